"""Reads the metrics of a run, one JSON object per line, into columns.

A line is ``{"kind": "train", "step": 50, "loss": 6.1, "trust_ratio/<path>": [1.1, 0.9], ...}`` or
``{"kind": "held_out", "step": 100, "loss": 5.9}``. A name with a slash is a quantity of one leaf of
the parameters: a number, or a list if the leaf holds several stacked layers. NaN and the
infinities, which JSON cannot express, are written as null and read as NaN.
"""

import dataclasses
import json
import math
import pathlib
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optim_zoo import errors

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One quantity of one leaf of the parameters."""

    rows: npt.NDArray[np.int64]  # (n,): the indices of the training lines that have it
    values: Floats  # (n, layers)
    stacked: bool  # whether each line has a list


@dataclasses.dataclass(frozen=True)
class Records:
    """The content of a metrics file."""

    steps: Floats  # (training lines,)
    train: Mapping[str, tuple[Floats, Floats]]  # name without a slash: steps and values, each (n,)
    held_out: Mapping[str, tuple[Floats, Floats]]
    leaves: Mapping[str, Leaf]  # by quantity/path, in the order of the file

    def layers(self, quantity: str) -> tuple[list[str], Floats]:
        """Returns the names of the layers that have a quantity, and its values.

        Layer 3 of a stacked leaf is called ``encoder/layers[3]/attention/query/kernel`` if its path
        has a segment ``layers``, and ``path[3]`` otherwise.

        Args:
          quantity: such as ``trust_ratio``.

        Returns:
          The names, and an array ``(layers, steps)`` of the values. The steps are those of
          `layer_steps`. The value is NaN where a line does not have a layer.
        """
        rows = self._layer_rows(quantity)
        names: list[str] = []
        values = [np.empty((0, rows.size))]
        for path, leaf in self._leaves_of(quantity):
            count = leaf.values.shape[1]
            names += [_layer_name(path, i) for i in range(count)] if leaf.stacked else [path]
            aligned = np.full((count, rows.size), np.nan)
            aligned[:, np.searchsorted(rows, leaf.rows)] = leaf.values.T
            values.append(aligned)
        return names, np.concatenate(values)

    def layer_steps(self, quantity: str) -> Floats:
        """Returns the steps of the lines that have a quantity of any layer, ``(steps,)``."""
        return self.steps[self._layer_rows(quantity)]

    def _leaves_of(self, quantity: str) -> list[tuple[str, Leaf]]:
        prefix = quantity + "/"
        return [
            (name.removeprefix(prefix), leaf)
            for name, leaf in self.leaves.items()
            if name.startswith(prefix)
        ]

    def _layer_rows(self, quantity: str) -> npt.NDArray[np.int64]:
        rows = [leaf.rows for _, leaf in self._leaves_of(quantity)]
        return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))


def read(path: pathlib.Path) -> Records:
    """Returns the content of a metrics file.

    A last line that a kill left incomplete is ignored.

    Raises:
      UserError: the file cannot be read, or an earlier line is not a record.
    """
    steps = {"train": array("d"), "held_out": array("d")}
    columns: dict[str, dict[str, _Column]] = {"train": {}, "held_out": {}}
    for _, record in lines(path):
        kind, step = record.pop("kind"), record.pop("step")
        for name, value in record.items():
            column = columns[kind].setdefault(name, _Column(isinstance(value, list)))
            try:
                if column.stacked and not (kind == "train" and "/" in name):
                    raise TypeError("a list for a quantity that has no layers")
                column.append(len(steps[kind]), value)
            except (TypeError, ValueError) as error:
                raise errors.UserError(
                    f"{path}, {kind} line of step {step}: expected {name} to be a number or a list"
                    f" of as many numbers as before, got {value!r:.80}; correct or delete the line"
                ) from error
        steps[kind].append(step)
    by_kind = {kind: np.array(values) for kind, values in steps.items()}
    train, leaves = {}, {}
    for name, column in columns["train"].items():
        if "/" in name:
            leaves[name] = column.leaf()
        else:
            train[name] = column.series(by_kind["train"])
    held_out = {name: c.series(by_kind["held_out"]) for name, c in columns["held_out"].items()}
    return Records(by_kind["train"], train, held_out, leaves)


class _Column:
    """The values of one name, in packed arrays because a long run has millions of them."""

    def __init__(self, stacked: bool) -> None:
        self.rows = array("q")
        self.values = array("d")
        self.stacked = stacked

    def append(self, row: int, value: Any) -> None:
        numbers = value if isinstance(value, list) else [value]
        new = [math.nan if number is None else float(number) for number in numbers]
        if self.rows and len(new) * len(self.rows) != len(self.values):
            raise ValueError("another number of layers")
        self.rows.append(row)
        self.values.extend(new)

    def leaf(self) -> Leaf:
        values = np.array(self.values).reshape(len(self.rows), -1)
        return Leaf(np.array(self.rows, np.int64), values, self.stacked)

    def series(self, steps: Floats) -> tuple[Floats, Floats]:
        leaf = self.leaf()
        return steps[leaf.rows], leaf.values[:, 0]


def lines(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each complete line, with its newline, and the record in it.

    A last line that a kill left incomplete is skipped.

    Raises:
      UserError: the file cannot be read, or an earlier line is not a record.
    """
    incomplete = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if incomplete:
                    raise _no_record(path, number - 1)
                try:
                    record = json.loads(line)
                except ValueError:
                    incomplete = True  # allowed for the last line only
                    continue
                if not _is_record(record):
                    raise _no_record(path, number)
                # A kill between a record and its newline leaves a complete record.
                yield line.rstrip(b"\n") + b"\n", record
    except OSError as error:
        raise errors.UserError(
            f"expected to read the metrics in {path}, got {error.strerror}; check the run folder"
        ) from error


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and record.get("kind") in ("train", "held_out")
        and isinstance(record.get("step"), int)
    )


def _no_record(path: pathlib.Path, number: int) -> errors.UserError:
    return errors.UserError(
        f"{path}, line {number}: expected a JSON object with a kind (train or held_out) and a step,"
        " got something else; delete the line"
    )


def plain(name: str, value: object) -> str | bool | int | float | list[Any] | None:
    """Returns a value in the types that JSON has.

    Args:
      name: its name, for the message.
      value: a string, a number, or a NumPy or JAX array of at most one dimension. Arrays on a
        device are fetched one by one: call ``jax.device_get`` on all of them first.

    Raises:
      ValueError: the array has more dimensions.
    """
    if isinstance(value, str):
        return value
    numbers = np.asarray(value)
    if numbers.ndim > 1:
        raise ValueError(f"{name} must have at most one dimension, got shape {numbers.shape}")
    return [_number(x) for x in numbers] if numbers.ndim else _number(numbers[()])


def _number(value: Any) -> bool | int | float | None:
    if isinstance(value, np.bool_ | np.integer):
        plain: bool | int = value.item()
        return plain
    # The shortest digits that give the same float32: 0.1, not 0.10000000149011612.
    number = float(str(value))
    return number if math.isfinite(number) else None


def _layer_name(path: str, index: int) -> str:
    segments = path.split("/")
    at = segments.index("layers") if "layers" in segments else -1
    segments[at] += f"[{index}]"
    return "/".join(segments)

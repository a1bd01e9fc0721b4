"""Chooses which tests of a large family a plain pytest runs; the others are marked `slow`.

A family tests one mechanism with many values: every optimizer, wrapper, mode and dtype. A plain
pytest runs a part of it in which every kind occurs, and `.ci/run` also runs the rest.
"""

import operator
from collections.abc import Collection, Mapping
from typing import Any

import pytest


def mostly_slow(
    values: Mapping[str, Any], quick: Collection[str], *, unpack: bool = False
) -> list[Any]:
    """Returns parameters for `pytest.mark.parametrize`: those that are not named are slow.

    Args:
      values: value of each parameter, by its id.
      quick: ids of the parameters that a plain pytest runs.
      unpack: whether a value is a tuple with a value for each of several arguments.
    """
    assert set(quick) <= set(values), sorted(set(quick) - set(values))
    return [
        pytest.param(
            *(value if unpack else (value,)),
            id=name,
            marks=() if name in quick else pytest.mark.slow,
        )
        for name, value in values.items()
    ]


def is_off_diagonal(item: pytest.Function) -> bool:
    """Returns whether a plain pytest leaves out this test, whose function is marked `diagonal`.

    The first argument takes its values in turn, and so does each other one, which starts one value
    later in each round. With 4 and 2 values these are the positions (0, 0), (1, 1), (2, 1) and
    (3, 0), so that every value occurs. Values that are marked slow have no position.
    """
    places: list[tuple[int, int]] = []
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args[:2]
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        used = [item.callspec.params[name] for name in names]
        quick = [_arguments(value, len(names)) for value in values if not _is_slow(value)]
        # By identity, because arrays have no single truth value.
        same = [i for i, each in enumerate(quick) if all(map(operator.is_, each, used))]
        if not same:
            return False  # marked slow already
        places.append((same[0], len(quick)))
    longest = max(count for _, count in places)
    return not any(
        all(
            position == (turn + i * (turn // count)) % count
            for i, (position, count) in enumerate(places)
        )
        for turn in range(longest)
    )


def _arguments(value: Any, count: int) -> tuple[Any, ...]:
    if isinstance(value, type(pytest.param())):
        return tuple(value.values)
    return (value,) if count == 1 else tuple(value)


def _is_slow(value: Any) -> bool:
    return any(mark.name == "slow" for mark in getattr(value, "marks", ()))

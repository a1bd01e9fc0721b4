"""Sinks are opened in order, closed in reverse order, and learn whether the run has finished."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from optim_zoo.errors import ArgumentValueError
from optim_zoo.train import sinks
from optim_zoo.train.sinks.base import RunInfo, opened
from optim_zoo.train.sinks.jsonl import JsonLines
from tests.train.sinks.run_info import run_info


class Recorder:
    """Records its calls in a list that several sinks share."""

    def __init__(self, name: str, calls: list[str], fails: str = "") -> None:
        self.name, self.calls, self.fails = name, calls, fails

    def _note(self, call: str) -> None:
        self.calls.append(f"{self.name}.{call}")
        if call == self.fails:
            raise KeyError(call)

    def open(self, run: RunInfo) -> None:
        self._note("open")

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._note("log")

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("evaluate")

    def close(self, finished: bool) -> None:
        self._note(f"close {finished}")


def test_sinks_are_closed_in_reverse_order(tmp_path: Path) -> None:
    calls: list[str] = []
    with opened([Recorder("a", calls), Recorder("b", calls)], run_info(tmp_path)):
        calls.append("run")
    assert calls == ["a.open", "b.open", "run", "b.close True", "a.close True"]


def test_sinks_are_closed_unfinished_after_an_error(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail() -> None:
        with opened([Recorder("a", calls), Recorder("b", calls)], run_info(tmp_path)):
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert calls == ["a.open", "b.open", "b.close False", "a.close False"]


def test_a_sink_that_cannot_be_opened_closes_the_ones_before_it(tmp_path: Path) -> None:
    calls: list[str] = []
    failing = [Recorder("a", calls), Recorder("b", calls, fails="open"), Recorder("c", calls)]
    with pytest.raises(KeyError), opened(failing, run_info(tmp_path)):
        pass
    assert calls == ["a.open", "b.open", "a.close False"]


def test_sinks_are_created_by_name_after_the_metrics_file() -> None:
    made = sinks.make(list(sinks.SINKS))
    assert isinstance(made[0], JsonLines)
    paths = [f"{type(sink).__module__}:{type(sink).__name__}" for sink in made[1:]]
    assert paths == list(sinks.SINKS.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prgress", "unknown sinks 'prgress'; did you mean progress"),
        ("no_such_package:Sink", "Python finds no module no_such_package"),
        ("json:Sink", "the module json has no Sink"),
        ("json:", "be the import path of a sink, package.module:Class"),
        (":Sink", "be the import path of a sink"),
        ("a b:Sink", "be the import path of a sink"),
    ],
)
def test_a_sink_that_does_not_exist_is_named(name: str, expected: str) -> None:
    with pytest.raises(ArgumentValueError) as caught:
        sinks.make([name])
    assert expected in str(caught.value)
    assert caught.value.argument == "sinks"

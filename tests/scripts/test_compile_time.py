"""The script that measures the compile time of updates, at its smallest size."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests.scripts.importing import imported


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with imported("bench", "compile_time") as (module,):
        monkeypatch.setattr(module, "WARMUP_ROUNDS", 1)
        yield module


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_every_optimizer_compiles(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--here", "--leaves", "1", "2"])
    lines = _lines(capsys)
    one, two = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert len(one) == len(two) == len(script.COMPILED)
    for few, many in zip(one, two, strict=True):
        assert few["program_lines"] < many["program_lines"]
        assert few["compile_cpu_s"] > 0
        assert few["peak_memory_mb"] >= few["peak_memory_before_mb"] > 0


def test_each_measurement_runs_in_a_new_process(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--leaves", "1", "--optimizers", "lamb", "--label", "today"])
    (line,) = _lines(capsys)
    assert (line["what"], line["optimizer"], line["leaves"]) == ("compile", "lamb", 1)
    assert line["process_s"] > line["compile_s"] > 0
    assert (line["label"], line["jax"]) == ("today", jax.__version__)


def test_a_measurement_that_takes_too_long_is_stopped(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--leaves", "1", "--optimizers", "lamb", "--seconds", "0.01"])
    (line,) = _lines(capsys)
    assert line["stopped_after_s"] == 0.01


def test_the_tree_has_the_size_of_bert_base(script: Any) -> None:
    shapes = script.bert_base("bfloat16")
    assert len(shapes) == 202
    assert sum(x.size for x in shapes.values()) == 109_514_298


@pytest.mark.usefixtures("quick_to_compile")
def test_bfloat16_updates_of_every_candidate_are_timed(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "bert_base", lambda dtype: script.small_leaves(3, dtype))
    script.main(["--bfloat16", "--rounds", "2"])
    lines = _lines(capsys)
    assert [line["optimizer"] for line in lines] == ["lamb", "optax.lamb", "lars", "optax.lars"]
    for line in lines:
        low, high = line["quartiles_ms"]
        assert low <= line["median_ms"] <= high
        assert (line["parameters"], line["leaves"]) == (3 * 16 * 16, 3)


def test_quartiles_need_two_rounds(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--bfloat16", "--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err

"""The metrics file has complete lines, and no line twice after a resume."""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from optim_zoo import errors
from optim_zoo.train import records
from optim_zoo.train.sinks.base import opened
from optim_zoo.train.sinks.jsonl import JsonLines, has_evaluation
from tests.train.sinks.run_info import run_info


def run_steps(sink: JsonLines, first: int, last: int) -> None:
    """Logs steps first to last of a run whose numbers depend only on the step."""
    for step in range(first, last + 1):
        ratios = np.random.default_rng(step).uniform(size=3).astype(np.float32)
        sink.log(step, {"loss": 6 / step, "trust_ratio/kernel": ratios})
        if step % 4 == 0:
            sink.evaluate(step, {"loss": 7 / step})


@contextlib.contextmanager
def lines(folder: pathlib.Path, start: int = 0) -> Iterator[JsonLines]:
    folder.mkdir(exist_ok=True)
    sink = JsonLines()
    with opened([sink], run_info(folder, start=start)):
        yield sink


@pytest.mark.parametrize("tear", [0, 1, 5, 60])
def test_a_killed_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(
    tmp_path: pathlib.Path, tear: int
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with lines(whole) as sink:
        run_steps(sink, 1, 12)
    with lines(killed) as sink:
        run_steps(sink, 1, 10)
    path = killed / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - tear])
    with lines(killed, start=8) as sink:
        run_steps(sink, 9, 12)
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert list(killed.iterdir()) == [path]


def test_a_complete_line_without_a_newline_is_kept(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with lines(tmp_path) as sink:
        run_steps(sink, 1, 4)
    content = path.read_bytes()
    path.write_bytes(content.removesuffix(b"\n"))
    with lines(tmp_path, start=4):
        pass
    assert path.read_bytes() == content


def test_a_new_run_replaces_the_file(tmp_path: pathlib.Path) -> None:
    assert not has_evaluation(tmp_path)
    with lines(tmp_path) as sink:
        run_steps(sink, 1, 4)
    assert has_evaluation(tmp_path)
    with lines(tmp_path) as sink:
        run_steps(sink, 1, 2)
    assert not has_evaluation(tmp_path)
    assert records.read(tmp_path / "metrics.jsonl").steps.size == 2


def test_a_line_is_in_the_file_before_the_sink_is_closed(tmp_path: pathlib.Path) -> None:
    with lines(tmp_path) as sink:
        sink.log(1, {"loss": 6.0})
        assert records.read(tmp_path / "metrics.jsonl").train["loss"][1] == [6.0]


def test_an_array_of_two_dimensions_is_refused(tmp_path: pathlib.Path) -> None:
    with (
        lines(tmp_path) as sink,
        pytest.raises(ValueError, match=r"trust_ratio/a must have at most one.*\(2, 3\)"),
    ):
        sink.log(1, {"trust_ratio/a": np.ones((2, 3))})


def test_a_missing_folder_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"expected to write .*absent/metrics\.jsonl"):
        JsonLines().open(run_info(tmp_path / "absent"))


def test_a_full_disk_is_reported_in_one_sentence_and_complete_lines_stay_readable(
    tmp_path: pathlib.Path,
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    with lines(tmp_path) as sink:
        sink.log(1, {"loss": 6.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(errors.UserError, match=r"expected to write .*metrics\.jsonl"):
                sink.log(2, {"loss": 6.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records.read(path).steps.size == 1

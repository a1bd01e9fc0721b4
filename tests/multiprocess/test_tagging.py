"""A tagging run over two processes: its numbers, its best parameters, and its early end.

Sums across processes are taken in another order, so the float32 losses agree to rounding only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optim_zoo import train as training
from optim_zoo import tree
from optim_zoo.train import config_file, evaluating, loop
from optim_zoo.train.run_folder import BEST, saved_steps
from tests.multiprocess.test_job import train
from tests.train.tasks.token_tagging.small_text import write_tagged_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compiled"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
OPTIONS = (
    # The F1 rises, so that the evaluations with the lowest one come first.
    *("train.steps=16", "output.keep_best=-f1", "output.stop_after=2"),
    *("output.evaluate_every=2", "output.checkpoint_every=2", 'output.sinks=["progress"]'),
)
RTOL = 1e-4  # LAMB carries the rounding from step to step


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged_text(tmp_path_factory.mktemp("tagged"))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def in_two(config: Path, folder: Path, *overrides: str) -> str:
    """Trains in two processes of four devices each, and returns what the first one prints."""
    with train(config, folder, *OPTIONS, *overrides) as group:
        (code, out, err), other = group.ends()
    assert (code, err) == (0, "")
    assert other == (0, "", "")
    return str(out)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Compares all evaluations, the end, and the best parameters of two runs."""
    for kind in ("train", "held_out"):
        seen, others = lines(folder, kind), lines(expected, kind)
        assert [line["step"] for line in seen] == [line["step"] for line in others]
        for line, other in zip(seen, others, strict=True):
            np.testing.assert_allclose(line["loss"], other["loss"], rtol=RTOL)
            assert line.get("f1") == other.get("f1")
    assert saved_steps(folder)[-1] == saved_steps(expected)[-1]
    assert saved_steps(folder, BEST) == saved_steps(expected, BEST)
    best, other = (training.load(each, best=True) for each in (folder, expected))
    assert best.step == other.step
    for path, array in tree.by_path(best.params).items():
        # The step is about 0.02 of the norm of a layer.
        np.testing.assert_allclose(
            array, tree.by_path(other.params)[path], rtol=RTOL, atol=1e-4, err_msg=path
        )


@pytest.mark.parametrize("average", [(), ("averaging.decay=0.7",)], ids=["plain", "averaged"])
def test_two_processes_keep_the_best_parameters_and_end_early_as_one_does(
    average: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    loop.run(config_file.load(config, (*OPTIONS, "output.sinks=[]", *average)), tmp_path / "one")
    out = in_two(config, tmp_path / "two", *average)
    assert "\ndevices: 8 x cpu in 2 processes\n" in out
    assert "(stopped: 2 evaluations without a better value)" in out
    assert_same_run(tmp_path / "two", tmp_path / "one")
    seen = {line["step"]: line["f1"] for line in lines(tmp_path / "two", "held_out")}
    (at,) = saved_steps(tmp_path / "two", BEST)
    assert seen[at] == min(seen.values())
    assert at < max(seen) < 16  # or this test could not fail
    # What is kept is what was evaluated: the average, where there is one.
    again = evaluating.evaluate(tmp_path / "two", best=True).values
    assert again["f1"] == seen[at]
    if average:
        resumed = shutil.copytree(tmp_path / "two", tmp_path / "resumed")
        first, *more = saved_steps(resumed)
        for step in more:
            shutil.rmtree(resumed / "checkpoints" / str(step))
        in_two(config, resumed, *average)
        assert_same_run(resumed, tmp_path / "two")
        assert first < saved_steps(resumed)[-1]

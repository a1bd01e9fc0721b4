"""What every run promises, for tagging: kills, guards, and the weights of accumulated batches.

The sentences have different numbers of words, so that no two batches have the same weight.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo import train, tree
from optim_zoo.train import config_file, loop
from optim_zoo.train.config import Stage
from optim_zoo.train.job import initial_params
from optim_zoo.train.run_folder import BEST, saved_steps
from optim_zoo.train.tasks.token_tagging.task import TokenTagging
from optim_zoo.tree import Tree
from tests.multiprocess.group import Group
from tests.train.one_device import OneDevice, use_devices
from tests.train.tasks.token_tagging.small_text import write_tagged_text

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
AVERAGED = ("averaging.decay=0.8",)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged_text(tmp_path_factory.mktemp("tagged"))


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, OneDevice())


def run(config: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains, and returns the lines of the training steps."""
    loop.run(config_file.load(config, overrides), folder)
    return [line for line in lines(folder) if line["kind"] == "train"]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of the metrics file without the tokens per second, which vary."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


def assert_same(one: Tree, other: Tree) -> None:
    for path, array in tree.by_path(one).items():
        np.testing.assert_array_equal(array, tree.by_path(other)[path], err_msg=path)


# Guards


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that puts NaN in the loss of one batch, or leaves that batch out."""
    batch = TokenTagging.batch

    def spoil(number: int, *, leave_out: bool = False) -> None:
        def changed(self: TokenTagging, index: int, stage: Stage) -> Tree:
            made = dict(batch(self, index + (leave_out and index >= number), stage))
            if index == number and not leave_out:
                made["word_weights"] = made["word_weights"] * np.float32(np.nan)
            return made

        monkeypatch.setattr(TokenTagging, "batch", changed)

    return spoil


@pytest.mark.slow
def test_a_batch_with_nan_is_skipped_as_if_it_had_not_been_there(
    config: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    """Parameters and their average have the same bits."""
    spoil(2)
    steps = run(config, tmp_path / "run", *AVERAGED)
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1]
    assert steps[2]["loss"] is None
    spoil(2, leave_out=True)
    run(config, tmp_path / "without", *AVERAGED, "train.steps=3")
    for averaged in (False, True):
        got, expected = (
            train.load(tmp_path / folder, averaged=averaged).params for folder in ("run", "without")
        )
        assert_same(got, expected)


# Accumulation


def weighted_losses(config: Path, folder: Path, *overrides: str) -> np.ndarray:
    """Returns loss and weight of the first two batches under the initial parameters, ``(2, 2)``."""
    loaded = config_file.load(config, overrides)
    task = config_file.make_task(loaded, folder)
    params, loss = initial_params(loaded, task), jax.jit(task.loss)
    return np.array([loss(params, task.batch(i, loaded.stages[0]))[:2] for i in range(2)])


@pytest.mark.slow
def test_the_loss_of_a_step_is_the_mean_over_the_words_of_its_batches(
    config: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    """It is not the mean of the means. A batch with NaN does not count at all."""
    own = ("accumulation.every=2", "train.steps=2", "train.batch_size=2")
    (total, weight), (other, other_weight) = weighted_losses(config, tmp_path / "tokens", *own)
    assert weight != other_weight
    mean = (total + other) / (weight + other_weight)
    mean_of_means = (total / weight + other / other_weight) / 2
    assert abs(mean - mean_of_means) > 1e-3
    first, _ = run(config, tmp_path / "run", *own)
    assert first["loss"] == pytest.approx(mean, rel=1e-5)  # sums of float32
    spoil(1)
    spoiled, _ = run(config, tmp_path / "spoiled", *own)
    assert spoiled["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert (spoiled["skipped_micro_batches"], spoiled["skipped_steps"]) == (1, 0)


@pytest.mark.slow
def test_accumulated_batches_and_their_average_are_the_same_under_zero1(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of eight devices has one sentence of a batch, with a weight of its own."""
    own = (*AVERAGED, "accumulation.every=2", "output.evaluation_batches=32")
    expected = run(config, tmp_path / "one", *own)
    use_devices(monkeypatch, jax)
    found = run(config, tmp_path / "zero1", *own, "parallel.zero1=true")
    for line, other in zip(found, expected, strict=True):
        # Sums in float32 are taken in another order, and LAMB carries the differences on.
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    values = [lines(tmp_path / name)[-1] for name in ("one", "zero1")]
    assert values[0]["kind"] == "held_out"
    assert values[1]["loss"] == pytest.approx(values[0]["loss"], rel=1e-4)
    assert values[1]["f1"] == values[0]["f1"]


# Kills


LONG = (
    *("train.steps=60", "output.checkpoint_every=10", "output.evaluate_every=15"),
    *("output.keep_best=f1", *AVERAGED),
)


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_with_the_same_bits(
    config: Path, tmp_path: Path
) -> None:
    """Sends SIGKILL in each half of the run, the second time during a save."""
    folder, moments = tmp_path / "run", random.Random(17)

    def started(to: Path) -> Group:
        command = ("-m", "optim_zoo.cli", "train", str(config), f"run.dir={to}", *LONG)
        return Group([command], devices=1)

    def finishes(to: Path) -> None:
        with started(to) as group:
            ((code, _, err),) = group.ends()
        assert (code, err) == (0, "")

    finishes(tmp_path / "unbroken")
    for part in range(2):
        line = 33 * part + moments.randrange(3, 25)
        with started(folder) as group:
            group.wait_for(lambda line=line: lines_of(folder) >= line)  # type: ignore[misc]
            if part == 1:
                group.wait_for(lambda: any((folder / "checkpoints").glob("*tmp*")))
            else:
                time.sleep(moments.uniform(0, 0.05))
            group.processes[0].kill()
            ((code, _, err),) = group.ends()
        assert (code, err) == (-signal.SIGKILL, "")
        assert 0 < lines_of(folder) < 64
    finishes(folder)
    assert lines(folder) == lines(tmp_path / "unbroken")
    assert saved_steps(folder, BEST) == saved_steps(tmp_path / "unbroken", BEST)
    for chosen in ({}, {"best": True}, {"averaged": True}):
        got, expected = (train.load(to, **chosen) for to in (folder, tmp_path / "unbroken"))
        assert got.step == expected.step
        assert_same(got.params, expected.params)

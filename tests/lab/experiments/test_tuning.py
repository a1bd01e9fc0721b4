"""The search for a learning rate whose runs a file keeps."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optim_zoo.lab.experiments.drawing import apart
from optim_zoo.lab.experiments.optimizers import grid
from optim_zoo.lab.experiments.training import Outcome
from optim_zoo.lab.experiments.tuning import Row, RunLog, columns, losses, tune

COARSE = grid(0.1, 3)


class Bowl:
    """Trains nothing: the loss is lowest at a rate, and not finite above a limit."""

    def __init__(self, best: float, limit: float = math.inf) -> None:
        self.best, self.limit, self.runs = best, limit, []

    def __call__(self, rate: float, seed: int) -> Row:
        self.runs.append((rate, seed))
        loss = abs(math.log(rate / self.best)) + 0.01 * seed
        return {"loss": loss if rate < self.limit else None, "learning_rate": rate}


def test_every_search_has_the_same_budget_and_the_best_rate_all_seeds() -> None:
    for best in (0.02, 0.1, 0.28, 30.0):
        bowl = Bowl(best)
        tuned = tune(bowl, COARSE, 6, search_seeds=(0,), seeds=(0, 1, 2))
        assert len({rate for rate, _ in bowl.runs}) == len(tuned.rows) == 6
        assert [len(rows) for rows in tuned.rows.values()].count(3) == 1
        assert tuned.best is not None
        assert len(tuned.best_losses) == 3
        assert tuned.interior == (best < 30)
        assert list(tuned.rows) == sorted(tuned.rows)


def test_a_rate_that_diverges_is_not_the_best() -> None:
    tuned = tune(Bowl(1.0, limit=0.2), COARSE, 5, search_seeds=(0,), seeds=(0, 1))
    assert tuned.best is not None
    assert tuned.best < 0.2
    assert np.isinf(tuned.losses(COARSE[-1])).all()
    assert losses([{"loss": 1e15}, {"loss": 3.0}, {"loss": None}]).tolist() == [
        math.inf,
        3.0,
        math.inf,
    ]


def test_without_a_finite_loss_there_is_no_best() -> None:
    tuned = tune(Bowl(1.0, limit=0.0), COARSE, 4, search_seeds=(0, 1), seeds=(0, 1))
    assert tuned.best is None
    assert not tuned.interior
    assert np.isinf(tuned.best_losses).all()


def test_a_stopped_experiment_continues_with_its_rows(tmp_path: Path) -> None:
    path, made = tmp_path / "results.jsonl", []

    def make() -> dict[str, Any]:
        made.append(1)
        return columns(Outcome({"loss": math.nan, "accuracy": 0.5}, np.array([1.0, math.inf])))

    log = RunLog(path, "a")
    first = log.row({"rate": 0.1, "seed": 0}, make)
    assert (first["loss"], first["curve"], first["status"]) == (None, [1.0, None], "diverged")
    log.row({"rate": 0.1, "seed": 1}, make)
    path.write_text(path.read_text() + '{"run": "rate=0.1 seed=2", "lo')  # killed while writing
    again = RunLog(path, "a")
    assert again.row({"rate": 0.1, "seed": 0}, make) == first
    assert len(made) == 2
    assert again.seconds == pytest.approx(log.seconds)
    again.row({"rate": 0.1, "seed": 2}, make)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == len(made) == 3
    RunLog(path, "b").row({"rate": 0.1, "seed": 0}, make)  # another setting: nothing is reused
    assert len(path.read_text().splitlines()) == 1
    assert len(made) == 4


def test_labels_are_moved_apart_in_their_order() -> None:
    assert apart([0.1, 0.5], 0.1) == [0.1, 0.5]
    placed = apart([0.50, 0.2, 0.51, 0.49], 0.1)
    assert placed[1] == 0.2
    np.testing.assert_allclose([placed[3], placed[0], placed[2]], [0.4, 0.5, 0.6])


def test_a_grid_has_steps_of_the_square_root_of_ten() -> None:
    assert grid(1.0) == (0.1, 0.3162, 1.0, 3.162, 10.0)

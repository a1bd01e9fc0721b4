import math
from pathlib import Path

import pytest

from optim_zoo.errors import UserError
from optim_zoo.lab import comparisons, report, sweep
from optim_zoo.lab.folder import About
from optim_zoo.lab.trials import Trial
from tests.lab.conftest import Load
from tests.lab.fake_runner import FakeRunner

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SWEEP = """
[grid]
train.batch_size = [8, 16, 32]
run.seed = [0, 1]
[[grid.optimizer]]
name = "lamb"
learning_rate = [0.1, 1.0, 10.0]
[[grid.optimizer]]
name = "lars"
learning_rate = [0.1, 1.0]
"""


def loss(trial: Trial) -> float:
    if trial.rate == 10.0:
        raise ZeroDivisionError
    return (0.5 if trial.rate == 1.0 else 2.0) + 0.01 * trial.seed


def test_the_page_has_the_plots_and_says_which_rate_is_no_best(load: Load) -> None:
    described = load(SWEEP)
    sweep.run(described, lambda line: None, FakeRunner(described.folder, loss))
    path = report.write(described.folder)
    page = path.read_text()
    names = {each.name for each in described.folder.glob("*.png")}
    assert names == {"curves.png", "best.png", "sensitivity.png", "steps_to_target.png"}
    assert page.count('<img src="data:image/png;base64,') == 4
    assert 'src="http' not in page
    # All rates of lamb on one side of the best diverged, which counts as tried.
    assert "at the edge of the tried rates (1)" in page  # lars
    assert page.count("none inside") == 3
    assert page.count("it failed") == 6
    assert "no fit: " in page


def test_a_sweep_that_has_not_ended_is_reported_and_an_empty_one_refused(load: Load) -> None:
    described = load(SWEEP)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(described, lambda line: None, FakeRunner(described.folder, loss, 0))
    with pytest.raises(UserError, match=r"no run of .* has ended yet"):
        report.write(described.folder)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(described, lambda line: None, FakeRunner(described.folder, loss, 3))
    assert "runs" in report.write(report.folder_of(Path("trial.toml"))).read_text()
    with pytest.raises(UserError, match="expected the folder of a sweep"):
        report.write(Path("elsewhere"))


def group(losses: dict[float, float | None], better: bool = False) -> comparisons.Group:
    rows = [
        {"run": str(rate), "status": "finished", "optimizer": "x", "learning_rate": rate,
         "batch_size": 8, "seed": 0, "m": value}
        for rate, value in losses.items()
    ]  # fmt: skip
    about = About("s.toml", "m", better, "images", "")
    (made,) = comparisons.groups(rows, about)
    return made


def test_the_best_rate_counts_only_between_tried_ones() -> None:
    assert group({0.1: 2.0, 1.0: 1.0, 10.0: None}).is_interior
    edge = group({0.1: 2.0, 1.0: 1.0})
    assert (edge.best_rate, edge.is_interior) == (1.0, False)
    assert edge.note == "at the edge of the tried rates"
    assert group({0.1: None}).note == "no run has finished"
    best = group({0.1: 0.2, 1.0: 0.9, 10.0: 0.5}, better=True)
    assert (best.best_rate, best.is_interior) == (1.0, True)


def test_the_usable_range_is_contiguous_and_at_most_ten_percent_worse() -> None:
    assert group({0.1: 1.05, 1.0: 1.0, 10.0: 1.2, 100.0: 1.01}).usable == (0.1, 1.0)
    best = group({0.1: 0.8, 1.0: 1.0, 10.0: 0.91}, better=True)
    assert best.usable == (1.0, 10.0)
    assert math.isinf(group({0.1: None}).scores[0.1])

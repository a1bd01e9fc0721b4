"""The best evaluation of a run, by the direction of its metric."""

import json
from collections.abc import Sequence

import pytest

from optim_zoo.train.stopping import History, is_lower_better, metric_of


def seen(goal: str, values: Sequence[float]) -> History:
    """Returns the history after evaluations at steps 10, 20, ..."""
    history = History(goal)
    for i, value in enumerate(values, start=1):
        history = history.after(10 * i, {metric_of(goal): value, "other": 99.0 * i})
    return history


@pytest.mark.parametrize(
    ("goal", "metric", "lower"),
    [
        ("f1", "f1", False),
        ("f1/keyword", "f1/keyword", False),
        ("accuracy", "accuracy", False),
        ("loss", "loss", True),
        ("span_loss", "span_loss", True),
        ("word_error", "word_error", True),
        ("perplexity", "perplexity", True),
        ("-distance", "distance", True),
        ("+loss", "loss", False),
        ("-f1", "f1", True),
        ("losses_avoided", "losses_avoided", False),
    ],
)
def test_the_name_and_its_sign_say_which_direction_is_better(
    goal: str, metric: str, lower: bool
) -> None:
    assert metric_of(goal) == metric
    assert is_lower_better(goal) == lower
    best = seen(goal, [2.0, 3.0, 1.0])
    assert (best.step, best.value) == ((30, 1.0) if lower else (20, 3.0))


def test_evaluations_without_a_better_value_are_counted_from_the_best_one() -> None:
    assert seen("loss", []).without_better == 0
    assert seen("loss", [3.0]).without_better == 0
    assert seen("loss", [3.0, 4.0, 5.0]).without_better == 2
    assert seen("loss", [3.0, 4.0, 2.0]).without_better == 0
    equal = seen("loss", [3.0, 3.0])
    assert (equal.step, equal.without_better, equal.evaluated) == (10, 1, 20)


def test_a_repeated_evaluation_is_not_counted_again() -> None:
    history = seen("loss", [3.0, 4.0])
    assert history.after(20, {"loss": 1.0}) == history
    assert history.after(10, {"loss": 1.0}) == history


def test_without_a_goal_nothing_is_compared() -> None:
    assert History("").after(10, {"loss": 1.0}) == History("")


def test_a_history_is_recorded_in_json_to_the_bit() -> None:
    history = seen("loss", [0.1 + 0.2, 1 / 3])
    record = json.loads(json.dumps(history.record()))
    assert History.of("loss", record) == history


@pytest.mark.parametrize("goal", ["", "f1", "+loss"])
def test_the_history_of_another_metric_is_left_out(goal: str) -> None:
    assert History.of(goal, seen("loss", [3.0, 4.0]).record()) == History(goal)
    assert History.of(goal, None) == History(goal)

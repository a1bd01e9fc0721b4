"""The experiment with zero F1: what is exact, its settings, its results, and a quick run."""

import dataclasses
import json
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_zoo import cli
from optim_zoo.lab.experiments.fine_tuning_zero import exact, settings, training
from optim_zoo.lab.experiments.fine_tuning_zero.arms import (
    ARMS,
    BASE,
    FIRST_SYNC,
    OPTIMIZERS,
    QUICK_ARMS,
    Arm,
)
from optim_zoo.lab.experiments.fine_tuning_zero.results import Results, Row
from optim_zoo.train import distributed

CONFIGS = Path(__file__).parents[3] / "configs"


# What is exact


@pytest.mark.parametrize("name", FIRST_SYNC)
def test_the_first_synchronization_shrinks_the_parameters_of_the_published_ones(name: str) -> None:
    """From x, with a sum u of the fast updates: alpha (x + u), and x + alpha u when repaired."""
    alpha, step = FIRST_SYNC[name]

    def after_sync(start: float) -> np.ndarray:
        tx = OPTIMIZERS[name](lambda t: 0.01)
        x = start * jnp.array([1.0, -2.0, 0.5])
        state = tx.init(x)
        for number in range(step):
            updates, state = tx.update(jnp.array([1.0, -0.3, 0.2]) + number, state, x)
            x = optax.apply_updates(x, updates)
        return np.asarray(x)

    # None of them decays weights, so that the fast updates do not depend on the parameters; from 0,
    # both kinds leave alpha u.
    expected = (alpha if "." in name else 1.0) * np.array([1.0, -2.0, 0.5]) + after_sync(0.0)
    np.testing.assert_allclose(after_sync(1.0), expected, rtol=1e-5)  # float32


def test_what_the_first_synchronization_keeps() -> None:
    assert {name: round(share, 6) for name, share in exact.kept_by_first_sync().items()} == {
        "lifeiteng.Lookahead": 0.5,
        "michaelrzhang.LookaheadTF": 0.8,
        "jyhengcoder.Ranger": 0.5,
        "lookahead": 1.0,
        "ranger": 1.0,
    }


def closed_forms(rates: np.ndarray) -> Mapping[str, float]:
    """Returns the sums of the docstring of `exact`, with the defaults of b1 and b2."""
    s = np.arange(1, len(rates) + 1)
    rho_inf = 2 / (1 - 0.999) - 1
    rho = rho_inf - 2 * s * 0.999**s / (1 - 0.999**s)
    inside = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    r = np.where(s >= 6, np.sqrt(np.maximum(inside, 0)), 1)
    return {
        BASE: np.sum(rates * (1 - 0.9**s) / np.sqrt(1 - 0.999**s)),
        "lifeiteng.RAdam": np.sum(rates * r),
        "lookahead": 0.5 * np.sum(rates),
        "ranger": 0.5 * np.sum(rates * r),
    }


def test_the_movement_under_a_constant_gradient_is_a_sum() -> None:
    steps = 60  # whole periods of Lookahead (5) and Ranger (6)
    scale = dataclasses.replace(settings.FULL, steps=steps, warmup_steps=6)
    for schedule in (exact.constant, exact.schedule(scale)):
        rates = np.array([float(schedule(jnp.int32(step))) for step in range(steps)])
        found, expected = exact.movements(schedule, steps), closed_forms(rates)
        assert found.keys() == expected.keys()
        for name, distance in expected.items():
            # BERT's eps of 1e-6 next to a root of 0.03 and more, and a schedule in float32.
            np.testing.assert_allclose(found[name], distance, rtol=1e-4)


# Settings


def test_the_settings_are_those_of_the_configs() -> None:
    for name, ours in (
        ("bert_tiny_lamb.toml", settings.PRETRAINING),
        ("tag_python.toml", settings.FINE_TUNING),
    ):
        assert tomllib.loads((CONFIGS / name).read_text()) == dict(ours)


def test_every_arm_comes_after_the_one_that_its_rate_follows_from() -> None:
    for arms in (ARMS, QUICK_ARMS):
        names = [arm.name for arm in arms]
        assert names[0] == BASE
        assert len(set(names)) == len(names)
        for arm in arms:
            assert arm.optimizer in OPTIMIZERS
            assert not arm.raised_from or arm.raised_from in names[: names.index(arm.name)]


# Pretraining


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Returns the folders of the training runs, which are not made."""
    found: list[Path] = []
    monkeypatch.setattr(training.loop, "run", lambda config, folder: found.append(folder))
    return found


@pytest.mark.parametrize(
    ("saved", "trains"), [([], True), (["4500"], True), (["4500", "5000"], False)]
)
def test_pretraining_is_made_or_resumed_unless_it_is_finished(
    tmp_path: Path, runs: list[Path], saved: list[str], trains: bool
) -> None:
    for step in saved:
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    training.pretrain(tmp_path)
    assert runs == [tmp_path] * trains


def test_a_signal_during_pretraining_ends_the_command_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: Any, folder: Path) -> None:
        raise distributed.Stopped(signal.SIGTERM, 500, folder)

    monkeypatch.setattr(training.loop, "run", stop)
    assert cli.main(["reproduce", "fine-tuning-zero", f"--dir={tmp_path}"]) == 128 + signal.SIGTERM
    assert "step 500 is saved" in capsys.readouterr().err


def test_the_time_of_pretraining_leaves_out_what_has_no_speed(tmp_path: Path) -> None:
    assert training.pretraining_seconds(tmp_path) == 0
    lines = [
        {"kind": "train", "step": step, "loss": 1.0, "tokens": 100 * step, "tokens_per_second": v}
        for step, v in ((1, None), (2, 50.0), (4, 20.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training.pretraining_seconds(tmp_path) == 100 / 50 + 200 / 20


# Results


def row(arm: str, seed: int, distance: float, steps: int = settings.QUICK.steps) -> Row:
    return Row(
        arm, "ranger", 1e-3, seed, steps, settings.QUICK.batch_size, "finished", 0.5, 1.0,
        [(4, 0.5)], [1.0, 1.0], [0.0, distance], 1.0,
    )  # fmt: skip


def test_a_raised_rate_follows_from_the_mean_movement(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl", settings.QUICK, 1e-3)
    for seed, (base, other) in enumerate([(3.0, 0.5), (5.0, 1.5)]):
        results.add(row(BASE, seed, base))
        results.add(row("ranger", seed, other))
    assert results.movement("ranger") == pytest.approx(1 / 4)
    assert results.rate_of(Arm("ranger_raised", "", "ranger", "ranger")) == pytest.approx(4e-3)
    assert results.rate_of(Arm("ranger", "", "ranger")) == 1e-3


def test_results_are_read_again_and_rows_of_another_size_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Results(path, settings.QUICK, 1e-3)
    first.add(row(BASE, 0, 1.0))
    first.add(row(BASE, 1, 1.0, steps=7))
    again = Results(path, settings.QUICK, 1e-3)
    arm = ARMS[0]
    assert again.has(arm, 1e-3, 0)
    assert not again.has(arm, 1e-3, 1)
    assert not again.has(arm, 2e-3, 0)
    assert [each.name for each in again.arms()] == [BASE]


# The command


@pytest.mark.slow  # half a minute of compiling
def test_a_quick_run_writes_everything_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_to_compile: None
) -> None:
    folder = tmp_path / "new"
    command = ["reproduce", "fine-tuning-zero", "--quick", f"--dir={folder}"]
    assert cli.main(command) == 0
    page = (folder / "fine_tuning_zero.md").read_text()
    plots = [path.name for path in folder.glob("*.png")]
    assert len(plots) == 2
    assert all(f"]({name})" in page for name in plots)
    assert "its figures mean nothing" in page
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [each["arm"] for each in rows] == [arm.name for arm in QUICK_ARMS]
    assert all(len(each["norm"]) == settings.QUICK.steps + 1 for each in rows)
    # The learning rate of the first step is 0, and jyhengcoder's Ranger synchronizes after it.
    kept = {each["arm"]: each["norm"][1] / each["norm"][0] for each in rows}
    assert kept["ranger_zero"] == pytest.approx(0.5, rel=1e-5)  # 6 digits are kept
    assert kept["ranger"] == pytest.approx(1, rel=1e-5)

    # A run that was stopped makes only what is missing.
    (folder / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    made: list[Any] = []

    def train(self: training.Bench, *arguments: Any, **more: Any) -> training.Curve:
        made.append(arguments)
        last = rows[-1]
        return training.Curve(**{field.name: last[field.name] for field in CURVE})

    monkeypatch.setattr(training.Bench, "train", train)
    assert cli.main(command) == 0
    assert len(made) == 1
    again = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert again == rows


CURVE = dataclasses.fields(training.Curve)

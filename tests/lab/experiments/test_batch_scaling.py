"""The experiment with batch sizes: its rules, its page from made-up runs, and a quick run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optim_zoo import cli
from optim_zoo.lab import fits
from optim_zoo.lab.experiments.batch_scaling import figures, measuring, page
from optim_zoo.lab.experiments.batch_scaling.measuring import Noise, Result
from optim_zoo.lab.experiments.optimizers import OPTIMIZERS
from optim_zoo.lab.experiments.tuning import Tuned

SCALE = dataclasses.replace(measuring.FULL, batches=(32, 128, 512), examples=1024)


@pytest.mark.parametrize("scale", [measuring.FULL, measuring.QUICK])
def test_the_number_of_examples_is_the_same_at_every_batch_size(scale: measuring.Scale) -> None:
    for batch in (*scale.batches, scale.noise_batch):
        assert scale.steps(batch) * batch == scale.examples
        assert batch % scale.micro_size == 0


def test_untuned_rates_follow_the_square_root_of_the_batch_size() -> None:
    rates = [measuring.scaled(0.01, batch, 32) for batch in measuring.FULL.batches]
    assert rates == [0.01, 0.02, 0.04, 0.08]


def a_row(rate: float, loss: float | None, steps: int) -> dict[str, Any]:
    curve = list(np.linspace(5, 2 + rate, min(steps, 64)))
    return {"learning_rate": rate, "loss": loss, "curve": curve}


def a_result(name: str, exponent: float, *, edge: int = 0, diverged: bool = False) -> Result:
    """Returns made-up runs whose best rate is ``0.1 (batch / 32)^exponent``."""
    (optimizer,) = (each for each in OPTIMIZERS if each.name == name)
    tuned, untuned = {}, {}
    for batch in SCALE.batches:
        best, steps = 0.1 * (batch / 32) ** exponent, SCALE.steps(batch)
        rows = {
            best * factor: [a_row(best * factor, 2 + abs(factor - 1) + 0.01 * seed, steps)
                            for seed in range(3 if factor == 1 else 1)]
            for factor in (0.5, 1.0, 2.0)
        }  # fmt: skip
        tuned[batch] = Tuned(rows, best, batch != edge)
        untuned[batch] = [a_row(0.1, None if diverged else 2.5, steps) for _ in range(3)]
    return Result(optimizer, tuned, untuned)


def test_the_exponent_is_that_of_the_interior_best_rates() -> None:
    assert a_result("lamb", 0.55).exponent() == pytest.approx(0.55)
    assert a_result("lamb", 0.55, edge=512).exponent() == pytest.approx(0.55)
    one = a_result("lamb", 0.55)
    edges = {batch: dataclasses.replace(t, interior=False) for batch, t in one.tuned.items()}
    assert dataclasses.replace(one, tuned=edges).exponent() is None


def test_every_tuned_run_reaches_the_target() -> None:
    result = a_result("lamb", 0.5, edge=512)
    (target,) = measuring.targets([result], SCALE, SCALE.batches)
    assert target.loss is not None
    assert set(target.steps) == {32, 128}  # no best rate is known at the edge
    assert all(len(values) == 3 for values in target.steps.values())
    (lowest,) = {min(row["curve"]) for row in result.interior_rows()[128]}
    assert 0 <= target.loss - lowest <= 0.01
    assert all(values[0] <= SCALE.steps(batch) for batch, values in target.steps.items())
    (easier,) = measuring.targets([result], SCALE, SCALE.batches[:1])
    assert set(easier.steps) == {32}
    assert easier.loss is not None
    assert easier.loss < target.loss


def test_the_page_reports_edges_divergence_and_missing_fits(tmp_path: Path) -> None:
    results = [a_result("adamw", 0.3, diverged=True), a_result("lamb", 0.5, edge=512)]
    panels = [measuring.targets(results, SCALE, SCALE.batches[:n]) for n in (3, 2)]
    curve = fits.Fit(10.0, 300.0, (9.0, 11.0), (250.0, 350.0))
    panels[0][0] = dataclasses.replace(panels[0][0], fit=curve)
    noise = Noise(512, 0.01, np.array([[np.inf, 400.0]] * 3))  # a run of two steps
    figures.draw_losses(results, SCALE, tmp_path / "loss.png")
    figures.draw_steps(panels, SCALE, tmp_path / "steps.png")
    text = page.text(results, panels, noise, SCALE, 60.0, quick=False)
    flat = " ".join(text.split())
    assert "figures mean nothing" not in text
    assert "at 0.4, at the edge of the tried rates" in flat
    assert "diverged at 0.1" in flat
    assert "no fit: the target was reached at 2 batch sizes" in flat
    assert "| not measurable | not measurable | 400 (400 to 400) | 400 (400 to 400) |" in flat
    assert "| 2.10 | 300 (250 to 350) | 400 (400 to 400) |" in flat.replace(
        f"| {panels[0][0].loss:.2f} |", "| 2.10 |"
    )
    assert "300 (250 to 350)" in flat
    assert "is 300 and the measured noise scale 400, a ratio of 0.75" in flat
    assert "divergence (AdamW)" in flat


@pytest.mark.slow  # one quick run of an experiment, weight-decay, is enough for a plain pytest
def test_a_quick_run_writes_everything_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_to_compile: None
) -> None:
    command = ["reproduce", "batch-scaling", "--quick", f"--dir={tmp_path}"]
    assert cli.main(command) == 0
    written = {path.name for path in tmp_path.iterdir()}
    text = (tmp_path / "batch_scaling.md").read_text()
    plots = {name for name in written if name.endswith(".png")}
    assert written == {"results.jsonl", "batch_scaling.md", *plots}
    assert len(plots) == 2
    assert all(f"]({name})" in text for name in plots)
    assert "its figures mean nothing" in text
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({row["run"] for row in rows}) == len(rows)
    trained = [row for row in rows if "optimizer" in row]
    scale = measuring.QUICK
    for name in scale.optimizers:
        for batch in scale.batches:
            own = [r for r in trained if (r["optimizer"], r["batch_size"]) == (name, batch)]
            assert len({row["learning_rate"] for row in own}) >= scale.budget
    before = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "batch_scaling.md").unlink()
    assert cli.main(command) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert (tmp_path / "batch_scaling.md").read_text() == text

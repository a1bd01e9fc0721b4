"""The digits task: its data, its loss computed by hand, and a run of its config."""

from pathlib import Path

import jax
import numpy as np
import pytest

from optim_zoo.train import config_file, loop, records
from optim_zoo.train.config import Stage
from optim_zoo.train.tasks.base import Task
from tests.train.one_device import OneDevice, use_devices

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = Path(__file__).parents[3] / "configs" / "digits_lars.toml"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return config_file.make_task(config_file.load(CONFIG), tmp_path_factory.mktemp("cache"))


def stage(batch_size: int) -> Stage:
    return Stage(1, batch_size, 1, schedule={}, sections={}, table={}, settings={})


def rows(batch: dict[str, np.ndarray]) -> list[bytes]:
    return [row.tobytes() for row in batch["pixels"]]


def test_an_epoch_has_every_training_image_once_and_no_held_out_one(task: Task) -> None:
    epoch = [row for number in range(3) for row in rows(task.batch(number, stage(500)))]
    assert len(epoch) == 1500
    # A few images occur twice in the data set.
    assert len(set(epoch)) > 1490
    (held_out,) = task.held_out()
    assert len(held_out["labels"]) == 297
    assert len(set(rows(held_out)) & set(epoch)) < 5
    again = [row for number in range(3, 6) for row in rows(task.batch(number, stage(500)))]
    assert sorted(again) == sorted(epoch)
    assert again != epoch


def test_the_order_of_images_does_not_depend_on_the_batch_size(task: Task) -> None:
    """The batches cross the end of an epoch."""
    whole = rows(task.batch(1, stage(1000)))
    assert [*rows(task.batch(2, stage(500))), *rows(task.batch(3, stage(500)))] == whole


def test_loss_and_accuracy_agree_with_a_computation_by_hand(task: Task) -> None:
    params = jax.jit(task.init)(jax.random.key(0))
    batch = task.batch(0, stage(40))
    measured = jax.jit(task.measure)(params, batch)
    x = np.asarray(batch["pixels"], np.float64)
    for name in ("hidden_0", "hidden_1", "logits"):
        x = x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        x = np.maximum(x, 0) if name != "logits" else x
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = -log_p[np.arange(40), batch["labels"]].sum()
    assert float(measured["loss"][0]) == pytest.approx(expected, rel=1e-5)  # float32
    assert float(measured["accuracy"][0]) == (x.argmax(-1) == batch["labels"]).sum()
    assert float(measured["loss"][1]) == float(measured["accuracy"][1]) == 40


def test_the_baseline_predicts_by_class_frequency(task: Task) -> None:
    assert task.baseline is not None
    assert task.baseline.metrics["loss"] == pytest.approx(np.log(10), abs=0.02)
    assert 0.05 < task.baseline.metrics["accuracy"] < 0.15


def losses(folder: Path) -> list[float]:
    return list(records.read(folder / "metrics.jsonl").train["loss"][1])


@pytest.mark.newest
def test_the_config_reaches_its_expected_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_devices(monkeypatch, OneDevice())
    figures = loop.run(config_file.load(CONFIG, ["output.sinks=[]"]), tmp_path / "run")
    assert float(figures["held-out accuracy"]) > 0.975
    assert figures["accuracy by class frequency"].startswith("0.0")
    assert figures["images"] == "153,600"


@pytest.mark.slow
def test_eight_devices_agree_with_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes the evaluation, whose 297 images cannot be divided among eight devices."""
    short = ["output.sinks=[]", "train.steps=20", "schedule.warmup_steps=5"]
    eight = loop.run(config_file.load(CONFIG, short), tmp_path / "eight")
    use_devices(monkeypatch, OneDevice())
    one = loop.run(config_file.load(CONFIG, short), tmp_path / "one")
    assert one["held-out loss"] == eight["held-out loss"]
    # Sums are taken in another order.
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)

"""The training job: what a run writes, and that a stopped run resumes with the same bits."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo import metrics
from optim_zoo.errors import UserError
from optim_zoo.train import config_file, loop, machine, optimization, saved_config
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.config import Stage
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.train.tasks.masked_language.task import MaskedLanguage
from optim_zoo.tree import Tree
from tests.train.one_device import OneDevice, use_devices
from tests.train.tasks.masked_language.small_text import write_random_text

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile"),  # most runs compile the same program
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
TINY = """
[data]
text = "{folder}/*.txt"
vocabulary = "{folder}/vocabulary"
held_out = 0.2
sequence_length = 16
[model]
num_layers = 2
hidden_size = 16
num_heads = 2
intermediate_size = 32
max_positions = 32
[optimizer]
weight_decay = 0.01
exclude_from_weight_decay = ["bias", "LayerNorm"]
exclude_from_layer_adaptation = ["bias", "LayerNorm"]
[schedule]
learning_rate = 0.03
warmup_steps = 3
[train]
steps = 12
batch_size = 8
[output]
log_every = 1
evaluate_every = 6
evaluation_batches = 2
checkpoint_every = 4
"""
TWO_STAGES = (
    "train.steps=5",
    "stages.1.steps=5",
    "stages.1.sequence_length=32",
    "stages.1.batch_size=4",
    "stages.1.learning_rate=0.02",
    "stages.1.warmup_steps=2",
    "model.dropout=0.1",
    "output.checkpoint_every=3",
    "output.evaluate_every=100",
)
PLOTS = {
    f"{name}.png"
    for quantities in (
        ("loss", "learning_rate", "gradient_norm"),
        ("trust_ratio", "parameter_norm", "update_norm"),
    )
    for name in quantities
}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, OneDevice())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a few documents, a vocabulary and a config."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_text(folder)
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))
    return folder


PICTURES = 'output.sinks=["progress", "plots", "report"]'


def train(tiny: Path, folder: Path, *overrides: str) -> Any:
    """Trains without plots by default, because they take most of the time of a short run."""
    config = config_file.load(tiny / "tiny.toml", ('output.sinks=["progress"]', *overrides))
    return loop.run(config, folder)


@pytest.fixture(scope="module")
def unbroken(
    tiny: Path, compiled: None, quick_to_compile: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns the folder of a finished run with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, OneDevice())
        train(tiny, folder, PICTURES)
    return folder


@pytest.fixture(scope="module")
def unbroken_stages(
    tiny: Path, compiled: None, quick_to_compile: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns the folder of a finished run of two stages of 5 steps, with all checkpoints."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, OneDevice())
        train(tiny, folder, *TWO_STAGES, "output.keep_checkpoints=9")
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of the metrics file without the tokens per second, which vary."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


def cut_back(whole: Path, folder: Path, step: int) -> Path:
    """Copies a run folder without the checkpoints after ``step``."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint_of(folder: Path, tiny: Path, *overrides: str) -> tuple[Any, ...]:
    """Returns step, parameters and state of the last checkpoint of a run."""
    loaded = config_file.load(tiny / "tiny.toml", overrides)
    task = config_file.make_task(loaded, folder / "tokens")
    params = jax.tree.map(
        lambda x: x.astype(loaded.precision.parameters), jax.jit(task.init)(jax.random.key(1))
    )
    tx = optimization.wrapped(loaded, optimization.make_optimizer(loaded, task.layers))
    with Checkpoints(folder, 99) as checkpoints:
        return checkpoints.restore(params, tx.init(params))[:3]


# What a run writes


def test_a_run_writes_metrics_plots_report_config_and_checkpoints(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert names == PLOTS | {
        *("metrics.jsonl", "report.html", "config.toml", "checkpoints", "tokens", ".lock")
    }
    steps = {path.name for path in (unbroken / "checkpoints").iterdir()}
    assert steps == {"4", "8", "12"}
    seen = lines(unbroken)
    assert [r["step"] for r in seen if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in seen if r["kind"] == "held_out"] == [6, 12]
    assert [r["tokens"] for r in seen if r["kind"] == "train"] == [128 * i for i in range(1, 13)]
    report = (unbroken / "report.html").read_text()
    assert f"{seen[-1]['loss']:.4f} nats" in report
    assert report.count("<img ") == len(PLOTS)


def test_the_saved_config_equals_the_config_of_the_run(unbroken: Path, tiny: Path) -> None:
    saved = saved_config.load(unbroken / "config.toml")
    assert saved_config.differences(saved, config_file.load(tiny / "tiny.toml")) == []
    assert saved.run.dir == str(unbroken)


def test_metrics_equal_the_state_of_the_optimizer(unbroken: Path, tiny: Path) -> None:
    """The last line equals the saved state bit for bit, with a list for each stacked leaf."""
    step, _, state = checkpoint_of(unbroken, tiny)
    expected = {name: np.asarray(value) for name, value in metrics.read(state).items()}
    written = [r for r in lines(unbroken) if r["kind"] == "train"][-1]
    assert written["step"] == step == 12
    assert written.keys() == expected.keys() | {"kind", "step", "tokens", "loss"}
    adapted = [name for name in expected if name.startswith("trust_ratio/")]
    # Embeddings, layers and transform; the pattern "bias" also excludes output_bias.
    assert len(adapted) == 3 + 6 + 1
    for name, value in expected.items():
        np.testing.assert_array_equal(np.float32(written[name]), value, err_msg=name)
    kernel = "encoder/layers/attention/query/kernel"
    assert np.shape(written[f"trust_ratio/{kernel}"]) == (2,)
    assert len(set(written[f"trust_ratio/{kernel}"])) == 2
    rates = [r["learning_rate"] for r in lines(unbroken) if r["kind"] == "train"]
    expected_rates = [0, 0.01, 0.02, *(0.03 * (1 - i / 9) for i in range(9))]
    np.testing.assert_allclose(rates, expected_rates, rtol=1e-6)  # float32


def test_the_held_out_loss_is_computed_from_the_saved_parameters(
    unbroken: Path, tiny: Path
) -> None:
    _, params, _ = checkpoint_of(unbroken, tiny)
    task = config_file.make_task(config_file.load(tiny / "tiny.toml"), unbroken / "tokens")
    measure = jax.jit(task.measure)
    sums = np.array([measure(params, b)["loss"] for b in task.held_out()], np.float64)
    assert lines(unbroken)[-1]["loss"] == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), 1e-7)


def test_repeating_a_run_gives_the_same_bits(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", "output.checkpoint_every=100", "output.evaluate_every=100")
    again = [r for r in lines(tmp_path / "run") if r["kind"] == "train"]
    assert again == [r for r in lines(unbroken) if r["kind"] == "train"]


def test_a_run_of_one_step_writes_plots_and_a_report(tiny: Path, tmp_path: Path) -> None:
    """The speed is not timed, because there is no second step."""
    overrides = ("train.steps=1", "schedule.warmup_steps=0", "output.log_every=50", PICTURES)
    figures = train(tiny, tmp_path / "run", *overrides)
    assert figures["steps"] == "1 of 1"
    assert figures["tokens per second"] == "not timed"


# Resuming


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_resuming_from_an_earlier_checkpoint_gives_the_same_bits(
    step: int, unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(unbroken, tmp_path / "run", step)
    train(tiny, folder)
    assert lines(folder) == lines(unbroken)
    expected, got = checkpoint_of(unbroken, tiny), checkpoint_of(folder, tiny)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow  # four steps to compile: two stages, before and after the interruption
@pytest.mark.parametrize("step", [3, 6])
def test_resuming_before_and_after_a_stage_boundary_gives_the_same_metrics(
    step: int, unbroken_stages: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(unbroken_stages, tmp_path / "run", step)
    train(tiny, folder, *TWO_STAGES, "output.keep_checkpoints=9")
    assert lines(folder) == lines(unbroken_stages)


@pytest.mark.slow  # with the run of the test above
def test_each_stage_has_its_own_batch_shape_and_warmup(unbroken_stages: Path) -> None:
    seen = [r for r in lines(unbroken_stages) if r["kind"] == "train"]
    assert [r["tokens"] for r in seen] == [128 * i for i in range(1, 11)]
    rates = [r["learning_rate"] for r in seen]
    assert rates[0] == rates[5] == 0
    assert rates[6] == pytest.approx(0.01)


def test_restarting_a_finished_run_changes_no_file(
    unbroken: Path,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace(str(unbroken), str(folder)))  # run.dir
    before = digests(folder)
    train(tiny, folder, PICTURES)
    assert f"resuming from the checkpoint of step 12 in {folder}" in capsys.readouterr().out
    assert digests(folder) == before


def test_a_finished_run_without_its_metrics_is_evaluated_again(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "metrics.jsonl").unlink()
    figures = train(tiny, folder)
    assert lines(folder) == lines(unbroken)[-1:]
    assert figures["held-out loss"] == f"{lines(unbroken)[-1]['loss']:.4f} nats"


def test_metrics_after_the_checkpoint_and_incomplete_lines_are_written_again(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(unbroken, tmp_path / "run", 8)
    content = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(content[: int(len(content) * 0.93)])
    train(tiny, folder)
    assert lines(folder) == lines(unbroken)


# Errors that leave the run folder unchanged


def refused(tiny: Path, folder: Path, *overrides: str) -> str:
    before = digests(folder)
    with pytest.raises(UserError) as caught:
        train(tiny, folder, *overrides)
    assert digests(folder) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_changed_config_is_refused_and_its_changes_are_named(unbroken: Path, tiny: Path) -> None:
    message = refused(tiny, unbroken, "model.hidden_size=32", "optimizer.weight_decay=0.5")
    assert f"{unbroken} holds a run of another config" in message
    assert "model.hidden_size: 16 -> 32; optimizer.weight_decay: 0.01 -> 0.5" in message
    assert "run.accept_changes=true" in message


def test_a_changed_config_resumes_with_accept_changes(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(unbroken, tmp_path / "run", 8)
    train(tiny, folder, "train.steps=14", "run.accept_changes=true")
    seen = lines(folder)
    assert seen[: len(lines(unbroken)) - 5] == lines(unbroken)[:-5]
    assert seen[-1]["step"] == 14
    assert config_file.load(folder / "config.toml").train.steps == 14
    # The accepted change is saved, so the next start does not need the permission again.
    train(tiny, folder, "train.steps=14")


def test_accept_changes_does_not_accept_another_model(unbroken: Path, tiny: Path) -> None:
    message = refused(tiny, unbroken, "model.hidden_size=32", "run.accept_changes=true")
    assert "another model or optimizer" in message


def test_fewer_steps_than_the_checkpoint_has_are_refused(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    message = refused(tiny, unbroken, "train.steps=10", "run.accept_changes=true")
    assert "the checkpoint is of step 12, beyond the 10 steps of this config" in message
    # As many steps as the checkpoint has are accepted, and the last one is evaluated.
    folder = cut_back(unbroken, tmp_path / "run", 4)
    figures = train(tiny, folder, "train.steps=4", "run.accept_changes=true")
    assert figures["steps"] == "4 of 4"


def test_another_vocabulary_is_refused(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    changed = tmp_path / "vocabulary"
    changed.write_text((tiny / "vocabulary").read_text().replace("text", "test"))
    for accept in ("false", "true"):
        folder = tmp_path / accept
        shutil.copytree(unbroken, folder)
        stored = folder / "config.toml"
        stored.write_text(stored.read_text().replace(f"{tiny}/vocabulary", str(changed)))
        overrides = (f"data.vocabulary={changed}", f"run.accept_changes={accept}")
        with pytest.raises(UserError, match="trained with another vocabulary"):
            train(tiny, folder, *overrides)
        kept = {k: v for k, v in digests(folder).items() if not k.startswith("tokens")}
        kept.pop("config.toml")
        assert kept.items() <= digests(unbroken).items()


def test_a_changed_text_is_refused_without_accept_changes(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    """A file that the pattern matched is removed, so the text changes but the config does not."""
    folder = cut_back(unbroken, tmp_path / "run", 8)
    removed = tiny / "07.txt"
    content = removed.read_text()
    removed.unlink()
    try:
        with pytest.raises(UserError, match="trained with another text"):
            train(tiny, folder)
        assert lines(folder) == lines(unbroken)
        train(tiny, folder, "run.accept_changes=true")
        assert lines(folder)[-1]["step"] == 12
    finally:
        removed.write_text(content)


def test_resuming_with_another_number_of_cores_prints_a_note(
    unbroken: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = cut_back(unbroken, tmp_path / "run", 8)
    now = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**now, "cores": "96"})
    train(tiny, folder)
    assert (
        f"note: cores was {now['cores']} and is 96 now, so the last bits may differ"
        in capsys.readouterr().out
    )


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for mistake in ("data.text=nowhere/*.txt", "optimizer.exclude_from_weight_decay=['nothing']"):
        with pytest.raises(UserError):
            train(tiny, folder, mistake)
    train(tiny, folder, "train.steps=1", "schedule.warmup_steps=0")


def test_patterns_that_match_nothing_name_the_nearest_paths(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tiny, tmp_path / "run", "optimizer.exclude_from_layer_adaptation=['atention']")
    message = str(caught.value)
    assert message.startswith(
        "[optimizer] exclude_from_layer_adaptation: 'atention' matches no leaf"
    )
    assert "encoder/layers/attention/" in message


def test_the_batch_size_must_be_divisible_by_devices_times_micro_batches(
    tiny: Path, tmp_path: Path
) -> None:
    message = r"train\.batch_size must be divisible by 1 devices x 3 micro"
    with pytest.raises(UserError, match=message):
        train(tiny, tmp_path / "run", "train.micro_batches=3")
    with pytest.raises(UserError, match=r"stages\.1\.batch_size must be divisible by"):
        train(tiny, tmp_path / "run", *TWO_STAGES, "stages.1.micro_batches=3")
    assert not (tmp_path / "run").exists()


MODES = {
    "jit": (),
    "zero1": ("parallel.zero1=true",),
    "shard_map": ("parallel.mode=shard_map",),
    "pmap": ("parallel.mode=pmap",),
}
CHANGED = ("run.accept_changes=true",)


def assert_close(folder: Path, expected: Path) -> None:
    """Compares the losses and gradient norms of two runs.

    Sums are taken in another order, and trust ratios carry the rounding through several steps.
    """
    for line, other in zip(lines(folder), lines(expected), strict=True):
        assert line.keys() == other.keys()
        for key in set(line) & {"loss", "gradient_norm"}:
            np.testing.assert_allclose(line[key], other[key], rtol=1e-4, err_msg=key)


@pytest.mark.slow
def test_every_mode_agrees_with_one_device_and_a_resume_may_change_the_mode(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example has its own dropout key, and all modes save the same layout."""
    options = ("train.steps=4", "model.dropout=0.1", "output.evaluate_every=100")
    longer = (*options, "train.steps=6", *CHANGED)
    train(tiny, tmp_path / "one", *options)
    shutil.copytree(tmp_path / "one", tmp_path / "one longer")
    train(tiny, tmp_path / "one longer", *longer)
    for mode, setting in MODES.items():
        use_devices(monkeypatch, jax)
        train(tiny, tmp_path / mode, *options, *setting)
        assert_close(tmp_path / mode, tmp_path / "one")
        # Resumes a run of one device in this mode, and a run of this mode on one device.
        resumed = cut_back(tmp_path / "one", tmp_path / f"one to {mode}", 4)
        train(tiny, resumed, *longer, *setting)
        assert_close(resumed, tmp_path / "one longer")
        use_devices(monkeypatch, OneDevice())
        train(tiny, tmp_path / mode, *longer)
        assert_close(tmp_path / mode, tmp_path / "one longer")


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_nonfinite_loss_ends_the_run_without_a_checkpoint(
    every: int, tiny: Path, tmp_path: Path
) -> None:
    """Parameters that are finite but give a nonfinite loss are not saved either."""
    folder = tmp_path / "run"
    too_high = ("schedule.learning_rate=1e30", "schedule.warmup_steps=0")
    with pytest.raises(UserError) as caught:
        train(tiny, folder, *too_high, f"output.checkpoint_every={every}")
    assert re.fullmatch(
        r"the (loss|parameter norm) is (nan|inf) at step [123] \(no checkpoint was saved\): lower "
        r"schedule\.learning_rate or warm up for longer",
        str(caught.value),
    )
    assert saved_steps(folder) == []
    # The same folder can be used after following the advice.
    train(tiny, folder, "train.steps=1", "schedule.warmup_steps=0")


@pytest.fixture
def scale_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that scales the loss and the gradient of each batch.

    The function multiplies the weights of batch ``number`` by ``factor(number)``. With ``skip`` it
    also leaves out the batch of that number. A second call replaces the first.
    """
    batch = MaskedLanguage.batch

    def scale_batches(factor: Callable[[int], float], skip: int | None = None) -> None:
        def scaled_batch(self: MaskedLanguage, number: int, stage: Stage) -> Tree:
            made = batch(self, number + (skip is not None and number >= skip), stage)
            scale = np.float32(factor(number))
            return {**made, "masked_weights": made["masked_weights"] * scale}

        monkeypatch.setattr(MaskedLanguage, "batch", scaled_batch)

    return scale_batches


@pytest.mark.slow
def test_without_guards_a_nan_loss_ends_the_run(
    tiny: Path, tmp_path: Path, scale_batches: Callable[..., None]
) -> None:
    scale_batches(lambda number: math.nan if number == 6 else 1)
    with pytest.raises(UserError, match=r"the loss is nan at step 7 \(step 4 is saved\)"):
        train(tiny, tmp_path / "run", "guards.nonfinite=false")
    assert saved_steps(tmp_path / "run") == [4]


def test_a_skipped_step_gives_the_same_bits_as_a_run_without_its_batch(
    unbroken: Path,
    tiny: Path,
    tmp_path: Path,
    scale_batches: Callable[..., None],
) -> None:
    """The skipped step is counted and plotted."""
    scale_batches(lambda number: math.nan if number == 6 else 1)
    train(tiny, tmp_path / "run", PICTURES)
    steps = [r for r in lines(tmp_path / "run") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in steps] == [0] * 6 + [1] * 6
    assert steps[6]["loss"] is None
    assert lines(tmp_path / "run")[:7] == lines(unbroken)[:7]
    report = (tmp_path / "run" / "report.html").read_text()
    assert 'alt="Plot of the skipped by step"' in report

    scale_batches(lambda number: 1, skip=6)
    train(tiny, tmp_path / "without", "output.checkpoint_every=11")
    (tmp_path / "without" / "checkpoints" / "12").rename(tmp_path / "12")
    expected = checkpoint_of(tmp_path / "without", tiny)
    got = checkpoint_of(tmp_path / "run", tiny)
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])
    jax.tree.map(np.testing.assert_array_equal, got[2].inner, expected[2].inner)


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run_and_it_resumes_from_the_last_checkpoint(
    unbroken: Path, tiny: Path, tmp_path: Path, scale_batches: Callable[..., None]
) -> None:
    scale_batches(lambda number: math.inf if number >= 6 else 1)
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(tiny, folder, "guards.max_consecutive=3")
    assert str(caught.value) == (
        "up to step 9, 3 steps in a row were skipped, at most 2 are allowed (3 in all); step 8 is "
        "saved: lower schedule.learning_rate, warm up for longer, or raise guards.max_consecutive"
    )
    # Steps 7 and 8 were skipped, so the parameters saved at step 8 are those of step 6.
    scale_batches(lambda number: 1)
    train(tiny, folder, CHANGED[0])
    assert [r["loss"] for r in lines(folder)[:7]] == [r["loss"] for r in lines(unbroken)[:7]]
    last = lines(folder)[-2]
    assert last["skipped_steps"] == 2
    assert math.isfinite(last["loss"])


@pytest.mark.slow
def test_accumulation_weights_micro_batches_and_skips_nonfinite_ones(
    tiny: Path, tmp_path: Path, scale_batches: Callable[..., None]
) -> None:
    """Steps are those of the optimizer, and checkpoints are only saved between them."""
    options = ("accumulation.every=2", "train.steps=6", "output.checkpoint_every=2")
    scale_batches(lambda number: math.nan if number == 5 else 1)
    folder = tmp_path / "run"
    train(tiny, folder, *options)
    steps = [r for r in lines(folder) if r["kind"] == "train"]
    assert [r["tokens"] for r in steps] == [2 * 128 * i for i in range(1, 7)]
    assert [r["skipped_micro_batches"] for r in steps] == [0, 0, 1, 1, 1, 1]
    assert {r["skipped_steps"] for r in steps} == {0}
    assert steps[2]["loss"] == pytest.approx(
        steps[1]["loss"], abs=0.1
    )  # the loss of the finite one
    np.testing.assert_allclose([r["learning_rate"] for r in steps[:4]], [0, 0.01, 0.02, 0.03])
    resumed = cut_back(folder, tmp_path / "resumed", 2)
    train(tiny, resumed, *options)
    assert lines(resumed) == lines(folder)


PRECISIONS = {
    "master_weights": ("precision.state={nu='bfloat16'}",),
    "stochastic_rounding": ("precision.wrapper=stochastic_rounding",),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", PRECISIONS)
def test_bfloat16_parameters_are_trained_saved_and_resumed(
    wrapper: str, unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    options = ("precision.parameters=bfloat16", *PRECISIONS[wrapper])
    folder = tmp_path / "run"
    train(tiny, folder, *options)
    step, params, state = checkpoint_of(folder, tiny, *options)
    assert step == 12
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    if wrapper == "master_weights":
        # The outer state belongs to the guard, the inner one to the wrapper.
        rounded = jax.tree.map(lambda x: x.astype("bfloat16"), state.inner.master)
        jax.tree.map(np.testing.assert_array_equal, params, rounded)
    for line, other in zip(lines(folder), lines(unbroken), strict=True):
        # bfloat16 rounds by 2^-9 at most, which is about 0.006 of a loss near 3.
        assert line["loss"] == pytest.approx(other["loss"], abs=0.02)
    resumed = cut_back(folder, tmp_path / "resumed", 4)
    train(tiny, resumed, *options)
    assert lines(resumed) == lines(folder)


def test_an_unknown_field_of_the_state_is_named_in_the_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^\[precision\] unknown field of the state 'velocity'; .*, nu,"
    ):
        train(tiny, tmp_path / "run", "precision.state={velocity='bfloat16'}")


@pytest.mark.slow
def test_a_resumed_run_may_change_its_schedule_and_its_clipping(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = cut_back(unbroken, tmp_path / "run", 4)
    constant = tmp_path / "constant.toml"
    text = (tiny / "tiny.toml").read_text()
    constant.write_text(
        text.replace("warmup_steps = 3", 'name = "constant"').replace(
            "batch_size = 8", "batch_size = 8\nclip_norm = inf"
        )
    )
    loop.run(config_file.load(constant, ('output.sinks=["progress"]', *CHANGED)), folder)
    steps = [r for r in lines(folder) if r["kind"] == "train"]
    assert [r["learning_rate"] for r in steps[4:]] == [pytest.approx(0.03, rel=1e-6)] * 8
    assert all(r["clipped_gradient_norm"] == r["gradient_norm"] for r in steps[4:])
    # The change can be undone.
    shutil.rmtree(folder / "checkpoints" / "12")
    train(tiny, folder, *CHANGED)
    steps = [r for r in lines(folder) if r["kind"] == "train"]
    np.testing.assert_allclose(steps[-1]["learning_rate"], 0.03 / 9, rtol=1e-6)
    assert steps[-1]["clipped_gradient_norm"] <= 1 + 1e-6


# The same numbers for every number of micro-batches


@pytest.mark.slow
def test_micro_batches_change_a_run_only_by_rounding(
    unbroken: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train(tiny, folder, "train.micro_batches=4", "train.steps=4", "output.evaluate_every=100")
    # These steps are in the warmup, which does not depend on train.steps.
    for whole, parts in zip(lines(unbroken)[:4], lines(folder)[:4], strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=2e-6)
        assert parts["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_number_of_micro_batches(tiny: Path, tmp_path: Path) -> None:
    """Each sequence has its own dropout key."""
    both = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        train(tiny, folder, f"train.micro_batches={parts}", "model.dropout=0.3", "train.steps=3")
        both.append([r["loss"] for r in lines(folder) if r["kind"] == "train"])
    np.testing.assert_allclose(both[0], both[1], rtol=2e-6)


# Runs in separate processes


CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a user's process, with this module's compilation cache."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name in CACHE or not name.startswith(("JAX_", "XLA_"))
    }
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in the runs of this process
    return {**own, **quick, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(tiny: Path, folder: Path, *overrides: str, devices: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "optim_zoo.cli", "train", str(tiny / "tiny.toml")]
    return subprocess.Popen(
        [*command, f"run.dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(devices),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.002)


def lines_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_eight_devices_agree_with_one_device(unbroken: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quick = ("train.steps=4", "output.evaluate_every=100", "output.checkpoint_every=100")
    code, out, err = finish(start(tiny, folder, *quick, devices=8))
    assert (code, err) == (0, "")
    assert "8 x" in (folder / "report.html").read_text()
    del out
    for one, eight in zip(lines(unbroken)[:4], lines(folder)[:4], strict=True):
        assert eight["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert eight["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)


LONG = (
    "train.steps=200",
    "output.evaluate_every=150",
    "output.checkpoint_every=20",
    "output.log_every=1",
    "model.num_layers=1",
)
NO_PICTURES = 'output.sinks=["progress"]'


@pytest.fixture(scope="module")
def long_run(tiny: Path, compiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished run that lasts longer than a signal takes to arrive."""
    folder = tmp_path_factory.mktemp("long") / "run"
    code, _, err = finish(start(tiny, folder, *LONG))
    assert (code, err) == (0, "")
    return folder


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        ),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_the_run_with_one_sentence(
    number: signal.Signals, tiny: Path, tmp_path: Path, long_run: Path
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored, as under nohup, and so it is in the run")
    folder = tmp_path / "run"
    process = start(tiny, folder, *LONG, NO_PICTURES)
    wait_for(lambda: lines_of(folder) > 33, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number, err
    found = re.fullmatch(
        r"(?:optim-zoo: saving step \d+, .*\n)?"  # printed for Ctrl-C only
        rf"optim-zoo: stopped by {number.name}; step (\d+) is saved in {folder}, and the same "
        r"command resumes from there\n",
        err,
    )
    assert found, err
    assert saved_steps(folder)[-1] == int(found[1]) < 200
    assert lines_of(folder) >= int(found[1])  # the metrics of that step are written
    code, out, err = finish(start(tiny, folder, *LONG, NO_PICTURES))
    assert (code, err) == (0, "")
    assert out.startswith(f"resuming from the checkpoint of step {found[1]} in {folder}\n")
    assert lines(folder) == lines(long_run)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 5])
def test_a_run_killed_at_random_moments_resumes_with_the_same_bits(
    kills: int, tiny: Path, tmp_path: Path, long_run: Path
) -> None:
    """Sends SIGKILL in each part of the run, every second time during a save."""
    folder = tmp_path / "run"
    moments = random.Random(1904_00962)
    landed = []
    for part in range(kills):
        process = start(tiny, folder, *LONG)
        line = 200 // kills * part + moments.randrange(5, 35)
        wait_for(lambda line=line: lines_of(folder) >= line, process)  # type: ignore[misc]
        if part % 2:
            wait_for(lambda: any((folder / "checkpoints").glob("*tmp*")), process)
        else:
            time.sleep(moments.uniform(0, 0.05))
        process.kill()
        code, _, err = finish(process)
        assert code in (0, -signal.SIGKILL), err
        if code == -signal.SIGKILL:
            landed.append(lines_of(folder))
    assert len(landed) >= kills - 1, landed
    assert all(0 < line < 202 for line in landed)
    code, out, err = finish(start(tiny, folder, *LONG))
    assert (code, err) == (0, "")
    assert out.startswith("resuming from the checkpoint of step ")
    assert lines(folder) == lines(long_run)
    assert digests(folder)["loss.png"] == digests(long_run)["loss.png"]
    expected = checkpoint_of(long_run, tiny, *LONG)
    jax.tree.map(np.testing.assert_array_equal, checkpoint_of(folder, tiny, *LONG), expected)
    assert not list((folder / "checkpoints").glob("*tmp*"))
    print("kills landed after lines", landed)


def test_one_process_at_a_time_trains_in_a_run_folder(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    hold = (
        "import fcntl, sys, time\n"
        f"file = open({str(folder / '.lock')!r}, 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process trains in {folder}"):
            train(tiny, folder)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        other.kill()  # its lock needs no cleanup
    train(tiny, folder, "train.steps=1", "schedule.warmup_steps=0")


def test_a_step_that_exhausts_memory_suggests_more_micro_batches(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("optim_zoo.sharding.DataParallelStep.__call__", full)
    with pytest.raises(UserError, match=r"raise micro_batches in \[train\]"):
        train(tiny, tmp_path / "run")

"""The best parameters of a run and early stopping: the same after any kill as without one."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train import best as best_module
from optim_zoo.train import config_file, load, loop, saved_params
from optim_zoo.train.best import Best
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.config import Stage
from optim_zoo.train.run_folder import BEST, saved_steps
from optim_zoo.train.tasks.base import Batch, Task, WeightedSum
from optim_zoo.tree import Tree
from tests.train.one_device import OneDevice, use_devices

pytestmark = [
    pytest.mark.usefixtures("compiled", "quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
CONFIG = """
[task]
name = "tests.train.test_best:Wave"
[optimizer]
name = "adamw"
[schedule]
name = "constant"
learning_rate = 0.13
[train]
steps = 40
batch_size = 2
[output]
sinks = []
log_every = 5
evaluate_every = 3
checkpoint_every = 7
keep_checkpoints = 2
keep_best = "wave"
"""


class Wave(Task):
    """A vector that moves away from 0, and a metric that rises and falls on its way."""

    def init(self, key: jax.Array) -> Tree:
        return {"x": 0.01 * jax.random.normal(key, (6,)), "y": jnp.zeros((8, 2))}

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        distance = (params["x"] - 5.0) ** 2 + jnp.sum(params["y"] ** 2)
        return WeightedLoss(jnp.mean(distance) * jnp.sum(batch["a"]), jnp.sum(batch["a"]))

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        wave = jnp.sin(3.0 * params["x"][0]) * (1 - 0.1 * (params["x"][1] - 2.5) ** 2)
        return {"loss": Wave.loss(self, params, batch), "wave": (wave, jnp.ones(()))}

    def batch(self, number: int, stage: Stage) -> Batch:
        return {"a": np.full(stage.batch_size, 1.0 + number % 3, np.float32)}

    def held_out(self) -> list[Batch]:
        return [{"a": np.ones(2, np.float32)}]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, OneDevice())


def train(folder: Path, *overrides: str) -> Mapping[str, str]:
    path = folder.parent / "wave.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONFIG)
    return loop.run(config_file.load(path, overrides), folder)


def run_once(factory: pytest.TempPathFactory, *overrides: str) -> Path:
    folder = factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, OneDevice())
        train(folder, *overrides)
    return folder


STOPS = "output.stop_after=4"


@pytest.fixture(scope="module")
def unbroken(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of all 40 steps; tests must not change it."""
    return run_once(tmp_path_factory)


@pytest.fixture(scope="module")
def stopped(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that has ended early; tests must not change it."""
    return run_once(tmp_path_factory, STOPS)


def held_out(folder: Path) -> dict[int, dict[str, float]]:
    """Returns the held-out metrics by step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r.pop("step"): r for r in records if r.pop("kind") == "held_out"}


def wave() -> Tree:
    return jax.eval_shape(lambda: Wave.init(None, jax.random.key(0)))  # type: ignore[arg-type]


def best_of(folder: Path) -> tuple[int, dict[str, bytes], Any, Any]:
    """Returns step, bits of the parameters, metric and value of the best parameters."""
    step, params, info, notes = saved_params.read(folder, wave(), best=True)
    assert notes == []
    assert info["step"] == step
    return step, {k: np.asarray(x).tobytes() for k, x in params.items()}, info["metric"], info[
        "value"
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Killed(BaseException):
    """Ends a run as a kill does: nothing of it is handled."""


def kill_after(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Makes a function raise `Killed` after a call, if ``when`` says so."""
    function = getattr(owner, name)

    def killed(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if when(*arguments):
            raise Killed
        return result

    patch.setattr(owner, name, killed)


def killed_after_evaluation(folder: Path, step: int, *overrides: str) -> None:
    """Runs until the evaluation of a step has been seen, before anything else is written."""
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, Best, "see", lambda _, done, *__: done == step)
        with pytest.raises(Killed):
            train(folder, *overrides)


def test_the_best_parameters_are_those_of_the_best_evaluation(unbroken: Path) -> None:
    metrics = held_out(unbroken)
    assert sorted(metrics) == [*range(3, 40, 3), 40]
    values = {step: each["wave"] for step, each in metrics.items()}
    at = max(values, key=lambda step: values[step])
    assert 3 < at < 39  # or this test could not fail
    step, _, metric, value = best_of(unbroken)
    assert (step, metric, value) == (at, "wave", values[at])
    assert saved_steps(unbroken, BEST) == [at]
    params = saved_params.read(unbroken, wave(), best=True).params
    assert wave_of(params) == pytest.approx(value, rel=1e-5)  # compiled in another way


def test_for_a_loss_the_lowest_value_is_the_best(tmp_path: Path) -> None:
    figures = train(tmp_path / "run", "output.keep_best=loss")
    values = {step: each["loss"] for step, each in held_out(tmp_path / "run").items()}
    at = min(values, key=lambda step: values[step])
    step, _, metric, value = best_of(tmp_path / "run")
    assert (step, metric, value) == (at, "loss", values[at])
    assert figures["best loss"] == f"{value:.4f} at step {at}"


def test_without_keep_best_no_parameters_are_kept(tmp_path: Path) -> None:
    figures = train(tmp_path / "run", 'output.keep_best=""', "train.steps=3")
    assert not (tmp_path / "run" / BEST).exists()
    assert not any(name.startswith("best") for name in figures)


@pytest.mark.parametrize(
    "step", [3, 18, 24, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 21, 39))]
)
def test_a_run_killed_after_any_evaluation_ends_with_the_same_best(
    step: int, unbroken: Path, tmp_path: Path
) -> None:
    """The best parameters may be newer than the last checkpoint, or there is no checkpoint yet."""
    folder = tmp_path / "run"
    killed_after_evaluation(folder, step)
    if step > 3:
        best_of(folder)  # whole
    train(folder)
    assert best_of(folder) == best_of(unbroken)
    assert held_out(folder) == held_out(unbroken)


@pytest.mark.parametrize("point", ["save", "_remove_all_but", "make"])
def test_a_run_killed_while_it_writes_ends_with_the_same_best(
    point: str, unbroken: Path, tmp_path: Path
) -> None:
    """Three kills in one run, at the third, second and first time that a point is reached."""
    folder = tmp_path / "run"
    owner: Any = {"save": Checkpoints, "_remove_all_but": Best, "make": best_module}[point]
    for times in (3, 2, 1):
        calls = itertools.count(1)
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, owner, point, lambda *_, c=calls, n=times: next(c) == n)
            with pytest.raises(Killed):
                train(folder)
    train(folder)
    assert best_of(folder) == best_of(unbroken)
    assert held_out(folder) == held_out(unbroken)


def test_a_kill_leaves_no_half_removed_parameters(tmp_path: Path) -> None:
    """The folder is renamed before its files are removed."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        remove = shutil.rmtree

        def killed(path: Any, *arguments: Any, **keywords: Any) -> None:
            if BEST in Path(path).parts:
                raise Killed
            remove(path, *arguments, **keywords)

        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            train(folder)
    assert [path.name for path in (folder / BEST).glob("removed-*")]
    best_of(folder)
    train(folder)
    assert len(list((folder / BEST).iterdir())) == 1


def test_if_the_evaluation_differs_after_a_resume_the_earlier_best_is_there(
    unbroken: Path, tmp_path: Path
) -> None:
    """As on another machine: the evaluation after the kill does not repeat the lost best value."""
    folder, (at, *_) = tmp_path / "run", best_of(unbroken)
    killed_after_evaluation(folder, at)
    assert max(saved_steps(folder)) < at == saved_steps(folder, BEST)[-1]
    with pytest.MonkeyPatch.context() as patch:
        after = loop._evaluate

        def worse(job: Any, *arguments: Any) -> None:
            object.__setattr__(job, "evaluate", lambda _: {"loss": 1.0, "wave": -9.0})
            after(job, *arguments)

        patch.setattr(loop, "_evaluate", worse)
        train(folder)
    before = {step: each["wave"] for step, each in held_out(folder).items() if each["wave"] > -9}
    step, _, _, value = best_of(folder)
    assert step == max(before, key=lambda step: before[step]) < at
    assert value == before[step]


def test_parameters_of_an_earlier_checkpoint_stay_as_long_as_it_does(
    unbroken: Path, tmp_path: Path
) -> None:
    """The last checkpoint is damaged, so that the run resumes from the one before it."""
    folder, (at, *_) = tmp_path / "run", best_of(unbroken)
    killed_after_evaluation(folder, at + 3)
    earlier, last = saved_steps(folder)
    assert earlier < at <= last  # or nothing would have to stay
    shutil.rmtree(folder / "checkpoints" / str(last) / "info")
    killed_after_evaluation(folder, earlier + 3 - earlier % 3)
    values = {s: m["wave"] for s, m in held_out(unbroken).items() if s <= earlier}
    assert best_of(folder)[0] == max(values, key=lambda step: values[step])
    train(folder)
    assert best_of(folder) == best_of(unbroken)


# Early stopping


def test_a_run_ends_after_the_evaluations_without_a_better_value(
    stopped: Path, unbroken: Path
) -> None:
    values = [each["wave"] for each in held_out(unbroken).values()]
    first = next(i for i in range(len(values)) if i - int(np.argmax(values[: i + 1])) == 4)
    end = list(held_out(unbroken))[first]
    assert end < 40  # or this test could not fail
    assert max(held_out(stopped)) == end
    assert max(saved_steps(stopped)) == end
    assert held_out(stopped).items() <= held_out(unbroken).items()
    assert best_of(stopped)[0] == list(held_out(unbroken))[first - 4]


def test_starting_a_stopped_run_again_does_not_continue_it(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    train(folder, STOPS, f"run.dir={stopped}")
    before = digests(folder)
    figures = train(folder, STOPS, f"run.dir={stopped}")
    assert digests(folder) == before
    end = max(held_out(stopped))
    assert figures["steps"] == f"{end} of 40 (stopped: 4 evaluations without a better value)"


@pytest.mark.parametrize("before_end", [0, 1, 2, 4])
def test_a_run_that_is_killed_stops_after_the_same_step(
    before_end: int, stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    step = sorted(held_out(stopped))[-1 - before_end]
    killed_after_evaluation(folder, step, STOPS)
    train(folder, STOPS)
    assert held_out(folder) == held_out(stopped)
    assert saved_steps(folder) == saved_steps(stopped)
    assert best_of(folder) == best_of(stopped)


def test_a_stopped_run_continues_with_a_higher_limit(
    stopped: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    train(folder, "output.stop_after=99", "run.accept_changes=true")
    assert held_out(folder) == held_out(unbroken)
    assert best_of(folder) == best_of(unbroken)


def test_a_resumed_run_may_compare_another_metric(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    train(folder, "output.keep_best=-wave", "run.accept_changes=true")
    after = {s: m["wave"] for s, m in held_out(folder).items() if s > max(held_out(stopped))}
    assert best_of(folder)[0] == min(after, key=lambda step: after[step])


# The average of the parameters

AVERAGES = ("averaging.decay=0.9", "train.steps=20", "output.checkpoint_every=10")


def wave_of(params: Tree) -> float:
    return float(Wave.measure(None, params, {"a": jnp.ones(2)})["wave"][0])  # type: ignore[arg-type]


def test_the_average_is_evaluated_and_kept_as_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *AVERAGES)
    read = [saved_params.read(folder, wave(), averaged=averaged) for averaged in (False, True)]
    assert read[1].step == 20
    average, params = wave_of(read[1].params), wave_of(read[0].params)
    assert held_out(folder)[20]["wave"] == pytest.approx(average, rel=1e-5)  # compiled otherwise
    assert abs(average - params) > 0.01  # or this test could not fail
    loaded = load(folder, averaged=True)
    assert loaded.step == 20
    assert wave_of(loaded.params) == average
    best = saved_params.read(folder, wave(), best=True, averaged=True)
    with pytest.raises(UserError, match="has the average, not the parameters"):
        load(folder, best=True, averaged=False)
    assert wave_of(load(folder, best=True).params) == wave_of(best.params)
    assert held_out(folder)[best.step]["wave"] == pytest.approx(wave_of(best.params), rel=1e-5)


def test_the_parameters_are_evaluated_where_the_average_is_not(
    unbroken: Path, tmp_path: Path
) -> None:
    """The average changes no parameter."""
    folder = tmp_path / "run"
    train(folder, *AVERAGES, "averaging.evaluate=false")
    expected = {step: each for step, each in held_out(unbroken).items() if step < 20}
    assert held_out(folder).items() >= expected.items()
    saved_params.read(folder, wave(), averaged=True)
    with pytest.raises(UserError, match="has parameters, not their average"):
        saved_params.read(folder, wave(), best=True, averaged=True)


def test_a_run_with_an_average_resumes_to_the_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", *AVERAGES)
    killed_after_evaluation(tmp_path / "run", 15, *AVERAGES)
    train(tmp_path / "run", *AVERAGES)
    assert held_out(tmp_path / "run") == held_out(tmp_path / "whole")
    assert best_of(tmp_path / "run") == best_of(tmp_path / "whole")


def test_skipped_and_accumulated_batches_leave_the_average_alone(tmp_path: Path) -> None:
    """Every batch has the same gradient, so that accumulation changes no step."""
    same = ("train.steps=6", "output.evaluate_every=1", "averaging.decay=0.9")
    train(tmp_path / "plain", *same)
    train(tmp_path / "accumulated", *same, "accumulation.every=2")
    plain, accumulated = held_out(tmp_path / "plain"), held_out(tmp_path / "accumulated")
    for step in range(1, 7):
        # The sums over two batches are rounded.
        assert plain[step]["wave"] == pytest.approx(accumulated[step]["wave"], rel=1e-4)


def test_a_sharded_average_is_evaluated_as_an_unsharded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_devices(monkeypatch, jax)  # all eight
    short = ("averaging.decay=0.9", "train.steps=4", "train.batch_size=8")
    train(tmp_path / "plain", *short)
    train(tmp_path / "zero1", *short, "parallel.zero1=true")
    assert held_out(tmp_path / "zero1") == held_out(tmp_path / "plain")
    assert best_of(tmp_path / "zero1") == best_of(tmp_path / "plain")


# Bad input


def test_a_metric_that_the_task_does_not_measure_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^output\.keep_best: unknown .*'wav'; did you mean wave"):
        train(tmp_path / "run", "output.keep_best=wav")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_stop_after_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stop_after must be 0 where keep_best is not set, got 3"):
        train(tmp_path / "run", 'output.keep_best=""', "output.stop_after=3")


def test_parameters_that_cannot_be_written_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / BEST).write_text("a file")
    with pytest.raises(UserError, match=f"cannot write a checkpoint to {tmp_path / 'run' / BEST}"):
        train(tmp_path / "run")

"""The main job: from a config to a run folder, and on from where a run was stopped.

With several processes all run this, each on its own devices, and the first one writes and speaks.
Every process makes the whole batch and hands over the rows of its devices: a batch's random numbers
are drawn in one go, which takes less than the step it is made during, and so a batch is the same on
any number of processes.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optim_zoo import guards, metrics, sharding
from optim_zoo.errors import UserError
from optim_zoo.train import (
    config_file,
    foreign_errors,
    optimization,
    plots,
    processes,
    progress,
    records,
    report,
    tasks,
)
from optim_zoo.train.checkpoints import Checkpoints, saved_steps
from optim_zoo.train.config import Config
from optim_zoo.train.signals import SharedSignals, Signals, Stopped
from optim_zoo.tree import Tree


def run(config: Config, folder: Path) -> Mapping[str, str]:
    """Trains what ``config`` says in ``folder``, and returns the final figures (the first process).

    Where the folder holds a checkpoint, the run goes on from the last whole one, and its losses
    are bit for bit those of a run that was never stopped, on the same number of cores.

    Raises:
      UserError: a mistake of the user's, or a loss that is not finite.
      Stopped: SIGTERM or Ctrl-C came, to any process; a checkpoint was saved first.
      processes.Lost: another process has failed or is gone.
    """
    check_batches(config, jax.device_count())
    try:
        with processes.watched(folder), _alone_in(folder):
            figures = _run(_prepare(config, folder))
            processes.wait_for_all("the end")
            return figures
    except jax.errors.JaxRuntimeError as error:
        if not foreign_errors.is_out_of_memory(error):
            raise
        raise UserError(
            "a step does not fit into memory: raise train.micro_batches (in a second stage "
            "second_stage.micro_batches), or train a smaller model"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same from the first step to the last."""

    config: Config
    folder: Path
    task: tasks.Task
    steps: Sequence[sharding.DataParallelStep]  # of each stage
    evaluate: Callable[[Tree], float]  # parameters -> held-out loss in nats
    info: Mapping[str, Any]  # what a checkpoint tells of machine and data


def _run(job: _Job) -> Mapping[str, str]:
    """`run`, alone in the folder."""
    config, folder = job.config, job.folder
    params, state = job.steps[0].init(_initial_params(config, job.task))
    with (
        SharedSignals() if processes.several() else Signals() as signals,
        Checkpoints(folder, config.output.keep_checkpoints) as checkpoints,
    ):
        start, notes = 0, []
        if checkpoints.last_step is not None:
            found = checkpoints.restore(
                *job.steps[0].uncopied((params, state)),
                check=lambda step, before: _check_resumes(config, step, before, job.info),
            )
            start = found.step
            params, state = job.steps[0].place(found.params, found.state)
            notes = [*found.notes, *_changes(found.info["machine"], job.info["machine"])]
            notes.append(f"going on from the checkpoint of step {start} in {folder}")
        if processes.is_first():
            records.replace_file(folder / "config.toml", config_file.to_toml(config).encode())
        with (
            _writer(folder / "metrics.jsonl", start or None) as writer,
            progress.reporter(config.total_steps, start, speaks=processes.is_first()) as reporter,
        ):
            for note in notes:
                reporter.say(note)
            course = _Course(job, start, checkpoints, writer, reporter)
            for step in range(start, config.total_steps):
                params, state, loss = _step(job, step, params, state)
                signal_number = signals.requested(step + 1)  # once: it may come at any moment
                course.record(step + 1, params, state, loss, stopping=signal_number is not None)
                if signal_number is not None and step + 1 < config.total_steps:
                    checkpoints.wait()
                    raise Stopped(signal_number, step + 1, folder)
            checkpoints.wait()
            return course.finish(params)


def _step(job: _Job, step: int, params: Tree, state: Tree) -> tuple[Tree, Tree, jax.Array]:
    """Parameters and state after step number ``step`` (from 0), and the mean of its losses.

    Without those that are not finite, where such batches are left out of the step.
    """
    stage, every = job.config.stage_of(step), job.config.accumulation.every
    losses = []
    for number in range(step * every, (step + 1) * every):
        batch = job.task.batch(number, job.config.stages[stage])
        params, state, loss = job.steps[stage](params, state, batch)
        losses.append(loss)
    if every == 1:
        return params, state, losses[0]
    seen = jnp.stack(losses)
    counted = jnp.isfinite(seen) | (not job.config.guards.nonfinite)
    return params, state, jnp.sum(jnp.where(counted, seen, 0)) / jnp.sum(counted)


class _NoWriter:
    """In place of `records.Writer` where another process writes."""

    def write(self, record: Mapping[str, object]) -> None:
        """Nothing."""


def _writer(
    path: Path, resume_step: int | None
) -> contextlib.AbstractContextManager[records.Writer | _NoWriter]:
    if processes.is_first():
        return records.Writer(path, resume_step)
    return contextlib.nullcontext(_NoWriter())


class _Course:
    """What a run writes as it goes: metrics, evaluations with plots and report, checkpoints."""

    def __init__(
        self,
        job: _Job,
        start: int,
        checkpoints: Checkpoints,
        writer: records.Writer | _NoWriter,
        reporter: progress.Reporter,
    ) -> None:
        self._job, self._start, self._checkpoints = job, start, checkpoints
        self._writer, self._reporter = writer, reporter
        self._rate = progress.Rate(job.config.tokens_after)
        self._drawn: Mapping[str, str] | None = None  # figures of the last plots and report

    def record(
        self, done: int, params: Tree, state: Tree, loss: jax.Array, *, stopping: bool
    ) -> None:
        """What is due after ``done`` steps; the lines of a step come before its checkpoint.

        A kill between the two then loses nothing: the lines are dropped and written again.
        """
        if done == self._start + 1:
            self._rate.begin(loss, done)
        due = _due(self._job.config, done, stopping)
        uncopied = self._job.steps[0].uncopied
        if any(due):
            seen = jax.device_get({"loss": loss, **uncopied(metrics.read(state))})
            if not self._job.config.guards.nonfinite:  # else such a step was refused
                self._check_finite({name: seen[name] for name in ("loss", "gradient_norm")}, done)
            if due.log:
                self._log(done, {**seen, "tokens_per_second": self._rate.after(done)})
            self._check_refusals(state, done)  # as it is: of every copy, where there are some
        with self._rate.paused():
            if due.evaluate or due.save:
                params, state = uncopied((params, state))
            if due.evaluate:
                self._evaluate(done, params)
            if due.save:
                # A finite loss and gradient may still have led to parameters beyond repair: not
                # finite, or so large that the next step's norms will not be.
                self._check_finite({"parameter norm": optax.tree.norm(params)}, done)
                self._checkpoints.save(done, params, state, self._job.info)

    def finish(self, params: Tree) -> Mapping[str, str]:
        """The final figures, printed and in the report."""
        if processes.as_the_first_says(self._unevaluated()):
            # Resumed at its end, and the file is gone or its last steps are not wanted any more.
            self._evaluate(self._job.config.total_steps, self._job.steps[0].uncopied(params))
        figures = self._drawn or _draw(self._job)  # the last step was drawn when it was evaluated
        for name, value in figures.items():
            self._reporter.say(f"{name}: {value}")
        self._reporter.say(f"report: {self._job.folder / 'report.html'}")
        return figures

    def _unevaluated(self) -> bool:
        """Whether no evaluation is on record, as the process knows that writes them."""
        if not processes.is_first():
            return False
        return not records.read(self._job.folder / "metrics.jsonl").held_out

    def _log(self, done: int, seen: Mapping[str, Any]) -> None:
        tokens = self._job.config.tokens_after(done)
        self._writer.write({"kind": "train", "step": done, "tokens": tokens, **seen})
        self._reporter.at(done, _figures(seen))

    def _evaluate(self, done: int, params: Tree) -> None:
        held_out = self._job.evaluate(params)
        self._check_finite({"held-out loss": held_out}, done)
        self._writer.write({"kind": "held_out", "step": done, "loss": held_out})
        self._reporter.say(f"step {done}: held-out loss {held_out:.4f} nats")
        self._drawn = _draw(self._job)

    def _check_finite(self, seen: Mapping[str, Any], done: int) -> None:
        for name, value in seen.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the {name.replace('_', ' ')} is {value} at step {done} ({self._kept()}): "
                    f"lower schedule.learning_rate or warm up for longer"
                )

    def _check_refusals(self, state: Tree, done: int) -> None:
        try:
            guards.check(state)
        except guards.TooManyRefusals as error:
            raise UserError(
                f"up to step {done}, {error.in_a_row} steps in a row were refused, at most "
                f"{error.limit - 1} are allowed ({error.total} in all); {self._kept()}: lower "
                f"schedule.learning_rate, warm up for longer, or raise guards.max_consecutive"
            ) from error

    def _kept(self) -> str:
        """Which step a new start would go on from."""
        self._checkpoints.wait()  # for one that is being written
        saved = saved_steps(self._job.folder)
        return f"step {saved[-1]} is saved" if saved else "no checkpoint was saved"


class _Due(NamedTuple):
    """What has to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


def _due(config: Config, done: int, stopping: bool) -> _Due:
    last, every = done == config.total_steps, config.output
    return _Due(
        log=last or done % every.log_every == 0,
        evaluate=last or done % every.evaluate_every == 0,
        save=last or stopping or done % every.checkpoint_every == 0,
    )


def _prepare(config: Config, folder: Path) -> _Job:
    """Everything that can fail before the first step, with nothing written but the token cache."""
    processes.check_shared(folder)
    if processes.is_first():  # and soon writes its own config there
        _check_config(config, folder)
    with processes.first_one_first("the tokens are there"):
        task = tasks.make(config, folder / "tokens")
    processes.check_same({"config": config_file.to_toml(config), **task.identity})
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return _Job(
        config,
        folder,
        task,
        steps=_make_steps(config, task, mesh),
        evaluate=_evaluation(task, mesh),
        info={"machine": machine(), "identity": dict(task.identity)},
    )


def check_batches(config: Config, devices: int) -> None:
    """Raises `UserError` unless every stage's batch divides over devices and micro-batches."""
    for section, stage in zip(("train", "second_stage"), config.stages, strict=False):
        if stage.batch_size % (devices * stage.micro_batches):
            raise UserError(
                f"{section}.batch_size must divide by {devices} devices x {stage.micro_batches} "
                f"micro-batches = {devices * stage.micro_batches}, got {stage.batch_size}"
            )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other runs out of it until this one ends, however."""
    if not processes.is_first():  # which does it for all
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another with run.dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process trains in {folder}: wait for its end, or choose another folder "
                f"with run.dir"
            ) from None
        yield


def _check_config(config: Config, folder: Path) -> None:
    """Raises `UserError` where what is saved in the folder is of another config."""
    path = folder / "config.toml"
    if path.exists() and saved_steps(folder) and not config.run.accept_changes:
        changed = config_file.differences(config_file.load(path), config)
        if changed:
            raise UserError(
                f"{folder} holds a run of another config ({'; '.join(changed)}): choose another "
                f"folder with run.dir, or go on with the new values by run.accept_changes=true"
            )


def machine() -> dict[str, str]:
    """What the numbers of a run depend on beside its config."""
    devices = jax.devices()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax")]
    count = jax.process_count()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}"
        + (f" in {count} processes" if count > 1 else ""),
        "cores": str(_cores()),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "libraries": ", ".join(versions),
        "optim_zoo": _own_version(),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("optim-zoo")
    except importlib.metadata.PackageNotFoundError:  # used by PYTHONPATH, without being installed
        return "from a checkout"


def _cores() -> int | None:
    """Those this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _initial_params(config: Config, task: tasks.Task) -> Tree:
    def init(key: jax.Array) -> Tree:
        return jax.tree.map(lambda x: x.astype(config.precision.parameters), task.init(key))

    return jax.jit(init)(jax.random.key(config.run.seed, impl=tasks.KEYS))


def _make_steps(config: Config, task: tasks.Task, mesh: Mesh) -> list[sharding.DataParallelStep]:
    """The step of each stage; they share the optimizer and its state."""
    bare = optimization.make_optimizer(config, task.layers)
    tx = optimization.wrapped(config, bare)
    zero1 = "data" if config.parallel.zero1 else None
    # A path pattern that matches nothing, and a field that the state has not.
    for section, each in (("optimizer", bare), ("precision", tx)):
        try:
            jax.eval_shape(lambda each=each: each.init(_initial_params(config, task)))
        except (TypeError, ValueError) as error:
            raise UserError(f"[{section}] {error}") from error
    if config.parallel.mode == "pmap" and processes.several():
        raise UserError("parallel.mode=pmap is for one process: take jit or shard_map for several")
    return [
        sharding.data_parallel(
            task.loss,
            tx,
            mesh=mesh,
            mode=config.parallel.mode,
            micro_batches=stage.micro_batches,
            zero1=zero1,
        )
        for stage in config.stages
    ]


def _check_resumes(
    config: Config, step: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raises `UserError` where a checkpoint, of which ``before`` tells, is not of this job."""
    if step > config.total_steps:
        raise UserError(
            f"the checkpoint is of step {step}, beyond the {config.total_steps} steps of this "
            f"config: raise train.steps, or choose another folder with run.dir"
        )
    changed = [k for k, v in now["identity"].items() if before["identity"].get(k) != v]
    if "vocabulary" in changed:
        raise UserError(
            "the vocabulary is not the one this checkpoint was trained with, so its embeddings "
            "mean other tokens: restore the file, or choose another folder with run.dir"
        )
    if changed and not config.run.accept_changes:
        raise UserError(
            f"the {' and '.join(changed)} is not what this checkpoint was trained on: restore it, "
            f"choose another folder with run.dir, or go on by run.accept_changes=true"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resume should say of the machine."""
    return [
        f"note: {name} was {before.get(name)} and is {value} now, so the last bits may differ from "
        f"an unbroken run's"
        for name, value in now.items()
        if before.get(name) != value
    ]


def _evaluation(task: tasks.Task, mesh: Mesh) -> Callable[[Tree], float]:
    """A function from parameters to the held-out loss in nats."""
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batches = task.held_out()
    # Wanted whole by every process.
    loss = jax.jit(task.held_out_loss, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def evaluate(params: Tree) -> float:
        sums = [loss(params, sharding.put(batch, rows)) for batch in batches]
        totals, weights = np.array(jax.device_get(sums), np.float64).T
        return float(totals.sum() / weights.sum())

    return evaluate


def _figures(seen: Mapping[str, Any]) -> str:
    rate, skipped = seen["tokens_per_second"], seen.get("skipped_steps", 0)
    return (
        f"loss {seen['loss']:.4f}  learning rate {seen['learning_rate']:.2e}"
        + (f"  {rate:,.0f} tokens/s" if math.isfinite(rate) else "")
        + (f"  {skipped} skipped" if skipped else "")
    )


def _draw(job: _Job) -> dict[str, str]:
    """Plots and report of the metrics so far; returns the report's headline figures.

    Nothing where another process draws.
    """
    if not processes.is_first():
        return {}
    config, folder, reference_loss = job.config, job.folder, job.task.reference_loss
    seen = records.read(folder / "metrics.jsonl")
    steps, losses = seen.held_out["loss"]
    rates = seen.train.get("tokens_per_second", (np.empty(0), np.empty(0)))[1]
    timed = rates[np.isfinite(rates)]
    figures = {
        "held-out loss": f"{losses[-1]:.4f} nats",
        "loss by token frequency": f"{reference_loss:.4f} nats",
        "gain": f"{reference_loss - losses[-1]:.4f} nats",
        "steps": f"{int(steps[-1]):,} of {config.total_steps:,}",
        "tokens": f"{config.tokens_after(int(steps[-1])):,}",
        "tokens per second": f"{np.median(timed):,.0f} (median)" if timed.size else "not timed",
    }
    drawn = plots.write_all(seen, reference_loss, folder)
    report.write(
        folder,
        title=f"{config.task.name}: {folder.name}",
        config=config_file.to_dict(config),
        machine=job.info["machine"],
        figures=figures,
        plots=drawn,
    )
    return figures

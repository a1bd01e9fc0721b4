"""The training loop: one run from its config to its last step, resumed if it was stopped.

If a run has several processes, all of them run this, each on its own devices. Every process makes
whole batches, so that these do not depend on the number of processes, and computes the same
numbers. Only process 0 has sinks.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from optim_zoo import metrics
from optim_zoo.errors import UserError
from optim_zoo.train import (
    critical_batch_size,
    distributed,
    foreign_errors,
    resume,
    saved_config,
    sinks,
)
from optim_zoo.train.best import Best
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.config import Config
from optim_zoo.train.distributed import SharedSignals, Signals, Stopped
from optim_zoo.train.files import replace_file
from optim_zoo.train.health import Health
from optim_zoo.train.job import Job, check_batches, prepare
from optim_zoo.train.sinks.base import RunInfo, opened
from optim_zoo.train.sinks.jsonl import has_evaluation
from optim_zoo.train.summary import summarize
from optim_zoo.train.throughput import Throughput
from optim_zoo.tree import Tree


def run(config: Config, folder: Path, notes: Sequence[str] = ()) -> Mapping[str, str]:
    """Trains what ``config`` describes in ``folder``, and returns the headline figures.

    If the folder has a checkpoint, the run resumes from the last undamaged one. On the same number
    of cores its losses are bit for bit those of a run that was never stopped. Processes other than
    process 0 return no figures.

    Args:
      config: what to train.
      folder: the run folder; it is created.
      notes: sentences for the user about the config, which are shown at the start.

    Raises:
      UserError: the user has made a mistake, or the loss is not finite.
      Stopped: SIGTERM, Ctrl-C, SIGHUP or SIGUSR1 reached any process; a checkpoint was saved first.
      distributed.Lost: another process has failed or is gone.
    """
    check_batches(config, jax.device_count())
    with _memory_advice(), distributed.watched(folder), distributed.alone_in(folder):
        distributed.check_shared(folder)
        if distributed.is_first():  # before it writes its own config there
            resume.check_config(config, folder)
        job = prepare(config, folder)
        with (
            _signals(config) as signals,
            Checkpoints(folder, config.output.keep_checkpoints) as saved,
        ):
            info = _train(job, signals, saved, notes)
        distributed.wait_for_all("the end")
        return summarize(info) if distributed.is_first() else {}


def _train(job: Job, signals: Signals, checkpoints: Checkpoints, notes: Sequence[str]) -> RunInfo:
    """Makes the remaining steps, and logs, evaluates and saves when due."""
    done, params, state, more, before = resume.start(job, checkpoints)
    info, outputs = run_info(job, done, params, [*notes, *job.task.notes, *more]), _outputs(job)
    health, speed = Health(job, checkpoints), Throughput(job.units_after)
    best = Best(job.folder, job.config.output, checkpoints, done, before.get("best"))
    with opened(outputs, info):
        while done < info.total_steps and not best.gives_up:
            params, state, loss = job.step(done, params, state)
            done += 1
            speed.start(done, loss)
            stop = signals.requested(done)  # asked once per step: the answer may change
            is_due = due(job.config, done, stopping=stop is not None)
            if any(is_due):
                figures = _figures(job, done, loss, state)
                health.check_figures(done, figures)
            if is_due.log:
                figures[f"{info.unit}_per_second"] = speed.since_last(done)
                for sink in outputs:
                    sink.log(done, figures)
                health.check_skipped(done, state)
            with speed.paused():
                if is_due.evaluate:
                    _evaluate(job, done, job.evaluated(params, state), health, best, outputs)
                if is_due.save or best.gives_up:
                    health.check_parameters(done, job.plain(params))
                    now = {**job.info, "best": best.history.record()}
                    checkpoints.save(done, job.plain(params), job.plain(state), now)
            if stop is not None and done < info.total_steps and not best.gives_up:
                checkpoints.wait()
                raise Stopped(stop, done, job.folder)
        if distributed.broadcast_from_first(_lacks_evaluation(job)):
            _evaluate(job, done, job.evaluated(params, state), health, best, outputs)
        checkpoints.wait()
        best.finish()
    return info


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    evaluate: bool
    save: bool


def due(config: Config, done: int, *, stopping: bool = False) -> Due:
    """Returns what is due after ``done`` steps; a run that is stopping also saves."""
    last, every = done == config.total_steps, config.output
    return Due(
        log=last or done % every.log_every == 0,
        evaluate=last or done % every.evaluate_every == 0,
        save=last or stopping or done % every.checkpoint_every == 0,
    )


def _figures(job: Job, done: int, loss: jax.Array, state: Tree) -> dict[str, Any]:
    """Returns the units used, the loss, and the metrics in the optimizer state."""
    kept = {**metrics.read(state), **critical_batch_size.in_examples(job.config, done, state)}
    seen = {"loss": loss, **job.plain(kept)}
    return {job.task.unit: job.units_after(done), **jax.device_get(seen)}


def _evaluate(
    job: Job, done: int, params: Tree, health: Health, best: Best, outputs: list[sinks.Sink]
) -> None:
    """Evaluates parameters, keeps the best ones, and passes the held-out metrics to the sinks."""
    held_out = job.evaluate(params)
    health.check_evaluation(done, held_out)
    best.see(done, held_out, params, job.info)
    for sink in outputs:
        sink.evaluate(done, held_out)


def _lacks_evaluation(job: Job) -> bool:
    """Returns whether the metrics have no evaluation, as after the file was removed.

    Only process 0 reads the file.
    """
    return distributed.is_first() and not has_evaluation(job.folder)


def _outputs(job: Job) -> list[sinks.Sink]:
    """Returns the sinks of this process, and saves the config for when the run is resumed."""
    if not distributed.is_first():
        return []
    path = job.folder / saved_config.CONFIG_FILE
    replace_file(path, saved_config.of_run(job.config, job.folder).encode())
    return sinks.make(job.config.output.sinks)


def run_info(job: Job, start: int, params: Tree, notes: list[str]) -> RunInfo:
    """Returns what the sinks may know about a run that starts after ``start`` steps."""
    return RunInfo(
        folder=job.folder,
        task=job.config.task.name,
        config=saved_config.sections(job.config),
        machine=job.machine,
        start=start,
        total_steps=job.config.total_steps,
        unit=job.task.unit,
        loss_unit=job.task.loss_unit,
        weight_unit=job.task.weight_unit,
        baseline=job.task.baseline,
        notes=notes,
        facts=job.task.facts,
        parameters=sum(x.size for x in jax.tree.leaves(job.plain(params))),
        total_units=job.units_after(job.config.total_steps),
    )


def _signals(config: Config) -> Signals:
    kind = SharedSignals if distributed.several() else Signals
    return kind(config.total_steps)


@contextlib.contextmanager
def _memory_advice() -> Iterator[None]:
    """Says what to do if a device has too little memory for a step."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not foreign_errors.is_out_of_memory(error):
            raise
        raise UserError(
            "a step does not fit into memory: raise micro_batches in [train], or in the [[stages]] "
            "table of this stage, or train a smaller model"
        ) from error

"""Trains runs that differ in the seed and in some numbers in one program, by ``jax.vmap``.

It makes the same steps as `optim_zoo.train.loop` and writes the same figures, without checkpoints
and without units per second, which a run that shares a program does not have.
"""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import metrics
from optim_zoo.errors import UserError
from optim_zoo.sharding import WeightedLoss, gradients
from optim_zoo.train import loop, optimization
from optim_zoo.train.config import Choice, Config
from optim_zoo.train.health import Health
from optim_zoo.train.job import Job, check_batches, initial_params, metrics_of, prepare, pretrained
from optim_zoo.train.sinks.jsonl import JsonLines
from optim_zoo.train.tasks.base import Batch, Task
from optim_zoo.tree import Tree
from optim_zoo.wrappers.counters import SkippedSteps, all_of


def train(
    configs: Sequence[Config],
    folders: Sequence[Path],
    values: Sequence[Mapping[str, float]],
    check_signals: Callable[[], None],
) -> list[UserError | None]:
    """Trains all runs, and writes ``metrics.jsonl`` into their folders.

    Args:
      configs: one config for each run. They are equal but for the seed and ``values``.
      folders: the run folders, which exist.
      values: key of the config -> number, for each run.
      check_signals: called before each step; it may raise.

    Returns:
      For each run, None if it has finished, and the error that ended it otherwise.

    Raises:
      UserError: the task or the optimizer cannot be made, or the loss depends on the seed.
    """
    check_batches(configs[0], 1)
    jobs: dict[int, Job] = {}
    for config, folder in zip(configs, folders, strict=True):
        if config.run.seed not in jobs:
            jobs[config.run.seed] = prepare(config, folder)
    params = {seed: _start(job) for seed, job in jobs.items()}
    _check_seeds(jobs, next(iter(params.values())))
    group = _Group(configs, jobs, values)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params[c.run.seed] for c in configs))
    with contextlib.ExitStack() as stack:
        runs = []
        for config, folder in zip(configs, folders, strict=True):
            job = dataclasses.replace(jobs[config.run.seed], config=config, folder=folder)
            runs.append(_Run(job, params[config.run.seed]))
            stack.callback(runs[-1].sink.close, finished=True)
        state = group.init(stacked)
        for number in range(configs[0].total_steps):
            check_signals()
            stacked, state, loss = group.step(number, stacked, state)
            _note(group, runs, number + 1, stacked, state, loss)
            if all(run.failure for run in runs):
                break
    return [run.failure for run in runs]


def _start(job: Job) -> Tree:
    """Returns the parameters that a run starts with."""
    return pretrained(job.task, initial_params(job.config, job.task))


class _Group:
    """The program of a group. Parameters, state and losses have a first axis of runs."""

    def __init__(
        self,
        configs: Sequence[Config],
        jobs: Mapping[int, Job],
        values: Sequence[Mapping[str, float]],
    ) -> None:
        self._config, self._jobs = configs[0], list(jobs.values())
        self._task = self._jobs[0].task
        self._seeds = np.array([list(jobs).index(config.run.seed) for config in configs])
        # A number that does not differ stays a constant of the program.
        self._values = {
            key: np.array([each[key] for each in values], np.float32)
            for key in values[0]
            if len({each[key] for each in values}) > 1
        }
        held_out = [job.task.held_out() for job in self._jobs]
        self._held_out = [_stacked(each) for each in zip(*held_out, strict=True)]
        self._step = jax.jit(jax.vmap(self._one_step, (0, 0, 0, 0, None)), donate_argnums=(2, 3))
        self._measure = jax.jit(jax.vmap(self._one_measure, (0, 0, None)))
        self._read = jax.jit(jax.vmap(lambda state, loss: {"loss": loss, **metrics.read(state)}))

    def init(self, params: Tree) -> Tree:
        """Returns the optimizer state of all runs."""
        init = jax.vmap(lambda values, params: self._optimizer(values).init(params))
        return jax.jit(init)(self._values, params)

    def step(self, number: int, params: Tree, state: Tree) -> tuple[Tree, Tree, jax.Array]:
        """Returns the parameters, state and loss of each run after step ``number`` (from 0)."""
        batches = [job.task.batch(number, self._config.stages[0]) for job in self._jobs]
        return self._step(self._values, self._seeds, params, state, _stacked(batches))

    def figures(self, state: Tree, loss: jax.Array) -> list[Mapping[str, Any]]:
        """Returns the loss and the metrics in the optimizer state of each run."""
        return self._by_run(self._read(state, loss))

    def skipped(self, state: Tree) -> list[list[SkippedSteps]]:
        """Returns the counters of the guards of each run."""
        return self._by_run(all_of(SkippedSteps, state))

    def evaluate(self, params: Tree) -> list[Mapping[str, float]]:
        """Returns the held-out metrics of each run."""
        sums = [self._measure(self._seeds, params, batches) for batches in self._held_out]
        return [metrics_of(each) for each in self._by_run(sums)]

    def parameters(self, params: Tree) -> list[Tree]:
        """Returns the parameters of each run."""
        return self._by_run(params)

    def _by_run(self, tree: Tree) -> list[Any]:
        plain = jax.device_get(tree)
        return [jax.tree.map(operator.itemgetter(i), plain) for i in range(len(self._seeds))]

    def _optimizer(self, values: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        config = _with_values(self._config, values)
        tx = optimization.make_optimizer(config, self._task.layers)
        return optax.with_extra_args_support(optimization.wrapped(config, tx))

    def _one_step(
        self, values: Tree, seed: jax.Array, params: Tree, state: Tree, batches: Tree
    ) -> tuple[Tree, Tree, jax.Array]:
        def loss_fn(params: Tree, batch: Tree) -> WeightedLoss:
            return WeightedLoss(*self._task.loss(params, batch))

        batch = jax.tree.map(lambda x: x[seed], batches)
        loss, weight, gradient, *_ = gradients.mean_gradient(loss_fn, params, batch)
        tx = self._optimizer(values)
        updates, state = tx.update(gradient, state, params, value=loss, weight=weight)
        return optax.apply_updates(params, updates), state, loss

    def _one_measure(self, seed: jax.Array, params: Tree, batches: Tree) -> Mapping[str, Any]:
        return self._task.measure(params, jax.tree.map(lambda x: x[seed], batches))


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config with other values of keys in [schedule] and [optimizer]."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == "optimizer":
            arguments = {**config.optimizer.arguments, name: value}
            choice = Choice(config.optimizer.name, arguments)
            config = dataclasses.replace(config, optimizer=choice)
        else:
            (stage,) = config.stages
            stage = dataclasses.replace(stage, schedule={**stage.schedule, name: value})
            config = dataclasses.replace(config, stages=(stage,))
    return config


class _Run:
    """One run of a group: its metrics, its checks, and how it ended."""

    def __init__(self, job: Job, params: Tree) -> None:
        self.failure: UserError | None = None
        self.job, self.health, self.sink = job, Health(job, None), JsonLines()
        self.sink.open(loop.run_info(job, 0, params, []))


def _note(
    group: _Group, runs: Sequence[_Run], done: int, params: Tree, state: Tree, loss: jax.Array
) -> None:
    """Writes and checks what is due after a step, in the order of `optim_zoo.train.loop`."""
    due = loop.due(runs[0].job.config, done)
    if not any(due):
        return
    figures, skipped = group.figures(state, loss), group.skipped(state)
    held_out = group.evaluate(params) if due.evaluate else []
    saved = group.parameters(params) if due.save else []
    for index, run in enumerate(runs):
        if run.failure:
            continue
        try:
            run.health.check_figures(done, figures[index])
            if due.log:
                units = {run.job.task.unit: run.job.units_after(done)}
                run.sink.log(done, {**units, **figures[index]})
                run.health.check_skipped(done, skipped[index])
            if due.evaluate:
                run.health.check_evaluation(done, held_out[index])
                run.sink.evaluate(done, held_out[index])
            if due.save:
                run.health.check_parameters(done, saved[index])
        except UserError as error:
            run.failure = error


def _stacked(batches: Sequence[Batch]) -> Batch:
    """Returns the batches of all seeds along a new first axis."""
    try:
        return jax.tree.map(lambda *x: np.stack(x), *batches)
    except ValueError as error:
        raise UserError(
            "in_process=true needs batches of the same structure and shapes from every seed: "
            f"remove in_process ({error})"
        ) from error


def _check_seeds(jobs: Mapping[int, Job], params: Tree) -> None:
    """Checks that the seed changes the batches and the initial parameters only.

    Raises:
      UserError: the loss or the metrics of a task depend on its seed.
    """
    programs = {seed: _program(job.task, job.config, params) for seed, job in jobs.items()}
    texts = {text for text, _ in programs.values()}
    constants = [found for _, found in programs.values()]
    same = len(texts) == 1 and all(
        len(found) == len(constants[0]) and all(map(np.array_equal, found, constants[0]))
        for found in constants
    )
    if not same:
        raise UserError(
            "in_process=true needs a task whose loss and metrics depend on the seed through the "
            "batches alone: remove in_process"
        )


def _program(task: Task, config: Config, params: Tree) -> tuple[str, list[np.ndarray]]:
    """Returns the programs of loss and metrics as text without addresses, and their constants."""
    batch = task.batch(0, config.stages[0])
    made = [jax.make_jaxpr(function)(params, batch) for function in (task.loss, task.measure)]
    text = re.sub("0x[0-9a-f]+", "", "".join(map(str, made)))
    return text, [np.asarray(x) for each in made for x in each.consts]

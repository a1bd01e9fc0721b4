"""What a run computes, prepared from its config: the task, the training steps, the evaluation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optim_zoo import averaging, ranges, sharding
from optim_zoo.errors import UserError
from optim_zoo.train import (
    config_file,
    config_values,
    critical_batch_size,
    distributed,
    machine,
    optimization,
    saved_config,
    stopping,
)
from optim_zoo.train.config import Config
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.base import Task
from optim_zoo.tree import Tree


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that stays the same from the first step to the last."""

    config: Config
    folder: Path
    task: Task
    steps: Sequence[sharding.DataParallelStep]  # one per stage; they share parameters and state
    evaluate: Callable[[Tree], Mapping[str, float]]  # plain parameters -> held-out metrics
    machine: Mapping[str, str]

    def init(self, *, anew: bool = True) -> tuple[Tree, Tree]:
        """Returns the initial parameters and optimizer state, in the layout of `step`.

        Args:
          anew: whether the run starts with them, so that they are the task's pretrained ones if it
            has any. False if a checkpoint replaces their values.
        """
        params = initial_params(self.config, self.task)
        return self.steps[0].init(pretrained(self.task, params) if anew else params)

    def plain(self, tree: Tree) -> Tree:
        """Returns parameters or state in the layout of checkpoints and metrics."""
        return self.steps[0].global_arrays(tree)

    def step(self, number: int, params: Tree, state: Tree) -> tuple[Tree, Tree, jax.Array]:
        """Returns parameters and state after step ``number`` (from 0), and its loss.

        With accumulation the loss is the weighted mean over the batches of the step. The optimizer
        state holds it; batches that were skipped are not counted.
        """
        stage, every = self.config.stage_of(number), self.config.accumulation.every
        for index in range(number * every, (number + 1) * every):
            batch = self.task.batch(index, self.config.stages[stage])
            params, state, loss = self.steps[stage](params, state, batch)
        if every > 1:
            total, weight = self.plain((state.value, state.weight))
            loss = total / weight
        return params, state, loss

    def evaluated(self, params: Tree, state: Tree) -> Tree:
        """Returns the parameters to evaluate: plain ones, or their average if it is chosen."""
        params = self.plain(params)
        if not self._evaluates_average:
            return params
        average = averaging.read(self.plain(state), like=params)
        # ZeRO-1 shards it, and an evaluation adds up in the same order without ZeRO-1.
        return jax.device_put(average, jax.tree.map(lambda x: x.sharding, params))

    def units_after(self, steps: int) -> int:
        """Returns the units of the task (such as tokens) used after ``steps`` steps."""
        used = zip(self.config.batches_after(steps), self.config.stages, strict=True)
        return sum(batches * self.task.units(stage) for batches, stage in used)

    @property
    def info(self) -> Mapping[str, Any]:
        """What a checkpoint records about the machine, the data and the evaluations."""
        return {
            "machine": dict(self.machine),
            "identity": dict(self.task.identity),
            "evaluated": "average" if self._evaluates_average else "parameters",
        }

    @property
    def _evaluates_average(self) -> bool:
        return self.config.averaging.decay > 0 and self.config.averaging.evaluate


def prepare(config: Config, folder: Path) -> Job:
    """Returns the job of a config.

    Every error that can be found before the first step is raised here. Nothing is written except
    the cache of the task.

    Raises:
      UserError: the data cannot be used, a batch cannot be divided among the devices, a pattern
        of the optimizer matches nothing, or the model does not fit into memory.
    """
    with distributed.first_process_first("the task is prepared"):
        task = config_file.make_task(config, folder / "tokens")
    distributed.check_same({"config": saved_config.to_toml(config), **task.identity})
    mesh = Mesh(np.array(jax.devices()), ("data",))
    steps = _make_steps(config, task, mesh)
    _check_metric(config, task)
    return Job(config, folder, task, steps, evaluation(task, mesh), machine.describe())


def check_batches(config: Config, devices: int) -> None:
    """Checks that the batch of each stage can be divided among devices and micro-batches.

    Raises:
      UserError: a batch size is not a multiple of their product, or there is one device and one
        micro-batch where ``train.noise_scale`` needs several.
    """
    for index, stage in enumerate(config.stages):
        divisor = devices * stage.micro_batches
        if stage.batch_size % divisor:
            own = {"batch_size", "micro_batches"} & stage.table.keys()
            section = f"stages.{index}" if own else "train"
            raise UserError(
                f"{section}.batch_size must be divisible by {devices} devices x "
                f"{stage.micro_batches} micro-batches = {divisor}, got {stage.batch_size}"
            )
    critical_batch_size.check(config, devices)


def initial_params(config: Config, task: Task) -> Tree:
    """Returns the parameters before the first step, in the precision of the config."""

    def init(key: jax.Array) -> Tree:
        return jax.tree.map(lambda x: x.astype(config.precision.parameters), task.init(key))

    return jax.jit(init)(jax.random.key(config.run.seed, impl=KEYS))


def pretrained(task: Task, params: Tree) -> Tree:
    """Returns the task's pretrained parameters in the dtypes of the initial ones.

    Raises:
      ValueError: they have another structure or other shapes.
    """
    found = task.pretrained(params)
    if found is params:
        return params
    if jax.tree.map(np.shape, found) != jax.tree.map(np.shape, params):
        raise ValueError("Task.pretrained must return arrays of the structure and shapes of params")
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), found, params)


def _make_steps(config: Config, task: Task, mesh: Mesh) -> list[sharding.DataParallelStep]:
    """Returns the step of each stage; they share the optimizer and its state."""
    _check_memory(jax.eval_shape(lambda: initial_params(config, task)))
    bare = optimization.make_optimizer(config, task.layers)
    tx = optimization.wrapped(config, bare)

    def one_step(tx: optax.GradientTransformation) -> Tree:
        params = initial_params(config, task)
        return tx.update(params, tx.init(params), params)

    # Finds path patterns that match nothing, optimizers that need sparse gradients, and fields that
    # the state does not have.
    for section, trial in (
        ("optimizer", lambda: one_step(bare)),
        ("precision", lambda: tx.init(initial_params(config, task))),
    ):
        try:
            jax.eval_shape(trial)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"[{section}] {error}") from error
    if config.parallel.mode == "pmap" and distributed.several():
        raise UserError("parallel.mode=pmap is for one process: use jit or shard_map for several")

    def loss(params: Tree, batch: Tree) -> sharding.WeightedLoss:
        return sharding.WeightedLoss(*task.loss(params, batch))  # a task may return a plain pair

    return [
        sharding.data_parallel(
            loss,
            tx,
            mesh=mesh,
            mode=config.parallel.mode,
            micro_batches=stage.micro_batches,
            zero1="data" if config.parallel.zero1 else None,
            # With accumulation, `optimization.wrapped` measures it, from whole batches.
            noise_scale=config.train.noise_scale and config.accumulation.every == 1,
        )
        for stage in config.stages
    ]


def _check_metric(config: Config, task: Task) -> None:
    """Checks that the task measures the metric that ``output.keep_best`` names.

    Raises:
      UserError: it does not.
    """
    goal = config.output.keep_best
    if goal:
        params = jax.eval_shape(lambda: initial_params(config, task))
        measured = jax.eval_shape(task.measure, params, task.held_out()[0])
        with config_values.user_errors("output.keep_best"):
            ranges.check_choice("held-out metric", stopping.metric_of(goal), measured)


def _check_memory(params: Tree) -> None:
    """Checks that the parameters of a model, given as shapes, fit into the memory of this machine.

    If they did not, the operating system would kill the process or XLA would abort it.

    Raises:
      UserError: they do not fit.
    """
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    available = machine.memory()
    if available is not None and size > available * jax.process_count():
        raise UserError(
            f"the model has {count:,} parameters, which take {size / 2**30:,.0f} GiB; this machine "
            f"has {available / 2**30:,.0f} GiB of memory: lower the sizes in [model]"
        )


def evaluation(task: Task, mesh: Mesh) -> Callable[[Tree], Mapping[str, float]]:
    """Returns a function from parameters to the held-out metrics."""
    batches = task.held_out()
    # Replicated, because every process reads the result.
    measure = jax.jit(task.measure, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def sharded(batch: Mapping[str, np.ndarray]) -> Tree:
        rows = {len(x) for x in batch.values()}
        divides = all(number % mesh.size == 0 for number in rows)
        return sharding.put(batch, NamedSharding(mesh, PartitionSpec("data" if divides else None)))

    def evaluate(params: Tree) -> Mapping[str, float]:
        return metrics_of(jax.device_get([measure(params, sharded(batch)) for batch in batches]))

    return evaluate


def metrics_of(sums: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """Returns the held-out metrics, the loss first.

    Args:
      sums: what `Task.measure` returned for each held-out batch, as NumPy scalars.
    """
    metrics = {}
    for name in sorted(sums[0], key=lambda name: (name != "loss", name)):
        total, weight = np.array([each[name] for each in sums], np.float64).sum(axis=0)
        counted = weight != 0 or name == "loss"
        metrics[name] = float(total / weight) if counted else 0.0
    return metrics

"""A job's step and its optimizer, compiled for TPUs from shapes alone, and what they need there.

Nothing is run, and neither the text nor the vocabulary of the config is read.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hlo
from optim_zoo import clip_by_global_norm, registry, sharding
from optim_zoo.errors import UserError
from optim_zoo.train import optimization
from optim_zoo.train.config import Config, Stage
from optim_zoo.train.job import check_batches
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.bert.vocabulary import read_vocabulary
from optim_zoo.train.tasks.masked_language import batches
from optim_zoo.train.tasks.masked_language.task import init_bert, masked_loss, sequence_length
from optim_zoo.tree import Tree, by_path

LARGE = 1 << 18  # the elements that a large leaf has at least: 1 MiB in float32

# name -> (optimizer state sharded over "data", large parameters sharded over "data"); all use jit
LAYOUTS: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {"replicated": (False, False), "zero1": (True, False), "fsdp": (True, True)}
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a config trains. No array is allocated."""

    config: Config
    model: Bert
    params: Tree  # of ShapeDtypeStructs
    tx: optax.GradientTransformation

    def loss(self, params: Tree, batch: Tree) -> sharding.WeightedLoss:
        """Returns the training loss of a batch and its weight."""
        return masked_loss(self.model, params, batch)


def make_job(config: Config, vocabulary_size: int) -> Job:
    """Returns the job of a config.

    Args:
      config: the config. The files that it names need not exist.
      vocabulary_size: the number of tokens.
    """
    sizes = config.task_sections["model"]
    model = Bert(sizes, vocabulary_size)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=KEYS))
    length = sequence_length(config.stages[0])
    params = jax.eval_shape(lambda key: init_bert(model, length, key), key)
    tx = optimization.make_optimizer(config, layer_rules(sizes))
    return Job(config, model, params, tx)


def batch_shapes(config: Config, stage: Stage) -> Tree:
    """The shapes of a batch: those of a batch with one row, with as many rows as the stage has."""
    vocabulary = read_vocabulary("")
    row = batches.masked_batch(
        np.zeros(sequence_length(stage), vocabulary.dtype),
        vocabulary,
        seed=0,
        step=0,
        batch_size=1,
        sequence_length=sequence_length(stage),
    )
    if config.task_sections["model"].dropout:
        row["dropout_keys"] = np.zeros((1, 2), np.uint32)
    return {
        name: jax.ShapeDtypeStruct((stage.batch_size, *x.shape[1:]), x.dtype)
        for name, x in row.items()
    }


def make_mesh(topology: str) -> Mesh:
    """A mesh with one axis, "data", of all chips of a topology.

    Raises:
      UserError: there is no such topology.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise UserError(f"{topology} is no TPU topology such as v5e:4x4: {reason}") from error
    return Mesh(np.array(devices), ("data",))


def for_chips(config: Config, chips: int, most_chips: int) -> Config:
    """Returns the config for fewer chips, with more micro-batches of as many rows per chip.

    Args:
      config: the config as it is used on the most chips.
      chips: the number of chips to use it on.
      most_chips: the number of chips that its micro-batches apply to.

    Raises:
      UserError: a batch cannot be divided evenly.
    """
    check_batches(config, most_chips)
    if most_chips % chips:
        raise UserError(
            f"{most_chips} chips must be a multiple of {chips}: compile them separately"
        )
    times = most_chips // chips

    stages = tuple(
        dataclasses.replace(stage, micro_batches=stage.micro_batches * times)
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=stages)


def make_step(job: Job, stage: Stage, layout: str, mesh: Mesh) -> sharding.DataParallelStep:
    """Returns the step of a stage in one of `LAYOUTS`."""
    shard_state, shard_parameters = LAYOUTS[layout]
    return sharding.data_parallel(
        job.loss,
        job.tx,
        mesh=mesh,
        micro_batches=stage.micro_batches,
        zero1="data" if shard_state else None,
        param_shardings=sharding_rules(job.params, mesh) if shard_parameters else (),
    )


def sharding_rules(params: Tree, mesh: Mesh, large: int = LARGE) -> list[tuple[str, PartitionSpec]]:
    """Rules that shard every large parameter as ZeRO-1 shards its momentum.

    That is along its longest dimension that the number of devices divides.
    """
    momentum = optax.trace(0.9)
    shardings: Any = sharding.state_shardings(momentum, params, mesh=mesh, zero1="data")
    specs = by_path(shardings.trace)
    return [
        (f"^{re.escape(path)}$", specs[path].spec)
        for path, x in by_path(params).items()
        if x.size >= large
    ]


def measure_step(job: Job, stage: Stage, layout: str, mesh: Mesh) -> dict[str, Any]:
    """Returns the memory and the collectives of a stage's step on one chip."""
    lowered = make_step(job, stage, layout, mesh).lower(job.params, batch_shapes(job.config, stage))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, _ = needed_and_available(error)
        return {"fits": False, "memory": {"peak": needed}}
    return {
        "fits": True,
        "memory": memory(compiled),
        "collectives": hlo.collectives(hlo.parse_module(compiled.as_text() or "")),
    }


def memory(compiled: Any) -> dict[str, int]:
    """Returns the compiler's figures for one chip, in bytes."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def needed_and_available(error: Exception) -> tuple[int, int]:
    """The bytes that a program needs and those that a chip has, from the compiler's message.

    Raises:
      Exception: ``error`` itself, if it is not about memory.
    """
    message = re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
        r"|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
        str(error),
    )
    if message is None:
        raise error
    needed, of_needed, available, of_available = (group for group in message.groups() if group)
    scale = {unit: 1 << 10 * power for power, unit in enumerate("KMGT", 1)}
    return int(float(needed) * scale[of_needed]), int(float(available) * scale[of_available])


def available_memory(mesh: Mesh) -> int:
    """Returns the bytes of a chip that a program may use.

    They are in the compiler's message about a program that is too large.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    too_large = jax.ShapeDtypeStruct((1 << 22, 1 << 16), np.float32, sharding=replicated)
    try:
        jax.jit(lambda x: x + 1, out_shardings=replicated).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return needed_and_available(error)[1]
    raise AssertionError("a program of 2 TiB must be refused")


def measure_update(
    tx: optax.GradientTransformation, params: Tree, mesh: Mesh, large: int = LARGE
) -> dict[str, Any]:
    """Returns the passes that an optimizer's update makes over large leaves.

    The update is compiled without the model. Parameters and state are replicated and donated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def update(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        (params, jax.eval_shape(tx.init, params), params),
    )
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()
    sizes = [x.size for x in jax.tree.leaves(params) if x.size >= large]
    fusions, arrays = hlo.passes(hlo.parse_module(compiled.as_text() or ""), sizes)
    return {
        "large_leaves": len(sizes),
        "fusions_per_large_leaf": round(fusions, 2),
        "arrays_moved_per_large_leaf": round(arrays, 2),
        "memory": memory(compiled),
    }


def updates(job: Job) -> dict[str, optax.GradientTransformation]:
    """The config's optimizer and the same chain with ``optax.lamb``, without and with clipping."""
    choice = job.config.optimizer
    constructor = registry.get(choice.name).constructor
    schedule = optimization.make_schedule(job.config)
    rules = {"layers": layer_rules(job.config.task_sections["model"])}
    known = rules if "layers" in inspect.signature(constructor).parameters else {}
    shared = {key: choice.arguments[key] for key in ("b1", "b2", "eps", "weight_decay")
              if key in choice.arguments}  # fmt: skip
    peer = optax.lamb(schedule, **shared)
    return {
        f"optim_zoo.{choice.name}": constructor(schedule, **choice.arguments, **known),
        "optax.lamb": peer,
        f"clip + optim_zoo.{choice.name}": job.tx,
        "clip + optax.lamb": optax.chain(clip_by_global_norm(job.config.train.clip_norm), peer),
    }

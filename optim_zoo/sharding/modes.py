"""One function per mode of `data_parallel`. Each fills the record `DataParallelStep`.

Modes ``jit`` and ``shard_map`` work on global arrays, and differ only in the function that they
compile. Mode ``pmap`` gives its arrays an axis of devices: see ``device_axis``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optim_zoo import rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.sharding import device_axis, gradients, placement
from optim_zoo.sharding.auxiliary import Aux
from optim_zoo.sharding.losses import LossFn
from optim_zoo.sharding.record import DataParallelStep, Step
from optim_zoo.tree import Tree


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `data_parallel` that every mode uses."""

    loss_fn: LossFn
    tx: optax.GradientTransformationExtraArgs
    mesh: Mesh
    batch_axis: str
    micro_batches: int
    has_aux: bool
    noise_scale: bool  # whether the state of ``tx`` is a `NoiseScaleState`

    @property
    def devices(self) -> int:
        """The number of devices that the batch is divided over."""
        return self.mesh.shape[self.batch_axis]

    @property
    def batch_divisor(self) -> int:
        """See `DataParallelStep`."""
        return self.devices * self.micro_batches

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a batch."""
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axis))


def jit_step(
    settings: Settings, *, zero1: str | None, param_shardings: rules.Rules
) -> DataParallelStep:
    """Returns the step on global arrays; the compiler divides the work over the devices."""
    placement.check_axis("zero1", zero1, settings.mesh)
    rules.check_rules("param_shardings", param_shardings)
    replicated = NamedSharding(settings.mesh, PartitionSpec())
    update = _make_update(settings, _mean_gradient_of_global_arrays(settings))
    shardings = functools.partial(
        placement.step_shardings,
        settings.tx,
        mesh=settings.mesh,
        zero1=zero1,
        param_shardings=param_shardings,
    )

    def step(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        of_params, of_state = shardings(params)
        params, state, loss, aux = update(params, state, batch)
        return (
            jax.lax.with_sharding_constraint(params, of_params),
            jax.lax.with_sharding_constraint(state, of_state),
            jax.lax.with_sharding_constraint(loss, replicated),
            aux,
        )

    patterns = [pattern for pattern, _ in param_shardings]
    return _step_of_global_arrays(settings, step, shardings, patterns)


def shard_map_step(settings: Settings) -> DataParallelStep:
    """Returns the step that ``shard_map`` runs on each device; the state is replicated."""
    update = _make_update(settings, _mean_gradient_of_device(settings))

    def step(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        replicated, rows = PartitionSpec(), PartitionSpec(settings.batch_axis)
        return jax.shard_map(
            update,
            mesh=settings.mesh,
            in_specs=(replicated, replicated, rows),
            out_specs=(replicated, replicated, replicated, Aux(replicated, rows)),
        )(params, state, batch)

    shardings = functools.partial(placement.step_shardings, settings.tx, mesh=settings.mesh)
    return _step_of_global_arrays(settings, step, shardings)


def _step_of_global_arrays(
    settings: Settings,
    step: Step,
    shardings: Callable[[Tree], tuple[Tree, Tree]],
    patterns: Sequence[str] = (),
) -> DataParallelStep:
    """Returns the record around ``step``.

    Args:
      settings: see `Settings`.
      step: a function of global arrays, to be compiled, which returns an `Aux`.
      shardings: the shardings of parameters and state, as a function of the parameters.
      patterns: the path patterns of ``param_shardings``.
    """
    tx, mesh, rows = settings.tx, settings.mesh, settings.rows

    def joined(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        *made, aux = step(params, state, batch)
        return (*made, aux.joined()) if settings.has_aux else tuple(made)

    compiled = jax.jit(joined, donate_argnums=(0, 1))

    def call(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        _check_batch(settings, batch)
        with jax.set_mesh(mesh):
            return compiled(params, state, placement.put(batch, rows))

    def init(params: Tree) -> tuple[Tree, optax.OptState]:
        rules.check_matches("param_shardings", patterns, params)
        of_params, of_state = shardings(params)
        params = placement.copied(params, of_params, mesh=mesh)
        with jax.set_mesh(mesh):
            return params, jax.jit(tx.init, out_shardings=of_state)(params)

    def lower(params: Tree, batch: Tree) -> jax.stages.Lowered:
        arguments = (params, jax.eval_shape(tx.init, params), batch)
        of_batch = jax.tree.map(lambda _: rows, batch)
        placed = placement.shapes(arguments, (*shardings(params), of_batch))
        with jax.set_mesh(mesh):
            return compiled.lower(*placed)

    def place(params: Tree, state: optax.OptState) -> tuple[Tree, optax.OptState]:
        of_params, of_state = shardings(params)
        return placement.put(params, of_params), placement.put(state, of_state)

    return DataParallelStep(
        step=call,
        init=init,
        params=functools.partial(placement.on_one_device, mesh=mesh),
        lower=lower,
        global_arrays=lambda tree: tree,
        place=place,
        batch_divisor=settings.batch_divisor,
    )


def pmap_step(settings: Settings) -> DataParallelStep:
    """Returns the step that ``pmap`` runs on each device, with a copy of parameters and state."""
    _check_pmap(settings)
    tx, mesh, by_device = settings.tx, settings.mesh, settings.rows
    devices = list(mesh.devices.flat)
    update = _make_update(settings, _mean_gradient_of_device(settings))
    compiled = jax.pmap(update, settings.batch_axis, devices=devices, donate_argnums=(0, 1))
    compiled_init = jax.pmap(tx.init, settings.batch_axis, devices=devices)

    def call(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        _check_batch(settings, batch)
        batch = device_axis.batch_divided(batch, by_device)
        params, state, loss, aux = compiled(params, state, batch)
        made = (params, state, loss[0])
        return (*made, device_axis.removed_from_aux(aux).joined()) if settings.has_aux else made

    def init(params: Tree) -> tuple[Tree, optax.OptState]:
        params = device_axis.new_copies(params, by_device)
        return params, compiled_init(params)

    def first_copy(params: Tree) -> Tree:
        return placement.on_one_device(jax.tree.map(lambda x: x[0], params), mesh=mesh)

    def lower(params: Tree, batch: Tree) -> jax.stages.Lowered:
        copies = (params, jax.eval_shape(tx.init, params))
        return compiled.lower(
            *device_axis.copied_shapes(copies, by_device),
            device_axis.divided_shapes(batch, by_device),
        )

    return DataParallelStep(
        step=call,
        init=init,
        params=first_copy,
        lower=lower,
        global_arrays=lambda tree: device_axis.removed(tree, by_device),
        place=lambda params, state: device_axis.added((params, state), by_device),
        batch_divisor=settings.batch_divisor,
    )


def _mean_gradient_of_global_arrays(settings: Settings) -> Callable[[Tree, Tree], tuple[Any, ...]]:
    """Returns the mean gradient outside of a mapped context, as a function of params and batch."""
    mean_gradient = functools.partial(gradients.mean_gradient, has_aux=settings.has_aux)
    if settings.micro_batches > 1 or settings.noise_scale:
        mean_gradient = functools.partial(
            gradients.mean_gradient_by_device,
            mesh=settings.mesh,
            axis_name=settings.batch_axis,
            micro_batches=settings.micro_batches,
            has_aux=settings.has_aux,
            spread=settings.noise_scale,
        )
    return functools.partial(mean_gradient, settings.loss_fn)


def _mean_gradient_of_device(settings: Settings) -> Callable[[Tree, Tree], tuple[Any, ...]]:
    """Returns the mean gradient in a mapped context, as a function of parameters and rows."""
    return functools.partial(
        gradients.mean_gradient,
        settings.loss_fn,
        micro_batches=settings.micro_batches,
        axis_name=settings.batch_axis,
        has_aux=settings.has_aux,
        spread=settings.noise_scale,
    )


def _make_update(
    settings: Settings, mean_gradient: Callable[[Tree, Tree], tuple[Any, ...]]
) -> Step:
    """Returns one step of the optimizer, to be compiled, which returns an `Aux`."""
    tx = settings.tx
    accepted = _keywords_accepted(tx.update, ("value", "weight"))

    def update(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        loss, weight, gradient, aux, spread = mean_gradient(params, batch)
        if settings.noise_scale:
            state = state._replace(spread=spread)
        extra = {"value": loss, "weight": weight}
        extra = {name: extra[name] for name in accepted}
        updates, state = tx.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss, aux

    return update


def _keywords_accepted(function: Callable[..., Any], names: Sequence[str]) -> list[str]:
    """Returns those of ``names`` that ``function`` accepts as keywords."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(names)
    return [name for name in names if name in parameters]


def _check_batch(settings: Settings, batch: Tree) -> None:
    """Raises unless the batch can be divided over devices and micro-batches."""
    divisor, devices = settings.batch_divisor, settings.devices
    for x in jax.tree.leaves(batch):
        rows = jnp.shape(x)[0] if jnp.ndim(x) else 0
        if rows == 0 or rows % divisor:
            product = f"{devices} devices x {settings.micro_batches} micro-batches"
            expected = f"divisible by {divisor} ({product})"
            raise ArgumentValueError(
                "batch",
                f"have first axes {expected}",
                jnp.shape(x),
                sentence=f"the first axis of every array in the {{argument}} must be {expected}, "
                f"got shape {jnp.shape(x)}",
            )


def _check_pmap(settings: Settings) -> None:
    """Raises unless the mesh has no other axis than the batch axis, and no other process."""
    mesh, advice = settings.mesh, "use 'jit' or 'shard_map'"
    if mesh.size != settings.devices:
        raise ArgumentValueError(
            "mode",
            "be 'jit' or 'shard_map' unless batch_axis is the whole mesh",
            "pmap",
            advice,
            sentence=f"{{argument}} 'pmap' must have the whole mesh along "
            f"{settings.batch_axis!r}, got {dict(mesh.shape)}: {advice}",
            related=["mesh", "batch_axis"],
        )
    if not settings.rows.is_fully_addressable:
        raise ArgumentValueError(
            "mode",
            "be 'jit' or 'shard_map' with several processes",
            "pmap",
            advice,
            sentence=f"{{argument}} 'pmap' must have one process: {advice}",
        )

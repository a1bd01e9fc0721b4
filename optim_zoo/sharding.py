"""Where optimizer state lives, and one training step over all devices of a mesh.

Optimizer state is mostly as large as the parameters, twice. `state_shardings` says where it goes:
like the parameters, or spread over the data axis as well (ZeRO-1, arXiv 1910.02054)::

    state = sharding.init(tx, params, mesh=mesh, zero1="data")

`data_parallel` makes the whole step, in one of three modes that give the same numbers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, map_with_path, varying_axes, wide

LossFn = Callable[[Tree, Tree], Any]


def state_shardings(
    tx: optax.GradientTransformation, params: Tree, *, mesh: Mesh, zero1: str | None = None
) -> Tree:
    """A `NamedSharding` for every array in the state of ``tx``.

    What is like a parameter lies as the parameter does, other state on every device. With
    ``zero1`` the former is spread over that axis too: along its longest dimension that is not cut
    yet and divides. Where none divides it stays as the parameter: see `unspread`.

    Args:
      tx: the optimizer.
      params: arrays, or ``jax.ShapeDtypeStruct``s; one without a `NamedSharding` counts as
        replicated.
      mesh: the devices.
      zero1: the mesh axis to spread the state over, mostly that of the batch.

    Raises:
      ValueError: the mesh has no such axis.
    """
    _check_axis("zero1", zero1, mesh)

    def like(value: Any, x: Any) -> Any:
        if _is_masked(value):
            return value
        spec = _spec(x)
        return NamedSharding(mesh, spec if zero1 is None else _spread(x.shape, spec, mesh, zero1))

    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(
        tx,
        like,
        state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=_is_masked,
    )
    return jax.tree.broadcast(shardings, state)


def _is_masked(x: Any) -> bool:
    """Whether ``x`` stands where a part of the state holds nothing for a parameter."""
    return isinstance(x, optax.MaskedNode)


def unspread(params: Tree, *, mesh: Mesh, zero1: str) -> list[str]:
    """The paths of the parameters whose state ``zero1`` leaves whole, for no dimension divides.

    Raises:
      ValueError: the mesh has no such axis.
    """
    _check_axis("zero1", zero1, mesh)
    whole = map_with_path(lambda path, x: path if _spread(x.shape, _spec(x), mesh, zero1)
                          == _spec(x) else "", params)  # fmt: skip
    return [path for path in jax.tree.leaves(whole) if path]


def init(
    tx: optax.GradientTransformation, params: Tree, *, mesh: Mesh, zero1: str | None = None
) -> optax.OptState:
    """The state of ``tx``, made where `state_shardings` wants it.

    ``jax.jit(tx.init)(params)`` alone puts it on one device, whatever the parameters' sharding.

    Raises:
      ValueError: see `state_shardings`.
    """
    shardings = state_shardings(tx, params, mesh=mesh, zero1=zero1)
    with jax.set_mesh(_automatic(mesh)):
        return jax.jit(tx.init, out_shardings=shardings)(params)


def _automatic(mesh: Mesh) -> Mesh:
    """The mesh with Auto axes: where to cut what lies between is left to the compiler."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _check_axis(name: str, axis: Any, mesh: Mesh) -> None:
    if axis is not None and axis not in mesh.shape:
        raise ArgumentValueError(name, f"be one of {tuple(mesh.shape)}", axis)


def _spec(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _spread(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, axis: str) -> PartitionSpec:
    """``spec`` with ``axis`` on the longest free dimension that divides; else ``spec`` itself."""
    cuts = [*spec, *[None] * (len(shape) - len(spec))]
    used = [name for cut in cuts for name in (cut if isinstance(cut, tuple) else (cut,))]
    size = mesh.shape[axis]
    free = [i for i, cut in enumerate(cuts) if cut is None and shape[i] and shape[i] % size == 0]
    if axis in used or not free:
        return spec
    longest = max(free, key=lambda i: shape[i])
    cuts[longest] = axis
    while cuts[-1] is None:  # as the compiler writes it; else the second step compiles anew
        cuts.pop()
    return PartitionSpec(*cuts)


def put(tree: Tree, sharding: Any) -> Tree:
    """The arrays of ``tree`` laid out by ``sharding``: one for all, or a tree of them.

    As ``jax.device_put``, except that with several processes each hands over what its own devices
    hold, of values that are the same in all of them: ``jax.device_put`` would send every array
    around to compare it.
    """

    def put_leaf(x: Any, sharding: Any) -> jax.Array:
        if not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put_leaf(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    if all(one.is_fully_addressable for one in jax.tree.leaves(sharding)):
        return jax.device_put(tree, sharding)  # all arrays at once
    return jax.tree.map(put_leaf, tree, jax.tree.broadcast(sharding, tree))


class DataParallelStep:
    """A compiled, donating training step; made by `data_parallel`.

    ::

        params, state = step.init(params)
        params, state, loss = step(params, state, batch)  # and aux, where there is one

    With several processes, each calls every method with the same whole values, or with arrays that
    span the processes.
    """

    _step: Callable[..., Any]  # (params, state, batch) -> what a call returns; of each mode

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        mesh: Mesh,
        batch_axis: str,
        micro_batches: int,
        has_aux: bool,
    ) -> None:
        # Whatever the types of the given mesh's axes are (`jax.make_mesh` makes them Explicit),
        # so that any loss will do.
        self._mesh = _automatic(mesh)
        self._batch_axis = batch_axis
        self.batch_divisor = mesh.shape[batch_axis] * micro_batches
        self._tx = optax.with_extra_args_support(tx)
        self._tells = _names_taken(self._tx.update, ("value", "weight"))
        self._loss_fn = loss_fn
        self._micro_batches = micro_batches
        self._has_aux = has_aux
        self._replicated = NamedSharding(self._mesh, PartitionSpec())
        self._rows = NamedSharding(self._mesh, PartitionSpec(batch_axis))

    def init(self, params: Tree) -> tuple[Tree, optax.OptState]:
        """Copies of ``params`` where the step wants them, and the optimizer's state.

        They are copies because a step donates its arguments, and the caller's arrays live on.
        """
        raise NotImplementedError

    def __call__(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        """``(params, state, loss)`` after one step, and aux where the loss has it.

        Raises:
          ArgumentValueError: the batch does not divide over devices and micro-batches.
        """
        for x in jax.tree.leaves(batch):
            rows = jnp.shape(x)[0] if jnp.ndim(x) else 0
            if rows == 0 or rows % self.batch_divisor:
                devices = self.batch_divisor // self._micro_batches
                expected = (
                    f"divide by {self.batch_divisor} ({devices} devices x {self._micro_batches} "
                    f"micro-batches)"
                )
                raise ArgumentValueError(
                    "batch",
                    f"have first axes that {expected}",
                    jnp.shape(x),
                    sentence=f"the first axis of every array in the {{argument}} must {expected}, "
                    f"got shape {jnp.shape(x)}",
                )
        return self._run(params, state, batch)

    def lower(self, params: Tree, batch: Tree) -> jax.stages.Lowered:
        """The step for arguments of these shapes, not run.

        ``.compile()`` of what it returns tells memory, cost and collectives. The arguments are
        arrays or ``jax.ShapeDtypeStruct``s, and the devices of the mesh need not be there
        (``jax.experimental.topologies``).
        """
        state = jax.eval_shape(self._tx.init, params)
        of_params, of_state = self._shardings(params)
        of_batch = jax.tree.map(lambda _: self._rows, batch)
        arguments = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (params, state, batch),
            (of_params, of_state, of_batch),
        )
        with jax.set_mesh(self._mesh):
            return self._step.lower(*arguments)  # type: ignore[attr-defined]

    def _shardings(self, params: Tree) -> tuple[Tree, Tree]:
        """Of the parameters and of the state."""
        state = jax.eval_shape(self._tx.init, params)
        return jax.tree.map(lambda _: self._replicated, (params, state))

    def params(self, params: Tree) -> Tree:
        """Plain parameters on one device, as copies: the next step donates what it is given.

        With several processes, on one device of each.
        """
        device = SingleDeviceSharding(self._mesh.local_devices[0])

        def plain(x: jax.Array) -> jax.Array:
            if not x.is_fully_addressable:
                if not x.is_fully_replicated:
                    x = jax.device_put(x, self._replicated)
                x = x.addressable_data(0)
            return jax.device_put(x, device, may_alias=False)

        return jax.tree.map(plain, params)

    def uncopied(self, tree: Tree) -> Tree:
        """Parameters or state as they are in every mode, for checkpoints and metrics.

        That is: without the axis of copies that mode ``"pmap"`` has. Each process still holds its
        devices' part, and the arrays are not copies: the next step donates them.
        """
        return tree

    def place(self, params: Tree, state: optax.OptState) -> tuple[Tree, optax.OptState]:
        """The inverse of `uncopied`: arrays of a checkpoint where the step wants them.

        They are given away: a step donates them, and this may make no copy.
        """
        of_params, of_state = self._shardings(params)
        return put(params, of_params), put(state, of_state)

    def _copied(self, params: Tree, shardings: Tree) -> Tree:
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        with jax.set_mesh(self._mesh):
            # Placed first, because jit takes no array that is committed to other devices.
            return copy(put(params, shardings))

    def _run(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        with jax.set_mesh(self._mesh):
            return self._step(params, state, put(batch, self._rows))

    def _update(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        loss, weight, gradients, aux = self._loss_and_gradients(params, batch)
        told = {"value": loss, "weight": weight}
        told = {name: told[name] for name in self._tells}
        updates, state = self._tx.update(gradients, state, params, **told)
        params = optax.apply_updates(params, updates)
        return (params, state, loss, aux) if self._has_aux else (params, state, loss)

    def _loss_and_gradients(
        self, params: Tree, batch: Tree
    ) -> tuple[jax.Array, jax.Array, Tree, Tree]:
        """The mean loss over the global batch, its weight, its gradients, and aux."""
        sums, aux = self._accumulated(params, batch)
        return *_divided(*sums), aux

    def _accumulated(self, params: Tree, batch: Tree) -> tuple[tuple[Tree, Any, Any], Tree]:
        """Sums over the micro-batches: of gradients, losses and weights; and aux."""
        if self._micro_batches == 1:
            return self._sums(params, batch)

        def add(carry: Tree, micro_batch: Tree) -> tuple[Tree, Tree]:
            sums, aux = self._sums(params, micro_batch)
            return jax.tree.map(jnp.add, carry, sums), aux

        zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)
        start = (zeros, jnp.zeros((), float), jnp.zeros((), float))
        return jax.lax.scan(add, self._apart(start), self._split(batch))

    def _apart(self, tree: Tree) -> Tree:
        """``tree``, as what each device has of its own; of the mapped modes."""
        return tree

    def _sums(self, params: Tree, batch: Tree) -> tuple[tuple[Tree, Any, Any], Tree]:
        """The gradient of loss times weight, that itself, and the weight; and aux."""

        def objective(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            value = self._loss_fn(params, batch)
            loss, aux = value if self._has_aux else (value, None)
            total, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
            return jnp.asarray(total, float), (jnp.asarray(weight, float), aux)

        (total, (weight, aux)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return (gradients, total, weight), aux

    def _split(self, batch: Tree) -> Tree:
        """Micro-batches along a new first axis: every n-th row, so that no row changes device."""
        return jax.tree.map(
            lambda x: jnp.reshape(x, (-1, self._micro_batches, *x.shape[1:])).swapaxes(0, 1), batch
        )


def _names_taken(function: Callable[..., Any], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that ``function`` takes as keywords."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(names)
    return [name for name in names if name in parameters]


def _divided(
    gradients: Tree, total: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, Tree]:
    """The mean loss, its weight and its gradients, out of sums."""
    # No weight at all (a batch without a masked token): no gradient, rather than 0 / 0.
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    return total * scale, weight, jax.tree.map(lambda g: wide(g) * scale, gradients)


class _JitStep(DataParallelStep):
    """Arrays are global; the compiler cuts the work."""

    def __init__(
        self, *args: Any, zero1: str | None, param_shardings: rules.Rules, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_axis("zero1", zero1, self._mesh)
        rules.check_rules("param_shardings", param_shardings)
        self._zero1 = zero1
        self._param_shardings = param_shardings
        self._by_device = _ShardMapStep(*args, **kwargs)
        self._step = jax.jit(self._constrained, donate_argnums=(0, 1))

    def init(self, params: Tree) -> tuple[Tree, optax.OptState]:
        pattern_names = [pattern for pattern, _ in self._param_shardings]
        rules.check_matches("param_shardings", pattern_names, params)
        placed, _ = self._shardings(params)
        params = self._copied(params, placed)
        return params, init(self._tx, params, mesh=self._mesh, zero1=self._zero1)

    def _shardings(self, params: Tree) -> tuple[Tree, Tree]:
        specs = rules.assign("param_shardings", self._param_shardings, params, PartitionSpec())
        placed = map_with_path(lambda path, x, spec: self._checked(path, x, spec), params, specs)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            params,
            placed,
        )
        return placed, state_shardings(self._tx, like, mesh=self._mesh, zero1=self._zero1)

    def _checked(self, path: str, x: Any, spec: Any) -> NamedSharding:
        if not isinstance(spec, PartitionSpec):
            raise ArgumentTypeError(
                "param_shardings",
                "give a PartitionSpec for every pattern",
                spec,
                sentence=f"{{argument}}: {path} must have a PartitionSpec, got {spec!r}",
            )
        sharding = NamedSharding(self._mesh, spec)
        try:
            sharding.shard_shape(jnp.shape(x))
        except ValueError:
            raise ArgumentValueError(
                "param_shardings",
                "give a PartitionSpec that divides the leaf",
                spec,
                sentence=f"{{argument}}: {path} of shape {jnp.shape(x)} cannot be cut by {spec} "
                f"over the mesh {dict(self._mesh.shape)}",
            ) from None
        return sharding

    def _constrained(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        """The step, whose results lie where its arguments did."""
        placed, of_state = self._shardings(params)
        new_params, new_state, loss, *aux = self._update(params, state, batch)
        return (
            jax.lax.with_sharding_constraint(new_params, placed),
            jax.lax.with_sharding_constraint(new_state, of_state),
            jax.lax.with_sharding_constraint(loss, self._replicated),
            *aux,
        )

    def _loss_and_gradients(
        self, params: Tree, batch: Tree
    ) -> tuple[jax.Array, jax.Array, Tree, Tree]:
        if self._micro_batches == 1:
            return super()._loss_and_gradients(params, batch)
        # Left to the compiler, gradients would be added over the devices in every micro-batch,
        # and in the dtype of the model's arithmetic.
        return self._by_device.gradients(params, batch)


class _MappedStep(DataParallelStep):
    """Every device works on its own rows; sums go over the batch axis, once a step."""

    def _loss_and_gradients(
        self, params: Tree, batch: Tree
    ) -> tuple[jax.Array, jax.Array, Tree, Tree]:
        # Made to vary by type: the gradient of a replicated value would be summed over devices
        # already, and the sum that follows count it once a device.
        sums, aux = self._accumulated(self._apart(params), batch)
        sums = jax.tree.map(lambda x: jax.lax.psum(wide(x), self._batch_axis), sums)
        scalar = int(self._micro_batches > 1)  # which then are a new first axis
        averaged = jax.tree.map(
            lambda x: jax.lax.pmean(x, self._batch_axis) if jnp.ndim(x) == scalar else x, aux
        )
        return *_divided(*sums), averaged


class _ShardMapStep(_MappedStep):
    """``shard_map`` with ``check_vma=True`` over replicated parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step = jax.jit(self._mapped, donate_argnums=(0, 1))

    def init(self, params: Tree) -> tuple[Tree, optax.OptState]:
        params = self._copied(params, self._replicated)
        return params, init(self._tx, params, mesh=self._mesh)

    def gradients(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array, Tree, Tree]:
        """`_loss_and_gradients` of global arrays; axes other than the batch's stay as they are."""
        whole, rows = PartitionSpec(), PartitionSpec(self._batch_axis)
        return jax.shard_map(
            self._loss_and_gradients,
            mesh=self._mesh,
            in_specs=(whole, rows),
            out_specs=(whole, whole, whole, self._aux_specs(params, batch)),
            axis_names={self._batch_axis},
        )(params, batch)

    def _mapped(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        whole, rows = PartitionSpec(), PartitionSpec(self._batch_axis)
        out_specs: tuple[Any, ...] = (whole, whole, whole)
        if self._has_aux:
            out_specs += (self._aux_specs(params, batch),)
        return jax.shard_map(
            self._update, mesh=self._mesh, in_specs=(whole, whole, rows), out_specs=out_specs
        )(params, state, batch)

    def _aux_specs(self, params: Tree, batch: Tree) -> Tree:
        """Arrays of aux are joined along their rows; scalars are the same on every device."""
        if not self._has_aux:
            return None
        local = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // self.batch_divisor, *x.shape[1:]),
                                           x.dtype), batch)  # fmt: skip
        _, aux = jax.eval_shape(self._loss_fn, params, local)
        later = (None,) * (self._micro_batches > 1)
        joined = PartitionSpec(*later, self._batch_axis)
        return jax.tree.map(lambda x: joined if x.ndim else PartitionSpec(), aux)

    def _apart(self, tree: Tree) -> Tree:
        def apart(x: jax.Array) -> jax.Array:
            if self._batch_axis in varying_axes(x):
                return x
            return jax.lax.pcast(x, self._batch_axis, to="varying")

        return jax.tree.map(apart, tree)


class _PmapStep(_MappedStep):
    """``pmap`` over copies of the parameters, one a device along a new first axis."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._mesh.size != self._mesh.shape[self._batch_axis]:
            raise ArgumentValueError(
                "mode",
                "be 'jit' or 'shard_map' unless batch_axis is the whole mesh",
                "pmap",
                "use 'jit' or 'shard_map'",
                sentence=f"{{argument}} 'pmap' must have the whole mesh along "
                f"{self._batch_axis!r}, got {dict(self._mesh.shape)}: use 'jit' or 'shard_map'",
                related=["mesh", "batch_axis"],
            )
        devices = list(self._mesh.devices.flat)
        if not self._replicated.is_fully_addressable:
            advice = "use 'jit' or 'shard_map'"
            raise ArgumentValueError(
                "mode",
                "be 'jit' or 'shard_map' with several processes",
                "pmap",
                advice,
                sentence=f"{{argument}} 'pmap' must have one process: {advice}",
            )
        self._step = jax.pmap(
            self._update, self._batch_axis, devices=devices, donate_argnums=(0, 1)
        )
        self._init = jax.pmap(self._tx.init, self._batch_axis, devices=devices)

    def init(self, params: Tree) -> tuple[Tree, optax.OptState]:
        copies = jax.tree.map(lambda x: jnp.stack([x] * self._mesh.size), jax.device_get(params))
        params = jax.device_put(copies, self._rows)
        return params, self._init(params)

    def lower(self, params: Tree, batch: Tree) -> jax.stages.Lowered:
        """See `DataParallelStep.lower`."""
        state = jax.eval_shape(self._tx.init, params)

        def along_devices(x: Any, copied: bool) -> jax.ShapeDtypeStruct:
            rows = x.shape if copied else (x.shape[0] // self._mesh.size, *x.shape[1:])
            return jax.ShapeDtypeStruct((self._mesh.size, *rows), x.dtype)

        copies = jax.tree.map(lambda x: along_devices(x, True), (params, state))
        rows = jax.tree.map(lambda x: along_devices(x, False), batch)
        return self._step.lower(*copies, rows)  # type: ignore[attr-defined]

    def params(self, params: Tree) -> Tree:
        """The copy of the first device, as a copy of its own."""
        return super().params(jax.tree.map(lambda x: x[0], params))

    def uncopied(self, tree: Tree) -> Tree:
        """See `DataParallelStep.uncopied`: every device's copy is one of a replicated array."""

        def joined(x: jax.Array) -> jax.Array:
            copies = [shard.data.squeeze(0) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], self._replicated, copies)

        return jax.tree.map(joined, tree)

    def place(self, params: Tree, state: optax.OptState) -> tuple[Tree, optax.OptState]:
        """See `DataParallelStep.place`."""

        def copied(x: Any) -> jax.Array:
            copies = [shard.data[None] for shard in put(x, self._replicated).addressable_shards]
            shape = (self._mesh.size, *jnp.shape(x))
            return jax.make_array_from_single_device_arrays(shape, self._rows, copies)

        copied_params, copied_state = jax.tree.map(copied, (params, state))
        return copied_params, copied_state

    def _run(self, params: Tree, state: optax.OptState, batch: Tree) -> tuple[Any, ...]:
        def cut(x: jax.Array) -> jax.Array:
            rows = jnp.reshape(x, (self._mesh.size, -1, *jnp.shape(x)[1:]))
            return jax.device_put(rows, self._rows)

        params, state, loss, *aux = self._step(
            params,
            state,
            jax.tree.map(cut, batch),
        )
        axis = 1 + (self._micro_batches > 1)  # of the rows, behind that of the devices

        def joined(x: jax.Array) -> jax.Array:
            if x.ndim == axis:
                return x[0]
            x = jnp.moveaxis(x, 0, axis - 1)
            return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])

        return (params, state, loss[0], *jax.tree.map(joined, aux))


_MODES: Mapping[str, type[DataParallelStep]] = MappingProxyType(
    {"jit": _JitStep, "shard_map": _ShardMapStep, "pmap": _PmapStep}
)


def data_parallel(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    mode: str = "jit",
    batch_axis: str = "data",
    micro_batches: int = 1,
    zero1: str | None = None,
    param_shardings: rules.Rules = (),
    has_aux: bool = False,
) -> DataParallelStep:
    """A training step that spreads its batch over ``batch_axis`` of ``mesh``.

    The gradient is that of the mean over the global batch, whatever the mode, the devices and the
    micro-batches it is cut into. ``tx`` is handed the loss as ``value=`` and the sum of the weights
    as ``weight=``, for guards and `accumulate`.

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns the mean over its batch, or ``(sum, weight)``
        where examples weigh differently (masked tokens): sums and weights are then added over all
        devices and micro-batches before dividing, and zero weight gives a zero gradient.
        Randomness comes as per-example keys in the batch.
      mode: ``"jit"``: global arrays, cut by the compiler. ``"shard_map"``, ``"pmap"``: the loss is
        called on the rows of one device. Batch statistics in the loss are of the batch it sees.
      micro_batches: the batch is worked through in so many equal parts, one after another, with
        gradients summed in float32 or wider: a batch larger than memory in one step. In every
        mode the loss is then called on one device's rows of a part, and sums over devices are
        made once a step. Parameters cut over ``batch_axis`` are gathered for it.
      zero1: in mode ``"jit"``, the mesh axis to spread the optimizer's state over; see
        `state_shardings`.
      param_shardings: in mode ``"jit"``, rules (path pattern, ``PartitionSpec``) for parameters
        that are cut (FSDP, tensor parallelism); the others are replicated.
      has_aux: ``loss_fn`` returns ``(loss, aux)``. With several micro-batches every array of aux
        has them as a new first axis. In the mapped modes arrays of aux are joined along their
        rows, scalars averaged over devices.

    Raises:
      ArgumentValueError: the mode or an axis is unknown, or ``zero1`` or ``param_shardings`` is
        passed with a mode that replicates.
    """
    ranges.check_choice("mode", mode, _MODES)
    _check_axis("batch_axis", batch_axis, mesh)
    ranges.check_count("micro_batches", micro_batches, 1)
    placing: dict[str, Any] = {"zero1": zero1, "param_shardings": param_shardings}
    if mode != "jit":
        for name, value in placing.items():
            if value:
                raise ArgumentValueError(
                    name,
                    "be left out unless mode is 'jit'",
                    value,
                    sentence=f"{{argument}} belongs to mode 'jit', got it with {mode!r}",
                    related=["mode"],
                )
        placing = {}
    return _MODES[mode](
        loss_fn,
        tx,
        mesh=mesh,
        batch_axis=batch_axis,
        micro_batches=micro_batches,
        has_aux=has_aux,
        **placing,
    )

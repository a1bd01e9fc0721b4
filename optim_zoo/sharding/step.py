"""`data_parallel`: one training step over all devices of a mesh."""

from typing import Any

import optax
from jax.sharding import Mesh

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.sharding import modes, placement
from optim_zoo.sharding.losses import LossFn
from optim_zoo.sharding.record import DataParallelStep
from optim_zoo.wrappers.noise_scale import one_micro_batch, with_noise_scale


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
    noise_scale: bool = False,
    noise_decay: float = 0.99,
) -> DataParallelStep:
    """Returns a training step whose batch is sharded over ``batch_axis`` of ``mesh``.

    The gradient is that of the mean loss over the global batch, for every mode and every number of
    devices and micro-batches. The step passes the loss to ``tx`` as ``value=`` and the sum of the
    weights as ``weight=``, where ``tx`` accepts them, as guards and `accumulate` do::

        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        step = sharding.data_parallel(loss_fn, lamb(1e-3), mesh=mesh)
        params, state = step.init(params)
        for batch in batches:
            params, state, loss = step(params, state, batch)
        params = step.params(params)  # plain arrays on one device

    Args:
      loss_fn: ``loss_fn(params, batch)`` returns the mean loss over its batch or, where examples
        have different weights (masked tokens), ``WeightedLoss(total, weight)``. Totals and weights
        are then added over all devices and micro-batches before they are divided, and zero weight
        gives a zero gradient. Randomness is passed as per-example keys in the batch.
      tx: the optimizer.
      mesh: the mesh of devices. Its axes are treated as Auto axes, whatever their types are.
      mode: ``"jit"``: arrays are global, and the compiler divides the work. ``"shard_map"`` and
        ``"pmap"``: the loss is called with the rows of one device, and parameters and state are
        replicated. Batch statistics in the loss are those of the rows that it is called with.
      batch_axis: the mesh axis to shard the batch over.
      micro_batches: the number of equal parts of the batch that are processed one after another,
        with gradients summed in float32 or wider, so that one step can use a batch whose
        activations would not fit in memory. With several, in every mode, the loss is called with
        one device's rows of one part, and gradients are summed over devices once per step.
        Parameters that are sharded over ``batch_axis`` are gathered for it.
      zero1: in mode ``"jit"``, the mesh axis to shard the optimizer state over; see
        `state_shardings`.
      param_shardings: in mode ``"jit"``, rules (path pattern, ``PartitionSpec``) for parameters
        that are sharded (FSDP, tensor parallelism). The other parameters are replicated.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``, where aux is any pytree of arrays. Each
        is combined over the calls of the loss by a rule that does not depend on the mode or on the
        numbers of devices and micro-batches. A floating-point scalar must be a mean over the
        examples, with the weights of the loss where it has any, and is averaged with them. An
        integer or boolean scalar must be a sum over the examples, and is added (booleans in int32).
        An array whose first axis is the batch is concatenated in the order of the batch. Other
        means and sums are marked, ``sharding.Mean(x)`` or ``sharding.Sum(x)``: arrays such as the
        mean of every feature, and floating-point sums, which would else be averaged. To find the
        arrays whose first axis is the batch, the loss is also traced with twice the batch.
      noise_scale: if True, the gradient noise scale (arXiv 1812.06162) is measured from the
        gradients of all devices and micro-batches, and `optim_zoo.metrics.read` returns it as
        ``gradient_noise_scale``; the formula is there. It costs one pass over each gradient. Its
        unit is that of the weights of a `WeightedLoss`; for a mean loss it is one call of the loss,
        the rows of one device in one micro-batch. The state is then a ``metrics.NoiseScaleState``
        around that of ``tx``, and is saved with it. In mode ``"jit"`` the loss is called with one
        device's rows, as with several micro-batches. A call whose weight is 0 does not count, and a
        step whose gradient is not finite leaves the estimate unchanged.
      noise_decay: the decay rate, for each step, of the averages behind the noise scale, in
        [0, 1). They cover about ``1 / (1 - noise_decay)`` steps.

    Returns:
      A `DataParallelStep`: call it for one step, and see there for its other functions.

    Raises:
      ArgumentValueError: the mode or an axis is unknown, or ``zero1`` or ``param_shardings`` is
        passed with a mode that replicates parameters and state, or mode ``"pmap"`` is used with
        another mesh axis or with several processes, or ``noise_decay`` is outside its range, or
        ``noise_scale`` is True with one device and one micro-batch, or with ``param_shardings`` and
        one micro-batch. When the step is traced: the loss is not a
        scalar, or a leaf of aux is not covered by a rule (a batch statistic without a mark, a
        random key, a string).
      ArgumentTypeError: when the step is traced, ``loss_fn`` returns something else, such as a pair
        that is not a `WeightedLoss` without ``has_aux``.
    """
    ranges.check_choice("mode", mode, ("jit", "shard_map", "pmap"))
    placement.check_axis("batch_axis", batch_axis, mesh)
    ranges.check_count("micro_batches", micro_batches, 1)
    ranges.check_decay("noise_decay", noise_decay)
    tx = optax.with_extra_args_support(tx)
    if noise_scale:
        if micro_batches == 1:
            _check_devices_differ(mesh.shape[batch_axis], param_shardings)
        tx = with_noise_scale(tx, noise_decay)
    if mode != "jit":
        _check_left_out(mode, zero1=zero1, param_shardings=param_shardings)
    settings = modes.Settings(
        loss_fn=loss_fn,
        tx=tx,
        mesh=placement.automatic(mesh),
        batch_axis=batch_axis,
        micro_batches=micro_batches,
        has_aux=has_aux,
        noise_scale=noise_scale,
    )
    match mode:
        case "jit":
            return modes.jit_step(settings, zero1=zero1, param_shardings=param_shardings)
        case "shard_map":
            return modes.shard_map_step(settings)
        case _:
            return modes.pmap_step(settings)


def _check_left_out(mode: str, **only_with_jit: Any) -> None:
    for name, value in only_with_jit.items():
        if value:
            raise ArgumentValueError(
                name,
                "be left out unless mode is 'jit'",
                value,
                sentence=f"{{argument}} belongs to mode 'jit', got it with {mode!r}",
                related=["mode"],
            )


def _check_devices_differ(devices: int, param_shardings: rules.Rules) -> None:
    """Raises unless one micro-batch has several gradients, which ``noise_scale`` compares."""
    if devices == 1:
        raise one_micro_batch("use several devices, or pass micro_batches=2 or more")
    if param_shardings:
        advice = "pass micro_batches=2 or more"
        raise ArgumentValueError(
            "noise_scale",
            "be False with sharded parameters and one micro-batch",
            True,
            advice,
            sentence="{argument} needs a gradient from each device, and with sharded parameters "
            f"and one micro-batch the compiler makes only their mean: {advice}",
            related=["micro_batches", "param_shardings"],
        )

"""The LAMB paper's strategy for any base (You et al., arXiv 1904.00962, section 3)."""

from typing import Any

import jax
import optax

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import mesh_axes
from optim_zoo.optax_arguments import accepts_optax_arguments
from optim_zoo.transforms import (
    ScaleByLearningRateState,
    chain_leaf_by_leaf,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)
from optim_zoo.tree import Tree


@accepts_optax_arguments
def layerwise_adaptive(
    base: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    phi_bounds: ranges.Bounds | None = None,
    ratio_bounds: ranges.Bounds | None = None,
    exclude_from_layer_adaptation: rules.Patterns = (),
    layers: rules.Rules = (),
    axis_name: mesh_axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the direction u of any base, layer by layer, to the norm of the parameters.

    ::

        x <- x - learning_rate phi(|x|) / |u| u

    This is the general strategy of the LAMB paper (arXiv 1904.00962, section 3). With
    `scale_by_adam` and `add_decayed_weights` as its base it is `lamb`; with ``trace_momentum(b1,
    ema=True)`` after `add_decayed_weights` it is `lars_ema`. The trust ratio phi(|x|) / |u| is 1
    where phi(|x|) or |u| is 0.

    Args:
      base: A transformation that returns a direction with the sign of the gradient, such as
        ``scale_by_adam()`` or a chain of pieces. An optimizer does not fit, because its updates
        already point downhill. Optimizers of this library are refused in ``init``; those of other
        libraries cannot be recognized.
      learning_rate: A finite number >= 0, or a schedule: a function from the step to the learning
        rate, where the first step is 0.
      phi_bounds: The bounds (low, high) of phi, None where a side is open. By default phi is the
        identity.
      ratio_bounds: The bounds (low, high) of the trust ratio, None where a side is open. By default
        it has no bounds.
      exclude_from_layer_adaptation: Path patterns of the leaves whose trust ratio is 1. They may
        still be decayed.
      layers: Rules (path pattern, layer spec) for leaves that hold several layers, such as
        ``("blocks", stacked(0))``; see `optim_zoo.layers`. By default each leaf is one layer.
      axis_name: The mesh axes that the parameters are sharded over, under ``pmap`` and
        ``shard_map(check_vma=False)``: a name, several names, or rules (path pattern, names). Not
        needed under ``jit``, nor under ``shard_map(check_vma=True)``.

    Returns:
      A transformation whose state is a tuple: the state of base, ``ScaleByTrustRatioState`` (trust
      ratio and norms of every layer) and ``ScaleByLearningRateState`` (the step and the learning
      rate).

    Raises:
      ArgumentValueError: An argument is out of its range; in ``init``, base is an optimizer, a path
        pattern matches no leaf, or a leaf does not fit its layer spec; in ``update``, the
        parameters are missing.
      ArgumentTypeError: ``base`` is not an ``optax.GradientTransformation``, or another argument
        has the wrong type.

    Example:
      ```python
      tx = optim_zoo.layerwise_adaptive(optim_zoo.scale_by_nadam(), 1e-3)
      ```
    """
    ranges.check_transformation("base", base)
    chain = chain_leaf_by_leaf(
        base,
        scale_by_trust_ratio(
            phi_bounds=phi_bounds,
            ratio_bounds=ratio_bounds,
            exclude=rules.named("exclude_from_layer_adaptation", exclude_from_layer_adaptation),
            layers=layers,
            axis_name=axis_name,
        ),
        scale_by_learning_rate(learning_rate),
    )

    def init(params: Tree) -> Any:
        state = chain.init(params)
        kinds = jax.tree.leaves(state[0], is_leaf=_has_learning_rate)
        if any(map(_has_learning_rate, kinds)):
            raise ArgumentValueError(
                "base",
                "be a direction such as scale_by_adam()",
                base,
                sentence="{argument} must be a direction such as scale_by_adam(), got an "
                "optimizer with a learning rate of its own, whose updates point downhill already",
            )
        return state

    return optax.GradientTransformationExtraArgs(init, chain.update)


def _has_learning_rate(node: Any) -> bool:
    return isinstance(node, ScaleByLearningRateState)

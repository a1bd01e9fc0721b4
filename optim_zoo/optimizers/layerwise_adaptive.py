"""The LAMB paper's strategy around any base (You et al., arXiv 1904.00962, section 3)."""

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

    Around `scale_by_adam` and `add_decayed_weights` this is `lamb`; around `trace_momentum`
    with ``ema=True``, `lars_ema`.

    Args:
      base: gives a direction that has the sign of the gradient, such as ``scale_by_adam()`` or a
        chain of pieces: not an optimizer, whose updates already point downhill. One of this
        library's is refused in ``init``; another library's cannot be told apart.
      learning_rate: a number or a schedule: step -> learning rate, the first step being 0.
      phi_bounds, ratio_bounds, layers, axis_name: see `scale_by_trust_ratio`.
      exclude_from_layer_adaptation: path patterns (``re.search``) of leaves whose ratio is 1.

    Raises:
      TypeError: ``base`` is no ``optax.GradientTransformation``.
      ValueError: ``base`` is an optimizer; see `scale_by_trust_ratio`.
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

"""Learning rates by path and by layer, and frozen parameters: for every optimizer of a config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import errors, layerwise_decay, ranges, rows, rules, scale_by_rules
from optim_zoo.transforms.factors import ScaleByRulesState
from optim_zoo.tree import Tree, map_with_path


@dataclasses.dataclass(frozen=True)
class ByPath:
    """Keys of [optimizer] that are not arguments of the constructor."""

    # Pairs of a path pattern and a factor of the learning rate: a number, or a list with one number
    # for each layer of a stacked array. The first pattern that matches a path counts.
    learning_rate_factors: Sequence[Any] = ()
    # The learning rate of a layer divided by that of the layer above it; 1 changes nothing. It
    # comes on top of learning_rate_factors.
    layerwise_decay: float = 1.0
    # Path patterns of parameters that are not trained: no update, no weight decay, no optimizer
    # state, and no part in the norm that clips the gradients.
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        with errors.renaming({"factors": "learning_rate_factors"}):
            scale_by_rules(self.learning_rate_factors)
        ranges.check("layerwise_decay", self.layerwise_decay, 0.0, 1.0, open_low=True)
        rules.check_patterns("frozen", self.frozen)


KEYS = tuple(field.name for field in dataclasses.fields(ByPath))


def apply(
    tx: optax.GradientTransformation, keys: ByPath, layers: rules.Rules
) -> optax.GradientTransformation:
    """Returns an optimizer with the learning rates and frozen parameters of a config.

    Args:
      tx: the optimizer with its clipping. It is returned unchanged where no key is set.
      keys: what the config sets.
      layers: the layer rules of the task, for ``layerwise_decay``.
    """
    pieces = [freeze(tx, keys.frozen) if keys.frozen else tx]
    if keys.learning_rate_factors:
        pieces.append(_learning_rate_factors(keys.learning_rate_factors))
    if keys.layerwise_decay != 1:
        pieces.append(_layerwise_decay(keys.layerwise_decay, layers))
    return optax.chain(*pieces) if len(pieces) > 1 else pieces[0]


def freeze(
    inner: optax.GradientTransformation, frozen: rules.Patterns
) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters out of an optimizer, which has neither state nor updates for them.

    It is ``optax.masked`` with two differences. The path patterns of ``inner`` are still checked
    against all parameters. And the state is that of ``inner`` itself, so that `metrics.read` gives
    its figures the same names as without frozen parameters.

    Args:
      inner: any optimizer.
      frozen: path patterns. The update of a parameter whose path one of them matches is -0.0, so
        that the parameter stays unchanged to the bit.

    Raises:
      ArgumentValueError: in ``init``, a pattern matches no leaf, or all leaves are frozen.
    """
    inner = optax.with_extra_args_support(inner)

    def trained(tree: Tree) -> Tree:
        return map_with_path(
            lambda path, x: optax.MaskedNode() if rules.matches(frozen, path) else x, tree
        )

    def init(params: Tree) -> Tree:
        rules.check_matches("frozen", frozen, params)
        left = trained(params)
        if jax.tree.leaves(params) and not jax.tree.leaves(left):
            advice = "leave out the pattern that matches everything"
            raise errors.ArgumentValueError("frozen", "leave a leaf to train", frozen, advice)
        jax.eval_shape(inner.init, params)  # Inner patterns are not checked on a part of a tree.
        return inner.init(left)

    def update(
        updates: Tree, state: Tree, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Tree]:
        left = None if params is None else trained(params)
        made, state = inner.update(trained(updates), state, left, **extra)

        def whole(before: Any, after: Any) -> Any:
            if not isinstance(after, optax.MaskedNode):
                return after
            return rows.on_rows(lambda x: jnp.full_like(x, -0.0), before)

        return jax.tree.map(whole, updates, made, is_leaf=rows.is_sparse), state

    return optax.GradientTransformationExtraArgs(init, update)


def _learning_rate_factors(factors: rules.Rules) -> optax.GradientTransformationExtraArgs:
    """Returns `scale_by_rules` whose errors name the key of the config."""
    inner = scale_by_rules(factors)

    def init(params: Tree) -> Tree:
        with errors.renaming({"factors": "learning_rate_factors"}):
            return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, inner.update)


def _layerwise_decay(decay: float, layers: rules.Rules) -> optax.GradientTransformationExtraArgs:
    """Returns `scale_by_rules` with the rules of `layerwise_decay`, made from the parameters."""

    def piece(params: Tree) -> optax.GradientTransformationExtraArgs:
        with errors.renaming({"decay": "layerwise_decay"}):
            return scale_by_rules(layerwise_decay(params, decay, layers=layers))

    def init(params: Tree) -> Tree:
        # ``optax.tree.map_params`` passes a tree without leaves, which has no layers.
        return piece(params).init(params) if jax.tree.leaves(params) else ScaleByRulesState()

    def update(
        updates: Tree, state: Tree, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Tree]:
        del extra
        if params is None:
            raise errors.parameters_missing("layerwise_decay")
        return piece(params).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)

"""Optimizers of michaelrzhang/lookahead (c4fd85f), the code of the Lookahead paper."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges
from optim_zoo.optimizers.lookahead import synchronize
from optim_zoo.ports._arguments import in_source_words
from optim_zoo.transforms import TraceMomentumState, TraceNesterovMomentumState
from optim_zoo.tree import Tree, map_to_several


@in_source_words
def Lookahead(
    optimizer: optax.GradientTransformation,
    la_steps: int = 5,
    la_alpha: float = 0.8,
    pullback_momentum: str = "none",
) -> optax.GradientTransformation:
    """Applies `optim_zoo.lookahead`, which may also pull the momentum back.

    This is ``lookahead_pytorch.py``. Agrees with the source to 1e-9 in float64.

    Args:
      optimizer: The inner optimizer, with its learning rate.
      la_steps: The number of steps between synchronizations, >= 1.
      la_alpha: The share of the way from the slow to the fast weights, in [0, 1].
      pullback_momentum: What a synchronization does with the momentum of the inner SGD. ``"none"``
        does nothing; ``"reset"`` sets it to 0; ``"pullback"`` sets it to the weighted mean of
        itself, with weight ``la_alpha``, and of the value that it was last set to, which is 0 at
        first. Other inner optimizers have no such momentum and do not change.
    """
    ranges.check_count("la_steps", la_steps, 1)
    ranges.check("la_alpha", la_alpha, 0.0, 1.0)
    ranges.check_choice("pullback_momentum", pullback_momentum, ("none", "reset", "pullback"))
    wrapped = optimizer if pullback_momentum == "none" else _with_cached_momentum(optimizer)
    share = la_alpha if pullback_momentum == "pullback" else 0.0
    return synchronize(
        wrapped,
        lambda t: t % la_steps == 0,
        lambda t: la_alpha,
        period=la_steps,
        after=None if pullback_momentum == "none" else lambda due, s: _pull_back(due, s, share),
    )


@in_source_words
def LookaheadTF(
    optimizer: optax.GradientTransformation, la_steps: int = 5, la_alpha: float = 0.8
) -> optax.GradientTransformation:
    """Applies Lookahead, which at first shrinks the weights to ``la_alpha`` times their value.

    ``lookahead_tensorflow.py``: the slow weights start at zero, and there is a synchronization
    every ``la_steps + 1`` steps. Repaired: `Lookahead`. Agrees with the source to 2e-5 in float32.

    Args:
      optimizer: The inner optimizer, with its learning rate.
      la_steps: The number of steps between synchronizations, >= 1.
      la_alpha: The share of the way from the slow to the fast weights, in [0, 1].
    """
    ranges.check_count("la_steps", la_steps, 1)
    ranges.check("la_alpha", la_alpha, 0.0, 1.0)
    return synchronize(
        optimizer,
        lambda t: t % (la_steps + 1) == 0,
        lambda t: la_alpha,
        period=la_steps + 1,
        slow_starts_at_zero=True,
    )


class _CachedMomentumState(NamedTuple):
    cached: Tree  # momentum as of the last synchronization; None where there is none
    inner: Any


def _with_cached_momentum(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> _CachedMomentumState:
        state = inner.init(params)
        cached = [jax.tree.map(jnp.zeros_like, piece.momentum) for piece in _traces(state)]
        return _CachedMomentumState(cached, state)

    def update(
        updates: Tree, state: _CachedMomentumState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, _CachedMomentumState]:
        steps, inner_state = inner.update(updates, state.inner, params, **extra)
        return steps, _CachedMomentumState(state.cached, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _pull_back(due: jax.Array, state: _CachedMomentumState, share: float) -> _CachedMomentumState:
    """Momentum <- share momentum + (1 - share) cached, and cached <- momentum, where due."""

    def pull(m: jax.Array, cached: jax.Array) -> tuple[jax.Array, jax.Array]:
        pulled = jnp.asarray(share * m + (1 - share) * cached, m.dtype)
        return jnp.where(due, pulled, m), jnp.where(due, pulled, cached)

    pulled = [
        map_to_several(pull, 2, piece.momentum, cached)
        for piece, cached in zip(_traces(state.inner), state.cached, strict=True)
    ]
    momenta = iter(momentum for momentum, _ in pulled)

    def replaced(node: Any) -> Any:
        return node._replace(momentum=next(momenta)) if _is_trace(node) else node

    inner = jax.tree.map(replaced, state.inner, is_leaf=_is_trace)
    return _CachedMomentumState([cached for _, cached in pulled], inner)


def _traces(state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=_is_trace) if _is_trace(node)]


def _is_trace(node: Any) -> bool:
    return isinstance(node, TraceMomentumState | TraceNesterovMomentumState)

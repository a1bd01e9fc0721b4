"""michaelrzhang/lookahead (c4fd85f), the paper's own code."""

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
    """``lookahead_pytorch.py``: `optim_zoo.lookahead`, which may pull the momentum back too.

    At a synchronization ``pullback_momentum`` sets the momentum of the inner SGD to 0 ("reset"),
    or to the weighted mean of it and of what it was last set to, at first 0 ("pullback"). Other
    inner optimizers have no such momentum and are not changed. Agrees with the source to 1e-9 in
    float64.
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
    """The first synchronization shrinks the weights to ``la_alpha`` times their value.

    ``lookahead_tensorflow.py``: the slow weights start at zero, and there are ``la_steps + 1``
    steps from one synchronization to the next. Repaired: `Lookahead`. Agrees with the source to
    2e-5 in float32.
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

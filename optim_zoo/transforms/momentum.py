"""Momentum: the heavy ball (Polyak, 1964), Nesterov's, and a moving average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optim_zoo import errors, ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.transforms.leafwise import (
    Declaration,
    Leaf,
    Leafwise,
    count_step,
    leafwise,
    zero_count,
    zeros,
)
from optim_zoo.transforms.moments import moment
from optim_zoo.tree import Tree


class TraceMomentumState(NamedTuple):
    """State of `trace_momentum` for the heavy ball."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    momentum: Tree  # like the parameters, in float32 or wider


class TraceNesterovMomentumState(NamedTuple):
    """State of `trace_momentum` with ``nesterov=True``."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    momentum: Tree  # like the parameters, in float32 or wider


class TraceMomentumEmaState(NamedTuple):
    """State of `trace_momentum` with ``ema=True``."""

    count: jax.Array  # type: ignore[assignment]  # (), int32: steps made; stays at 2^31 - 1
    momentum: Tree  # like the parameters, in float32 or wider


def trace_momentum(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    ema: bool = False,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
) -> Leafwise:
    """Turns updates g into their momentum m.

    ::

        m <- decay m + (1 - dampening) g      heavy ball; at the first step m <- g
        m <- decay m + (1 - decay) g          with ema
        u  = m                                with nesterov  u = decay m + g

    The heavy ball with dampening is that of ``torch.optim.SGD``. ``optax.trace`` and ``optax.ema``
    compute the same without dampening; here m is in float32 or wider whatever the parameters are,
    so that its dtype does not change.

    Args:
      decay: The decay rate of m, in [0, 1).
      ema: Whether m is a moving average, which starts at 0 and has no bias correction.
      nesterov: Whether the update looks one step ahead along the momentum. For the heavy ball only;
        needs a decay above 0 and no dampening.
      dampening: The share of the gradient that is left out of m after the first step, in [0, 1].
        For the heavy ball only.

    Returns:
      A piece that returns u. Its state is `TraceMomentumState`, `TraceNesterovMomentumState` or
      `TraceMomentumEmaState`.

    Raises:
      ArgumentValueError: An argument is out of its range; ``nesterov`` is combined with a decay of
        0, dampening or ema; ``dampening`` is combined with ema; in ``update``, a gradient has
        another shape than its parameter.
      ArgumentTypeError: An argument has the wrong type; in ``init``, a parameter is not a real
        floating-point array.

    Example:
      ```python
      tx = optax.chain(optim_zoo.trace_momentum(0.9), optim_zoo.scale_by_learning_rate(0.1))
      ```
    """
    ranges.check_decay("decay", decay)
    ranges.check("dampening", dampening, 0.0, 1.0)
    damped = isinstance(dampening, jax.core.Tracer) or bool(dampening != 0)
    if nesterov:
        if not isinstance(decay, jax.core.Tracer) and decay == 0:
            raise _nesterov_without_momentum(0)
        if damped or ema:
            what = "ema" if ema else f"dampening, got {dampening}"
            raise ArgumentValueError(
                "nesterov",
                "be False with dampening or ema",
                nesterov,
                "leave one out",
                sentence=f"{{argument}} cannot be combined with {what}: leave one out",
                related=["ema" if ema else "dampening"],
            )
    if ema and damped:
        raise ArgumentValueError(
            "dampening",
            "be 0 with ema",
            dampening,
            "leave one out",
            sentence=f"{{argument}} cannot be combined with ema, got {dampening}: leave one out",
            related=["ema"],
        )

    def gain(count: jax.Array) -> jax.typing.ArrayLike:
        if ema:
            return 1 - decay
        return jnp.where(count == 0, 1.0, 1 - dampening) if damped else 1.0

    state = TraceMomentumEmaState if ema else None
    return trace_with_gain("trace_momentum", decay, gain, nesterov=nesterov, state=state)


def trace_if_set(
    momentum: jax.typing.ArrayLike | None,
    *,
    nesterov: bool = False,
    dampening: jax.typing.ArrayLike = 0.0,
) -> list[Leafwise]:
    """Returns `trace_momentum` in a list, which is empty where ``momentum`` is None.

    Every number stores a momentum, also 0: whether a traced number is 0 is not known, and the
    structure of a state must not depend on tracing.

    Raises:
      ArgumentValueError: ``nesterov`` is set without momentum; see also `trace_momentum`.
    """
    if momentum is not None:
        with errors.renaming({"decay": "momentum"}):
            return [trace_momentum(momentum, nesterov=nesterov, dampening=dampening)]
    ranges.check("dampening", dampening, 0.0, 1.0)
    if nesterov:
        with errors.renaming({"decay": "momentum"}):
            raise _nesterov_without_momentum(None)
    return []


def _nesterov_without_momentum(momentum: int | None) -> ArgumentValueError:
    advice = "set momentum, such as 0.9"
    sentence = f"{{argument}} needs a momentum above 0, got {momentum}: {advice}"
    return ArgumentValueError(
        "nesterov", "be False without momentum", True, advice, sentence, related=["decay"]
    )


def trace_with_gain(
    piece: str,
    decay: jax.typing.ArrayLike,
    gain: Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    nesterov: bool,
    state: Callable[..., Any] | None = None,
) -> Leafwise:
    """Does what `trace_momentum` does, with any gain of the gradient and any decay.

    ::

        m <- decay m + gain(step) g,   where the first step is 0
    """
    if state is None:
        state = TraceNesterovMomentumState if nesterov else TraceMomentumState

    def begin(state: TraceMomentumState) -> tuple[TraceMomentumState, jax.typing.ArrayLike]:
        return count_step(state)[0], gain(state.count)

    def update(
        g: jax.Array, state: TraceMomentumState, leaf: Leaf
    ) -> tuple[jax.Array, TraceMomentumState]:
        m = moment(g, state.momentum, decay, leaf.shared)
        u = jnp.asarray(decay * m + g, m.dtype) if nesterov else m
        return u, state._replace(momentum=m)

    return leafwise(
        Declaration(
            name=piece,
            update=update,
            state=state,
            like_params=("momentum",),
            init=lambda path, x: {"momentum": zeros(x)},
            init_shared=zero_count,
            begin=begin,
        )
    )

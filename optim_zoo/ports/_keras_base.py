"""What the base class of Keras's optimizers does: clipping, weight decay and their arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentValueError
from optim_zoo.layers import norms
from optim_zoo.ports._arguments import Rate, check_arguments, refuse
from optim_zoo.ports._decay import decay_before, times
from optim_zoo.ports._pieces import chain
from optim_zoo.rows import check_updates
from optim_zoo.transforms import clip_by_global_norm
from optim_zoo.tree import Tree, wide

CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
_REFUSED: dict[str, Any] = {
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
# The arguments of the base class with their defaults, in its order.
_BASE: dict[str, Any] = {**dict.fromkeys(CLIPPING), **_REFUSED, "name": None}
# Arguments of Keras's previous base class, on which TensorFlow Addons and tf_keras.legacy build.
REFUSED_BEFORE: dict[str, Any] = {
    "lr": None,
    "decay": 0.0,
    "gradient_aggregator": None,
    "gradient_transformers": None,
}


def with_base_arguments(
    port: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """Replaces ``**base`` by the arguments of Keras's base class, also by position."""
    *own, _ = inspect.signature(port).parameters.values()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    base = [inspect.Parameter(name, kind, default=default) for name, default in _BASE.items()]
    exclude = inspect.Parameter(
        "exclude_from_weight_decay", inspect.Parameter.KEYWORD_ONLY, default=()
    )
    signature = inspect.Signature([*own, *base, exclude])

    @functools.wraps(port)
    def called(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        check_arguments(f"keras.{port.__name__}", kwargs, signature.parameters, {})
        return port(**signature.bind(*args, **kwargs).arguments)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def finished(
    port: str,
    step: optax.GradientTransformation,
    learning_rate: Rate,
    weight_decay: float | None,
    base: dict[str, Any],
) -> optax.GradientTransformation:
    """Adds what the base class does: clipping in front, and weight decay before the step.

    Args:
      port: The name of the port, for messages.
      step: The optimizer.
      learning_rate, weight_decay: Those of the optimizer.
      base: The other arguments of the base class, and ``exclude_from_weight_decay``.

    Raises:
      NotImplementedError: An unsupported argument is not its default.
    """
    exclude = base.get("exclude_from_weight_decay", ())
    refuse(port, **{name: (base.get(name, default), default) for name, default in _REFUSED.items()})
    if weight_decay is not None:
        ranges.check("weight_decay", weight_decay, 0.0, open_high=True)
    rules.check_patterns("exclude_from_weight_decay", exclude)
    return chain(clipping(base), decay_before(step, times(learning_rate, weight_decay), exclude))


def clipping(base: dict[str, Any]) -> optax.GradientTransformation | None:
    """Returns the clipping of ``clipnorm``, ``global_clipnorm`` or ``clipvalue``, or None."""
    given = {name: base[name] for name in CLIPPING if base.get(name) is not None}
    for name, value in given.items():
        ranges.check(name, value, 0.0, open_high=True)
    if len(given) > 1:
        first, *others = given
        raise ArgumentValueError(
            first,
            "be the only clipping that is set",
            given,
            sentence=f"only one of {', '.join(CLIPPING)} can be set, got {given}",
            related=others,
        )
    if base.get("clipnorm"):
        return optax.stateless(lambda grads, _: _clip_each(grads, base["clipnorm"]))
    if base.get("global_clipnorm"):
        return clip_by_global_norm(base["global_clipnorm"])
    return optax.clip(base["clipvalue"]) if base.get("clipvalue") else None


def _clip_each(grads: Tree, max_norm: float) -> Tree:
    check_updates("clipnorm", grads, grads)

    def clip(g: jax.Array) -> jax.Array:
        norm = norms.norm(g)
        return wide(g) * jnp.where(norm <= max_norm, 1.0, max_norm / norm)

    return jax.tree.map(clip, grads)

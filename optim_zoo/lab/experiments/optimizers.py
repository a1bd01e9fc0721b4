"""The optimizers that experiments compare, with the same exclusions for all of them."""

import dataclasses
from collections.abc import Callable, Sequence

import optax

from optim_zoo import adamw, lamb, lars, momentum

TRUST_COEFFICIENT = 0.02  # of LARS


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer up to its learning rate."""

    name: str
    title: str
    settings: str  # for the page
    make: Callable[[optax.Schedule, Sequence[str]], optax.GradientTransformation]
    """From the schedule and the patterns of biases and norms, which are neither decayed nor given a
    trust ratio."""


OPTIMIZERS = (
    Optimizer(
        "momentum",
        "SGD with momentum",
        "momentum 0.9, no weight decay",
        lambda rate, excluded: momentum(rate, 0.9),
    ),
    Optimizer(
        "adamw",
        "AdamW",
        "b1 0.9, b2 0.999, eps 1e-8, weight decay 0.01",
        lambda rate, excluded: adamw(
            rate, 0.9, 0.999, 1e-8, 0.01, exclude_from_weight_decay=excluded
        ),
    ),
    Optimizer(
        "lamb",
        "LAMB",
        "b1 0.9, b2 0.999, eps 1e-6, weight decay 0.01",
        lambda rate, excluded: lamb(
            rate,
            0.9,
            0.999,
            1e-6,
            0.01,
            exclude_from_weight_decay=excluded,
            exclude_from_layer_adaptation=excluded,
        ),
    ),
    Optimizer(
        "lars",
        "LARS",
        f"momentum 0.9, weight decay 1e-4, trust coefficient {TRUST_COEFFICIENT}",
        lambda rate, excluded: lars(
            rate,
            0.9,
            1e-4,
            TRUST_COEFFICIENT,
            exclude_from_weight_decay=excluded,
            exclude_from_layer_adaptation=excluded,
        ),
    ),
)


def grid(middle: float, size: int = 5) -> tuple[float, ...]:
    """Returns a coarse grid in steps of the square root of 10, in ascending order."""
    return tuple(float(f"{middle * 10 ** ((i - size // 2) / 2):.4g}") for i in range(size))

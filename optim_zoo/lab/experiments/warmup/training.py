"""Held-out loss of the byte model for every warmup, learning rate and seed."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import adamw, lamb
from optim_zoo.schedules import warmup_cosine
from optim_zoo.train.config import Stage
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.base import Setup
from optim_zoo.train.tasks.byte_language.sections import Data, Model
from optim_zoo.train.tasks.byte_language.task import ByteLanguage
from optim_zoo.tree import Tree

B1, B2 = 0.9, 0.999
_SHARED: Mapping[str, Any] = MappingProxyType(
    {
        "b1": B1,
        "b2": B2,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "exclude_from_weight_decay": ["bias", "norm"],
    }
)


def multiplier(step: np.ndarray) -> np.ndarray:
    """Returns how many times larger Adam's direction is without bias correction, without eps.

    ::

        (1 - b1^t) / sqrt(1 - b2^t)

    Args:
      step: the steps t, from 1.
    """
    return (1 - B1**step) / np.sqrt(1 - B2**step)


@dataclasses.dataclass(frozen=True)
class Form:
    """An optimizer, with the learning rates that are tried."""

    name: str
    title: str
    rates: tuple[float, ...]
    make: Callable[..., optax.GradientTransformation]  # schedule, bias_correction


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FORMS = (
    Form("adamw", "AdamW", _RATES, functools.partial(adamw, **_SHARED)),
    Form(
        "lamb",
        "LAMB",
        _RATES,
        functools.partial(lamb, **_SHARED, exclude_from_layer_adaptation=["bias", "norm"]),
    ),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the experiment, equal for both optimizers."""

    warmups: tuple[float, ...]  # the shares of the steps
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    evaluation_batches: int
    model: Model


FULL = Scale((0.0, 0.1, 0.3), (0, 1, 2), 200, 32, 16, Model())
QUICK = Scale((0.0, 0.5), (0, 1), 4, 4, 1, Model(0, 4, 1, 4))  # no layers: quick to compile


@dataclasses.dataclass(frozen=True)
class Measured:
    """The runs of an optimizer with or without bias correction."""

    form: Form
    corrected: bool
    scale: Scale
    loss: np.ndarray  # (warmups, rates, seeds): held out, after the last step, in nats
    # (warmups, rates, seeds, steps): the norm of the update that the other variant would make from
    # the same gradients and parameters, divided by that of the update that was made. NaN where the
    # learning rate is 0, as at the first step of a warmup.
    ratio: np.ndarray

    @property
    def title(self) -> str:
        """The name in tables."""
        return f"{self.form.title} {'with' if self.corrected else 'without'} bias correction"

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yields one flat object for each run."""
        for (i, j, k), loss in np.ndenumerate(self.loss):
            finite = math.isfinite(loss)
            yield {
                "optimizer": self.form.name,
                "bias_correction": self.corrected,
                "warmup": self.scale.warmups[i],
                "learning_rate": self.form.rates[j],
                "seed": self.scale.seeds[k],
                "steps": self.scale.steps,
                "batch_size": self.scale.batch_size,
                "status": "finished" if finite else "diverged",
                "loss": float(loss) if finite else None,
            }

    def mean(self) -> np.ndarray:
        """Returns the mean loss over the seeds, (warmups, rates); inf where a run diverged."""
        return np.where(np.isfinite(self.loss).all(-1), self.loss.mean(-1), np.inf)

    def best(self, warmup: int) -> int:
        """Returns the index of the rate with the lowest mean loss at a warmup."""
        return int(self.mean()[warmup].argmin())


def measure(form: Form, corrected: bool, scale: Scale, tasks: Sequence[ByteLanguage]) -> Measured:
    """Trains every combination of warmup, learning rate and seed in one program.

    A seed fixes the initial parameters and the batches, which are the same for both optimizers,
    with and without bias correction.

    Args:
      form: the optimizer.
      corrected: whether it has bias correction.
      scale: the size of the experiment.
      tasks: that of each seed; see `make_tasks`.
    """
    stage = tasks[0].setup.stages[0]
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl=KEYS))(jnp.array(scale.seeds))
    params = jax.jit(jax.vmap(tasks[0].init))(keys)
    data = np.array(
        [[task.batch(number, stage)["ids"] for number in range(scale.steps)] for task in tasks]
    )  # (seeds, steps, batch, bytes)
    rates = np.array([[_rates(r, w, scale.steps) for r in form.rates] for w in scale.warmups])
    train = functools.partial(_train, tasks[0], form.make, corrected)
    cells = jax.vmap(jax.vmap(train, (None, 0, 0)), (0, None, None))
    flat = jnp.asarray(rates.reshape(-1, scale.steps), jnp.float32)
    loss, ratio = map(np.asarray, jax.jit(cells)(flat, params, data))
    shape = rates.shape[:2] + loss.shape[1:]
    return Measured(form, corrected, scale, loss.reshape(shape), ratio.reshape(*shape, -1))


def _rates(rate: float, warmup: float, steps: int) -> np.ndarray:
    """Returns the learning rate of every step."""
    schedule = warmup_cosine(rate, round(warmup * steps), steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def make_tasks(scale: Scale) -> list[ByteLanguage]:
    """Returns the task of each seed."""
    return [_task(scale, seed) for seed in scale.seeds]


def _task(scale: Scale, seed: int) -> ByteLanguage:
    nothing: Mapping[str, Any] = MappingProxyType({})
    stage = Stage(scale.steps, scale.batch_size, 1, nothing, nothing, nothing, nothing)
    sections = {"data": Data(), "model": scale.model}
    cache = Path(tempfile.gettempdir())  # which the task does not use
    return ByteLanguage(Setup(sections, [stage], seed, scale.evaluation_batches, cache))


def _train(
    task: ByteLanguage,
    make: Callable[..., optax.GradientTransformation],
    corrected: bool,
    rates: jax.Array,
    params: Tree,
    data: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the held-out loss of a run, and the ratio of norms at every step."""
    txs = [
        make(lambda step: rates[step], bias_correction=own) for own in (corrected, not corrected)
    ]

    def loss(params: Tree, ids: jax.Array) -> jax.Array:
        value, weight = task.measure(params, {"ids": ids})["loss"]
        return value / weight

    def step(carry: tuple[Tree, Any], ids: jax.Array) -> tuple[tuple[Tree, Any], jax.Array]:
        params, states = carry
        gradient = jax.grad(loss)(params, ids)
        made = [tx.update(gradient, s, params) for tx, s in zip(txs, states, strict=True)]
        norms = [optax.tree.norm(updates) for updates, _ in made]
        params = optax.apply_updates(params, made[0][0])
        return (params, [state for _, state in made]), norms[1] / norms[0]

    states = [tx.init(params) for tx in txs]
    (params, _), ratios = jax.lax.scan(step, (params, states), data)
    sums = [jnp.stack(task.measure(params, batch)["loss"]) for batch in task.held_out()]
    total, weight = jnp.sum(jnp.stack(sums), 0)
    return total / weight, ratios

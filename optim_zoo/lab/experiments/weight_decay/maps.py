"""Held-out loss and accuracy on digits, for every learning rate, weight decay and seed."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import adam, adamw, add_decayed_weights
from optim_zoo.schedules import warmup_cosine
from optim_zoo.train.config import Stage
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.base import Setup
from optim_zoo.train.tasks.digits import Digits, Model
from optim_zoo.tree import Tree

Make = Callable[[Any, Any, int], optax.GradientTransformation]


def _l2(rate: Any, decay: Any, steps: int) -> optax.GradientTransformation:
    return optax.chain(add_decayed_weights(decay), adam(warmup_cosine(rate, 0, steps)))


def _adamw(rate: Any, decay: Any, steps: int) -> optax.GradientTransformation:
    return adamw(warmup_cosine(rate, 0, steps), weight_decay=decay)


def _per_step(rate: Any, decay: Any, steps: int) -> optax.GradientTransformation:
    return adamw(warmup_cosine(rate, 0, steps), weight_decay=decay / rate)


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of weight decay, and the decays that are tried."""

    name: str  # in results.jsonl
    title: str
    decay: str  # what the decay is called on the axis
    decays: tuple[float, ...]
    make: Make  # learning rate, decay and steps -> the optimizer


def _grid(largest: float) -> tuple[float, ...]:
    """Returns 0, and seven decays in steps of the square root of 10 up to the largest one."""
    return (0.0, *(float(f"{largest * 10 ** (-i / 2):.2g}") for i in range(6, -1, -1)))


FORMS = (
    Form("adam_l2", "Adam with L2", "coefficient of L2", _grid(0.1), _l2),
    Form("adamw", "AdamW in optax and torch", "weight_decay", _grid(10.0), _adamw),
    Form(
        "adamw_per_step",
        "AdamW in the paper",
        "weight_decay x learning rate",
        _grid(0.1),
        _per_step,
    ),
)
QUICK_FORMS = tuple(dataclasses.replace(form, decays=form.decays[::7]) for form in FORMS)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the experiment, equal for every form of weight decay."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    batches: int  # different ones, which are repeated
    hidden_size: int
    num_layers: int


FULL = Scale((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0, 1, 2), 400, 64, 4, 64, 2)
QUICK = Scale((1e-3, 1e-2), (0, 1, 2), 4, 8, 2, 4, 1)


@dataclasses.dataclass(frozen=True)
class Map:
    """The held-out metrics after the last step of every run."""

    form: Form
    scale: Scale
    loss: np.ndarray  # (decays, rates, seeds), in nats
    accuracy: np.ndarray  # the same shape

    def rows(self) -> Iterator[Mapping[str, str | float]]:
        """Yields one flat object for each run."""
        for (i, j, k), loss in np.ndenumerate(self.loss):
            yield {
                "optimizer": self.form.name,
                "learning_rate": self.scale.rates[j],
                "decay": self.form.decays[i],
                "seed": self.scale.seeds[k],
                "steps": self.scale.steps,
                "batch_size": self.scale.batch_size,
                "status": "finished" if np.isfinite(loss) else "diverged",
                "loss": float(loss),
                "accuracy": float(self.accuracy[i, j, k]),
            }

    def mean(self) -> np.ndarray:
        """Returns the mean loss over the seeds, (decays, rates); inf where a run diverged."""
        return np.where(np.isfinite(self.loss).all(-1), self.loss.mean(-1), np.inf)

    def best(self) -> tuple[int, int]:
        """Returns the decay and the rate with the lowest mean loss, by their index."""
        decay, rate = np.unravel_index(np.argmin(self.mean()), self.mean().shape)
        return int(decay), int(rate)

    def usable(self) -> list[int]:
        """Returns the rates whose best mean loss is at most twice the best one of the map."""
        best = self.mean().min(0)
        return [int(rate) for rate in np.flatnonzero(best <= 2 * best.min())]

    def cost_of_moving(self) -> np.ndarray:
        """Returns how much a decay loses when the learning rate changes, for every seed.

        For two different usable rates, the decay that is best at the first one is used at the
        second one, and its loss is divided by the lowest loss there. The cost is the geometric mean
        of this ratio over all ordered pairs, minus 1. It is 0 if one decay is best at every rate.

        Returns:
          An array, (seeds,), >= 0; 0 where a single rate is usable.
        """
        used, costs = self.usable(), []
        for loss in np.moveaxis(np.where(np.isfinite(self.loss), self.loss, np.inf), -1, 0):
            best = loss.argmin(0)
            ratios = [
                np.log(loss[best[a], b] / loss[best[b], b]) for a in used for b in used if a != b
            ]
            costs.append(np.expm1(np.mean(ratios)) if ratios else 0.0)
        return np.array(costs)


def measure(form: Form, scale: Scale) -> Map:
    """Trains every combination of decay, learning rate and seed in one program.

    A seed fixes the initial parameters and the order of the batches, which are the same for every
    form, decay and rate.
    """
    tasks = [_task(scale, seed) for seed in scale.seeds]
    stage = tasks[0].setup.stages[0]
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl=KEYS))(jnp.array(scale.seeds))
    params = jax.jit(jax.vmap(tasks[0].init))(keys)
    batches = [[task.batch(i, stage) for i in range(scale.batches)] for task in tasks]
    stacked = jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(len(tasks), scale.batches, *leaves[0].shape),
        *(batch for seed in batches for batch in seed),
    )
    decays, rates = np.meshgrid(form.decays, scale.rates, indexing="ij")
    train = functools.partial(_train, tasks[0], form.make, scale.steps)
    cells = jax.vmap(train, (0, 0, None, None))
    every = jax.jit(jax.vmap(cells, (None, None, 0, 0)))
    measured = every(jnp.float32(decays.ravel()), jnp.float32(rates.ravel()), params, stacked)
    found = {name: np.asarray(x).T.reshape(*decays.shape, -1) for name, x in measured.items()}
    return Map(form, scale, found["loss"], found["accuracy"])


def _task(scale: Scale, seed: int) -> Digits:
    stage = Stage(
        scale.steps,
        scale.batch_size,
        1,
        MappingProxyType({}),
        MappingProxyType({}),
        MappingProxyType({}),
        MappingProxyType({}),
    )
    sizes = Model(scale.num_layers, scale.hidden_size)
    return Digits(Setup({"model": sizes}, [stage], seed, 1, Path(tempfile.gettempdir())))


def _train(
    task: Digits,
    make: Make,
    steps: int,
    decay: jax.Array,
    rate: jax.Array,
    params: Tree,
    data: Tree,
) -> Mapping[str, jax.Array]:
    """Returns the held-out metrics after a run; the arguments after ``steps`` may be traced."""
    tx = make(rate, decay, steps)

    def loss(params: Tree, batch: Tree) -> jax.Array:
        value, weight = task.measure(params, batch)["loss"]
        return value / weight

    def step(carry: tuple[Tree, Any], number: jax.Array) -> tuple[tuple[Tree, Any], None]:
        params, state = carry
        batch = jax.tree.map(lambda x: x[number % len(x)], data)
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    (held_out,) = task.held_out()
    return {
        name: value / weight for name, (value, weight) in task.measure(params, held_out).items()
    }

"""Fine-tunes the tagger with one optimizer, and records its F1 and how far it moves."""

import copy
import dataclasses
import functools
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import clip_by_global_norm, tree
from optim_zoo.lab.experiments.fine_tuning_zero.arms import OPTIMIZERS
from optim_zoo.lab.experiments.fine_tuning_zero.settings import FINE_TUNING, PRETRAINING, Scale
from optim_zoo.schedules import warmup_polynomial
from optim_zoo.train import config_file, loop, records
from optim_zoo.train.config import Config
from optim_zoo.train.files import replace_file
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.train.tasks.token_tagging import conll, python_source
from optim_zoo.train.tasks.token_tagging.task import TokenTagging
from optim_zoo.tree import Tree

NEW = "tagger"  # the classifier, which pretraining does not have


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one run of fine-tuning was like."""

    f1: float  # held out, after the last step
    loss: float  # the same, in nats
    evaluated: Sequence[tuple[int, float]]  # (step, F1 of a part of the held-out batches)
    # After 0, 1, 2, ... steps; of all parameters but those of the classifier.
    norm: Sequence[float]  # Euclidean norm
    distance: Sequence[float]  # from the start
    seconds: float


def pretrain(folder: Path) -> None:
    """Trains the model that is fine-tuned, unless ``folder`` already has it; resumes if stopped.

    Raises:
      UserError: the folder has another run.
      Stopped: a signal stopped the run.
    """
    if PRETRAINING["train"]["steps"] not in saved_steps(folder):
        loop.run(config_file.build(PRETRAINING, "the settings of the experiment"), folder)


def pretraining_seconds(folder: Path) -> float:
    """Returns how long the training steps of the pretrained run took; 0 without one.

    The steps before the first logged speed of a process, which compiles, do not count.
    """
    if not (folder / "metrics.jsonl").exists():
        return 0.0
    logged = records.read(folder / "metrics.jsonl").train
    (_, tokens), (_, speeds) = logged["tokens"], logged["tokens_per_second"]
    return float(np.nansum(np.diff(tokens, prepend=0)[-len(speeds) :] / speeds))


class Bench:
    """The tagger, its data, and the compiled pieces that every optimizer shares."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        """Reads the data; ``folder`` has the pretrained run, and keeps the tagged text."""
        self.scale = scale
        made = config_file.make_task(_config(scale, folder), folder / "tokens")
        assert isinstance(made, TokenTagging)
        self.task = made
        self._initial = jax.jit(made.init)
        self._gradient = jax.jit(jax.grad(self._loss))
        self._measure = jax.jit(made.measure)

    def train(self, optimizer: str, rate: float, seed: int, *, pretrained: bool = True) -> Curve:
        """Fine-tunes with one optimizer.

        Args:
          optimizer: a name of `OPTIMIZERS`.
          rate: the learning rate at the end of the warmup.
          seed: it sets the classifier's initial parameters, the order of the examples, and dropout.
          pretrained: whether the other parameters are the pretrained ones or random.
        """
        began = time.perf_counter()
        task = copy.copy(self.task)
        task.setup = dataclasses.replace(task.setup, seed=seed)  # of `batch`
        params = self._initial(jax.random.key(seed, impl=KEYS))
        if pretrained:
            params = jax.tree.map(jnp.asarray, task.pretrained(params))
        start, state = params, _init(optimizer, params)
        lengths = (self.scale.warmup_steps, self.scale.steps)
        norms, evaluated = [_norms(params, start)], []
        for number in range(self.scale.steps):
            gradient = self._gradient(params, task.batch(number, task.setup.stages[0]))
            params, state = _update(optimizer, lengths, rate, gradient, state, params)
            norms.append(_norms(params, start))
            done = number + 1
            if done % self.scale.evaluate_every == 0 or done == self.scale.steps:
                f1 = self._evaluate(params, self.scale.part)["f1"]
                evaluated.append((done, f1))
        last = self._evaluate(params)
        norm, distance = np.array(jax.device_get(norms), np.float64).T
        return Curve(
            last["f1"], last["loss"], evaluated, list(norm), list(distance),
            time.perf_counter() - began,
        )  # fmt: skip

    def baseline(self) -> float:
        """Returns the held-out F1 of giving every word the most frequent tag."""
        assert self.task.baseline is not None
        return self.task.baseline.metrics["f1"]

    def words(self) -> str:
        """Returns how many words there are to train on, and how many are held out."""
        return self.task.facts["text"]

    def _loss(self, params: Tree, batch: Tree) -> jax.Array:
        weighted = self.task.loss(params, batch)
        return weighted.total / weighted.weight

    def _evaluate(self, params: Tree, every: int = 1) -> Mapping[str, float]:
        """Returns the held-out metrics on one of ``every`` batches."""
        batches = self.task.held_out()[::every]
        sums = jax.device_get([self._measure(params, batch) for batch in batches])
        found = {}
        for name in ("loss", "f1"):
            total, weight = np.array([each[name] for each in sums], np.float64).sum(0)
            found[name] = float(total / weight) if weight else 0.0
        return found


def _config(scale: Scale, folder: Path) -> Config:
    data, model = dict(FINE_TUNING["data"]), dict(FINE_TUNING["model"])
    if scale.model is None:
        model["init_from"] = str(folder / "pretrained")
    else:
        # A quick run reads a short text, the class above, and an untrained model.
        text = conll.write(python_source.sentences(inspect.getsource(Bench)))
        replace_file(folder / "text.conll", text.encode())
        data.update(text=str(folder / "text.conll"), sequence_length=32)
        model.update(scale.model)
    schedule = {**FINE_TUNING["schedule"], "warmup_steps": scale.warmup_steps}
    train = {**FINE_TUNING["train"], "steps": scale.steps, "batch_size": scale.batch_size}
    changed = {"data": data, "model": model, "schedule": schedule, "train": train}
    return config_file.build({**FINE_TUNING, **changed}, "the settings of the experiment")


@functools.partial(jax.jit, static_argnums=0)
def _init(optimizer: str, params: Tree) -> Tree:
    return _transformation(optimizer, (1, 1), 0.0).init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    optimizer: str,
    lengths: tuple[int, int],
    rate: jax.Array,
    gradient: Tree,
    state: Tree,
    params: Tree,
) -> tuple[Tree, Tree]:
    """Returns parameters and state after a step; rates share a program.

    Args:
      lengths: the steps of the warmup, and all steps.
    """
    tx = _transformation(optimizer, lengths, rate)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _transformation(
    optimizer: str, lengths: tuple[int, int], rate: Any
) -> optax.GradientTransformation:
    schedule = warmup_polynomial(rate, *lengths)
    return optax.chain(clip_by_global_norm(1.0), OPTIMIZERS[optimizer](schedule))


@jax.jit
def _norms(params: Tree, start: Tree) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of the pretrained parameters, and their distance from the start."""
    old = {path: x for path, x in tree.by_path(start).items() if not path.startswith(NEW)}
    new = tree.by_path(params)
    return (
        jnp.sqrt(sum(jnp.sum(new[path] ** 2) for path in old)),
        jnp.sqrt(sum(jnp.sum((new[path] - x) ** 2) for path, x in old.items())),
    )

"""Language modelling of bytes as a task."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage
from optim_zoo.train.random_numbers import generator
from optim_zoo.train.tasks.base import Baseline, Batch, Setup, Task, WeightedSum
from optim_zoo.train.tasks.byte_language import corpus
from optim_zoo.train.tasks.byte_language.model import NUM_SYMBOLS, ByteTransformer
from optim_zoo.train.tasks.byte_language.sections import Data, Model
from optim_zoo.tree import Tree

HELD_OUT = 2_000  # windows of an evaluation, or fewer by output.evaluation_batches
_WINDOW_STREAM = 0
_BLOCK = 1_024  # windows that one random generator draws


class ByteLanguage(Task):
    """Predicts every next byte of a text.

    An example is a window of ``data.sequence_length + 1`` bytes: all but the last are read, and all
    but the first are predicted. The loss of a batch is the sum of ``-log p(byte)`` in nats over the
    predicted bytes, and its weight is their number.
    """

    sections = MappingProxyType({"data": Data, "model": Model})
    paths = ("data.text",)
    unit = "bytes"
    loss_unit = "nats"
    weight_unit = "bytes"

    def __init__(self, setup: Setup) -> None:
        """Reads the text; without `Setup.reads_data` it reads nothing.

        Raises:
          UserError: the text cannot be used.
        """
        super().__init__(setup)
        data: Data = setup.sections["data"]
        self.sequence_length = data.sequence_length
        self.model = ByteTransformer(setup.sections["model"])
        if not setup.reads_data:
            return
        text = corpus.load(data.text, data.held_out, data.sequence_length)
        self._train = text.train
        self._held_out = self._evaluated(text.held_out)
        self.identity = {"text": text.digest}
        self.facts = {
            "text": f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out"
        }
        self.baseline = _baseline(text.train, np.concatenate([x["ids"] for x in self._held_out]))

    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters of the transformer."""
        variables: Any = self.model.init(key, jnp.zeros((1, self.sequence_length), jnp.int32))
        return variables["params"]

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        """Returns the summed loss in nats, and the number of predicted bytes."""
        return WeightedLoss(*self.measure(params, batch)["loss"])

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the loss and the accuracy of a batch."""
        ids = batch["ids"].astype(jnp.int32)
        logits: Any = self.model.apply({"params": params}, ids[:, :-1])
        following = ids[:, 1:]
        # A one-hot sum and no gather, whose gradient is a scatter, which is slow on a CPU.
        chosen = following[..., None] == jnp.arange(NUM_SYMBOLS)[None, None]
        losses = nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0.0), -1)
        right = jnp.argmax(logits, -1) == following
        count = jnp.float32(losses.size)
        return {"loss": (jnp.sum(losses), count), "accuracy": (jnp.sum(right), count)}

    def batch(self, number: int, stage: Stage) -> Batch:
        """Returns the next windows of an endless sequence, each from a random place.

        The sequence depends on the seed only: a batch of 64 has the windows of two batches of 32.
        """
        places = number * stage.batch_size + np.arange(stage.batch_size)
        blocks, within = np.divmod(places, _BLOCK)
        starts = np.empty(stage.batch_size, np.int64)
        for block in np.unique(blocks):
            drawn = generator(self.setup.seed, int(block), _WINDOW_STREAM).integers(
                len(self._train) - self.sequence_length, size=_BLOCK
            )
            starts[blocks == block] = drawn[within[blocks == block]]
        return {"ids": self._windows(self._train, starts)}

    def held_out(self) -> Sequence[Batch]:
        """Returns at most 2,000 windows, evenly spaced over the held-out bytes."""
        return self._held_out

    def units(self, stage: Stage) -> int:
        """Returns how many bytes a batch predicts."""
        return stage.batch_size * self.sequence_length

    def _evaluated(self, text: np.ndarray) -> list[Batch]:
        """Returns the held-out windows in batches of equal size."""
        first = self.setup.stages[0]
        windows = min(HELD_OUT, self.setup.evaluation_batches * first.batch_size)
        # The size of a micro-batch, which fits into memory if a training step does.
        size = min(first.batch_size // first.micro_batches, windows)
        starts = np.linspace(0, len(text) - self.sequence_length - 1, windows // size * size)
        ids = self._windows(text, starts.astype(np.int64))
        return [{"ids": part} for part in np.split(ids, windows // size)]

    def _windows(self, text: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return text[starts[:, None] + np.arange(self.sequence_length + 1)]


def _baseline(train: np.ndarray, windows: np.ndarray) -> Baseline:
    """Returns the metrics of predicting every byte by its frequency, with one more of each."""
    counts = np.bincount(train, minlength=NUM_SYMBOLS) + 1
    losses = -np.log(counts / counts.sum())
    following = windows[:, 1:]
    return Baseline(
        "byte frequency",
        {
            "loss": float(np.mean(losses[following])),
            "accuracy": float(np.mean(following == np.argmax(counts))),
        },
    )

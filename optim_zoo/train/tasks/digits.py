"""Classification of scikit-learn's handwritten digits with a small MLP.

The data is part of scikit-learn: 1,797 images of 8 x 8 pixels (UCI, Optical Recognition of
Handwritten Digits), so that this task needs no download. It is the shortest complete task of the
package, and a good example for others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage, check_size
from optim_zoo.train.random_numbers import generator
from optim_zoo.train.tasks.base import Baseline, Batch, Setup, Task, WeightedSum
from optim_zoo.tree import Tree

NUM_CLASSES = 10
HELD_OUT = 297  # images that are never trained on, which leaves 1,500
_ORDER_STREAM, _SPLIT_STREAM = 0, 1


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of the MLP."""

    num_layers: int = 2  # hidden layers
    hidden_size: int = 128

    def __post_init__(self) -> None:
        check_size("num_layers", self.num_layers, 0)
        check_size("hidden_size", self.hidden_size)


class MLP(nn.Module):
    """Hidden layers with ReLU, then one logit per class."""

    sizes: Model

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps images, ``(batch, 64)``, to logits, ``(batch, 10)``."""
        x = pixels
        for index in range(self.sizes.num_layers):
            x = nn.relu(nn.Dense(self.sizes.hidden_size, name=f"hidden_{index}")(x))
        return nn.Dense(NUM_CLASSES, name="logits")(x)


class Digits(Task):
    """Classifies digits. The loss is the cross entropy in nats; accuracy is measured too."""

    sections = MappingProxyType({"model": Model})
    unit = "images"
    loss_unit = "nats"
    weight_unit = "examples"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.model = MLP(setup.sections["model"])
        digits: Any = load_digits()
        pixels = (digits.data / 16 - 0.5).astype(np.float32)  # (1797, 64), in [-0.5, 0.5]
        labels = digits.target.astype(np.int32)  # (1797,)
        order = generator(0, 0, _SPLIT_STREAM).permutation(len(labels))  # the same for all seeds
        self._train, held_out = order[HELD_OUT:], order[:HELD_OUT]
        self._pixels, self._labels = pixels, labels
        self._held_out = self._rows(held_out)
        share = np.bincount(labels[self._train], minlength=NUM_CLASSES) / len(self._train)
        expected = labels[held_out]
        self.baseline = Baseline(
            "class frequency",
            {
                "loss": float(np.mean(-np.log(share[expected]))),
                "accuracy": float(np.mean(expected == np.argmax(share))),
            },
        )

    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters of the MLP."""
        variables: Any = self.model.init(key, self._pixels[:1])
        return variables["params"]

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        """Returns the summed cross entropy, and the number of images."""
        return WeightedLoss(*self.measure(params, batch)["loss"])

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the loss and the accuracy of a batch."""
        logits: Any = self.model.apply({"params": params}, batch["pixels"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        right = jnp.argmax(logits, -1) == batch["labels"]
        count = jnp.float32(len(losses))
        return {"loss": (jnp.sum(losses), count), "accuracy": (jnp.sum(right), count)}

    def batch(self, number: int, stage: Stage) -> Batch:
        """Returns the next images of an endless sequence of shuffled epochs."""
        places = number * stage.batch_size + np.arange(stage.batch_size)
        epochs, within = np.divmod(places, len(self._train))
        rows = np.empty(stage.batch_size, np.int64)
        for epoch in np.unique(epochs):
            shuffled = generator(self.setup.seed, int(epoch), _ORDER_STREAM)
            order = shuffled.permutation(self._train)
            rows[epochs == epoch] = order[within[epochs == epoch]]
        return self._rows(rows)

    def held_out(self) -> Sequence[Batch]:
        """Returns all held-out images, as one batch."""
        return [self._held_out]

    def _rows(self, rows: np.ndarray) -> Batch:
        return {"pixels": self._pixels[rows], "labels": self._labels[rows]}

"""The optimizers by name, with what each of them is."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import optax

from optim_zoo import optimizers, ranges


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer of the zoo."""

    name: str
    constructor: Callable[..., optax.GradientTransformation]
    description: str  # one line
    paper: str  # arXiv number
    variant: str  # which of the variants in use it is, and the code it agrees with


_ENTRIES = (
    Entry(
        "adamw",
        optimizers.adamw,
        "Adam with decoupled weight decay",
        "arXiv 1711.05101",
        "decay times learning rate, as optax and torch",
    ),
    Entry(
        "bert_adamw",
        optimizers.bert_adamw,
        "AdamW without bias correction, as BERT was trained",
        "arXiv 1810.04805",
        "AdamWeightDecayOptimizer of google-research/bert",
    ),
    Entry(
        "lamb",
        optimizers.lamb,
        "AdamW's direction scaled to the norm of each layer, for large batches",
        "arXiv 1904.00962",
        "Algorithm 2 of version 5, bias correction on, as optax",
    ),
)

OPTIMIZERS: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def get(name: str) -> Entry:
    """The entry of ``name``.

    Raises:
      ValueError: there is none; the nearest names are listed.
    """
    ranges.check_choice("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]

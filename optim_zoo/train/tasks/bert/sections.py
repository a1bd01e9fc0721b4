"""The config section of BERT's sizes."""

import dataclasses
from types import MappingProxyType
from typing import Any

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train.config import check_size

MIN_SEQUENCE_LENGTH = 8  # [CLS] A [SEP] B [SEP] leaves five tokens of text

INHERITED = MappingProxyType(
    {
        "num_layers": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 512,
        "max_positions": 512,
        "activation": "gelu",
    }
)
"""The keys that ``model.init_from`` determines -> their defaults without it, those of BERT-tiny
(arXiv 1908.08962)."""

_UNSET: Any = None  # TOML cannot express it, and a saved config leaves it out


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of BERT.

    With ``init_from``, a key of `INHERITED` that the config does not set stays None (``activation``
    stays "") until `optim_zoo.train.tasks.bert.init_from.resolve` fills it in. Without, it has its
    default. This is how a size that is set is known from one that is not.
    """

    num_layers: int = _UNSET  # 2
    hidden_size: int = _UNSET  # 128
    num_heads: int = _UNSET  # 2
    intermediate_size: int = _UNSET  # 512
    max_positions: int = _UNSET  # 512
    # "gelu", which is the default and BERT's, or "gelu_tanh", its approximation by tanh.
    activation: str = ""
    dropout: float = 0.0  # of hidden states and attention weights; BERT uses 0.1
    scan_layers: bool = True  # stack the encoder's layers in one array each: compiles faster
    dtype: str = "float32"  # of the arithmetic, float32 or bfloat16; parameters are float32
    # A run folder, a folder that transformers has written, or an .npz file with TensorFlow's names:
    # sizes, vocabulary and initial parameters come from there. "" starts anew.
    init_from: str = ""
    # With init_from: take the position embeddings that both have if max_positions differs.
    resize_positions: bool = False

    def __post_init__(self) -> None:
        for name, value in INHERITED.items():
            if getattr(self, name) in (None, "") and not self.init_from:
                object.__setattr__(self, name, value)
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        if self.max_positions is not None:
            check_size("max_positions", self.max_positions, MIN_SEQUENCE_LENGTH)
        if self.activation:
            ranges.check_choice("activation", self.activation, ("gelu", "gelu_tanh"))
        if self.resize_positions and not self.init_from:
            raise ArgumentValueError("resize_positions", "be false without init_from", True)
        ranges.check("dropout", self.dropout, 0.0, 1.0, open_high=True)
        ranges.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if None not in (self.hidden_size, self.num_heads) and self.hidden_size % self.num_heads:
            sizes = f"{self.hidden_size} and {self.num_heads}"
            raise ArgumentValueError(
                "hidden_size",
                "be divisible by num_heads",
                self.hidden_size,
                sentence=f"{{argument}} must be divisible by num_heads, got {sizes}",
                related=["num_heads"],
            )


def check_positions(model: Model, longest: int) -> None:
    """Checks that there is a position embedding for every token of the longest sequence.

    A task calls it in `Task.check`, and again with the sizes that `init_from.resolve` returns.

    Raises:
      UserError: there are too few. Nothing is raised while ``max_positions`` is unset.
    """
    if model.max_positions is not None and longest > model.max_positions:
        raise UserError(
            f"model.max_positions must be at least the sequence length {longest}, "
            f"got {model.max_positions}: raise it, or shorten the sequences"
        )

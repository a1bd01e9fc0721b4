"""The sections that the byte language model adds to a config."""

import dataclasses

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.train.config import check_size


@dataclasses.dataclass(frozen=True)
class Data:
    """The text."""

    text: str = ""  # a glob of UTF-8 files; "" is the source of Python's standard library
    held_out: float = 0.05  # the fraction of the bytes that is never trained on
    sequence_length: int = 32  # bytes that are predicted in an example, each from those before it

    def __post_init__(self) -> None:
        ranges.check("held_out", self.held_out, 0.0, 1.0, open_low=True, open_high=True)
        check_size("sequence_length", self.sequence_length)


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of the transformer."""

    num_layers: int = 2
    hidden_size: int = 32
    num_heads: int = 2
    intermediate_size: int = 128  # of the feed-forward part of each layer

    def __post_init__(self) -> None:
        check_size("num_layers", self.num_layers, 0)
        for name in ("hidden_size", "num_heads", "intermediate_size"):
            check_size(name, getattr(self, name))
        if self.hidden_size % self.num_heads:
            raise ArgumentValueError(
                "hidden_size",
                f"be a multiple of num_heads, which is {self.num_heads}",
                self.hidden_size,
                related=["num_heads"],
            )

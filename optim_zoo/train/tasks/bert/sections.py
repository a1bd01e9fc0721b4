"""The config section of BERT's sizes."""

import dataclasses

from optim_zoo import ranges
from optim_zoo.errors import ArgumentValueError
from optim_zoo.train.config import check_size

MIN_SEQUENCE_LENGTH = 8  # [CLS] A [SEP] B [SEP] leaves five tokens of text


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of BERT; the defaults are those of BERT-tiny (arXiv 1908.08962)."""

    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 2
    intermediate_size: int = 512
    max_positions: int = 512
    activation: str = "gelu"  # gelu, which BERT uses, or gelu_tanh, its approximation by tanh
    dropout: float = 0.0  # of hidden states and attention weights; BERT uses 0.1
    scan_layers: bool = True  # stack the encoder's layers in one array each: compiles faster
    dtype: str = "float32"  # of the arithmetic, float32 or bfloat16; parameters are float32

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size"):
            check_size(name, getattr(self, name))
        check_size("max_positions", self.max_positions, MIN_SEQUENCE_LENGTH)
        ranges.check_choice("activation", self.activation, ("gelu", "gelu_tanh"))
        ranges.check("dropout", self.dropout, 0.0, 1.0, open_high=True)
        ranges.check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.hidden_size % self.num_heads:
            sizes = f"{self.hidden_size} and {self.num_heads}"
            raise ArgumentValueError(
                "hidden_size",
                "be divisible by num_heads",
                self.hidden_size,
                sentence=f"{{argument}} must be divisible by num_heads, got {sizes}",
                related=["num_heads"],
            )

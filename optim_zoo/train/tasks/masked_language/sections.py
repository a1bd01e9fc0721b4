"""The sections that masked-language pretraining adds to a config."""

import dataclasses

from optim_zoo import ranges
from optim_zoo.train.config import check_size
from optim_zoo.train.tasks.bert.sections import MIN_SEQUENCE_LENGTH


@dataclasses.dataclass(frozen=True)
class Data:
    """The text."""

    text: str = ""  # a glob of UTF-8 files; "" is the prose of Python's standard library
    field: str = ""  # the key that holds the text, where the files are JSON lines
    vocabulary: str = ""  # a WordPiece vocabulary, one token per line; "" is the bundled one
    held_out: float = 0.05  # the fraction of the tokens that is never trained on
    sequence_length: int = 128  # tokens per example, including [CLS] and [SEP]
    masking_rate: float = 0.15  # the share of the tokens that are masked
    whole_word_masking: bool = False  # mask all pieces of a word together

    def __post_init__(self) -> None:
        ranges.check("held_out", self.held_out, 0.0, 1.0, open_low=True, open_high=True)
        ranges.check("masking_rate", self.masking_rate, 0.0, 1.0, open_low=True, open_high=True)
        check_size("sequence_length", self.sequence_length, MIN_SEQUENCE_LENGTH)

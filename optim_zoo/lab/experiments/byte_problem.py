"""The byte language model as a problem of experiments."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optim_zoo.lab.experiments.training import Problem
from optim_zoo.train.config import Stage
from optim_zoo.train.tasks.base import Setup
from optim_zoo.train.tasks.byte_language.sections import Data, Model
from optim_zoo.train.tasks.byte_language.task import ByteLanguage

EXCLUDED = ("bias", "norm")  # neither decayed nor given a trust ratio


def stage(batch_size: int) -> Stage:
    """Returns a stage with a batch size; its other fields are placeholders."""
    empty: Mapping[str, Any] = MappingProxyType({})
    return Stage(1, batch_size, 1, empty, empty, empty, empty)


def problem(model: Model, sequence_length: int, examples: int, micro_size: int) -> Problem:
    """Returns the model on the standard library's sources, with 2,000 held-out windows."""
    sections = {"data": Data(sequence_length=sequence_length), "model": model}
    setup = Setup(sections, [stage(50)], 0, 40, Path(tempfile.gettempdir()))
    return Problem(ByteLanguage(setup), examples, micro_size)

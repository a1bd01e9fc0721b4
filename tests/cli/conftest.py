"""Runs that the tests of several commands use."""

from pathlib import Path

import pytest

from optim_zoo.train import config_file, loop
from tests.train.tasks.masked_language.small_text import write_random_text

TINY = """
[data]
text = "{folder}/*.txt"
vocabulary = "{folder}/vocabulary"
held_out = 0.2
sequence_length = 16
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
intermediate_size = 32
max_positions = 2000
[schedule]
learning_rate = 0.003
warmup_steps = 2
[train]
steps = 6
batch_size = 8
[output]
log_every = 1
evaluate_every = 100
checkpoint_every = 3
"""

DIGITS = """
[task]
name = "digits"
[model]
hidden_size = 8
[schedule]
name = "constant"
learning_rate = 0.1
[train]
steps = 1
batch_size = 8
[output]
sinks = []
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a config file, in a folder that also has a little text and a vocabulary."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_text(folder)
    (folder / "tiny.toml").write_text(TINY.format(folder=folder))
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a masked_language run with checkpoints of the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.run(config_file.load(tiny, ["output.sinks=[]", "output.evaluate_every=3"]), folder)
    return folder


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of the task digits."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits.toml").write_text(DIGITS)
    loop.run(config_file.load(folder / "digits.toml"), folder / "run")
    return folder / "run"

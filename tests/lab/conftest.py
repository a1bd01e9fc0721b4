"""A config and a function that writes sweep files next to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from optim_zoo.lab import sweep_file
from optim_zoo.lab.sweep_file import Sweep

BASE = """
[task]
name = "digits"
[model]
hidden_size = 4
num_layers = 1
[optimizer]
name = "lars"
momentum = 0.5
[schedule]
name = "constant"
learning_rate = 1.0
[train]
steps = 4
batch_size = 8
[output]
log_every = 1
evaluate_every = 2
"""

Load = Callable[..., Sweep]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes a sweep file of this text next to a config, and loads it."""
    (tmp_path / "base.toml").write_text(BASE)
    monkeypatch.chdir(tmp_path)

    def load(text: str, *arguments: str, name: str = "trial.toml") -> Sweep:
        config = "" if "config =" in text else 'config = "base.toml"\n'
        (tmp_path / name).write_text(config + text)
        return sweep_file.load(Path(name), arguments)

    return load

import math
from pathlib import Path

import numpy as np
import pytest

from optim_zoo.cli import main
from optim_zoo.lab import lr_find
from tests.lab.conftest import Load

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_the_range_ends_at_the_least_loss_and_begins_with_the_fall() -> None:
    rates = np.geomspace(1e-5, 10, 100)
    losses = 2 - np.clip(np.log10(rates) + 3, 0, 2) * 0.5 + 5 * np.clip(np.log10(rates), 0, None)
    found = lr_find.judge(list(rates), list(losses))
    assert found.low is not None
    assert found.high is not None
    assert 1e-3 < found.low < 1e-2  # where the loss begins to fall, and the average follows
    assert 0.1 < found.high < 3
    assert found.suggestion == max(found.high / 3, found.low)


def test_a_loss_that_does_not_fall_has_no_suggestion_and_one_that_explodes_stops() -> None:
    assert lr_find.judge([1e-3, 1e-2, 1e-1], [1.0, 1.0, 2.0]).suggestion is None
    assert lr_find.diverged([1.0, math.nan])
    assert lr_find.diverged([2.0] * 10 + [1.0, 2.5])
    assert not lr_find.diverged([2.0] * 10 + [1.0, 1.5])


def test_the_command_writes_its_own_folder_and_nothing_else(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("[grid]")
    assert main(["lr-find", "base.toml", "steps=10", "high=1", "train.batch_size=16"]) == 0
    made = {each.name for each in (tmp_path / "runs" / "base_lr_find").iterdir()}
    assert made == {"lr_find.jsonl", "lr_find.png"}
    assert "plot: " in capsys.readouterr().out
    assert main(["lr-find", "base.toml", "steps=3"]) == 2
    assert "steps must be >= 10, got 3" in capsys.readouterr().err

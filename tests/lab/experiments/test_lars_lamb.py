"""The experiment with LARS and LAMB: a quick run of the command."""

import json
from pathlib import Path

import pytest

from optim_zoo import cli
from optim_zoo.lab.experiments.lars_lamb import measuring


@pytest.mark.slow  # a quick run, as in test_batch_scaling.py
def test_every_optimizer_has_the_same_budget_on_every_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_to_compile: None
) -> None:
    assert cli.main(["reproduce", "lars-lamb", "--quick", f"--dir={tmp_path}"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"results.jsonl", "lars_lamb.md", "lars_lamb.png"}
    text = (tmp_path / "lars_lamb.md").read_text()
    assert "](lars_lamb.png)" in text
    assert "its figures mean nothing" in text
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    scale = measuring.QUICK
    for kind in measuring.KINDS:
        for name in scale.optimizers:
            own = [row for row in rows if (row["task"], row["optimizer"]) == (kind.name, name)]
            assert len(own) == scale.budget * len(scale.seeds)


@pytest.mark.parametrize("scale", [measuring.FULL, measuring.QUICK])
def test_batches_divide_the_examples(scale: measuring.Scale) -> None:
    assert scale.examples % scale.batch == 0
    assert scale.batch % scale.micro_size == 0

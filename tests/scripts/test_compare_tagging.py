"""The comparison of fine-tuning with random parameters: its commands, lines and picture."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.scripts.importing import imported


@pytest.fixture
def script() -> Iterator[Any]:
    with imported("fine_tuning", "compare_tagging") as (module,):
        yield module


def test_each_start_and_seed_is_a_run_with_a_line_and_a_place_in_the_picture(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append([part.replace(str(tmp_path), "") for part in command[4:]])
        folder = tmp_path / command[5].rpartition("/")[2]
        folder.mkdir(exist_ok=True)
        f1 = 0.9 if "pretrained" in command[5] else 0.8
        line = {"kind": "held_out", "step": 1, "loss": 1, "f1": f1, "f1/a": f1, "confusion/a/a": 1}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    for _ in range(2):
        arguments = ["RUN", str(tmp_path), "--seeds", "3,4", "train.steps=5"]
        assert script.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["seed"], line["start"], line["f1"], line["by_class"]) for line in lines[:4]] == [
        (seed, start, f1, {"a": f1})
        for seed in (3, 4)
        for start, f1 in (("pretrained", 0.9), ("scratch", 0.8))
    ]
    # The second time, every run is found.
    assert [line["seconds"] is None for line in lines] == [False] * 4 + [True] * 4
    assert [command[0].rpartition("/")[2] for command in commands[:2]] == [
        "tag_python.toml",
        "tag_python_scratch.toml",
    ]
    assert commands[0][2:] == ["run.seed=3", "model.init_from=RUN", "train.steps=5"]
    assert commands[3][1:] == ["run.dir=/scratch_4", "run.seed=4", "train.steps=5"]
    assert imread(tmp_path / "comparison.png").std() > 0.1


def test_a_run_that_fails_ends_the_comparison(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        script.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 75)
    )
    assert script.main(["RUN", str(tmp_path)]) == 75

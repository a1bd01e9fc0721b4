"""Saved steps of a run folder."""

from pathlib import Path

from optim_zoo.train.run_folder import saved_steps


def test_saved_steps_are_those_of_complete_checkpoints_in_order(tmp_path: Path) -> None:
    assert saved_steps(tmp_path) == []
    for name in ("9", "10", "11.orbax-checkpoint-tmp", "a"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [9, 10]

"""Finds what is saved in a run folder, without reading it."""

from pathlib import Path


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a run folder, in ascending order."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())

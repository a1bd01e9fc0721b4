"""Finds what is saved in a run folder, without reading it."""

from pathlib import Path

CHECKPOINTS = "checkpoints"  # parameters and optimizer state of the last steps saved
BEST = "best"  # the parameters that `output.keep_best` keeps


def saved_steps(folder: Path, name: str = CHECKPOINTS) -> list[int]:
    """Returns the steps of the complete checkpoints in a run folder, in ascending order.

    Args:
      folder: the run folder.
      name: `CHECKPOINTS` or `BEST`.
    """
    names = [path.name for path in (folder / name).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())

"""Predicts with what a run has trained; see ``optim-zoo predict``."""

import sys
from collections.abc import Iterable
from pathlib import Path

from optim_zoo import train
from optim_zoo.errors import UserError


def predict(
    folder: Path,
    file: str,
    *,
    top: int = 0,
    step: int | None = None,
    best: bool = False,
    averaged: bool | None = None,
) -> Iterable[str]:
    """Returns the lines to print: what the task of a run predicts for a text.

    Args:
      folder: the run folder.
      file: the path of a text in UTF-8, or "-" for standard input.
      top: how many candidates to show for each prediction; 0 for the predictions alone.
      step: the number of steps made; None for the last step that is saved.
      best: whether to use the parameters that ``output.keep_best`` has kept.
      averaged: whether to use the averages of the parameters of ``averaging.decay``; None for the
        parameters, and for the best ones as the run has evaluated them.

    Raises:
      UserError: the text cannot be read, `optim_zoo.train.load` refuses the run or the step, or the
        task cannot use the text.
    """
    if top < 0:
        raise UserError(f"--top must be at least 0, got {top}")
    text = read_lines(file)
    loaded = train.load(folder, step, best, averaged)
    return loaded.task.predict(loaded, text, top)


def read_lines(file: str) -> list[str]:
    """Returns the lines of a text without their ends, which may be those of any system.

    Raises:
      UserError: it cannot be read, has no text, or is not UTF-8.
    """
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"expected a text in UTF-8, but {name} has an invalid byte on line {place}: convert it"
        ) from error
    if not text.strip():
        raise UserError(f"expected a text, but {name} is empty")
    # Not splitlines, which also splits at characters that a line of text may contain.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")

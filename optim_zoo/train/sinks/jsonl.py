"""The sink that appends one JSON object per line to the metrics file.

`optim_zoo.train.records` describes the format and reads it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optim_zoo.train import records
from optim_zoo.train.files import cannot_write, replace_file
from optim_zoo.train.sinks.base import RunInfo


class JsonLines:
    """Writes ``metrics.jsonl``. A resumed run first drops the lines that it will write again."""

    def open(self, run: RunInfo) -> None:
        """Opens the file for appending.

        Raises:
          UserError: the file cannot be written, or it has a line that is not a record.
        """
        path = run.folder / "metrics.jsonl"
        kept = []
        if run.start and path.exists():
            kept = [line for line, record in records.lines(path) if record["step"] <= run.start]
        replace_file(path, b"".join(kept))
        self._path = path
        try:
            # Unbuffered, so that closing the file does not retry a write that a full disk refused.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes a line of kind ``train``."""
        self._write({"kind": "train", "step": step, **figures})

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line of kind ``held_out``."""
        self._write({"kind": "held_out", "step": step, **metrics})

    def close(self, finished: bool) -> None:
        """Closes the file; every line is already in it."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, and returns after the operating system has received it."""
        plain = {name: records.plain(name, value) for name, value in record.items()}
        rest = memoryview(json.dumps(plain, allow_nan=False).encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise cannot_write(self._path, error) from error


def has_evaluation(folder: Path) -> bool:
    """Returns whether the metrics file of a run folder has an evaluation."""
    path = folder / "metrics.jsonl"
    return path.exists() and bool(records.read(path).held_out)

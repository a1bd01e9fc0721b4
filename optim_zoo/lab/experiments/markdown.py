"""Pieces of the Markdown pages that experiments write."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np


def wrapped(paragraph: str, indent: str = "") -> str:
    """Returns a paragraph in lines of at most 120 characters; ``indent`` is that of the second."""
    return textwrap.fill(
        " ".join(paragraph.split()),
        120,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def listed(points: Sequence[str]) -> str:
    """Returns a list with one item for each paragraph."""
    return "\n".join(wrapped(f"- {point}", "  ") for point in points)


def table(*rows: Sequence[str]) -> str:
    """Returns a table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def spread(values: np.ndarray, factor: float, digits: int) -> str:
    """Returns ``mean (smallest to largest)`` of values times a factor."""
    low, mean, high = (factor * float(f(values)) for f in (np.min, np.mean, np.max))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def opening(title: str, name: str, seconds: float, *, quick: bool) -> list[str]:
    """Returns the title, the command and how long it took, as paragraphs."""
    return [
        f"# {title}",
        *(["**A quick run: its figures mean nothing.**"] if quick else []),
        f"```sh\noptim-zoo reproduce {name}{' --quick' if quick else ''}\n```",
        wrapped(
            f"""The command wrote this page in {seconds:.0f} seconds, on a machine with
            {os.cpu_count()} CPU cores that other programs may have used too."""
        ),
    ]

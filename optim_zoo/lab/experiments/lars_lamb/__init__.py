"""LARS and LAMB on attention and on images (arXiv 1904.00962, 1708.03888).

``measuring`` trains, ``figures`` draws, ``page`` writes.
"""

from pathlib import Path

from optim_zoo.lab.experiments import Say
from optim_zoo.lab.experiments.lars_lamb import figures, measuring, page
from optim_zoo.lab.experiments.tuning import RunLog
from optim_zoo.train.files import replace_file


def run(folder: Path, *, quick: bool, say: Say) -> Path:
    """Runs the experiment, and returns the path of its page.

    A run that was stopped continues with the rows of ``results.jsonl``.

    Args:
      folder: an existing folder, for ``results.jsonl``, a PNG and ``lars_lamb.md``.
      quick: whether to train tiny models for few steps.
      say: prints a line.
    """
    scale = measuring.QUICK if quick else measuring.FULL
    log = RunLog(folder / "results.jsonl", repr(scale))
    results = measuring.measure(scale, log, say)
    figures.draw(results, folder / "lars_lamb.png")
    text = page.text(results, scale, log.seconds, quick=quick)
    replace_file(folder / "lars_lamb.md", text.encode())
    return folder / "lars_lamb.md"

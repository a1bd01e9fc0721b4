"""Optimizers at four batch sizes with a fixed number of examples (arXiv 1904.00962, 2102.06356).

``measuring`` trains, ``figures`` draws, ``page`` and ``reading`` write.
"""

from pathlib import Path

from optim_zoo.lab.experiments import Say
from optim_zoo.lab.experiments.batch_scaling import figures, measuring, page
from optim_zoo.lab.experiments.tuning import RunLog
from optim_zoo.train.files import replace_file


def run(folder: Path, *, quick: bool, say: Say) -> Path:
    """Runs the experiment, and returns the path of its page.

    A run that was stopped continues with the rows of ``results.jsonl``.

    Args:
      folder: an existing folder, for ``results.jsonl``, two PNGs and ``batch_scaling.md``.
      quick: whether to train a tiny model for few steps with two optimizers.
      say: prints a line.
    """
    scale = measuring.QUICK if quick else measuring.FULL
    log = RunLog(folder / "results.jsonl", repr(scale))
    results, noise = measuring.measure(scale, log, say)
    panels = [
        measuring.targets(results, scale, batches)
        for batches in (scale.batches, scale.batches[:-1])
    ]
    figures.draw_losses(results, scale, folder / "batch_scaling_loss.png")
    figures.draw_steps(panels, scale, folder / "batch_scaling_steps.png")
    text = page.text(results, panels, noise, scale, log.seconds, quick=quick)
    replace_file(folder / "batch_scaling.md", text.encode())
    return folder / "batch_scaling.md"

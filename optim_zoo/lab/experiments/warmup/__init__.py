"""Warmup in place of bias correction, in AdamW and LAMB.

``training`` trains, ``figures`` draws, ``page`` writes.
"""

import json
import time
from pathlib import Path

from optim_zoo.lab.experiments import Say
from optim_zoo.lab.experiments.warmup import figures, page, training
from optim_zoo.train.files import replace_file


def run(folder: Path, *, quick: bool, say: Say) -> Path:
    """Runs the experiment, and returns the path of its page.

    Args:
      folder: an existing folder, for ``results.jsonl``, two PNGs and ``warmup.md``.
      quick: whether to train a tiny model for few steps.
      say: prints a line.
    """
    began = time.perf_counter()
    scale = training.QUICK if quick else training.FULL
    tasks = training.make_tasks(scale)
    measured = []
    for form in training.FORMS:
        for corrected in (True, False):
            start = time.perf_counter()
            measured.append(training.measure(form, corrected, scale, tasks))
            runs, seconds = measured[-1].loss.size, time.perf_counter() - start
            say(f"{measured[-1].title}: {runs} runs of {scale.steps} steps, {seconds:.0f} s")
    lines = "".join(json.dumps(row) + "\n" for one in measured for row in one.rows())
    replace_file(folder / "results.jsonl", lines.encode())
    figures.draw_ratios(measured, folder / "warmup_ratios.png")
    figures.draw_losses(measured, folder / "warmup_losses.png")
    text = page.text(measured, scale, time.perf_counter() - began, quick=quick)
    replace_file(folder / "warmup.md", text.encode())
    return folder / "warmup.md"

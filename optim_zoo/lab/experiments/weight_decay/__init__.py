"""L2 regularization compared with decoupled weight decay (arXiv 1711.05101).

``two_coordinates`` has what is exact, ``maps`` trains, ``figures`` draws, ``page`` writes.
"""

import json
import math
import time
from pathlib import Path

from optim_zoo.lab.experiments import Say
from optim_zoo.lab.experiments.weight_decay import figures, maps, page, two_coordinates
from optim_zoo.train.files import replace_file


def run(folder: Path, *, quick: bool, say: Say) -> Path:
    """Runs the experiment, and returns the path of its page.

    Args:
      folder: an existing folder, for ``results.jsonl``, two PNGs and ``weight_decay.md``.
      quick: whether to train small models for few steps on a small grid.
      say: prints a line.
    """
    began = time.perf_counter()
    kept = two_coordinates.kept()
    for name, shares in kept.items():
        say(f"{name}: keeps {shares[-1][0]:.4f} and {shares[-1][1]:.4f} of the two coordinates")
    figures.draw_two_coordinates(kept, folder / "weight_decay_two_coordinates.png")

    scale = maps.QUICK if quick else maps.FULL
    measured = []
    for form in maps.QUICK_FORMS if quick else maps.FORMS:
        start = time.perf_counter()
        measured.append(maps.measure(form, scale))
        runs = measured[-1].loss.size
        say(
            f"{form.title}: {runs} runs of {scale.steps} steps, {time.perf_counter() - start:.0f} s"
        )
    rows = [row for one in measured for row in one.rows()]
    # JSON has no NaN: a loss that is not finite is null.
    finite = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    lines = "".join(json.dumps(row) + "\n" for row in finite)
    replace_file(folder / "results.jsonl", lines.encode())
    figures.draw_maps(measured, folder / "weight_decay_maps.png")
    text = page.text(kept, measured, scale, time.perf_counter() - began, quick=quick)
    replace_file(folder / "weight_decay.md", text.encode())
    return folder / "weight_decay.md"

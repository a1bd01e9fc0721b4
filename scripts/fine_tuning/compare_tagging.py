"""Compares fine-tuning with training from random parameters, on the tags of Python source.

    python scripts/fine_tuning/compare_tagging.py RUN FOLDER [--seeds 0,1,2] [section.key=value ...]

Tags Python source from a pretrained run and from random parameters, with several seeds. Each run
prints one JSON line: seed, start, F1, F1 by class, and seconds. ``comparison.png`` in FOLDER shows
F1 by class. The same command resumes: a finished run is not made again, and its seconds are null.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from optim_zoo.train import records
from optim_zoo.train.sinks.plots.figure import BLUE, PALE_BLUE, new_figure, write

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
STARTS = {"pretrained": "tag_python.toml", "scratch": "tag_python_scratch.toml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs and draws the picture; returns the exit code of a run that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pretrained", type=pathlib.Path, help="the run folder to start from")
    parser.add_argument("folder", type=pathlib.Path, help="where the runs are written")
    parser.add_argument("overrides", nargs="*", help="of both configs, such as train.steps=100")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parsed = parser.parse_intermixed_args(arguments)
    rows = []
    for seed in map(int, parsed.seeds.split(",")):
        for start in STARTS:
            run = parsed.folder / f"{start}_{seed}"
            code, seconds = train(start, seed, run, parsed.pretrained, parsed.overrides)
            if code:
                return code
            rows.append({"seed": seed, "start": start, **scores(run), "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    draw(rows, parsed.folder / "comparison.png")
    return 0


def train(
    start: str,
    seed: int,
    run: pathlib.Path,
    pretrained: pathlib.Path,
    overrides: Sequence[str],
) -> tuple[int, float | None]:
    """Returns the exit code of a run, and how long it took unless it was resumed."""
    own = [f"model.init_from={pretrained}"] if start == "pretrained" else []
    command = [sys.executable, "-m", "optim_zoo.cli", "train", str(CONFIGS / STARTS[start])]
    resumed = (run / "metrics.jsonl").exists()
    began = time.perf_counter()
    done = subprocess.run(
        [*command, f"run.dir={run}", f"run.seed={seed}", *own, *overrides],
        stdout=sys.stderr,
        check=False,
    )
    return done.returncode, None if resumed else round(time.perf_counter() - began, 1)


def scores(run: pathlib.Path) -> dict[str, Any]:
    """Returns the F1 of the last evaluation of a run, over all classes and for each."""
    held_out = records.read(run / "metrics.jsonl").held_out
    last = {name: round(float(values[-1]), 4) for name, (_, values) in held_out.items()}
    by_class = {name[3:]: value for name, value in last.items() if name.startswith("f1/")}
    return {"f1": last["f1"], "by_class": by_class}


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws F1 by class as the mean over the seeds, with a mark for each seed."""
    names = ["all", *rows[0]["by_class"]]
    values = {
        start: np.array(
            [[row["f1"], *row["by_class"].values()] for row in rows if row["start"] == start]
        )
        for start in STARTS
    }
    figure, axes = new_figure(7.0, 1.4 + 0.42 * len(names))
    axes.set_title("Held-out F1 by class", loc="left", fontsize=12)
    for index, (start, color) in enumerate(zip(STARTS, (BLUE, PALE_BLUE), strict=True)):
        places = np.arange(len(names)) + 0.38 * (index - 0.5)
        means = values[start].mean(0)
        bars = axes.barh(places, means, 0.36, color=color, label=start)
        axes.bar_label(bars, fmt="%.3f", padding=8, fontsize=8)
        for seed in values[start]:
            axes.plot(seed, places, "|", color="black", ms=6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(max(0.0, min(v.min() for v in values.values()) - 0.1), 1.06)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    write(figure, path)


if __name__ == "__main__":
    sys.exit(main())

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
from optim_zoo.train.sinks.plots.figure import BLUE, VERMILION, new_figure, write

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
    """Draws F1 by class: a diamond for the mean over the seeds, and a dot for each seed."""
    names = ["all", *rows[0]["by_class"]]
    values = {
        start: np.array(
            [[row["f1"], *row["by_class"].values()] for row in rows if row["start"] == start]
        )
        for start in STARTS
    }
    figure, axes = new_figure(7.0, 1.2 + 0.4 * len(names))
    axes.set_title("Held-out F1 by class", loc="left", fontsize=12)
    for start, color, offset in zip(STARTS, (BLUE, VERMILION), (-0.16, 0.16), strict=True):
        places, means = np.arange(len(names)) + offset, values[start].mean(0)
        axes.plot(values[start].T, places, "o", color=color, alpha=0.35, ms=4, mew=0)
        axes.plot(means, places, "D", color=color, ms=6, label=start)
        for place, mean, most in zip(places, means, values[start].max(0), strict=True):
            label = axes.annotate(f"{mean:.3f}", (most, place), va="center", fontsize=8)
            label.set_position((8, 0))
            label.set_anncoords("offset points")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.06)
    axes.grid(axis="x", color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    write(figure, path)


if __name__ == "__main__":
    sys.exit(main())

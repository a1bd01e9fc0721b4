"""Measures how the time of an update grows with the number of parameters and of leaves.

    python scripts/bench/growth.py [--rounds N] [--parameters 1e7 ...] [--leaves 50 ...]
        [--fixed-parameters 5e7] [--fixed-leaves 200] [--plot FILE.png] > lines.jsonl
    python scripts/bench/growth.py --from lines.jsonl --plot FILE.png

The optimizers are `optim_zoo.lamb`, `optax.lamb` and `optax.adamw`, and the leaves are equal square
float32 matrices: first 200 leaves with a growing number of parameters, then 50 million parameters
in a growing number of leaves. Steps are jitted and donate their arguments. At every size the three
optimizers take turns in one process. Where they do not fit into memory together, they are measured
one after another (``"together": false``); where one does not fit alone, its line says so.

Prints one JSON line per measurement: the median and the quartiles of a step in milliseconds, and
the seconds that tracing and compiling take. ``--plot`` draws them with matplotlib, which the extra
``train`` installs. Compiling thousands of leaves takes minutes.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optax

import harness
import optim_zoo
from harness import LEARNING_RATE
from optim_zoo.tree import Tree

ROUNDS = 20
PARAMETERS = (10e6, 30e6, 100e6, 300e6, 500e6, 1e9)
LEAVES = (50, 200, 1000, 2000, 5000)
FIXED_PARAMETERS, FIXED_LEAVES = 50e6, 200
WEIGHT_DECAY = 0.01

OPTIMIZERS = {
    "optim_zoo.lamb": optim_zoo.lamb(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "optax.lamb": optax.lamb(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "optax.adamw": optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
}
# From the palette by Okabe and Ito, which is distinguishable with every kind of colour vision.
COLORS = {"optim_zoo.lamb": "#D55E00", "optax.lamb": "#0072B2", "optax.adamw": "#555555"}

Line = Mapping[str, Any]  # one printed line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--parameters", type=float, nargs="*", default=PARAMETERS)
    parser.add_argument("--leaves", type=int, nargs="*", default=LEAVES)
    parser.add_argument("--fixed-parameters", type=float, default=FIXED_PARAMETERS)
    parser.add_argument("--fixed-leaves", type=int, default=FIXED_LEAVES)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--from", dest="saved", type=Path, metavar="FILE.jsonl")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    if arguments.saved is not None and arguments.plot is None:
        parser.error("--from draws lines that were saved: --plot FILE.png must say where")
    if arguments.saved is not None:
        lines = [json.loads(line) for line in arguments.saved.read_text("utf-8").splitlines()]
    else:
        lines = [
            line
            for grows, parameters, leaves in [
                *(("parameters", int(x), arguments.fixed_leaves) for x in arguments.parameters),
                *(("leaves", int(arguments.fixed_parameters), x) for x in arguments.leaves),
            ]
            for line in measure(grows, parameters, leaves, arguments.rounds)
        ]
    if arguments.plot is not None:
        plot(lines, arguments.plot)


def measure(grows: str, parameters: int, leaves: int, rounds: int) -> list[Line]:
    """Prints and returns the lines of one tree.

    Args:
      grows: "parameters" or "leaves", the quantity that differs between the trees of a panel.
      parameters: the number of parameters of this tree, about.
      leaves: the number of leaves of this tree.
      rounds: how often each step is timed.
    """
    shapes = harness.square_leaves(parameters, leaves)
    steps = {
        name: harness.Step(tx, harness.update(tx), shapes, [shapes])
        for name, tx in OPTIMIZERS.items()
    }
    together = not _lack(steps, shapes)
    common = {
        "grows": grows,
        "parameters": harness.parameters(shapes),
        "leaves": leaves,
        "rounds": rounds,
        "together": together,
        **harness.machine(),
    }
    lines: list[Line] = []
    for names in [list(steps)] if together else [[name] for name in steps]:
        part = {name: steps.pop(name) for name in names}  # freed before the next part
        lack = _lack(part, shapes)
        spreads = {} if lack else _spreads(part, shapes, rounds)
        for name, step in part.items():
            measured = {
                **({"skipped": lack} if lack else spreads[name]),
                "trace_and_lower_s": step.lower_seconds,
                "compile_s": step.compile_seconds,
                "temporaries_per_parameter": step.temporaries,
            }
            lines.append(harness.show(name, measured, common))
        del step
    return lines


def _lack(steps: Mapping[str, harness.Step], shapes: Tree) -> str:
    """Returns the memory that the steps and gradients need if they do not fit, else ""."""
    return harness.lacking(
        harness.tree_bytes(shapes)
        + sum(step.held_bytes for step in steps.values())
        + max(step.temporary_bytes for step in steps.values())
    )


def _spreads(
    steps: Mapping[str, harness.Step], shapes: Tree, rounds: int
) -> dict[str, dict[str, Any]]:
    gradients = harness.random_gradients(shapes)
    for step in steps.values():
        step.start(harness.random_parameters(gradients), [gradients])
    times = harness.interleaved(steps, rounds)
    return {name: harness.spread(milliseconds) for name, milliseconds in times.items()}


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draws the seconds of a step and of compilation, against parameters and against leaves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9.0, 4.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    timed = [line for line in lines if "median_ms" in line]
    for axes, grows in zip(panels, ("parameters", "leaves"), strict=True):
        for name, color in COLORS.items():
            drawn = [line for line in timed if (line["what"], line["grows"]) == (name, grows)]
            drawn.sort(key=lambda line: line[grows])
            sizes = [line[grows] for line in drawn]
            low, high = ([line["quartiles_ms"][i] / 1e3 for line in drawn] for i in (0, 1))
            axes.fill_between(sizes, low, high, color=color, alpha=0.25, lw=0)
            axes.plot(sizes, [line["median_ms"] / 1e3 for line in drawn], "o-", color=color, ms=4)
            compiled = [line["trace_and_lower_s"] + line["compile_s"] for line in drawn]
            axes.plot(sizes, compiled, "s:", color=color, ms=3, lw=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(_x_label(timed, grows))
        axes.grid(which="major", color="#DDDDDD", lw=0.7)
        axes.tick_params(labelsize=9)
    panels[0].set_ylabel("seconds")
    handles = [Line2D([], [], color=color, lw=3, label=name) for name, color in COLORS.items()]
    handles += [
        Line2D([], [], color="black", marker="o", ms=4, label="one step (band: quartiles)"),
        Line2D([], [], color="black", marker="s", ms=3, ls=":", label="tracing and compiling"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path)


def _x_label(lines: Sequence[Line], grows: str) -> str:
    """Names the quantity that grows, and the value of the one that is fixed."""
    fixed = "leaves" if grows == "parameters" else "parameters"
    sizes = [line[fixed] for line in lines if line["grows"] == grows]
    if not sizes:
        return grows
    if fixed == "leaves":
        return f"{grows} (in {sizes[0]:,} leaves)"
    # The number of parameters differs a little between the trees, because leaves are square.
    return f"{grows} (of {statistics.median(sizes) / 1e6:.2g} million parameters)"


if __name__ == "__main__":
    main()

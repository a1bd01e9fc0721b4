"""Measures what the gradient noise scale adds to a training step of a BERT-like task.

    python scripts/bench/noise_scale.py configs/bert_tiny_lamb.toml [section.key=value ...]

The step of `optim_zoo.sharding.data_parallel` with ``noise_scale=True`` and the one without take
turns on the same batch, so that a noisy machine affects both alike. A config with one micro-batch
is measured with two.

Prints one JSON line for each: the median and the quartiles in milliseconds, the operations and the
bytes that XLA counts in the compiled step, and the ratios of these figures to the step without the
noise scale. The ratio of times is the median of the ratios of all turns.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import job_step

ROUNDS = 40


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="the number of turns")
    arguments = parser.parse_args(argv)
    job = job_step.load(arguments.config, arguments.overrides)
    micro_batches = max(job.config.train.micro_batches, 2)
    costs: dict[str, Any] = {}
    steps = {}
    for name, noise_scale in (("without", False), ("with noise_scale", True)):
        step = job.step(micro_batches=micro_batches, noise_scale=noise_scale)
        costs[name] = step.lower(job.params, job.batch).compile().cost_analysis()
        steps[name] = job_step.JobStep(step, job)
    milliseconds = harness.interleaved(steps, arguments.rounds)
    common = {
        "config": arguments.config.stem,
        "micro_batches": micro_batches,
        "parameters": harness.parameters(job.params),
        **harness.machine(),
    }
    for name, times in milliseconds.items():
        measured = harness.spread(times)
        turns = zip(times, milliseconds["without"], strict=True)
        measured["time_ratio"] = statistics.median(x / y for x, y in turns)
        for key in ("flops", "bytes accessed"):
            label = key.replace(" ", "_")
            measured[label] = costs[name][key]
            measured[f"{label}_ratio"] = costs[name][key] / costs["without"][key]
        harness.show(name, measured, common)


if __name__ == "__main__":
    main()

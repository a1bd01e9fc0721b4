"""Measures what each wrapper costs, compared with the optimizer that it wraps.

    python scripts/bench/wrappers.py [--trees bert-base ...] [--optimizers lamb adamw]
        [--groups accumulate metrics guards precision] [--rounds N] [--table]

A step computes updates from given gradients and applies them; it is jitted and donates its
arguments. A group consists of a bare optimizer and of wrappers around it, which take turns in one
process. The optimizers are `lamb` and `adamw` of this library with BERT's exclusions (biases and
LayerNorm are neither decayed nor adapted), on the trees of ``trees.py``. Groups are measured one
after another, so that only one of them needs memory at a time.

Where a wrapper counts (micro-batches in `accumulate` and `optax.MultiSteps`, steps in
`with_metrics`), its counter is an input of the step. A candidate is then either due in every call
("step", "taken") or in none ("between"), and the program is still the one that training compiles;
with ``every=1`` XLA could know at compile time what is due. A call "between" adds to sums that are
not zero, and a "step" is the last of `EVERY` micro-batches. "mean of" is the mean over one period.

Prints one JSON line per measurement, then one of ratios of medians; with ``--table`` a Markdown
table of the same figures at the end:

    median_ms, quartiles_ms      of one step
    temporaries_per_parameter    bytes XLA allocates in a step / bytes of the parameters
    state_bytes_per_parameter
    compile_s

Needs the extra ``train`` for BERT's shapes. A group on BERT-base takes about 11 GB of memory; where
one does not fit, the script says so and exits with 2.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import harness
import optim_zoo
from harness import LEARNING_RATE
from optim_zoo import accumulation, guards, metrics, precision, rules
from optim_zoo.tree import Tree, leaf_paths
from trees import TREES

ROUNDS = 30
EVERY = 4  # micro-batches per step
METRICS_EVERY = 10
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
EXCLUDED = ("bias", "LayerNorm")


class Candidate(NamedTuple):
    """A step that is measured."""

    tx: optax.GradientTransformation
    dtype: str = "float32"  # of parameters and gradients
    counter: str = ""  # a field of the state that every call sets to `at`
    at: int = 0


class Group(NamedTuple):
    """Candidates that take turns, and what is compared."""

    candidates: Mapping[str, Candidate]  # by name
    ratios: Sequence[tuple[str, str]]  # (numerator, denominator)
    # name of a mean -> how often each candidate occurs in one period
    means: Mapping[str, Mapping[str, int]] = {}


def accumulate_group(name: str, tx: optax.GradientTransformation) -> Group:
    ours, peer = f"accumulate({name}, {EVERY})", f"optax.MultiSteps({name}, {EVERY})"
    accumulate = accumulation.accumulate(tx, EVERY)
    multi_steps = optax.MultiSteps(tx, EVERY).gradient_transformation()
    occur = {"step": 1, "between": EVERY - 1}
    return Group(
        {
            name: Candidate(tx),
            f"{ours}, step": Candidate(accumulate, counter="micro_batches", at=EVERY - 1),
            f"{ours}, between": Candidate(accumulate, counter="micro_batches", at=1),
            f"{peer}, step": Candidate(multi_steps, counter="mini_step", at=EVERY - 1),
            f"{peer}, between": Candidate(multi_steps, counter="mini_step", at=1),
        },
        [
            (f"{ours}, step", name),
            (f"{ours}, between", f"{ours}, step"),
            (f"{peer}, step", name),
            (f"{peer}, between", f"{peer}, step"),
            (f"{ours}, mean of {EVERY}", f"{peer}, mean of {EVERY}"),
        ],
        {
            f"{outer}, mean of {EVERY}": {f"{outer}, {when}": n for when, n in occur.items()}
            for outer in (ours, peer)
        },
    )


def metrics_group(name: str, tx: optax.GradientTransformation) -> Group:
    clipped = f"clip_by_global_norm + {name}"
    clipped_tx = optax.chain(optim_zoo.clip_by_global_norm(MAX_NORM), tx)
    every, always = f"with_metrics({name}, {METRICS_EVERY})", f"with_metrics({name})"
    sometimes = metrics.with_metrics(tx, METRICS_EVERY)
    mean = f"{every}, mean of {METRICS_EVERY}"
    return Group(
        {
            name: Candidate(tx),
            always: Candidate(metrics.with_metrics(tx)),
            f"{every}, taken": Candidate(sometimes, counter="count", at=METRICS_EVERY),
            f"{every}, between": Candidate(sometimes, counter="count", at=METRICS_EVERY + 1),
            clipped: Candidate(clipped_tx),
            f"with_metrics({clipped})": Candidate(metrics.with_metrics(clipped_tx)),
        },
        [
            (always, name),
            (f"{every}, taken", name),
            (f"{every}, between", name),
            (mean, name),
            (f"with_metrics({clipped})", clipped),
        ],
        {mean: {f"{every}, taken": 1, f"{every}, between": METRICS_EVERY - 1}},
    )


def guards_group(name: str, tx: optax.GradientTransformation) -> Group:
    wrapped = {
        f"skip_nonfinite({name})": guards.skip_nonfinite(tx),
        f"skip_spikes({name})": guards.skip_spikes(tx),
        f"optax.apply_if_finite({name})": optax.apply_if_finite(tx, 10),
    }
    candidates = {outer: Candidate(x) for outer, x in wrapped.items()}
    return Group({name: Candidate(tx), **candidates}, [(outer, name) for outer in wrapped])


def precision_group(name: str, tx: optax.GradientTransformation) -> Group:
    low = f"{name}, bfloat16"
    wrapped = {
        f"master_weights({name}), bfloat16": precision.master_weights(tx),
        f"stochastic_rounding({name}), bfloat16": precision.stochastic_rounding(
            tx, jax.random.key(0)
        ),
    }
    candidates = {outer: Candidate(x, "bfloat16") for outer, x in wrapped.items()}
    return Group(
        {name: Candidate(tx), low: Candidate(tx, "bfloat16"), **candidates},
        [(low, name), *((outer, x) for outer in wrapped for x in (name, low))],
    )


GROUPS: Mapping[str, Callable[[str, optax.GradientTransformation], Group]] = {
    "accumulate": accumulate_group,
    "metrics": metrics_group,
    "guards": guards_group,
    "precision": precision_group,
}
OPTIMIZERS = ("lamb", "adamw")


def optimizer(name: str, shapes: Tree, layers: rules.Rules) -> optax.GradientTransformation:
    """Returns one of `OPTIMIZERS`, with BERT's exclusions that match a leaf of the tree."""
    paths = leaf_paths(shapes)
    excluded = [x for x in EXCLUDED if any(re.search(x, path) for path in paths)]
    arguments: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY,
        "exclude_from_weight_decay": excluded,
    }
    if name == "adamw":
        return optim_zoo.adamw(LEARNING_RATE, **arguments)
    arguments |= {"exclude_from_layer_adaptation": excluded, "layers": layers}
    return optim_zoo.lamb(LEARNING_RATE, **arguments)


def compiled(candidate: Candidate, shapes: Tree) -> harness.Step:
    """Returns the compiled step of a candidate. A counter is the second input of the step."""
    step = harness.update(candidate.tx)
    if not candidate.counter:
        return harness.Step(candidate.tx, step, shapes, [shapes])

    def counted(params: Tree, state: Any, gradients: Tree, at: jax.Array) -> Tree:
        return step(params, state._replace(**{candidate.counter: at}), gradients)

    at = jax.ShapeDtypeStruct((), jnp.int32)
    return harness.Step(candidate.tx, counted, shapes, [shapes, at])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=["bert-base"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--table", action="store_true", help="Markdown at the end")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles, got {arguments.rounds}")
    lines = []
    for tree in arguments.trees:
        for group in arguments.groups:
            for name in arguments.optimizers:
                measured = measure(tree, group, name, arguments.rounds)
                if isinstance(measured, str):
                    parser.exit(2, f"group {group} of {name} on {tree} {measured}\n")
                lines += measured
    if arguments.table:
        print(table(lines))


def measure(tree: str, group: str, name: str, rounds: int) -> list[dict[str, Any]] | str:
    """Prints and returns the lines of a group, or what it needs if it does not fit into memory."""
    shapes, layers = TREES[tree]()
    candidates, ratios, means = GROUPS[group](name, optimizer(name, shapes, layers))
    trees = {
        dtype: jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        for dtype in {candidate.dtype for candidate in candidates.values()}
    }
    steps = {key: compiled(x, trees[x.dtype]) for key, x in candidates.items()}
    held = sum(map(harness.tree_bytes, trees.values()))
    held += sum(step.held_bytes for step in steps.values())
    lack = harness.lacking(held + max(step.temporary_bytes for step in steps.values()))
    if lack:
        return lack

    gradients = {dtype: harness.random_gradients(x) for dtype, x in trees.items()}
    for key, step in steps.items():
        g = gradients[candidates[key].dtype]
        inputs = [g, jnp.asarray(candidates[key].at)] if candidates[key].counter else [g]
        step.start(harness.random_parameters(g), inputs)
    milliseconds = harness.interleaved(steps, rounds)

    count = harness.parameters(shapes)
    common = {
        "tree": tree,
        "optimizer": name,
        "group": group,
        "parameters": count,
        "leaves": len(jax.tree.leaves(shapes)),
        "rounds": rounds,
        **harness.machine(),
    }
    lines = []
    medians = {key: statistics.median(times) for key, times in milliseconds.items()}
    for key, step in steps.items():
        measured = harness.spread(milliseconds[key]) | {
            "dtype": candidates[key].dtype,
            "temporaries_per_parameter": step.temporaries,
            "state_bytes_per_parameter": step.state_bytes / count,
            "compile_s": step.compile_seconds,
        }
        lines.append(harness.show(key, measured, common))
    for key, parts in means.items():
        total = sum(n * medians[part] for part, n in parts.items())
        medians[key] = total / sum(parts.values())
        lines.append(harness.show(key, {"median_ms": medians[key]}, common))
    of_medians = {f"{above} / {below}": medians[above] / medians[below] for above, below in ratios}
    lines.append(harness.show("ratios of medians", of_medians, common))
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the printed lines as a Markdown table."""
    rows = [
        "| tree | step | ms (quartiles) | ratio | temporaries, x parameters |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = line["tree"], line["group"], line["optimizer"]
        groups.setdefault(key, []).append(line)
    for (tree, *_), (*measured, ratios) in groups.items():
        for line in measured:
            time, temporaries = f"{line['median_ms']:.0f}", ""
            if "quartiles_ms" in line:
                time += " ({:.0f} to {:.0f})".format(*line["quartiles_ms"])
                temporaries = f"{line['temporaries_per_parameter']:.2f}"
            compared = "; ".join(
                f"{value:.2f} x {below}"
                for above, slash, below in (key.partition(" / ") for key in ratios)
                if slash and above == line["what"]
                for value in [ratios[f"{above} / {below}"]]
            )
            rows.append(f"| {tree} | {line['what']} | {time} | {compared} | {temporaries} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()

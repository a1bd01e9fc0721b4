"""Compiles a job's step for TPUs on any machine, and prints memory, collectives and passes.

    python scripts/tpu/compile.py configs/bert_large_lamb_64k_32k.toml \
      --topology v5e:2x2 --topology v5e:4x4 --topology v5e:16x16 --table

Needs libtpu (``pip install -e '.[train,tpu]'``), whose compiler works on any machine. Nothing is
run, and neither the text nor the vocabulary is read. Prints one JSON line per compiled program, and
with ``--table`` two Markdown tables of the same figures at the end.

Every stage of the config is compiled in every layout of `LAYOUTS`. The config's ``micro_batches``
apply to the largest topology given. Smaller topologies use more of them, so that a chip always
works on the same number of rows at a time. Memory and its limit are the compiler's own figures:
``peak`` is the largest sum of arguments, temporaries and those outputs that do not reuse a donated
argument. The compiler refuses a program that exceeds the limit; its ``peak`` is then the sum that
it would need.

The ``bytes`` of a collective are those of one chip: the operands or the results, whichever are
larger, times how often the collective runs in a step. The optimizer is also compiled without the
model, and compared with the same chain with ``optax.lamb``, on the leaves with at least `LARGE`
elements.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import programs
from optim_zoo.errors import UserError
from optim_zoo.train import config_file
from optim_zoo.train.config import Config
from optim_zoo.train.tasks.masked_language.task import sequence_length
from programs import LAYOUTS

BERT_VOCABULARY = 30_522  # tokens of the uncased models of google-research/bert, vocab.txt
GIB = 1 << 30


def markdown(measured: Sequence[Mapping[str, Any]]) -> str:
    """Returns the printed figures as two Markdown tables: steps and updates."""
    steps = [x for x in measured if x["what"] == "step"]
    rows = [
        "| chips | stage | layout | micro-batches | peak GiB | arguments GiB | temporaries GiB | "
        "fits | all-reduce GB | reduce-scatter GB | all-gather GB | other GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in steps:
        sizes = x["memory"]
        parts = [f"{sizes[k] / GIB:.2f}" if k in sizes else "" for k in
                 ("peak", "arguments", "temporaries")]  # fmt: skip
        rows.append(
            f"| {x['chips']} | {x['stage']} | {x['layout']} | {x['micro_batches']} | "
            f"{' | '.join(parts)} | {'yes' if x['fits'] else '**no**'} | "
            f"{' | '.join(_cells(x.get('collectives')))} |"
        )
    rows += ["", "| update | fusions a large leaf | arrays moved a large leaf |", "|---|---|---|"]
    rows += [
        f"| `{x['optimizer']}` | {x['fusions_per_large_leaf']:g} | "
        f"{x['arrays_moved_per_large_leaf']:g} |"
        for x in measured
        if x["what"] == "update"
    ]
    return "\n".join(rows)


def _cells(found: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """A cell per kind of collective, and one for all rare kinds: GB per step, dtypes and count."""
    if found is None:
        return [""] * 4
    kinds = ("all-reduce", "reduce-scatter", "all-gather")
    groups = [[found[kind]] if kind in found else [] for kind in kinds]
    groups.append([x for kind, x in found.items() if kind not in kinds])
    cells = []
    for group in groups:
        by_dtype: Counter[str] = Counter()
        for x in group:
            by_dtype.update(x["bytes_by_dtype"])
        large = [dtype for dtype, size in by_dtype.most_common() if size >= 0.1 * by_dtype.total()]
        times = f", {sum(x['count'] for x in group)} x" if group else ""
        dtypes = f" ({'+'.join(large)}{times})" if large else ""
        cells.append(f"{by_dtype.total() / 1e9:.2f}{dtypes}" if group else "0")
    return cells


def compile_all(
    config: Config, names: Sequence[str], layouts: Sequence[str], vocabulary_size: int
) -> Iterator[dict[str, Any]]:
    """Compiles all programs, and yields the figures of each as soon as it is compiled.

    Args:
      config: of the job.
      names: of the topologies.
      layouts: keys of `LAYOUTS`.
      vocabulary_size: the number of tokens.
    """
    meshes = {name: programs.make_mesh(name) for name in dict.fromkeys(names)}
    most = max(mesh.size for mesh in meshes.values())
    scaled = {name: programs.for_chips(config, mesh.size, most) for name, mesh in meshes.items()}
    job = programs.make_job(config, vocabulary_size)
    for name, mesh in meshes.items():
        available = programs.available_memory(mesh)
        for number, stage in enumerate(scaled[name].stages, 1):
            for layout in layouts:
                began = time.perf_counter()
                figures = programs.measure_step(job, stage, layout, mesh)
                yield {
                    "what": "step",
                    "topology": name,
                    "chip": mesh.devices.flat[0].device_kind,
                    "chips": mesh.size,
                    "stage": number,
                    "layout": layout,
                    "batch_size": stage.batch_size,
                    "sequence_length": sequence_length(stage),
                    "micro_batches": stage.micro_batches,
                    "rows_per_chip_and_micro_batch": stage.batch_size
                    // (mesh.size * stage.micro_batches),
                    "peak_gib": round(figures["memory"]["peak"] / GIB, 2),
                    "available_gib": round(available / GIB, 2),
                    **figures,
                    "compile_seconds": round(time.perf_counter() - began, 1),
                }
    for optimizer, tx in programs.updates(job).items():
        figures = programs.measure_update(tx, job.params, next(iter(meshes.values())))
        yield {"what": "update", "optimizer": optimizer, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--topology", action="append", required=True, help="such as v5e:16x16")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="default: all of them")
    parser.add_argument("--vocabulary-size", type=int, default=BERT_VOCABULARY)
    parser.add_argument("--table", action="store_true", help="Markdown at the end")
    arguments = parser.parse_intermixed_args()
    measured = []
    try:
        prepare_compiler()
        config = config_file.load(arguments.config, arguments.overrides)
        for figures in compile_all(
            config, arguments.topology, arguments.layout or list(LAYOUTS), arguments.vocabulary_size
        ):
            versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
            measured.append({**figures, "config": arguments.config.stem, **versions})
            print(json.dumps(measured[-1]), flush=True)
    except UserError as error:
        print(f"compile.py: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.table:
        print(f"\n{markdown(measured)}")


def prepare_compiler() -> None:
    """Keeps JAX from looking for accelerators, and libtpu from looking for a TPU machine.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install -e '.[train,tpu]'")
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
        # Without these two libtpu complains that it finds no host. They do not affect the topology
        # that is compiled for.
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()

"""What a job's step needs on a TPU that is not there: memory, collectives, passes over the leaves.

    python scripts/tpu_compile.py configs/bert_large_lamb_64k_32k.toml \
      --topology v5e:2x2 --topology v5e:4x4 --topology v5e:16x16 --table

Needs libtpu (``pip install -e '.[train,tpu]'``), whose compiler works on any machine; nothing is
run, and neither text nor vocabulary is read. Prints one JSON line a compiled program, and with
``--table`` two Markdown tables of the same figures at the end.

Every stage of the config is compiled in every layout of `LAYOUTS`. ``micro_batches`` counts for
the largest topology given: smaller ones take more of them, so that a chip always works on as many
rows at once. Memory and limit are the compiler's own: ``peak`` holds arguments, outputs that are
no donated argument, and temporaries at the worst moment; a program beyond the limit is refused,
with the sum that it would need.

``bytes`` of a collective are those of one chip, of the larger of what goes in and what comes out,
times how often it runs in a step. The optimizer alone is compiled beside the same chain with
``optax.lamb``; a large leaf has at least `LARGE` elements.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optim_zoo import clip_by_global_norm, registry, sharding
from optim_zoo.errors import UserError
from optim_zoo.train import batches, bert, config_file, loop, optimization, tasks
from optim_zoo.train.config import Config, Stage
from optim_zoo.train.vocabulary import read_vocabulary
from optim_zoo.tree import Tree, by_path

BERT_VOCABULARY = 30_522  # google-research/bert, vocab.txt of the uncased models
LARGE = 1 << 18  # elements: 1 MiB in float32
GIB = 1 << 30

# name -> (state spread over "data", large parameters cut over "data"), all in mode jit
LAYOUTS: Mapping[str, tuple[bool, bool]] = MappingProxyType(
    {"replicated": (False, False), "zero1": (True, False), "fsdp": (True, True)}
)


# Reading optimized HLO text -----------------------------------------------------------------------


class Shape(NamedTuple):
    """One array of an instruction."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of a tiled layout."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
        return self.elements * width // 8


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    opcode: str
    results: tuple[Shape, ...]  # several where it is a tuple
    arguments: str  # what stands in the parentheses
    attributes: str  # what stands behind them

    @property
    def operands(self) -> list[str]:
        """The names of the instructions it works on."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def named(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{.*?\}}|%[\w.-]+)", self.attributes)
        return [name for text in found for name in re.findall(r"%([\w.-]+)", text)]


class Computation(NamedTuple):
    """A computation: its instructions by name."""

    name: str
    instructions: Mapping[str, Instruction]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """What an instruction reads."""
        return [shape for x in instruction.operands for shape in self.instructions[x].results]


class Module(NamedTuple):
    """A program."""

    computations: Mapping[str, Computation]
    entry: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def parse_module(text: str) -> Module:
    """The computations of optimized HLO text, as ``compiled.as_text()`` has it."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            instructions = {}
            computations[header[2]] = Computation(header[2], instructions)
            entry = header[2] if header[1] else entry
        elif parsed := _INSTRUCTION.match(line):
            instruction = _instruction(*parsed.groups())
            instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text must be an HLO module, found no ENTRY computation in it")
    return Module(computations, entry)


def _instruction(name: str, results: str, opcode: str, rest: str) -> Instruction:
    depth, end = 1, 0
    while depth:  # to the parenthesis that closes the arguments
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return Instruction(name, opcode, parse_shapes(results), rest[: end - 1], rest[end:])


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``(f32[2,3]{1,0:T(8,128)}, s32[])`` -> two shapes."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text)
    )


def trip_count(module: Module, condition: str) -> int:
    """How often a loop runs whose counter goes from 0 by 1, as ``lax.scan`` makes them.

    Raises:
      ValueError: its condition is of another kind.
    """
    inside = module.computations[condition].instructions.values()
    limits = {int(x.arguments) for x in inside if x.opcode == "constant" and x.arguments.isdigit()}
    if len(limits) != 1:
        raise ValueError(f"cannot read how often the loop with condition {condition} runs")
    return limits.pop()


class Executed(NamedTuple):
    """An instruction with its place and how often it runs in one call of the program."""

    computation: Computation
    instruction: Instruction
    times: int
    fused: bool  # stands inside a fusion, which is what the chip starts


def executed(
    module: Module, computation: str | None = None, times: int = 1, fused: bool = False
) -> Iterator[Executed]:
    """Every instruction that runs; all branches of a conditional count as run."""
    here = module.computations[computation or module.entry]
    for x in here.instructions.values():
        yield Executed(here, x, times, fused)
        if x.opcode == "while":
            (condition,), (body,) = x.named("condition"), x.named("body")
            yield from executed(module, body, times * trip_count(module, condition), fused)
        else:
            # Not the to_apply of a reduction or a collective: what adds two numbers.
            inner = ("to_apply",) if x.opcode == "call" else ("calls", "branch_computations",
                     "true_computation", "false_computation")  # fmt: skip
            for name in x.named(*inner):
                yield from executed(module, name, times, fused or x.opcode == "fusion")


_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def collectives(module: Module) -> dict[str, dict[str, Any]]:
    """What one chip exchanges in a call, by kind of collective.

    Of each: ``count``, how often one starts; ``bytes``; ``bytes_in_loops``, those of it inside
    loops; ``bytes_by_dtype``. A collective that is spread over several fusions, to run beside
    their arithmetic, counts once.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for computation, x, times, fused in executed(module):
        kind = x.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        channel = re.search(r"channel_id=\d+", x.attributes)
        if fused and channel:
            if channel[0] in seen:
                continue
            seen.add(channel[0])
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"  # which is how a TPU fuses it
        moved = _moved(computation, x)
        total = found.setdefault(
            kind, {"count": 0, "bytes": 0, "bytes_in_loops": 0, "bytes_by_dtype": Counter()}
        )
        total["count"] += times
        for dtype, size in moved.items():
            total["bytes"] += size * times
            total["bytes_in_loops"] += size * times * (times > 1)
            total["bytes_by_dtype"][dtype] += size * times
    return found


def _moved(computation: Computation, x: Instruction) -> Counter[str]:
    """Bytes by dtype of the larger side of a collective."""
    sides = computation.operand_shapes(x), list(x.results)
    if x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
        sides = sides[0], sides[1][len(sides[0]) :]  # its results begin with its operands
    larger = max(sides, key=lambda side: sum(shape.bytes for shape in side))
    moved: Counter[str] = Counter()
    for shape in larger:
        moved[shape.dtype] += shape.bytes
    return moved


# Those that move no leaf through the arithmetic units: names for what is there, and transfers
# between a chip's memories that the compiler places ahead of the fusion they serve.
_NO_PASS = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "custom-call",
            "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done",
            "while", "conditional", "call", "optimization-barrier"}  # fmt: skip


def passes(module: Module, sizes: Sequence[int]) -> tuple[float, float]:
    """Of leaves with these numbers of elements: fusions a leaf, and arrays moved a leaf.

    A fusion counts that reads or writes an array as large as a leaf, once whatever number of
    leaves it works on; an array moved is one such array read or written by such a fusion. An
    instruction that is not fused is a fusion of one.
    """
    wanted = set(sizes)
    fusions, elements = 0, 0
    for computation, x, times, fused in executed(module):
        if fused or x.opcode in _NO_PASS:
            continue
        shapes = [*computation.operand_shapes(x), *x.results]
        touched = [shape.elements for shape in shapes if shape.elements in wanted]
        fusions += times * bool(touched)
        elements += times * sum(touched)
    return fusions / len(sizes), elements / sum(sizes)


# Compiling ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What a config trains, from shapes alone."""

    config: Config
    model: bert.Bert
    params: Tree  # of ShapeDtypeStructs
    tx: optax.GradientTransformation

    def loss(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        """Of a batch in training."""
        return tasks.masked_loss(self.model, params, batch)


def make_job(config: Config, vocabulary_size: int) -> Job:
    """The job of a config, whose text and vocabulary need not be there."""
    model = bert.Bert(config.model, vocabulary_size)
    key = jax.eval_shape(lambda: jax.random.key(0, impl=tasks.KEYS))
    params = jax.eval_shape(lambda key: tasks.init_bert(model, config.stages[0], key), key)
    tx = optimization.make_optimizer(config, bert.layer_rules(config.model))
    return Job(config, model, params, tx)


def batch_shapes(config: Config, stage: Stage) -> Tree:
    """The shapes of a batch: those of one row of any text, as often as the stage has it."""
    vocabulary = read_vocabulary("")
    row = batches.masked_batch(
        np.zeros(stage.sequence_length, vocabulary.dtype),
        vocabulary,
        seed=0,
        step=0,
        batch_size=1,
        sequence_length=stage.sequence_length,
    )
    if config.model.dropout:
        row["dropout_keys"] = np.zeros((1, 2), np.uint32)
    return {
        name: jax.ShapeDtypeStruct((stage.batch_size, *x.shape[1:]), x.dtype)
        for name, x in row.items()
    }


def make_mesh(topology: str) -> Mesh:
    """All chips of a topology along "data".

    Raises:
      UserError: there is no such topology.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise UserError(f"{topology} is no TPU topology such as v5e:4x4: {reason}") from error
    return Mesh(np.array(devices), ("data",))


def for_chips(config: Config, chips: int, most_chips: int) -> Config:
    """The config whose rows per chip and micro-batch are on ``chips`` what they are on the most.

    Raises:
      UserError: a batch does not divide.
    """
    loop.check_batches(config, most_chips)
    if most_chips % chips:
        raise UserError(f"{most_chips} chips must be a multiple of {chips}: compile them apart")
    times = most_chips // chips

    def more(section: Any) -> Any:
        return dataclasses.replace(section, micro_batches=section.micro_batches * times)

    return dataclasses.replace(
        config, train=more(config.train), second_stage=more(config.second_stage)
    )


def make_step(job: Job, stage: Stage, layout: str, mesh: Mesh) -> sharding.DataParallelStep:
    """The step of a stage in one of `LAYOUTS`."""
    spread, cut = LAYOUTS[layout]
    return sharding.data_parallel(
        job.loss,
        job.tx,
        mesh=mesh,
        micro_batches=stage.micro_batches,
        zero1="data" if spread else None,
        param_shardings=cut_rules(job.params, mesh) if cut else (),
    )


def cut_rules(params: Tree, mesh: Mesh, large: int = LARGE) -> list[tuple[str, PartitionSpec]]:
    """Rules that cut every large parameter as ZeRO-1 cuts a momentum: the longest that divides."""
    momentum = optax.trace(0.9)
    spread: Any = sharding.state_shardings(momentum, params, mesh=mesh, zero1="data")
    specs = by_path(spread.trace)
    return [
        (f"^{re.escape(path)}$", specs[path].spec)
        for path, x in by_path(params).items()
        if x.size >= large
    ]


def measure_step(job: Job, stage: Stage, layout: str, mesh: Mesh) -> dict[str, Any]:
    """Memory and collectives of a stage's step on one chip."""
    lowered = make_step(job, stage, layout, mesh).lower(job.params, batch_shapes(job.config, stage))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, _ = needed_and_available(error)
        return {"fits": False, "memory": {"peak": needed}}
    return {
        "fits": True,
        "memory": memory(compiled),
        "collectives": collectives(parse_module(compiled.as_text() or "")),
    }


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of one chip."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def needed_and_available(error: Exception) -> tuple[int, int]:
    """The two figures, in bytes, of what the compiler says where a program does not fit.

    Raises:
      Exception: the given one, where it says something else.
    """
    said = re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
        r"|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
        str(error),
    )
    if said is None:
        raise error
    needed, of_needed, available, of_available = (group for group in said.groups() if group)
    scale = {unit: 1 << 10 * power for power, unit in enumerate("KMGT", 1)}
    return int(float(needed) * scale[of_needed]), int(float(available) * scale[of_available])


def available_memory(mesh: Mesh) -> int:
    """The bytes of a chip that a program may use: as the compiler says to one that is too large."""
    whole = NamedSharding(mesh, PartitionSpec())
    too_large = jax.ShapeDtypeStruct((1 << 22, 1 << 16), np.float32, sharding=whole)
    try:
        jax.jit(lambda x: x + 1, out_shardings=whole).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return needed_and_available(error)[1]
    raise AssertionError("a program of 2 TiB must be refused")


def measure_update(
    tx: optax.GradientTransformation, params: Tree, mesh: Mesh, large: int = LARGE
) -> dict[str, Any]:
    """Passes over the large leaves of an optimizer's update alone, donated, on every chip alike."""
    whole = NamedSharding(mesh, PartitionSpec())

    def update(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        (params, jax.eval_shape(tx.init, params), params),
    )
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()
    sizes = [x.size for x in jax.tree.leaves(params) if x.size >= large]
    fusions, arrays = passes(parse_module(compiled.as_text() or ""), sizes)
    return {
        "large_leaves": len(sizes),
        "fusions_per_large_leaf": round(fusions, 2),
        "arrays_moved_per_large_leaf": round(arrays, 2),
        "memory": memory(compiled),
    }


def updates(job: Job) -> dict[str, optax.GradientTransformation]:
    """The config's optimizer, and the same chain with ``optax.lamb``; without and with the clip."""
    choice = job.config.optimizer
    constructor = registry.get(choice.name).constructor
    schedule = optimization.make_schedule(job.config)
    rules = {"layers": bert.layer_rules(job.config.model)}
    known = rules if "layers" in inspect.signature(constructor).parameters else {}
    shared = {key: choice.arguments[key] for key in ("b1", "b2", "eps", "weight_decay")
              if key in choice.arguments}  # fmt: skip
    peer = optax.lamb(schedule, **shared)
    return {
        f"optim_zoo.{choice.name}": constructor(schedule, **choice.arguments, **known),
        "optax.lamb": peer,
        f"clip + optim_zoo.{choice.name}": job.tx,
        "clip + optax.lamb": optax.chain(clip_by_global_norm(job.config.train.clip_norm), peer),
    }


# Printing -----------------------------------------------------------------------------------------


def markdown(measured: Sequence[Mapping[str, Any]]) -> str:
    """The figures as two tables: steps and updates."""
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
    """GB a step and dtypes of each kind, the rarer kinds together."""
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
    """One figure a compiled program, as they come."""
    meshes = {name: make_mesh(name) for name in dict.fromkeys(names)}
    most = max(mesh.size for mesh in meshes.values())
    scaled = {name: for_chips(config, mesh.size, most) for name, mesh in meshes.items()}
    job = make_job(config, vocabulary_size)
    for name, mesh in meshes.items():
        available = available_memory(mesh)
        for number, stage in enumerate(scaled[name].stages, 1):
            for layout in layouts:
                began = time.perf_counter()
                figures = measure_step(job, stage, layout, mesh)
                yield {
                    "what": "step",
                    "topology": name,
                    "chip": mesh.devices.flat[0].device_kind,
                    "chips": mesh.size,
                    "stage": number,
                    "layout": layout,
                    "batch_size": stage.batch_size,
                    "sequence_length": stage.sequence_length,
                    "micro_batches": stage.micro_batches,
                    "rows_per_chip_and_micro_batch": stage.batch_size
                    // (mesh.size * stage.micro_batches),
                    "peak_gib": round(figures["memory"]["peak"] / GIB, 2),
                    "available_gib": round(available / GIB, 2),
                    **figures,
                    "compile_seconds": round(time.perf_counter() - began, 1),
                }
    for optimizer, tx in updates(job).items():
        figures = measure_update(tx, job.params, next(iter(meshes.values())))
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
        print(f"tpu_compile: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.table:
        print(f"\n{markdown(measured)}")


def prepare_compiler() -> None:
    """Has JAX look for no accelerator, and libtpu for no machine that it would belong to.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install -e '.[train,tpu]'")
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_WORKER_HOSTNAMES": "localhost",  # these two: else it complains to find no host;
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the topology is the one asked for all the same
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is claimed, so several may compile at once
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()

"""Reads optimized HLO text: the instructions that run, their communication and their arrays."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """The type of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding of a tiled layout."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
        return self.elements * width // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Shape, ...]  # more than one if the result is a tuple
    arguments: str  # the text inside the parentheses
    attributes: str  # the text after the parentheses

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it reads."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def named(self, *attributes: str) -> list[str]:
        """Returns the computations that any of these attributes names."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{.*?\}}|%[\w.-]+)", self.attributes)
        return [name for text in found for name in re.findall(r"%([\w.-]+)", text)]


class Computation(NamedTuple):
    """A computation, with its instructions by name."""

    name: str
    instructions: Mapping[str, Instruction]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Returns the arrays that an instruction reads."""
        return [shape for x in instruction.operands for shape in self.instructions[x].results]


class Module(NamedTuple):
    """A program, with its computations by name."""

    computations: Mapping[str, Computation]
    entry: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def parse_module(text: str) -> Module:
    """Parses optimized HLO text.

    Args:
      text: as ``compiled.as_text()`` returns it.

    Raises:
      ValueError: the text has no entry computation.
    """
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
    # The arguments end at the matching parenthesis; tiled layouts have parentheses of their own.
    depth, end = 1, 0
    while depth:
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return Instruction(name, opcode, parse_shapes(results), rest[: end - 1], rest[end:])


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Returns the shapes in a type: ``(f32[2,3]{1,0:T(8,128)}, s32[])`` has two."""
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text)
    )


def trip_count(module: Module, condition: str) -> int:
    """The number of iterations of a loop that counts from 0 by 1, as ``lax.scan`` makes them.

    Args:
      module: the program.
      condition: the name of the loop's condition.

    Raises:
      ValueError: the condition has another form.
    """
    inside = module.computations[condition].instructions.values()
    limits = {int(x.arguments) for x in inside if x.opcode == "constant" and x.arguments.isdigit()}
    if len(limits) != 1:
        raise ValueError(f"cannot read how often the loop with condition {condition} runs")
    return limits.pop()


class Executed(NamedTuple):
    """An instruction that runs."""

    computation: Computation  # which it is part of
    instruction: Instruction
    times: int  # it runs in one call of the program
    fused: bool  # it is inside a fusion, and the chip starts the fusion


def executed(
    module: Module, computation: str | None = None, times: int = 1, fused: bool = False
) -> Iterator[Executed]:
    """Yields every instruction that runs. All branches of a conditional count as run.

    Args:
      module: the program.
      computation: where to begin; None is the entry computation.
      times: how often that computation runs.
      fused: whether that computation is the body of a fusion.
    """
    here = module.computations[computation or module.entry]
    for x in here.instructions.values():
        yield Executed(here, x, times, fused)
        if x.opcode == "while":
            (condition,), (body,) = x.named("condition"), x.named("body")
            yield from executed(module, body, times * trip_count(module, condition), fused)
        else:
            # The to_apply of a reduction or of a collective adds two numbers; it is not followed.
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
    """What one chip communicates in one call of a program.

    Returns:
      For each kind of collective ``count``, how often one starts; ``bytes``; ``bytes_in_loops``,
      the part of them inside loops; and ``bytes_by_dtype``. A collective that is split over several
      fusions, so that it runs during their arithmetic, counts once.
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
            kind = "reduce-scatter"  # the fusion in which a TPU runs it
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
    """Bytes by dtype of the operands or of the results of a collective, whichever are larger."""
    sides = computation.operand_shapes(x), list(x.results)
    if x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
        sides = sides[0], sides[1][len(sides[0]) :]  # its results begin with its operands
    larger = max(sides, key=lambda side: sum(shape.bytes for shape in side))
    moved: Counter[str] = Counter()
    for shape in larger:
        moved[shape.dtype] += shape.bytes
    return moved


# Instructions that do not pass arrays through the arithmetic units. They name arrays, run other
# computations, or copy between a chip's memories ahead of the fusion that needs the copy.
_NO_PASS = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "custom-call",
            "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done",
            "while", "conditional", "call", "optimization-barrier"}  # fmt: skip


def passes(module: Module, sizes: Sequence[int]) -> tuple[float, float]:
    """Returns how many fusions work on a leaf, and how many arrays of its size they read and write.

    A fusion counts if it reads or writes an array as large as one of the leaves, and it counts once
    however many leaves it works on. An instruction outside any fusion is a fusion of one.

    Args:
      module: the program.
      sizes: the number of elements of each leaf.

    Returns:
      Fusions per leaf, and arrays read or written per leaf.
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

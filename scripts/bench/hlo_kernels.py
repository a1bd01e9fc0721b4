"""The kernels of an optimized HLO program, and the arrays that each of them reads and writes.

XLA turns every instruction that is not inside a fusion into about one kernel launch on a GPU.
`kernels` lists these instructions, including those of called computations (on a CPU, loops that
are divided over cores; on a GPU, command buffers). A loop body counts once.
"""

import math
import re
from typing import NamedTuple


class Array(NamedTuple):
    """The type of one array."""

    dtype: str  # as HLO spells it, such as "f32" or "bf16"
    entries: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, without padding."""
        bits = re.search(r"\d+", self.dtype)
        return self.entries * (int(bits[0]) if bits else 8) // 8  # "pred" takes one byte


class Kernel(NamedTuple):
    """One instruction that is launched as a kernel."""

    line: str  # the instruction, as HLO text
    reads: tuple[Array, ...]  # one per distinct operand
    writes: tuple[Array, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays that it reads and writes, each counted in full."""
        return sum(array.num_bytes for array in (*self.reads, *self.writes))


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"  (?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) "
    r"(?P<opcode>[\w-]+)\((?P<operands>.*?)\)(?P<attributes>.*)"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# These name arrays, or run computations whose instructions are listed themselves.
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier"),
    *("call", "while", "conditional", "async-start", "async-update", "async-done", "copy-done"),
}
_RUNS_COMPUTATIONS = {"call", "while", "conditional", "async-start"}
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|(?:true|false)_computation|branch_computations|"
    r"called_computations)=(\{.*?\}|%?[\w.-]+)"
)


def kernels(text: str) -> list[Kernel]:
    """Returns all kernels of a program, computation by computation.

    Args:
      text: an optimized HLO module, as ``compiled.as_text()`` returns it.

    Raises:
      ValueError: the text has no entry computation.
    """
    bodies: dict[str, list[re.Match[str]]] = {}
    entry, body = "", list[re.Match[str]]()
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            body = bodies[header["name"]] = []
            entry = header["name"] if header["entry"] else entry
        elif instruction := _INSTRUCTION.match(line):
            body.append(instruction)
    if not entry:
        raise ValueError("the text must be an HLO module, found no ENTRY computation in it")
    found: list[Kernel] = []
    seen, waiting = {entry}, [entry]
    while waiting:
        body = bodies[waiting.pop()]
        arrays = {x["name"]: _arrays(x["type"]) for x in body}
        for instruction in body:
            if instruction["opcode"] in _RUNS_COMPUTATIONS:
                called = _CALLED.findall(instruction["attributes"])
                names = [name for x in called for name in re.findall(r"[\w.-]+", x)]
                waiting += [name for name in names if name in bodies and name not in seen]
                seen.update(names)
            if instruction["opcode"] not in _NO_KERNEL:
                operands = dict.fromkeys(re.findall(r"%?([\w.-]+)", instruction["operands"]))
                reads = [array for name in operands for array in arrays.get(name, ())]
                writes = arrays[instruction["name"]]
                found.append(Kernel(instruction[0], tuple(reads), tuple(writes)))
    return found


def kernels_on(text: str, entries: int) -> list[Kernel]:
    """Returns the kernels that read or write an array with this number of entries, of any shape."""
    return [
        kernel
        for kernel in kernels(text)
        if any(array.entries == entries for array in (*kernel.reads, *kernel.writes))
    ]


def _arrays(types: str) -> list[Array]:
    """Returns the arrays in ``(f32[2,3]{1,0}, s32[])``."""
    return [
        Array(dtype, math.prod(map(int, filter(None, shape.split(",")))))
        for dtype, shape in _ARRAY.findall(types)
    ]

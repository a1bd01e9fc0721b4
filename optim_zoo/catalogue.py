"""The optimizers and ports as text: a table of all of them, and a page about one of them."""

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optim_zoo import ports, recorded, registry
from optim_zoo.errors import UserError
from optim_zoo.recorded.agreement import REFERENCE_NOISE
from optim_zoo.recorded.proofs import PROOFS

WIDTH = 100  # columns of a page


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A recorded case and the optimizer that is compared with it: arguments of `follow`."""

    case: recorded.Case
    constructor: str  # "optim_zoo.lamb"
    arguments: Mapping[str, Any] | None  # None for the arguments of the case


def table(width: int | None = None) -> str:
    """Returns all optimizers and ports, one line each; with a ``width``, long cells are wrapped."""
    entries = [(e.name, e.description, e.paper) for e in registry.OPTIMIZERS.values()]
    name, description, paper = _natural_widths(entries)
    if width is not None and name + description + paper + 4 > width:
        paper = min(paper, max(16, (width - name) // 3))  # 16: an arXiv number
        description = max(20, width - name - paper - 4)
    others = [(f"ports.{library}:", ", ".join(made)) for library, made in libraries().items()]
    library, made = _natural_widths(others)
    if width is not None:
        made = max(20, width - library - 2)
    lines = [*_columns(entries, (name, description, paper)), ""]
    return "\n".join([*lines, *_columns(others, (library, made))])


def page(name: str, width: int = WIDTH) -> str:
    """Returns a page about one optimizer or port, or about the ports of one library.

    Raises:
      UserError: The name is unknown. The message lists the nearest names.
    """
    short = short_name(name)
    library, _, port = short.partition(".")
    if short in registry.OPTIMIZERS:
        parts = _entry_parts(registry.get(short), width)
    elif port in libraries().get(library, {}):
        parts = _port_parts(library, port, width)
    elif short in libraries():
        made = [(f"ports.{short}.{n}", _summary(f)) for n, f in libraries()[short].items()]
        parts = [_doc(getattr(ports, short)), *_labelled(made, width)]
    else:
        raise unknown("optimizer", name, names())
    return "\n".join(parts)


@functools.cache
def libraries() -> Mapping[str, Mapping[str, Callable[..., Any]]]:
    """Returns the ports of each library by name, in the order of its file."""
    proved = {case.constructor for case in recorded.cases()}
    modules = {name: getattr(ports, name) for name in ports.__all__}
    return {
        library: {
            name: value
            for name, value in vars(module).items()
            if f"optim_zoo.ports.{library}.{name}" in proved
        }
        for library, module in modules.items()
        if inspect.ismodule(module)
    }


def names() -> list[str]:
    """Returns the names of optimizers, libraries and ports, such as ``torch.AdamW``."""
    of_ports = [f"{library}.{name}" for library, made in libraries().items() for name in made]
    return [*registry.OPTIMIZERS, *libraries(), *of_ports]


def short_name(name: str) -> str:
    """Returns ``torch.AdamW`` for ``optim_zoo.ports.torch.AdamW``."""
    return name.removeprefix("optim_zoo.").removeprefix("ports.")


def comparisons(short: str) -> list[Comparison]:
    """Returns what is recorded for an optimizer or a port: cases that name it, then proofs."""
    constructor = f"optim_zoo.{short if short in registry.OPTIMIZERS else f'ports.{short}'}"
    named = [c for c in recorded.cases() if c.constructor == constructor]
    proofs = PROOFS.get(short, ())
    return [
        *(Comparison(case, constructor, None) for case in named),
        *(Comparison(recorded.get(p.case), constructor, p.arguments) for p in proofs),
    ]


def unknown(kind: str, name: str, among: Sequence[str]) -> UserError:
    """Returns the error of a name that is not among ``among``, with the nearest of them."""
    wanted = short_name(name).lower()
    same = [n for n in among if wanted in (n.lower(), n.lower().rpartition(".")[2])]
    near = same[:4] or difflib.get_close_matches(short_name(name), among, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`optim-zoo list` lists all names"
    return UserError(f"unknown {kind} {name!r}; {hint}")


def short_number(x: float, digits: int) -> str:
    """Returns ``2.4e-6`` where Python formats 2.4e-06."""
    return _without_zeros(f"{x:.{digits - 1}e}") if x else "0"


def _entry_parts(entry: registry.Entry, width: int) -> list[str]:
    rows = [
        ("paper", entry.paper),
        ("variant", entry.variant),
        ("arguments", _arguments(entry.constructor)),
        ("example", entry.example),
    ]
    return [
        *textwrap.wrap(f"{entry.name}: {entry.description}", width),
        "",
        textwrap.indent(entry.formula, "    "),
        *_labelled(rows, width),
        *_agreements(entry.name, width),
    ]


def _port_parts(library: str, name: str, width: int) -> list[str]:
    port = libraries()[library][name]
    rows = [("library", _summary(getattr(ports, library))), ("arguments", _arguments(port))]
    return [
        f"ports.{library}.{name}",
        "",
        textwrap.indent(_doc(port), "    "),
        *_labelled(rows, width),
        *_agreements(f"{library}.{name}", width),
    ]


def _agreements(short: str, width: int) -> list[str]:
    """Returns a paragraph for each reference: to how many digits each case agrees with it."""
    if not comparisons(short):
        text = (
            "No trajectory is recorded for it. The tests compare it with an independent "
            "implementation in float64 NumPy."
        )
        return ["", *textwrap.wrap(text, width)]
    closeness: dict[str, dict[str, list[str]]] = {}
    for comparison in comparisons(short):
        case = comparison.case
        tolerance = max(case.rtol, REFERENCE_NOISE.get(case.id, 0.0))
        digits = f"{math.floor(-math.log10(tolerance))} digits, {case.dtype}"
        closeness.setdefault(case.reference, {}).setdefault(digits, []).append(case.id)
    lines = ["", "agrees, step by step, with"]
    for reference, cases in closeness.items():
        lines += textwrap.wrap(
            reference,
            width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for digits, ids in cases.items():
            text = f"{digits}: {', '.join(ids)}"
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=" " * 6,
                subsequent_indent=" " * (8 + len(digits)),
                break_long_words=False,
            )
    return lines


def _arguments(constructor: Callable[..., Any]) -> str:
    """Returns a signature without its types: ``learning_rate, b1=0.9, *, layers=()``."""
    shown = []
    parameters = inspect.signature(constructor).parameters.values()
    for kind, group in itertools.groupby(parameters, key=lambda p: p.kind):
        if kind is inspect.Parameter.KEYWORD_ONLY:
            shown.append("*")
        for p in group:
            default = "" if p.default is p.empty else f"={_without_zeros(repr(p.default))}"
            shown.append(p.name + default)
    return ", ".join(shown)


def _without_zeros(text: str) -> str:
    return re.sub(r"(?<=\d)e([-+])0+(?=\d)", r"e\1", text)


def _doc(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def _summary(thing: object) -> str:
    return _doc(thing).partition("\n")[0]


def _labelled(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Returns a paragraph of labels and texts."""
    label, text = _natural_widths(rows)
    return ["", *_columns(rows, (label, max(20, min(text, width - label - 2))))]


def _natural_widths(rows: Iterable[Sequence[str]]) -> tuple[int, ...]:
    return tuple(max(map(len, column)) for column in zip(*rows, strict=True))


def _columns(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Returns aligned columns; a wider cell continues in the next line."""
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
            for text, width in zip(row, widths, strict=True)
        ]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return lines

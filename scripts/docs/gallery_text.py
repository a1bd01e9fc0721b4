"""The text of the gallery: one page for each optimizer, and the table of all of them."""

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gallery_formulas import FORMULAS, LETTERS
from gallery_numbers import Distances, Group, Memory, Numbers
from gallery_settings import SETTINGS, Setting, described
from optim_zoo import recorded
from optim_zoo.catalogue import short_number
from optim_zoo.recorded.proofs import PROOFS
from optim_zoo.registry import Entry


def page(entry: Entry, numbers: Numbers) -> str:
    """Returns the page of one optimizer as Markdown."""
    sections = [
        f"# {entry.name}",
        _sentence(entry.description),
        f"- Paper: {_linked(entry.paper)}\n- Variant: {entry.variant.rstrip('.')}.",
        "## Formula",
        _formula(entry),
        "## Example",
        example(entry),
        "## Arguments",
        _arguments(entry),
        "## Agreement with recorded trajectories",
        _agreement(entry, numbers),
        "## How far its sources are from one another",
        _distances(entry, numbers),
        "## Known defects of its sources",
        _defects(entry),
        "## Memory",
        _memory(entry, numbers.memory),
    ]
    return "\n\n".join(sections) + "\n"


def overview(entries: Iterable[Entry], numbers: Mapping[str, Numbers]) -> str:
    """Returns the table of all optimizers as Markdown."""
    rows = []
    for entry in entries:
        of_entry = numbers[entry.name]
        memory = of_entry.memory["float32"]
        counts = [
            (len(d.groups), sum(len(group.labels) for group in d.groups))
            for d in of_entry.distances
        ]
        results, sources = max(counts, default=(1, 1))
        compared = f"{sources} sources, {results} result{'s' if results > 1 else ''}"
        rows.append(
            (
                f"[{entry.name}]({entry.name}.md)",
                _sentence(entry.description),
                _worst(of_entry),
                compared if counts else "one source",
                f"{memory.state:g}",
                f"{memory.moved:g}",
            )
        )
    header = ("Optimizer", "What it does", "Digits", "Its sources", "State", "Moved")
    return _table(header, rows)


def _worst(numbers: Numbers) -> str:
    """Returns the digits to which all recordings of a precision agree: ``14; 6 in float32``."""
    by_dtype: dict[str, float] = {}
    for followed in numbers.followed:
        dtype = recorded.get(followed.case).dtype
        by_dtype[dtype] = max(followed.difference, by_dtype.get(dtype, 0.0))
    digits = {dtype: _digits(difference) for dtype, difference in by_dtype.items()}
    shown = [digits[dtype] for dtype in digits if dtype == "float64"]
    shown += [f"{digits[dtype]} in {dtype}" for dtype in digits if dtype != "float64"]
    return "; ".join(shown) or "none recorded"


def example(entry: Entry) -> str:
    """Returns a block of Python that makes the optimizer and takes one step with it."""
    return f"""```python
import jax
import jax.numpy as jnp
import optim_zoo

tx = {entry.example}

params = {{"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
state = tx.init(params)
grads = jax.tree.map(jnp.ones_like, params)
updates, state = tx.update(grads, state, params)
params = optim_zoo.apply_updates(params, updates)
```"""


def _formula(entry: Entry) -> str:
    if entry.name not in FORMULAS:
        return f"```text\n{entry.formula}\n```"
    formula = FORMULAS[entry.name]
    lines = " \\\\[1.5ex]\n".join(formula)
    block = rf"\[\begin{{gathered}}{lines}\end{{gathered}}\]"
    used = " ".join(formula)
    letters = [
        rf"\({letter}\) is {_named(name, meaning, entry)}"
        for name in inspect.signature(entry.constructor).parameters
        for letter, meaning in LETTERS.get(name, {}).items()
        if _contains(used, letter)
    ]
    where = [r"\(x\) are the parameters", *_gradient(used), *letters]
    return f"{block}\n\nHere {', '.join(where)}."


def _gradient(formula: str) -> list[str]:
    shown = [r"\(g\) is the gradient"] if _contains(formula, "g") else []
    steps = [r"\(t = 1, 2, \ldots\) is the step"] if _contains(formula, "t") else []
    norms = [r"\(\lVert \cdot \rVert\) is the norm of one layer"] if "lVert" in formula else []
    return [*shown, *steps, *norms]


def _contains(formula: str, letter: str) -> bool:
    without_words = re.sub(r"\\text\{[^}]*\}", " ", formula)
    return re.search(rf"(?<![A-Za-z\\]){re.escape(letter)}(?![A-Za-z])", without_words) is not None


def _named(name: str, meaning: str, entry: Entry) -> str:
    """Returns the meaning, with the default value if it is a number."""
    default = inspect.signature(entry.constructor).parameters[name].default
    shown = isinstance(default, float | int) and f"`{name}`" == meaning
    return f"{meaning} ({_default(default)} by default)" if shown else meaning


def _arguments(entry: Entry) -> str:
    parameters = inspect.signature(entry.constructor).parameters.values()
    keyword_only = [p.kind is p.KEYWORD_ONLY for p in parameters]
    rows = [
        (f"`{p.name}`", "required" if p.default is p.empty else f"`{_default(p.default)}`")
        for p in parameters
    ]
    star = (
        f" The last {sum(keyword_only)} are passed by keyword."
        if sum(keyword_only) > 1
        else " The last one is passed by keyword."
        if any(keyword_only)
        else ""
    )
    return (
        f"{_table(('Argument', 'Default'), rows)}\n\n"
        f"The reference says what each of them means: [`optim_zoo.{entry.name}`]"
        f"[optim_zoo.{entry.name}].{star}"
    )


def _default(value: Any) -> str:
    return re.sub(r"(?<=\d)e([-+])0+(?=\d)", r"e\1", repr(value))


def _agreement(entry: Entry, numbers: Numbers) -> str:
    if not numbers.followed:
        return (
            "No trajectory is recorded for this optimizer. The tests compare it with an "
            "independent implementation in float64 NumPy."
        )
    by_reference: dict[tuple[str, str], list[float]] = {}
    for followed in numbers.followed:
        case = recorded.get(followed.case)
        differences = by_reference.setdefault((_reference(case), case.dtype), [])
        differences.append(followed.difference)
    rows = [
        (
            reference,
            dtype,
            str(len(differences)),
            short_number(max(differences), 2),
            _digits(max(differences)),
        )
        for (reference, dtype), differences in by_reference.items()
    ]
    return (
        f"`{entry.name}` was fed the gradients of each recording for 12 steps. The difference is "
        "the largest relative one of any parameter after any step of any case. "
        f"`optim-zoo verify {entry.name}` computes it on your machine.\n\n"
        + _table(("Reference", "Recorded in", "Cases", "Difference", "Digits"), rows)
    )


def _digits(difference: float) -> str:
    return "all" if difference == 0 else str(math.floor(-math.log10(difference)))


def _reference(case: recorded.Case) -> str:
    run = "" if case.origin == "executed" else ", transcribed"
    shown = re.sub(r"\s*\(.*?\)", "", case.reference)
    return shown.replace("_", r"\_").replace("/", "/<wbr>") + run


def _distances(entry: Entry, numbers: Numbers) -> str:
    settings = SETTINGS.get(entry.name, ())
    if not settings:
        return (
            "Only one source of this optimizer is recorded, so that there is nothing to compare "
            "it with."
        )
    tables = [
        _distance_table(setting, distances)
        for setting, distances in zip(settings, numbers.distances, strict=True)
    ]
    return "\n\n".join(
        [
            "All sources were fed the same parameters and the same 12 gradients under the same "
            "hyperparameters. Each cell says how far two results are from one another, compared "
            "with how far the leaf has moved from its start: the largest of the six leaves, and "
            "in parentheses the median. [How to read it](index.md#how-far-sources-are-from-one-"
            "another).",
            *tables,
        ]
    )


def _distance_table(setting: Setting, distances: Distances) -> str:
    parts = [f"**With** {described(setting.hyperparameters)}:"]
    if setting.note:
        parts[0] = f"{parts[0][:-1]}. {setting.note}"
    letters = "ABCDEFGHIJKLMNOP"
    groups = distances.groups
    if len(groups) == 1:
        parts.append(f"All compute the same: {_members(groups[0])}.")
    else:
        rows = []
        for i, group in enumerate(groups):
            cells = [
                _apart(distances.largest[i][j], distances.median[i][j]) if i != j else ""
                for j in range(len(groups))
            ]
            rows.append((f"**{letters[i]}**: {_members(group)}", *cells))
        parts.append(_table(("Sources that compute the same", *letters[: len(groups)]), rows))
    if any(any(group.rerun) for group in groups):
        parts.append(
            "† This source was recorded under other hyperparameters, and computed for this table "
            "by its port, which follows the recording."
        )
    return "\n\n".join(parts)


def _members(group: Group) -> str:
    marked = [
        f"{label}{' †' if rerun else ''}".replace("_", r"\_")
        for label, rerun in zip(group.labels, group.rerun, strict=True)
    ]
    return ", ".join(marked)


def _apart(largest: float, median: float) -> str:
    return f"{_percent(largest)} ({_percent(median)})"


def _percent(fraction: float) -> str:
    """Returns ``12 %``, for example, with one digit where it is less than 10 percent."""
    percent = 100 * fraction
    if percent < 0.001:
        return f"{short_number(percent, 1)} %"
    return f"{percent:.0f} %" if percent >= 9.5 else f"{percent:.1g} %"


def _defects(entry: Entry) -> str:
    found = [(name, text) for name, port in ports_of(entry) if (text := defect(port))]
    if not found:
        return "None is known."
    return "\n\n".join(
        [
            "The ports reproduce these, because they compute what their sources compute.",
            *(f"- [`{name}`][optim_zoo.{name}]: {_indented(text)}" for name, text in found),
        ]
    )


def ports_of(entry: Entry) -> list[tuple[str, Callable[..., Any]]]:
    """Returns the ports whose recordings are compared on the page of this optimizer."""
    settings = SETTINGS.get(entry.name, ())
    cases = [case for setting in settings for case in setting.cases]
    cases += [proof.case for proof in PROOFS.get(entry.name, ())]
    constructors = dict.fromkeys(recorded.get(case).constructor for case in cases)
    return [
        (catalogue_name, _function(constructor))
        for constructor in constructors
        if (catalogue_name := constructor.removeprefix("optim_zoo.")).startswith("ports.")
    ]


@functools.cache
def _function(constructor: str) -> Callable[..., Any]:
    module, name = constructor.rsplit(".", 1)
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def defect(port: Callable[..., Any]) -> str:
    """Returns what a port's docstring says about a defect of its source, or '' if it names none.

    A docstring that names a defect does so in its first sentence, and says in a paragraph with the
    word "Repaired:" how it is avoided.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.getdoc(port) or "")
    repaired = [x for x in paragraphs if re.search(r"\bRepaired:", x)]
    return "\n".join(dict.fromkeys([paragraphs[0], *repaired])) if repaired else ""


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def _memory(entry: Entry, memory: Mapping[str, Memory]) -> str:
    rows = [(dtype, f"{m.state:g}", f"{m.least:g}", f"{m.moved:g}") for dtype, m in memory.items()]
    arguments = f"`{entry.example}`" if entry.wraps else "default arguments"
    return (
        f"Bytes for each parameter, with {arguments}. [How they are counted]"
        "(index.md#memory).\n\n"
        + _table(
            ("Parameters", "State held", "Moved by a step, at least", "Moved by XLA on a CPU"), rows
        )
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _linked(paper: str) -> str:
    return re.sub(r"(arXiv )?(\d{4}\.\d{5})", r"[arXiv \2](https://arxiv.org/abs/\2)", paper)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in line)} |" for line in lines)

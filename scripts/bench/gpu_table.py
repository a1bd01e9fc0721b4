"""The results of ``gpu.sh`` as Markdown tables.

    python scripts/bench/gpu_table.py results.jsonl > table.md

Needs nothing but Python's standard library, and takes whatever lines there are: lines that are not
JSON, as of a program that was stopped while it printed, are left out.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
MISSING = ""
UPDATES = (
    "One update makes new parameters and state from given gradients; no model is run. Parameters",
    "and gradients have the dtype of the table. What the columns say:",
    "",
    "- *time / lamb*: over the time of `optim_zoo.lamb` in the same table.",
    "- *GB/s*: the fewest bytes that a step with this state must read and write, over its time.",
    "- *% of copy*: that rate over the rate of `read and write`, which negates a large array in "
    "place. GPU only.",
    "- *kernels / array*: kernels of the compiled program over the number of parameter arrays.",
    "- *on the largest array*: kernels that read or write an array as large as the largest one.",
    "- *bytes per parameter*: the fewest possible; those of all arrays that the compiled kernels "
    "read and write; the same by XLA's cost model; and those of the stored state. In bfloat16, "
    "optax and torch store their state in bfloat16, and `optim_zoo` in float32.",
    "- *temporaries*: what XLA allocates during the step, in multiples of the parameters' bytes.",
)


def read(path: Path) -> list[Line]:
    """Returns the lines of a file that are JSON objects."""
    lines: list[Line] = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def tables(lines: Sequence[Line]) -> str:
    """Returns all tables, with the device and the versions first."""
    measured: dict[str, list[Line]] = {}
    for line in lines:
        measured.setdefault(str(line.get("measured")), []).append(line)
    parts = [*_heading(lines), *_sections(measured.get("section", []))]
    if "bandwidth" in measured:
        parts += _bandwidth(measured["bandwidth"])
    parts += ["## Updates", "", *UPDATES, ""] * ("program" in measured)
    updates = [
        line
        for line in lines
        if str(line.get("section")).startswith("updates ") and line.get("measured") != "section"
    ]
    for tree, dtype in dict.fromkeys((line["tree"], line["dtype"]) for line in updates):
        parts += _updates([x for x in updates if (x["tree"], x["dtype"]) == (tree, dtype)])
    if "job step" in measured:
        parts += _job_step(measured["job step"])
    parts += _skipped(measured.get("skipped", []))
    return "\n".join(parts) + "\n"


def _heading(lines: Iterable[Line]) -> list[str]:
    about = next((line for line in lines if "devices" in line), None)
    if about is None:
        return ["# Benchmarks", "", "Nothing was measured.", ""]
    versions = ("python", "jax", "jaxlib", "optax", "flax", "torch", "timm")
    named = ", ".join(f"{name} {about[name]}" for name in versions if about.get(name))
    warning = [
        "**This ran on a CPU: it shows that the script works. The times say nothing about a GPU.**",
        "",
    ]
    return [
        f"# Benchmarks on {about['devices']}",
        "",
        *(warning if about.get("platform") == "cpu" else []),
        f"{about['cores']} CPU cores. Versions: {named}.",
        "",
        "Times are medians of one call, with the quartiles in parentheses. The candidates of a "
        "table take turns in the same minutes on the same device.",
        "",
    ]


def _sections(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    rows = [
        [x["what"], x["status"], str(x["seconds"]), str(x["limit_s"]), x.get("summary", "")]
        for x in lines
    ]
    return _table(
        "Sections",
        "What ran, and how long it took. A section that reaches its time limit is stopped.",
        ["section", "status", "time, s", "limit, s", "last line of the tests, or of a failure"],
        rows,
    )


def _bandwidth(lines: Sequence[Line]) -> list[str]:
    size = lines[0]["array_bytes"] / 2**20
    rows = [[x["what"], _milliseconds(x), f"{x['gigabytes_per_second']:,.0f}"] for x in lines]
    return _table(
        "Copy bandwidth",
        f"One pass over a float32 array of {size:,.0f} MiB. GB/s counts bytes read and written.",
        ["pass", "time, ms", "GB/s"],
        rows,
    )


def _updates(lines: Sequence[Line]) -> list[str]:
    about = lines[0]
    programs = {x["what"]: x for x in lines if x["measured"] == "program"}
    times = {x["what"]: x for x in lines if x["measured"] == "time"}
    rows = []
    for name in dict.fromkeys([*times, *programs]):
        facts = {**programs.get(name, {}), **times.get(name, {})}

        def cell(key: str, form: str, facts: Line = facts) -> str:
            return format(facts[key], form) if key in facts else MISSING

        rows.append(
            [
                name,
                _milliseconds(facts),
                cell("over_optim_zoo.lamb", ".2f"),
                cell("gigabytes_per_second", ",.0f"),
                f"{100 * facts['share_of_bandwidth']:.0f}" if "share_of_bandwidth" in facts else "",
                cell("kernels_per_leaf", ".2f"),
                cell("kernels_on_largest_leaf", "d"),
                cell("fewest_bytes_per_parameter", ".1f"),
                cell("array_bytes_per_parameter", ".1f"),
                cell("bytes_per_parameter", ".1f"),
                cell("state_bytes_per_parameter", ".1f"),
                cell("temporaries_per_parameter", ".2f"),
            ]
        )
    disturbed = next(iter(times.values()), {}).get("compiling_meanwhile") or []
    return _table(
        f"### {about['tree']} in {about['dtype']}",
        f"{about['parameters']:,} parameters in {about['leaves']} arrays."
        + (f" torch.compile was still busy: {', '.join(disturbed)}." if disturbed else ""),
        [
            *("update", "time, ms", "time / lamb", "GB/s", "% of copy"),
            *("kernels / array", "on the largest array", "bytes per parameter: fewest"),
            *("of the kernels", "by the cost model", "state", "temporaries"),
        ],
        rows,
    )


def _job_step(lines: Sequence[Line]) -> list[str]:
    about = lines[0]
    rows = [
        [
            x["what"],
            _milliseconds(x),
            f"{x['tokens_per_second']:,.0f}",
            f"{x['optimizer_ms']:.2f}" if x.get("optimizer_ms") else MISSING,
            f"{100 * x['optimizer_share']:.1f}" if x.get("optimizer_ms") else MISSING,
            f"{x['state_bytes_per_parameter']:.1f}",
            f"{x['temporary_bytes'] / 2**30:.2f}",
        ]
        for x in sorted(lines, key=lambda x: x["parameters_dtype"] != "float32")
    ]
    return _table(
        f"Job step of {about['tree']} in {about['dtype']}",
        f"{about['parameters']:,} parameters, {about['batch_size']} sequences of "
        f"{about['sequence_length']} tokens per call. The arithmetic is {about['dtype']}; stored "
        "parameters are float32 unless the name says otherwise. *Optimizer* is the time of the "
        "step minus that of `forward and backward` with parameters of the same dtype, taken in the "
        "same turns, and its share is of the step. `accumulate` updates the parameters on every "
        "fourth call, and its time is the mean of the four.",
        [
            *("step", "time, ms", "tokens / s", "optimizer, ms", "optimizer, % of step"),
            *("state, B / parameter", "temporaries, GiB"),
        ],
        rows,
    )


def _skipped(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    rows = [[x["section"], x["what"], x["reason"]] for x in lines]
    return _table(
        "Left out", "Candidates that were not measured.", ["section", "candidate", "reason"], rows
    )


def _milliseconds(line: Line) -> str:
    if "median_ms" not in line:
        return "not measured"
    digits: Callable[[float], str] = lambda x: f"{x:.2f}" if x < 100 else f"{x:.0f}"  # noqa: E731
    low, high = line["quartiles_ms"]
    return f"{digits(line['median_ms'])} ({digits(low)} to {digits(high)})"


def _table(
    title: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(columns)
    title = title if title.startswith("#") else f"## {title}"
    return [title, "", text, "", row(columns), rule, *map(row, rows), ""]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, metavar="results.jsonl")
    print(tables(read(parser.parse_args(argv).results)), end="")


if __name__ == "__main__":
    main()

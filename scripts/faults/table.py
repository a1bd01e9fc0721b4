"""The records of faults as a Markdown table."""

from collections.abc import Iterator, Mapping, Sequence

from outcomes import Record


def table(records: Sequence[Record]) -> str:
    """Returns a Markdown table with one row per fault. Variants with equal cells share a row.

    A cell says "bit for bit" where the metrics, the parameters and the optimizer state are equal.
    """
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        row = record["title"], *cells(record)
        rows.setdefault(row, []).append(record["variant"])
    text = ["| fault | what happens | steps lost |", "|---|---|---|"]
    for (title, happens, lost), variants in rows.items():
        named = f" ({'; '.join(variants)})" if any(variants) else ""
        text.append(f"| {title}{named} | {happens} | {lost} |")
    return "\n".join(text)


def cells(record: Record) -> tuple[str, str]:
    """Returns the cells "what happens" and "steps lost" of a record."""
    for why in ("skipped", "failed"):
        if why in record:
            return f"not known: {record[why]}", "?"
    lost = str(record["lost"])
    if "kills" in record:
        lost = (
            f"at most {record['lost']}, median {record['lost_median']:g}; a save begins every "
            f"{record['save_every']} steps"
        )
    return "; ".join(_what_happens(record)).replace("|", "\\|"), lost


def _what_happens(record: Record) -> Iterator[str]:
    if "kills" in record:
        during = ", ".join(f"{count} during {when}" for when, count in record["during"].items())
        yield f"{record['landed']} of {len(record['kills'])} land, {during}"
        yield "every next start resumes from " + (
            "the last complete save"
            if record["from_the_last_whole"]
            else "a step other than the last complete save"
        )
    if "first_exit_code" in record:
        yield "the second: " + _exit(record["exit_code"], record["said"])
        first = _exit(record["first_exit_code"], record["first_said"])
        yield f"the first, then at step {record['first_at']}: {first}"
    elif "exit_code" in record:
        yield _exit(record["exit_code"], record["said"])
    if "left_out" in record:
        yield f"micro-batches left out of the mean: {record['left_out']}"
    if "skipped_steps" in record:
        yield f"skipped steps: {_ranges(record['skipped_steps'])}"
    if not record.get("rates_are_positive", True):
        yield "tokens per second are not positive"
    if "days_off" in record:
        days_off = _list([f"{days:+} d" for days in record["days_off"]])
        yield f"the dates of the last saves are off by {days_off}"
    if record.get("next_exit_code", 0) or record.get("next_said"):
        yield "the next start: " + _exit(record["next_exit_code"], record["next_said"])
    elif "resumed_from" in record and "next_same" not in record:
        notes = "".join(f' says "{note}" and' for note in record["next_notes"])
        yield f"the next start{notes} resumes from step {record['resumed_from']}"
    yield _alike(record["same"], record["like"])
    if not record["finite"]:
        yield "parameters are not finite" if record["finite"] is False else "no parameters"
    if "next_same" in record:
        yield f"resumed from step {record['resumed_from']}: " + _alike(
            record["next_same"], "before"
        )


def _exit(code: int, said: str) -> str:
    return f"exit {code}" + (f', "{said}"' if said else "")


def _alike(same: Mapping[str, bool], like: str) -> str:
    if not same:
        return f"nothing can be compared with {like}"
    different = [name for name, is_same in same.items() if not is_same]
    if different:
        return f"{_list(different)} differ at the end from {like}"
    return f"bit for bit equal at the end to {like}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _ranges(steps: Sequence[int]) -> str:
    if len(steps) > 1 and steps[-1] - steps[0] == len(steps) - 1:
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps)) or "none"

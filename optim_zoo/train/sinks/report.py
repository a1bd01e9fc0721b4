"""The sink that writes the report of a run: one HTML file without references to other files."""

import base64
import html
import json
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from optim_zoo import errors
from optim_zoo.train import records
from optim_zoo.train.files import replace_file
from optim_zoo.train.sinks import plots as run_plots
from optim_zoo.train.sinks.base import RunInfo
from optim_zoo.train.summary import summarize


class Report:
    """Writes ``report.html`` after every evaluation, with the plots that are in the run folder."""

    def open(self, run: RunInfo) -> None:
        """Stores the description of the run."""
        self._run, self._written = run, False

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Does nothing."""

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the report again, with the current plots and figures."""
        run, self._written = self._run, True
        # Those of the file, because a run that is resumed after its last step evaluates nothing.
        # Plots of classes, which are larger, come last.
        held_out = records.read(run.folder / "metrics.jsonl").held_out
        names = map(run_plots.held_out_file, sorted(held_out, key=lambda name: name.count("/")))
        last = dict.fromkeys(names)  # each once
        files = [*(name for name in run_plots.CAPTIONS if name not in last), *last]
        plots = [run.folder / name for name in files]
        write(
            run.folder,
            title=f"{run.task}: {run.folder.name}",
            config=run.config,
            machine=run.machine,
            data=run.facts,
            figures=summarize(run),
            plots=[path for path in plots if path.exists()],
        )

    def close(self, finished: bool) -> None:
        """Writes the report of a run that was resumed after its last step."""
        if finished and not self._written:
            self.evaluate(self._run.total_steps, {})


def write(
    folder: pathlib.Path,
    *,
    title: str,
    config: Mapping[str, Mapping[str, object]],
    machine: Mapping[str, str],
    figures: Mapping[str, str],
    plots: Sequence[pathlib.Path],
    data: Mapping[str, str] = MappingProxyType({}),
    captions: Mapping[str, str] = run_plots.CAPTIONS,
    tables: Mapping[str, Sequence[Mapping[str, object]]] = MappingProxyType({}),
) -> pathlib.Path:
    """Writes ``report.html`` into a folder and returns its path.

    Args:
      folder: the run folder.
      title: the name of the run.
      config: section -> key -> value.
      machine: the devices and versions of the run, by name.
      figures: the final figures of the run by name, the most important one first.
      plots: PNG files, which the page shows in this order.
      data: facts about the data, by name.
      captions: file name of a plot -> its caption.
      tables: heading -> rows of a table, all with the same columns, shown below the plots.

    Raises:
      UserError: a plot cannot be read or the report cannot be written.
    """
    sections = [
        _section("Result", _cards(figures)) if figures else "",
        _section("Course", _plots(plots, captions)) if plots else "",
        *(_section(heading, _wide_table(rows)) for heading, rows in tables.items() if rows),
        _section("Configuration", _tables(config)) if config else "",
        _section("Data", f'<div class="tables">{_table("", data)}</div>') if data else "",
        _section("Machine", f'<div class="tables">{_table("", machine)}</div>') if machine else "",
    ]
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="".join(sections))
    path = folder / "report.html"
    replace_file(path, page.encode())
    return path


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>\n"


def _cards(figures: Mapping[str, str]) -> str:
    cards = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in figures.items()
    )
    return f'<dl class="cards">\n{_lines(cards)}\n</dl>'


def _plots(paths: Sequence[pathlib.Path], captions: Mapping[str, str]) -> str:
    plots = (_plot(path, captions) for path in paths)
    return f'<div class="plots">\n{_lines(plots)}\n</div>'


def _plot(path: pathlib.Path, captions: Mapping[str, str]) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise errors.UserError(
            f"expected the plot {path}, got {error.strerror}; draw the plots again"
        ) from error
    width, height = (round(pixels * 96 / run_plots.DPI) for pixels in _png_size(content))
    name = html.escape(path.stem.replace("_", " "))
    caption = html.escape(captions.get(path.name) or run_plots.caption(path.name))
    image = base64.b64encode(content).decode()
    return (
        f'<figure style="--width: {width}px">'
        f'<div class="paper" tabindex="0" role="group" aria-label="plot of the {name}">'
        f'<img src="data:image/png;base64,{image}" width="{width}" height="{height}"'
        f' alt="Plot of the {name}{" by step" if captions is run_plots.CAPTIONS else ""}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _png_size(content: bytes) -> tuple[int, int]:
    """Returns width and height in pixels from the first chunk of a PNG."""
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def _tables(config: Mapping[str, Mapping[str, object]]) -> str:
    tables = (_table(name, section) for name, section in config.items())
    return f'<div class="tables">\n{_lines(tables)}\n</div>'


def _table(caption: str, rows: Mapping[str, object]) -> str:
    head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = (
        f'<tr><th scope="row">{_breakable(name)}</th><td>{html.escape(_text(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{head}<tbody>\n{_lines(body)}\n</tbody></table>"


def _wide_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns a table with a heading for each column, which scrolls if it is too wide."""
    head = "".join(f'<th scope="col">{_breakable(name)}</th>' for name in rows[0])
    body = (
        f"<tr>{''.join(f'<td>{html.escape(_text(value))}</td>' for value in row.values())}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{_lines(body)}\n'
        "</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """Returns the name with a possible line break after each underscore."""
    return html.escape(name).replace("_", "_<wbr>")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
</header>
<main>
{body}</main>
</body>
</html>
"""

_STYLE = """\
:root {
  color-scheme: light dark;
  --text: #1d2329; --quiet: #5a6570; --page: #f6f7f8; --card: #ffffff; --line: #dde1e5;
}
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --quiet: #a3adb7; --page: #15191d; --card: #1e2429; --line: #353d45; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 0.75rem; font-size: 1.15rem; }
.cards {
  display: grid; gap: 0.75rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
}
.cards div, table, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
}
.cards div { padding: 0.6rem 0.9rem; }
dt { font-size: 0.85rem; color: var(--quiet); }
dd {
  margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 var(--width); min-width: 0; max-width: 100%; overflow: hidden; }
/* A plot too large to be read when shrunk to the screen is moved about inside its frame. */
.paper { background: #ffffff; overflow: auto; max-height: 64rem; padding: 0.5rem; }
img {
  display: block; min-width: calc(0.65 * var(--width)); max-width: 100%; height: auto;
  margin: 0 auto;
}
figcaption { padding: 0.6rem 0.9rem; font-size: 0.9rem; color: var(--quiet); }
.tables { columns: 22rem; column-gap: 1rem; }
table {
  width: 100%; margin: 0 0 1rem; break-inside: avoid; border-spacing: 0; font-size: 0.9rem;
  padding: 0.4rem 0.9rem;
}
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { padding: 0.25rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { width: 45%; padding-right: 1rem; font-weight: 400; color: var(--quiet); }
td { font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--line); }
.wide { overflow-x: auto; }
.wide th, .wide td { width: auto; padding: 0.25rem 1rem 0.25rem 0; overflow-wrap: normal; }
@media print {
  body { max-width: none; padding: 0; background: none; }
  figure, .cards div { break-inside: avoid; }
  .paper { max-height: none; }
  img { min-width: 0; max-height: 22cm; width: auto; }
}
"""

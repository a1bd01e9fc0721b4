"""Progress is a bar on a terminal, and plain lines elsewhere."""

import io
import math
import re
import sys
from pathlib import Path

import pytest

from optim_zoo.train.sinks import progress
from optim_zoo.train.sinks.base import Sink, opened
from optim_zoo.train.sinks.jsonl import JsonLines
from optim_zoo.train.tasks.base import Baseline
from tests.train.sinks.run_info import run_info


class Terminal(io.StringIO):
    """A text buffer whose ``isatty`` returns True."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 120) -> Terminal:
    """Replaces standard output by a terminal. A fixture cannot, because pytest would undo it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    return made


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def figures(loss: float, rate: float = math.nan, **others: float) -> dict[str, float]:
    return {"loss": loss, "learning_rate": 0.01, "tokens_per_second": rate, **others}


def test_a_pipe_receives_a_line_for_each_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = progress.Progress()
    about = run_info(
        tmp_path,
        start=5,
        notes=["a [bold]note[/bold]"],
        machine={"devices": "8 x TPU"},
        facts={"unknown tokens": "2.00% of the text"},
        parameters=1234,
        total_units=5678,
    )
    with opened([JsonLines(), sink], about):
        sink.log(6, figures(1.5, skipped_steps=0))
        sink.log(20, figures(1.0, 1234.5, skipped_steps=2))
        sink.evaluate(20, {"loss": 0.5, "accuracy": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "a [bold]note[/bold]",
        "devices: 8 x TPU",
        "parameters: 1,234",
        "unknown tokens: 2.00% of the text",
        "tokens: 5,678 in all steps",
        "steps: 20, 5 of them made",
        f"run folder: {tmp_path}",
        "compiling",
        "step 6/20  loss 1.5000  learning rate 1.00e-02",
        "step 20/20  loss 1.0000  learning rate 1.00e-02  1,234 tokens/s  2 skipped",
        "step 20: held-out loss 0.5000 nats, held-out accuracy 0.2500",
    ]


def test_a_finished_run_prints_its_final_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both: list[Sink] = [JsonLines(), progress.Progress()]
    baseline = Baseline("class frequency", {"loss": 2.0, "accuracy": 0.1})
    (tmp_path / "report.html").touch()
    with opened(both, run_info(tmp_path, unit="images", baseline=baseline)):
        for sink in both:
            sink.log(20, {"loss": 1.0, "learning_rate": 0.0, "images": 1280})
            sink.evaluate(20, {"loss": 0.5, "accuracy": 0.25})
    assert capsys.readouterr().out.splitlines()[8:] == [
        "held-out loss: 0.5000 nats",
        "held-out accuracy: 0.2500",
        "loss by class frequency: 2.0000 nats",
        "accuracy by class frequency: 0.1000",
        "gain: 1.5000 nats",
        "steps: 20 of 20",
        "images: 1,280",
        "images per second: not timed",
        f"report: {tmp_path / 'report.html'}",
    ]


def test_lines_are_flushed_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    progress.Lines(3).at(1, "loss 2.0")
    assert raw.getvalue() == b"step 1/3  loss 2.0\n"


def test_a_terminal_shows_a_bar_with_figures_below_the_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)
    sink = progress.Progress()
    with opened([JsonLines(), sink], run_info(tmp_path, start=5, notes=["a [bold] note"])):
        sink.log(7, figures(1.5))
        sink.log(20, figures(1.0))
    shown = plain(screen.getvalue())
    assert "a [bold] note\n" in shown
    assert "training" in shown
    assert "20/20" in shown
    assert "loss 1.0000" in shown
    assert "\x1b[?25h" in screen.getvalue()  # shows the cursor again


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bar_fits_the_terminal_and_is_erased_at_the_end(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch, columns)
    sink = progress.Progress()
    with opened([JsonLines(), sink], run_info(tmp_path, total_steps=15_625)):
        for step in (5_000, 15_000):
            sink.log(step, figures(12.3456, 123_456.7, skipped_steps=3))
    drawn = [plain(line) for line in re.split(r"[\r\n]", screen.getvalue())]
    bars = [line for line in drawn if "loss" in line]
    assert bars
    assert max(map(len, bars)) <= columns
    if columns >= 80:
        assert "15000/15625" in bars[-1]
        assert "loss 12.3456  123,457 tokens/s  3 skipped" in bars[-1]
    # The line of the bar is erased at the end.
    assert re.search(r"\x1b\[2K[^\w]*$", screen.getvalue().replace("\x1b[?25h", ""))


def test_a_negative_gain_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both: list[Sink] = [JsonLines(), progress.Progress()]
    baseline = Baseline("token frequency", {"loss": 6.25})
    with opened(both, run_info(tmp_path, baseline=baseline)):
        for sink in both:
            sink.log(20, {"loss": 1.0, "learning_rate": 0.0, "tokens": 1280})
            sink.evaluate(20, {"loss": 6.5})
    expected = "gain: -0.2500 nats (no better than token frequency yet)"
    assert expected in capsys.readouterr().out.splitlines()


def test_the_cursor_is_restored_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)

    def fail() -> None:
        sink = progress.Progress()
        with opened([sink], run_info(tmp_path)):
            sink.log(3, figures(2.0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "\x1b[?25h" in screen.getvalue()

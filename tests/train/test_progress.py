"""A bar on a terminal, plain lines elsewhere."""

import io
import re
import sys

import pytest

from optim_zoo.train import progress


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes standard output a terminal; in the test itself, or pytest would take it back."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    return made


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_pipe_gets_a_line_for_each_report(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.reporter(20, 5) as reporter:
        assert isinstance(reporter, progress.Lines)
        reporter.say("going on [bold]from[/bold] here")
        reporter.at(6, "loss 1.5")
        reporter.at(20, "loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "going on [bold]from[/bold] here",
        "step 6/20  loss 1.5",
        "step 20/20  loss 1.0",
    ]


def test_lines_are_flushed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    progress.Lines(3).at(1, "loss 2.0")
    assert raw.getvalue() == b"step 1/3  loss 2.0\n"


def test_a_terminal_gets_a_bar_with_figures_and_lines_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = terminal(monkeypatch)
    with progress.reporter(20, 5) as reporter:
        assert isinstance(reporter, progress.Bar)
        reporter.say("note: [bold] stays as it is")
        reporter.at(7, "loss 1.5")
        reporter.at(20, "loss 1.0")
    shown = plain(screen.getvalue())
    assert "note: [bold] stays as it is\n" in shown
    assert "training" in shown
    assert "20/20" in shown
    assert shown.rstrip().endswith("loss 1.0")
    assert "\x1b[?25h" in screen.getvalue()  # the cursor is shown again


def test_the_bar_is_put_in_order_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)

    def fail() -> None:
        with progress.reporter(20, 0) as reporter:
            reporter.at(3, "loss 2")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "\x1b[?25h" in screen.getvalue()

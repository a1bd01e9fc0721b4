"""Leaving in one process; tests/multiprocess/test_job.py has more."""

from pathlib import Path

import pytest

from optim_zoo.train import distributed
from optim_zoo.train.config import Distributed


@pytest.mark.parametrize(
    ("code", "line", "printed"),
    [(0, "", ""), (3, "", ""), (3, "what failed", "what failed\n")],
)
def test_one_process_prints_a_line_and_returns_its_code(
    code: int, line: str, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with distributed.start(Distributed(processes=1), tmp_path) as processes:
        assert not processes.joined
        assert processes.leave(code, line) == code
    assert capsys.readouterr() == ("", printed)

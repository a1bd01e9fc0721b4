"""Agreement in one process; tests/multiprocess/test_agreement.py has two."""

from pathlib import Path

from optim_zoo.train import distributed


def test_one_process_does_not_wait(tmp_path: Path) -> None:
    assert distributed.is_first()
    assert not distributed.several()
    distributed.wait_for_all("nobody")
    with distributed.first_process_first("nobody"):
        pass
    distributed.check_same({"config": "any"})
    distributed.check_shared(tmp_path / "is not touched")
    assert not list(tmp_path.iterdir())
    assert [distributed.broadcast_from_first(value) for value in (True, False)] == [True, False]

"""Locks of run folders. tests/train/test_loop.py tests the lock of a process that is killed."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.distributed import agreement, alone_in, lock


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with alone_in(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        refused = pytest.raises(UserError, match=rf"^another process trains in {folder}: ")
        with refused, alone_in(folder):
            pass
        with alone_in(tmp_path / "runs" / "other"):
            pass
    with alone_in(folder):
        pass
    assert (folder / ".lock").read_bytes() == b""


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path):
        raise ZeroDivisionError
    with alone_in(tmp_path):
        pass


def test_only_process_0_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone_in(tmp_path):
        monkeypatch.setattr(agreement, "is_first", lambda: False)
        with alone_in(tmp_path), alone_in(tmp_path / "not made"):
            assert not (tmp_path / "not made").exists()


@pytest.fixture
def read_only() -> Iterator[Path]:
    """Returns a folder without write permission. The superuser first gives up its privileges."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # only its user can enter `tmp_path`
        folder = Path(name)
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_run_folder_without_write_permission_is_reported_in_one_sentence(read_only: Path) -> None:
    advice = "make it writable, or choose another folder with run.dir"
    with pytest.raises(UserError) as caught, alone_in(read_only):
        pass
    assert str(caught.value) == (
        f"cannot write to the run folder {read_only}: Permission denied; {advice}"
    )
    with pytest.raises(UserError) as caught, alone_in(read_only / "run"):
        pass
    assert str(caught.value) == (
        f"cannot create the run folder {read_only / 'run'}: Permission denied; {advice}"
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_in_one_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre and NFS without a lock service raise these errors."""

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", fails)
    with pytest.raises(UserError) as caught, alone_in(tmp_path):
        pass
    assert str(caught.value).startswith(
        f"cannot lock the run folder {tmp_path}: {os.strerror(number)}; its file system must "
        f"support flock "
    )

"""Atomic replacement of files."""

import pathlib

import pytest

from optim_zoo import errors
from optim_zoo.train import files


def test_a_failed_replacement_keeps_the_old_file_and_leaves_no_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def refuse(source: pathlib.Path, target: pathlib.Path) -> None:
        assert source.read_bytes() == b"new"
        assert target.read_bytes() == b"old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(errors.UserError, match="No space left on device"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

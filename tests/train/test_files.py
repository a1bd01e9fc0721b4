"""Replacing files as a whole."""

import pathlib

import pytest

from optim_zoo import errors
from optim_zoo.train import files


def test_a_file_that_cannot_be_replaced_keeps_its_content_and_no_other_file_is_left(
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

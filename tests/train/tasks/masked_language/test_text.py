"""Reading the prose of the standard library and the files of a user."""

import gzip
import re
import sysconfig
from pathlib import Path

import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.tasks import text_files
from optim_zoo.train.tasks.masked_language import text

SOURCE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""The module."""
import os  # a note at the end of a line of code

# ----------------------------------
# A comment that goes on
# for two lines.
#
# Its second paragraph.


class Half:
    # Before the docstring.
    """Of a class.

        Indented.
    """

    def method(self):
        """Of a method."""
        return """not # documentation
    # nor this
    """
# The end.'''


@pytest.fixture(scope="module")
def library() -> list[str]:
    return text.standard_library()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_prose_is_docstrings_and_block_comments_in_source_order(tmp_path: Path) -> None:
    assert text._prose(write(tmp_path / "module.py", SOURCE)).split("\n\n") == [
        "The module.",
        "A comment that goes on for two lines.",
        "Its second paragraph.",
        "Before the docstring.",
        "Of a class.",
        "Indented.",
        "Of a method.",
        "The end.",
    ]


@pytest.mark.parametrize("source", ["def f(:\n    '''text", "x = (", "# caf\xe9".encode("latin-1")])
def test_a_module_that_does_not_parse_is_skipped(tmp_path: Path, source: str | bytes) -> None:
    assert text._prose(write(tmp_path / "module.py", source)) == ""


def test_modules_exclude_tests_and_packages_and_are_sorted(tmp_path: Path) -> None:
    names = ["b.py", "a/z.py", "test/c.py", "a/tests/d.py", "site-packages/e.py", "idlelib/f.py"]
    for name in names:
        write(tmp_path / name, "")
    assert text_files.library_modules(tmp_path) == [tmp_path / "a/z.py", tmp_path / "b.py"]


def test_standard_library_has_megabytes_of_documents_without_repetition(
    library: list[str],
) -> None:
    assert sum(map(len, library)) > 2_000_000
    assert len(library) > 400
    assert all(document.strip() for document in library)
    paragraphs = [
        " ".join(paragraph.split())
        for document in library
        for paragraph in re.split(r"\n\s*\n", document)
    ]
    assert len(paragraphs) == len(set(paragraphs))


def test_standard_library_holds_topics_docstrings_and_comments(library: list[str]) -> None:
    prose = "\n".join(library)
    assert 'The "assert" statement' in prose  # a help topic
    assert "Interface to the libbzip2 compression library." in prose  # a docstring, of bz2
    assert "JSON (JavaScript Object Notation)" in prose  # a docstring in a package
    assert "The child indices of heap index pos are already heaps" in prose  # a comment, of heapq


def test_lines_without_words_are_removed() -> None:
    document = (
        "Title\n*****\n\nName  Use\n----- ----\na--b  ----- c\n+----+\n=====\n\n>>> ...\n***\n"
    )
    kept = ["Title", "Name  Use\na--b  ----- c", ">>> ...\n***"]
    assert list(text._unseen(document, set())) == kept


def test_the_empty_pattern_reads_the_standard_library(
    library: list[str],
) -> None:
    assert text.read("") == library


def test_standard_library_without_source_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="expected the standard library's source files in"):
        text.read("")


def test_read_returns_one_document_per_file_in_the_order_of_the_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second\n\nparagraph")
    write(tmp_path / "a" / "deep" / "x.txt", "first")
    write(tmp_path / "c.txt", " \n")
    write(tmp_path / "d.md", "another kind")
    assert text.read(f"{tmp_path}/**/*.txt") == ["first", "second\n\nparagraph"]
    assert text.read(f"{tmp_path}/*.txt") == ["second\n\nparagraph"]


def test_read_takes_the_name_of_one_file_even_with_brackets(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1].txt", "one")
    assert text.read(str(path)) == ["one"]


def test_no_match_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*\*\.txt"):
        text.read(f"{tmp_path}/*.txt")


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches"):
        text.read(str(tmp_path))


def test_other_encodings_are_an_error_with_file_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", "a caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} has an invalid byte at offset 5"):
        text.read(str(path))


def test_an_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "locked.txt", "text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # permissions do not stop the superuser
    with pytest.raises(UserError, match=r"locked\.txt cannot be read \(Permission denied\)"):
        text.read(str(path))


def test_only_blank_text_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", " \n\t\n")
    write(tmp_path / "b.txt", "")
    with pytest.raises(UserError, match=r"the 2 file\(s\) that match .* hold only blanks"):
        text.read(f"{tmp_path}/*.txt")


RECORDS = ['{"id": 1, "text": "first {text}"}', "", '{"text": "second\\nline \\ud800", "id": 2}']


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.txt", "t.jsonl.gz", "t.gz"])
def test_json_lines_need_the_name_of_the_text_field(name: str, tmp_path: Path) -> None:
    content = "\n".join(RECORDS).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert text.read(str(path), "text") == ["first {text}", "second\nline ?"]
    with pytest.raises(
        UserError, match=r"holds JSON lines; name the field .* data\.field, one of "
    ):
        text.read(str(path))


def test_plain_text_may_be_compressed_and_may_begin_with_a_brace(tmp_path: Path) -> None:
    write(tmp_path / "a.txt.gz", gzip.compress(b"compressed"))
    write(tmp_path / "b.txt", "{this} is no JSON\n")
    write(tmp_path / "c.txt", "[1, 2]\n")
    read = text.read(f"{tmp_path}/*")
    assert read == ["compressed", "{this} is no JSON\n", "[1, 2]\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nplain\n', "line 2 of .*t.jsonl is none"),
        ('{"text": "a"}\n{"txt": "b", "id": 1}\n', "line 2 of .*t.jsonl has txt, id"),
        ('{"text": ["a"]}\n', "line 1 of .*t.jsonl has text"),
        ('"text"\n', "line 1 of .*t.jsonl has no fields"),
        ('{"text": " "}\n', "hold only blanks"),
        pytest.param(gzip.compress(b"text" * 99)[:-9], "t.jsonl is damaged", id="cut gzip"),
        pytest.param(
            gzip.compress(b"text" * 99)[:12] + b"\xff" * 40, "t.jsonl is damaged", id="wrong gzip"
        ),
        pytest.param(gzip.compress(b"\xff"), "invalid byte at offset 0", id="no UTF-8 in gzip"),
    ],
)
def test_invalid_json_lines_are_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", content)
    with pytest.raises(UserError, match=message):
        text.read(str(path), "text")


def test_a_path_may_begin_with_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "t.txt", "text")
    assert text.read("~/t.txt") == text.read("~/*.txt") == ["text"]

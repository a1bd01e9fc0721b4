"""CoNLL files: columns, comments, and what is refused."""

from pathlib import Path

import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.token_tagging import conll
from optim_zoo.train.tasks.token_tagging.conll import Sentence

COLUMNS = {"key": "text", "word_column": 0, "tag_column": -1}


def parse(content: str, word: int = 0, tag: int = -1) -> list[tuple[str, str]]:
    """Returns the sentences with their words and tags joined by blanks."""
    made = conll.parse(content, "f.conll", "text", word, tag)
    return [(" ".join(words), " ".join(tags)) for words, tags in made]


def test_sentences_end_at_blank_lines_and_document_starts_are_skipped() -> None:
    text = "\ufeff-DOCSTART- -X- O\n\n\nEU NNP  B-ORG\r\nrejects VBZ O \n \nPeter\tNNP\tB-PER"
    assert parse(text) == [("EU rejects", "B-ORG O"), ("Peter", "B-PER")]
    assert parse(text, tag=1) == [("EU rejects", "NNP VBZ"), ("Peter", "NNP")]
    assert parse(text, word=-1, tag=0)[1] == ("B-PER", "Peter")


def test_files_of_conll_u_have_comments_ranges_and_words_with_blanks() -> None:
    line = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_\n"
    text = "# text = C'est\n" + "".join(
        line.format(*each) for each in [("1-2", "x y", "_"), ("1", "1 000", "NUM"), ("2", "#", "X")]
    )
    assert list(conll.parse(text, "", "", 1, 3)) == [Sentence(("1 000", "#"), ("NUM", "X"))]


def test_what_is_written_is_read_again() -> None:
    sentences = [Sentence(("a", "\u00a0b\u2028"), ("O", "B-x")), Sentence(("c",), ("O",))]
    assert list(conll.parse(conll.write(sentences[1:]), "", "")) == sentences[1:]
    assert list(conll.parse(conll.write(sentences), "", ""))[1] == sentences[1]


def test_words_without_tags_are_read_for_predictions() -> None:
    assert conll.words_only("a\nb O\n\nc\td\n") == [("a", "b"), ("c",)]
    assert conll.words_only("a\n\nb O\n", 1) == [("O",)]
    with pytest.raises(UserError, match=r"expected a word in column 0 .* empty in line 2;"):
        conll.words_only("a\tO\n\tO\n")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (b"", {}, "have no words"),
        (b"\n\n-DOCSTART- O\n", {}, "have no words"),
        (b"EU\nrejects\n", {}, r"expected a tag in column -1 .* line 1 of .* has 1 column"),
        (b"EU O\n\nto\n", {"tag_column": 1}, r"expected a tag in column 1 .* line 3 of"),
        (b"a b\n", {"word_column": 2}, r"expected a word in column 2 .* line 1"),
        (b"a b\n", {"word_column": 1}, r"expected a tag in column -1"),
        (b"a\tO\n\tO\n", {}, r"expected a word in column 0 of every line, but it is empty"),
        (b"a\tO\nb\t\n", {}, r"expected a tag in column -1 of every line, but it is empty"),
        (b"a\tO\n\t\n", {}, r"expected a word in column 0 of every line, but it is empty"),
        (b"a O\n\xff O\n", {}, "expected UTF-8, but .* invalid byte at offset 4"),
    ],
)
def test_bad_files_are_refused(
    content: bytes, columns: dict[str, int], message: str, tmp_path: Path
) -> None:
    (tmp_path / "f.conll").write_bytes(content)
    with pytest.raises(UserError, match=message):
        conll.read(f"{tmp_path}/*", **(COLUMNS | columns))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"held_out_text: .* no file matches"):
        conll.read(f"{tmp_path}/*.txt", **(COLUMNS | {"key": "held_out_text"}))  # type: ignore[arg-type]

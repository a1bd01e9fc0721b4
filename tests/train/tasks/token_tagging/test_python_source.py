"""Tags of Python source, and the split of the library's files."""

from pathlib import Path

import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.token_tagging import python_source
from optim_zoo.train.tasks.token_tagging.conll import Sentence

SOURCE = '''\
class Über(Base):  # two words
    """A doc string."""

    def method(self, *args, key=1.5, **kwargs):
        ä = len(self.items) + other(key=None)
        return [lambda x: Über, method, f"{ä} b"], "ÄÖ", ä.name
'''
EXPECTED = """\
class keyword|Über class|( operator|Base O|) operator|: operator|# B-comment|two I-comment
words I-comment|\"""A B-string|doc I-string|string.\""" I-string|def keyword|method function
( operator|self parameter|, operator|* operator|args parameter|, operator|key parameter
= operator|1.5 number|, operator|** operator|kwargs parameter|) operator|: operator
ä O|= operator|len function|( operator|self O|. operator|items attribute|) operator
+ operator|other function|( operator|key parameter|= operator|None keyword|) operator
return keyword|[ operator|lambda keyword|x parameter|: operator|Über class|, operator
method function|, operator|f"{ä} B-string|b" I-string|] operator|, operator|"ÄÖ" string
, operator|ä O|. operator|name attribute"""


def test_every_word_has_its_class() -> None:
    pairs = [
        (word, tag)
        for sentence in python_source.sentences(SOURCE)
        for word, tag in zip(*sentence, strict=True)
    ]
    expected = [item.rsplit(" ", 1) for item in EXPECTED.replace("\n", "|").split("|")]
    assert pairs == [
        (word, tag if tag == "O" or tag[1] == "-" else f"B-{tag}") for word, tag in expected
    ]


def test_sentences_are_whole_logical_lines_of_at_most_32_words() -> None:
    source = "x = [\n1,\n2]\n" * 5 + f"# {'word ' * 40}\n" + "y = 1\n"
    made = python_source.sentences(source)
    assert [len(sentence.words) for sentence in made] == [28, 7, 32, 12]
    assert made[2].tags == ("B-comment", *["I-comment"] * 31)
    assert made[3].tags[:9] == ("I-comment",) * 9
    words = [word for sentence in made for word in sentence.words]
    assert words == source.replace("[", "[ ").replace(",", " ,").replace("]", " ]").split()


def test_untagged_source_need_not_be_valid() -> None:
    (sentence,) = python_source.sentences("def def x:\n", tagged=False)
    assert sentence.words == ("def", "def", "x", ":")
    for broken in ("x = (\n", "'''", "def def x:\n"):
        with pytest.raises(SyntaxError):
            python_source.sentences(broken)


def test_no_file_is_in_both_parts() -> None:
    files = [[Sentence((f"{i}",) * 10, ("O",) * 10)] for i in range(10)]
    train, held_out = python_source.split(files, 0.25)
    assert held_out == [file[0] for file in files[:3]]
    assert train == [file[0] for file in files[3:]]
    assert all(
        python_source.split(files[:2], share)[part] for share in (0.01, 0.99) for part in (0, 1)
    )


def test_the_library_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_source, "_BYTES", 60_000)
    first = python_source.load(tmp_path / "new", 0.2)
    assert {"B-keyword", "I-comment", "B-attribute", "O"} <= {
        tag for sentence in first.train for tag in sentence.tags
    }
    words = [sum(len(sentence.words) for sentence in part) for part in first]
    assert 0.1 < words[1] / sum(words) < 0.7  # whole files, and few of them
    monkeypatch.setattr(python_source, "sentences", None)
    assert python_source.load(tmp_path / "new", 0.2) == first
    monkeypatch.setattr(python_source.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(UserError, match="found 0; name your own CoNLL files"):
        python_source.load(tmp_path / "new", 0.2)

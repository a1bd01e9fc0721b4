"""Filling in masks. The text of a run and the candidates are tested in tests/cli."""

import pytest

from optim_zoo.train.tasks.bert.vocabulary import read_vocabulary
from optim_zoo.train.tasks.masked_language import predict


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("a [MASK] b [MASK].", ["x", "y"], "a x b y."),
        ("play [MASK] now", ["##ing"], "playing now"),
        ("[MASK][MASK]", ["a", "##b"], "ab"),
        ("[MASK]", ["##"], "##"),  # the token of two hash signs continues nothing
    ],
)
def test_a_token_that_continues_a_word_is_attached_to_it(
    text: str, tokens: list[str], expected: str
) -> None:
    assert predict._written(text, tokens) == expected


def test_only_the_mask_is_read_as_a_special_token() -> None:
    vocabulary = read_vocabulary("")
    plain, line = predict._read(["no mask [SEP]", "the [MASK] [SEP] [MASK]"], vocabulary)
    assert plain is None
    assert line is not None
    assert [line.ids[at] for at in line.masked] == [vocabulary.mask] * 2
    assert line.ids.count(vocabulary.mask) == 2
    assert line.ids.count(vocabulary.sep) == line.ids.count(vocabulary.cls) == 1

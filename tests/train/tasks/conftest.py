"""Fixtures shared by the tests of the data."""

import pytest

from optim_zoo.train.tasks.bert.vocabulary import Vocabulary, read_vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary("")

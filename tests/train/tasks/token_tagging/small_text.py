"""A small tagged text, and a model of a few numbers, for tests and configs of token tagging."""

from pathlib import Path

import numpy as np

from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS

NAMES = ("anna", "bert", "cara", "dora")
OTHERS = ("sees", "meets", "and", "calls", "in", "the", "rain")
PLACES = ("oslo", "rome", "newyork")  # the last one has two pieces

CONFIG = """
[task]
name = "token_tagging"
[data]
text = "{folder}/train.conll"
held_out_text = "{folder}/held_out.conll"
vocabulary = "{folder}/vocabulary"
sequence_length = 12
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
intermediate_size = 16
max_positions = 12
dropout = 0.1
[optimizer]
name = "lamb"
[schedule]
name = "constant"
learning_rate = 0.02
[train]
steps = 4
batch_size = 8
[output]
log_every = 1
evaluate_every = 2
checkpoint_every = 2
sinks = []
"""


def sentence(rng: np.random.Generator) -> str:
    """Returns a sentence of three to nine words in CoNLL format."""
    lines = []
    for _ in range(rng.integers(1, 4)):
        lines += [f"{word} O" for word in rng.choice(OTHERS, rng.integers(1, 3))]
        names = rng.choice(NAMES, rng.integers(1, 3))
        lines += [f"{word} {'I' if i else 'B'}-PER" for i, word in enumerate(names)]
        lines += [f"{word} B-LOC" for word in rng.choice(PLACES, 1)]
    return "".join(f"{line}\n" for line in lines)


def write_tagged_text(folder: Path) -> Path:
    """Writes forty sentences to train on, ten to evaluate on, a vocabulary and ``tag.toml``."""
    rng = np.random.default_rng(0)
    for name, number in (("train", 40), ("held_out", 10)):
        text = "-DOCSTART- O\n\n" + "\n".join(sentence(rng) for _ in range(number))
        (folder / f"{name}.conll").write_text(text)
    tokens = [*SPECIAL_TOKENS, *NAMES, *OTHERS, "oslo", "rome", "new", "##york"]
    (folder / "vocabulary").write_text("".join(f"{token}\n" for token in tokens))
    path = folder / "tag.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path

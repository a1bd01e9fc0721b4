"""Fills in the masked tokens of a text."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.model import Bert
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary, tokenizer
from optim_zoo.tree import Tree

MASK = "[MASK]"


class _Line(NamedTuple):
    ids: list[int]  # [CLS] text [SEP]
    masked: list[int]  # the positions of [MASK], in ascending order


def fill(
    model: Bert,
    params: Tree,
    vocabulary: Vocabulary,
    lines: Sequence[str],
    *,
    longest: int,
    top: int = 0,
) -> Iterator[str]:
    """Returns the lines with the most probable token in place of each ``[MASK]``.

    Each line is a sequence of its own, and each mask is filled in without regard to the others of
    the line. A special token is never filled in. A token that continues a word (``##ing``) is
    attached to the word before it. Lines without a mask are returned unchanged.

    Args:
      model: the model.
      params: its parameters.
      vocabulary: its vocabulary.
      lines: the text.
      longest: the largest number of tokens of a line, including [CLS] and [SEP].
      top: the number of candidates to show. After a line with masks follows a line for each mask,
        with its number in the line and the candidates with their probabilities in descending
        order: ``  1: the 0.3120, a 0.1210``.

    Raises:
      UserError: no line has a mask, or a line with a mask is too long. This is raised before the
        first line.
    """
    read = _read(lines, vocabulary)
    if not any(read):
        raise UserError(f"expected {MASK} in at least one line of the text, but no line has it")
    for number, line in enumerate(read, 1):
        if line is not None and len(line.ids) > longest:
            raise UserError(
                f"line {number} has {len(line.ids)} tokens, including [CLS] and [SEP], but the run "
                f"was trained on sequences of {longest}: shorten the line"
            )
    return _filled(model, params, vocabulary, lines, read, longest, top)


def _read(lines: Sequence[str], vocabulary: Vocabulary) -> list[_Line | None]:
    """Returns the tokens of each line that has a mask, and None for each of the others."""
    encoder = tokenizer(vocabulary)

    def tokens(part: str) -> list[int]:
        ids: list[int] = encoder.encode(part, add_special_tokens=False).ids
        return ids

    read: list[_Line | None] = []
    for line in lines:
        first, *rest = line.split(MASK)
        ids, masked = [vocabulary.cls, *tokens(first)], []
        for part in rest:
            masked.append(len(ids))
            ids += [vocabulary.mask, *tokens(part)]
        read.append(_Line([*ids, vocabulary.sep], masked) if rest else None)
    return read


def _filled(
    model: Bert,
    params: Tree,
    vocabulary: Vocabulary,
    lines: Sequence[str],
    read: Sequence[_Line | None],
    longest: int,
    top: int,
) -> Iterator[str]:
    special = list(vocabulary.special)
    for text, line in zip(lines, read, strict=True):
        if line is None:
            yield text
            continue
        probabilities = _probabilities(model, params, vocabulary, line, longest)
        ordinary = probabilities.copy()
        ordinary[:, special] = -1  # after all others
        ranked = np.argsort(-ordinary, kind="stable")
        yield _written(text, [vocabulary.tokens[order[0]] for order in ranked])
        if top:
            shown = min(top, vocabulary.size - len(special))
            for number, (order, each) in enumerate(zip(ranked, probabilities, strict=True), 1):
                best = (f"{vocabulary.tokens[i]} {each[i]:.4f}" for i in order[:shown])
                yield f"  {number}: {', '.join(best)}"


def _written(text: str, tokens: Sequence[str]) -> str:
    """Returns a line with tokens in place of its masks."""
    written, *parts = text.split(MASK)
    for token, part in zip(tokens, parts, strict=True):
        continues = token.startswith("##") and token != "##"
        written = written.rstrip() + token[2:] if continues else written + token
        written += part
    return written


def _probabilities(
    model: Bert, params: Tree, vocabulary: Vocabulary, line: _Line, longest: int
) -> np.ndarray:
    """Returns the probability of every token at every mask, ``(masks, vocabulary)`` float32."""
    length = min(_rounded(len(line.ids)), longest)
    ids = np.full(length, vocabulary.pad, np.int32)
    ids[: len(line.ids)] = line.ids
    positions = np.zeros(_rounded(len(line.masked)), np.int32)
    positions[: len(line.masked)] = line.masked
    made = _softmax(model, params, ids, positions, np.arange(length) < len(line.ids))
    return np.asarray(made)[: len(line.masked)]


def _rounded(size: int) -> int:
    """Returns the next power of two, at least 16, so that few shapes are compiled."""
    return max(16, 1 << (size - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _softmax(
    model: Bert, params: Tree, ids: jax.Array, positions: jax.Array, attended: jax.Array
) -> jax.Array:
    types = jnp.zeros_like(ids)
    variables = {"params": params}
    logits: Any = model.apply(variables, ids, types, positions, attended, deterministic=True)
    return jax.nn.softmax(logits)

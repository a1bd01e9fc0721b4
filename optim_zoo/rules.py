"""Path patterns and rules: one language for weight decay, trust ratios, layers and sharding.

A pattern is matched with ``re.search`` against the ``/``-joined path of a leaf, as in BERT's
``optimization.py``. A rule is a pair ``(pattern, value)``; the first rule that matches wins.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.tree import Tree, is_partial, leaf_paths, leaves_with_path, map_with_path

Patterns = Sequence[str]
Rules = Sequence[tuple[str, Any]]

Mask = Tree | Callable[[Tree], Tree] | None  # bools, as `optax.masked` takes them

REQUIRED: Any = object()  # the default of `assign`: a rule must cover every leaf


class AnnotatedPatterns(tuple[str, ...]):
    """Patterns, with what the checks in this module need to know about them."""

    argument: str = ""  # the name of the caller's argument, where it was passed under another
    is_optional: bool = False  # whether a pattern may match no leaf


def optional(*patterns: str) -> AnnotatedPatterns:
    """Returns ``patterns`` that need not match a leaf: the default exclusions of a constructor."""
    annotated = AnnotatedPatterns(patterns)
    annotated.is_optional = True
    return annotated


def named(argument: str, patterns: Patterns) -> AnnotatedPatterns:
    """Returns ``patterns`` that errors, also those from ``init``, report as ``argument``.

    It is for a function that passes its own argument on under the name of another function:

    ::

        exclude = rules.named("exclude_from_weight_decay", exclude_from_weight_decay)
        decay = add_decayed_weights(weight_decay, exclude)

    Raises:
      ArgumentTypeError, ArgumentValueError: See `check_patterns`.
    """
    check_patterns(argument, patterns)
    annotated = AnnotatedPatterns(patterns)
    annotated.argument = _name(argument, patterns)  # the outermost caller's name
    annotated.is_optional = getattr(patterns, "is_optional", False)
    return annotated


def _name(argument: str, patterns: Patterns) -> str:
    return getattr(patterns, "argument", "") or argument


def check_patterns(name: str, patterns: Patterns) -> None:
    """Raises unless ``patterns`` is a sequence of regular expressions.

    Args:
      name: The name of the argument, unless the patterns are `named`.
      patterns: The patterns that were passed.

    Raises:
      ArgumentTypeError: ``patterns`` is not a sequence of strings, or it is a single string, of
        which each character would be a pattern.
      ArgumentValueError: A pattern is not a regular expression.
    """
    name = _name(name, patterns)
    if isinstance(patterns, str):
        advice = f"write [{patterns!r}]"
        raise ArgumentTypeError(
            name,
            "be a list of path patterns",
            patterns,
            advice,
            sentence=f"{{argument}} must be a list of path patterns, got the string {patterns!r}: "
            f"{advice}",
        )
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(name, "be a list of path patterns (strings)", patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentValueError(
                name,
                "be a list of regular expressions",
                pattern,
                sentence=f"{{argument}}: {pattern!r} is not a regular expression: {error}",
            ) from None


def check_rules(name: str, rules: Rules) -> None:
    """Raises unless ``rules`` is a sequence of pairs ``(pattern, value)``.

    Raises:
      ArgumentTypeError: ``rules`` is not a sequence of pairs, or a pattern is not a string.
      ArgumentValueError: A pattern is not a regular expression.
    """
    pairs = isinstance(rules, (tuple, list))
    if not pairs or not all(
        isinstance(r, (tuple, list)) and len(r) == 2 and isinstance(r[0], str) for r in rules
    ):
        raise ArgumentTypeError(name, "be a list of pairs (path pattern, value)", rules)
    check_patterns(name, [pattern for pattern, _ in rules])


def check_matches(name: str, patterns: Patterns, tree: Tree) -> None:
    """Raises if a pattern matches no leaf of ``tree``; the error lists the nearest paths.

    Nothing is raised if the patterns are optional, or if ``tree`` is empty or holds
    ``optax.MaskedNode``. It is then a part of a larger tree, and the pattern may match elsewhere.

    Raises:
      ArgumentValueError: A pattern matches no leaf. ``received`` is the list of these patterns.
    """
    if getattr(patterns, "is_optional", False) or is_partial(tree):
        return
    name = _name(name, patterns)
    # A pattern may also match None, the place of a part that was taken out of the tree.
    paths = leaf_paths(jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: x is None))
    unmatched = [p for p in patterns if not any(re.search(p, path) for path in paths)]
    if unmatched:
        raise ArgumentValueError(
            name,
            "match a leaf with every pattern",
            unmatched,
            sentence="; ".join(
                f"{{argument}}: {pattern!r} matches no leaf; the nearest paths are "
                + ", ".join(nearest(pattern, paths))
                for pattern in unmatched
            ),
        )


def matches(patterns: Patterns, path: str) -> bool:
    """Returns whether any of ``patterns`` is found in ``path``."""
    return any(re.search(pattern, path) for pattern in patterns)


def mask_of(argument: str, mask: Mask, tree: Tree) -> Tree:
    """Returns the bools that ``mask`` gives to the leaves of ``tree``; True where it is None.

    Args:
      argument: the name of the argument, for messages.
      mask: a tree of bools like ``tree`` or a prefix of it, or a function from ``tree`` to one.
      tree: arrays.

    Raises:
      ArgumentTypeError: a leaf of the mask is not a bool.
      ArgumentValueError: the mask does not have the structure of ``tree``.
    """
    given = True if mask is None else mask(tree) if callable(mask) else mask
    expected = "be a tree of bools like the parameters, or a function that returns one"
    for path, value in leaves_with_path(given):
        if not isinstance(value, (bool, np.bool_)):
            where = f" at {path}" if path else ""
            sentence = f"{{argument}} must {expected}, got {type(value).__name__}{where}"
            raise ArgumentTypeError(argument, expected, value, sentence=sentence)
    try:
        return jax.tree.broadcast(given, tree)
    except ValueError as error:
        received, wanted = jax.tree.structure(given), jax.tree.structure(tree)
        sentence = f"{{argument}} must {expected}, got {received} for {wanted}"
        raise ArgumentValueError(argument, expected, given, sentence=sentence) from error


def mask(patterns: Patterns, tree: Tree) -> Tree:
    """Returns a tree of bools: True at the leaves whose path any of ``patterns`` matches."""
    return map_with_path(lambda path, _: matches(patterns, path), tree)


def assign(name: str, rules: Rules, tree: Tree, default: Any = REQUIRED) -> Tree:
    """Returns the values that ``rules`` give to the leaves of ``tree``; the first match wins.

    Raises:
      ArgumentValueError: No rule covers a leaf, and there is no default. The message lists all such
        leaves.
    """
    uncovered = []

    def value_at(path: str, _: Any) -> Any:
        value = first_match(rules, path, default)
        if value is REQUIRED:
            uncovered.append(path)
        return value

    values = map_with_path(value_at, tree)
    if uncovered:
        advice = "add one, or ('.*', value) as the last"
        raise ArgumentValueError(
            name,
            "cover every leaf",
            rules,
            advice,
            sentence=f"{{argument}}: no rule covers {', '.join(uncovered)}; {advice}",
        )
    return values


def first_match(rules: Rules, path: str, default: Any) -> Any:
    """Returns the value of the first rule whose pattern matches ``path``, else ``default``."""
    return next((value for pattern, value in rules if re.search(pattern, path)), default)


def nearest(pattern: str, paths: Sequence[str], count: int = 5) -> list[str]:
    """Returns the paths that are most like ``pattern``, as a whole or in one of their segments."""
    words = re.sub(r"[\\^$.*+?()\[\]{}|]+", " ", pattern).strip() or pattern

    def likeness(path: str) -> float:
        candidates = [path, *path.split("/")]
        return max(difflib.SequenceMatcher(None, words, c).ratio() for c in candidates)

    return sorted(paths, key=likeness, reverse=True)[:count]

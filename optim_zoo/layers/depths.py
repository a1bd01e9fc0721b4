"""How deep in the model a leaf is, and learning rates that decay with the distance from the top."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo import ranges, rules
from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.layers import specs
from optim_zoo.tree import Tree, is_partial, leaves_with_path

# The names of embeddings; an "unembedding" is a head. Also GPT-2's tables, and tokens of BEiT.
_EMBEDDING = r"(?i)(?<!un)embed|(^|/)(wte|wpe|cls_token|mask_token)(/|$)"
# The first numbered part of a path: layer_0, encoderblock_3, h_11, layer0, or blocks/3.
_NUMBERED = re.compile(
    r"^(?P<series>(?:[^/]+/)*?(?:[^/]*(?:layer|block|stage)s?|h)[_/]?)(?P<number>\d+)(?=/|$)",
    re.IGNORECASE,
)


def layerwise_decay(
    params: Tree,
    decay: jax.typing.ArrayLike,
    *,
    layers: Sequence[str | tuple[str, Any]] = (),
) -> list[tuple[str, Any]]:
    """Returns rules for `scale_by_rules` by which learning rates decay from the top to the bottom.

    ::

        factor = decay^(top - depth)

    The embeddings have depth 0, the layers 1, 2, ... from the bottom to the top, and all other
    leaves, such as a head or the last norm, the next depth. ``top`` is the largest depth that a
    leaf has, so that the top always has the factor 1. This is the decay of ELECTRA (arXiv
    2003.10555) with the depths of BEiT's code (microsoft/unilm, ``beit/optim_factory.py``), in
    which the head is one step above the last layer; in ELECTRA's code it is two steps above.
    Learning rates that differ by layer are from Howard and Ruder (arXiv 1801.06146).

    Args:
      params: The parameters; arrays or ``jax.ShapeDtypeStruct``s.
      decay: The factor from one layer to the one below it, a number in (0, 1].
      layers: The layers from the bottom to the top. An entry is one of

        - a path pattern (a regular expression, searched for in a path): its leaves are one layer;
        - a pair ``(pattern, stacked(axis))``: its leaves hold several layers, stacked along that
          axis as by ``nn.scan``, which have consecutive depths. Of several stacked axes, as in
          ``(stacked(0), stacked(1))`` for experts in a stack, the first counts.

        The first entry that matches a leaf counts. The rules that other functions take as
        ``layers`` are accepted too: a rule with ``split`` only says nothing about depths and is
        ignored, and a stacked rule for some leaves of a stack that a later rule covers, such as
        ``("layers/.*qkv", (stacked(0), split(-1, 3)))``, has the depths of that one.

        A leaf that no entry matches is an embedding, with depth 0, if its path contains ``embed``
        in upper or lower case (but not ``unembed``) or has a key ``wte``, ``wpe``, ``cls_token`` or
        ``mask_token``; otherwise it has the depth above all layers.

        Where no entry is left, the layers are those that the paths number, such as ``layer_0``,
        ``blocks/3``, ``h_11`` and ``encoderblock_5``. The first such number in a path counts.

    Returns:
      Pairs of a path pattern and a factor: a number, for a stack along the first axis a vector with
      one factor for each layer, and for another stack a pair ``(vector, stacked(axis))``. The
      leaves above all layers need no rule.

    Raises:
      ArgumentValueError: ``decay`` is not in (0, 1]; an entry matches no leaf, or none that an
        earlier entry leaves; the leaves of a stack have different numbers of layers or no such
        axis; or without entries, no path or several series of paths are numbered.
      ArgumentTypeError: An argument has the wrong type.

    Example:
      ```python
      factors = optim_zoo.layerwise_decay(
          params, 0.9, layers=[("encoder/layers/", optim_zoo.stacked(0))]
      )
      tx = optax.chain(optim_zoo.adamw(1e-4), optim_zoo.scale_by_rules(factors))
      ```
    """
    ranges.check("decay", decay, 0.0, 1.0, open_low=True)
    if not isinstance(decay, jax.core.Tracer):
        decay = float(np.asarray(decay))
    shapes = dict(leaves_with_path(params))
    entries = _stacks(layers, params) or _numbered(list(shapes))
    leaves: list[dict[str, Any]] = [{} for _ in entries]
    others = []
    for path, x in shapes.items():
        i = next((i for i, entry in enumerate(entries) if re.search(entry.pattern, path)), None)
        if i is None:
            others.append(path)
        else:
            leaves[i][path] = x
    _check_none_is_hidden(entries, leaves, params)
    counts = [_count(entry, found) for entry, found in zip(entries, leaves, strict=True)]
    starts, above = _starts(entries, leaves, counts)
    embeddings = [path for path in others if re.search(_EMBEDDING, path)]
    top = above if len(embeddings) < len(others) else above - 1

    made: list[tuple[str, Any]] = []
    for (pattern, along), found, start, count in zip(entries, leaves, starts, counts, strict=True):
        if not found:
            continue
        if along is None:
            made.append((pattern, decay ** (top - start)))
            continue
        vector = decay ** np.arange(top - start, top - start - count, -1)
        made.append((pattern, vector if along == specs.stacked(0) else (vector, along)))
    return made + [(_EMBEDDING, decay**top)] * bool(embeddings)


class _Entry(NamedTuple):
    """A layer, or a stack of layers."""

    pattern: str
    along: specs.LayerAxis | None  # the axis of the stack


def _stacks(layers: Any, params: Tree) -> list[_Entry]:
    """Returns the entries that say something about depths.

    Raises:
      ArgumentTypeError, ArgumentValueError: An entry is not one, or it matches no leaf.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        rules.check_patterns("layers", layers)
    if not all(isinstance(entry, str | tuple | list) for entry in layers):
        expected = "be a list of path patterns and of pairs (path pattern, stacked(axis))"
        raise ArgumentTypeError("layers", expected, layers)
    rules.check_patterns("layers", [entry for entry in layers if isinstance(entry, str)])
    specs.check_layer_rules([entry for entry in layers if not isinstance(entry, str)])
    entries = []
    for entry in layers:
        if isinstance(entry, str):
            entries.append(_Entry(entry, None))
            continue
        pattern, spec = entry
        items = spec if isinstance(spec, tuple | list) else (spec,)
        stacks = [item for item in items if item.parts is None]
        if stacks:
            entries.append(_Entry(pattern, stacks[0]))
    rules.check_matches("layers", [entry.pattern for entry in entries], params)
    return entries


def _numbered(paths: Sequence[str]) -> list[_Entry]:
    """Returns an entry for each number in the paths.

    Raises:
      ArgumentValueError: No path is numbered, or there are several series of numbers.
    """
    found = [match for path in paths if (match := _NUMBERED.search(path))]
    series = sorted({match["series"] for match in found})
    if len(series) != 1:
        received = (
            f"numbers behind {', '.join(series)}" if series else "no path with a numbered layer"
        )
        advice = "list the layers from the bottom to the top, stacks as (pattern, stacked(axis))"
        raise ArgumentValueError(
            "layers",
            "say what the layers are",
            series,
            advice,
            sentence=f"layerwise_decay: {{argument}} must say what the layers are, because the "
            f"paths of the parameters do not (received {received}): {advice}",
        )
    numbers = sorted({(int(match["number"]), match["number"]) for match in found})
    return [_Entry(f"^{re.escape(series[0])}{number}(/|$)", None) for _, number in numbers]


def _check_none_is_hidden(
    entries: Sequence[_Entry], leaves: Sequence[dict[str, Any]], params: Tree
) -> None:
    """Raises where earlier entries match every leaf of an entry, as layer_1 does of layer_10."""
    if is_partial(params):
        return
    hidden = [entry.pattern for entry, found in zip(entries, leaves, strict=True) if not found]
    if hidden:
        advice = "end a pattern where the name ends, such as 'layer_1/'"
        raise ArgumentValueError(
            "layers",
            "leave a leaf for every entry",
            hidden,
            advice,
            sentence=f"{{argument}}: earlier entries match all leaves of {hidden[0]!r}: {advice}",
        )


def _count(entry: _Entry, found: dict[str, Any]) -> int:
    """Returns the number of layers that an entry holds.

    Raises:
      ArgumentValueError: A leaf has no such axis, or the leaves have different numbers of layers.
    """
    if entry.along is None:
        return 1
    counts = {}
    for path, x in found.items():
        (spec,) = specs.layers_of([entry], path, x)
        counts[path] = spec.count(jnp.shape(x))
    if len(set(counts.values())) > 1:
        raise _other_counts(entry.pattern, counts)
    return next(iter(counts.values()), 0)


def _other_counts(pattern: str, counts: dict[str, int]) -> ArgumentValueError:
    shown = ", ".join(f"{path} ({count})" for path, count in counts.items())
    return ArgumentValueError(
        "layers",
        "have stacks whose leaves have as many layers",
        counts,
        sentence=f"{{argument}}: all leaves of the stack {pattern!r} must have the same number of "
        f"layers, got {shown}",
    )


def _starts(
    entries: Sequence[_Entry], leaves: Sequence[dict[str, Any]], counts: Sequence[int]
) -> tuple[list[int], int]:
    """Returns the depth of the first layer of each entry, and the depth above all layers.

    Raises:
      ArgumentValueError: An entry has other layers than the later entry whose stack it belongs to.
    """
    stack = list(range(len(entries)))  # the entry whose depths an entry has
    for i in reversed(stack):
        for k in range(i + 1, len(entries)):
            both = entries[i].along is not None and entries[k].along is not None
            if (
                both
                and leaves[i]
                and all(re.search(entries[k].pattern, path) for path in leaves[i])
            ):
                stack[i] = stack[k]
                break
    depth, starts = 1, {}
    for i, k in enumerate(stack):
        if i == k:
            starts[i], depth = depth, depth + counts[i]
        elif counts[i] != counts[k]:
            different = {entries[i].pattern: counts[i], entries[k].pattern: counts[k]}
            raise _other_counts(entries[k].pattern, different)
    return [starts[k] for k in stack], depth

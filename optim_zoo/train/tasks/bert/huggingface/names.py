"""The names of BERT's parameters: ours, those of Hugging Face, and those of google-research/bert.

A path in this file is that of a leaf of one layer, such as ``encoder/layer_0/output/kernel``, also
where the model stacks its layers in one array (``encoder/layers/output/kernel``).

Sources: ``modeling_bert.py`` of huggingface/transformers, and ``modeling.py`` of
google-research/bert.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optim_zoo import tree
from optim_zoo.tree import Tree

Array = npt.NDArray[Any]

# Patterns of our modules -> those of Hugging Face. The first one that matches the whole counts.
_LAYER = r"bert.encoder.layer.\1"
_MODULES = (
    (r"embeddings/(\w+)", r"bert.embeddings.\1"),
    (r"encoder/layer_(\d+)/attention/output", rf"{_LAYER}.attention.output.dense"),
    (r"encoder/layer_(\d+)/attention/(\w+)", rf"{_LAYER}.attention.self.\2"),
    (r"encoder/layer_(\d+)/attention_LayerNorm", rf"{_LAYER}.attention.output.LayerNorm"),
    (r"encoder/layer_(\d+)/output_LayerNorm", rf"{_LAYER}.output.LayerNorm"),
    (r"encoder/layer_(\d+)/(intermediate|output)", rf"{_LAYER}.\2.dense"),
    (r"masked_language/transform", "cls.predictions.transform.dense"),
    (r"masked_language/LayerNorm", "cls.predictions.transform.LayerNorm"),
    (r"pooler", "bert.pooler.dense"),
    (r"tagger", "classifier"),
)
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}
_TENSORFLOW_LEAVES = {"kernel": "/kernel", "bias": "/bias", "scale": "/gamma", "embedding": ""}
_STACK = re.compile(r"^encoder/layers/")


def hugging_face(path: str) -> str | None:
    """Returns the name of a parameter in `transformers`, or None if it has none.

    A ``kernel`` of ours, ``(inputs, outputs)``, is the transpose of their ``weight``.
    """
    if path == "output_bias":
        return "cls.predictions.bias"
    module, _, leaf = path.rpartition("/")
    theirs = _module(module)
    return None if theirs is None or leaf not in _LEAVES else f"{theirs}.{_LEAVES[leaf]}"


def tensorflow(path: str) -> str | None:
    """Returns the name of a parameter in a TensorFlow checkpoint, or None if it has none.

    All arrays have our axes.
    """
    if path == "output_bias":
        return "cls/predictions/output_bias"
    module, _, leaf = path.rpartition("/")
    theirs = _module(module)
    if theirs is None or leaf not in _TENSORFLOW_LEAVES:
        return None
    name = re.sub(r"/layer/(\d+)/", r"/layer_\1/", theirs.replace(".", "/"))
    is_beta = module.endswith("LayerNorm") and leaf == "bias"
    return name + ("/beta" if is_beta else _TENSORFLOW_LEAVES[leaf])


def is_kernel(path: str) -> bool:
    """Returns whether a parameter is a matrix that Hugging Face stores transposed."""
    return path.endswith("/kernel")


def parts(path: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """Returns the paths and shapes of one leaf: one for each layer where it stacks layers."""
    if not _STACK.search(path):
        return {path: shape}
    return {_STACK.sub(f"encoder/layer_{i}/", path): shape[1:] for i in range(shape[0])}


def unstacked(params: Tree) -> dict[str, Array]:
    """Returns the arrays of a parameter tree by path, with each layer's arrays separate."""
    arrays: dict[str, Array] = {}
    for path, leaf in tree.by_path(params).items():
        array = np.asarray(leaf)
        paths = parts(path, array.shape)
        arrays |= dict(zip(paths, array, strict=True)) if _STACK.search(path) else {path: array}
    return arrays


def stacked(find: Callable[[str, Array], Array], params: Tree) -> Tree:
    """Returns a tree like ``params`` with the arrays that ``find`` returns.

    Args:
      find: called with the path and the array of every parameter of one layer.
      params: a parameter tree, which may stack its layers.
    """

    def leaf(path: str, x: Any) -> Array:
        array = np.asarray(x)
        if not _STACK.search(path):
            return find(path, array)
        paths = parts(path, array.shape)
        return np.stack([find(each, row) for each, row in zip(paths, array, strict=True)])

    return tree.map_with_path(leaf, params)


def _module(module: str) -> str | None:
    for pattern, theirs in _MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(theirs)
    return None

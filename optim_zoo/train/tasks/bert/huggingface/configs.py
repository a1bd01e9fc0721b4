"""Translates between the section [model] and ``config.json`` (or ``bert_config.json``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.model import LAYER_NORM_EPSILON
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary

# Our key -> theirs, in both libraries.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
# The first one is what `to_json` writes. All of the second line are GELU's approximation by tanh.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
}
# Values that `optim_zoo.train.tasks.bert.model` has built in; a missing key has this value.
_BUILT_IN = {
    "model_type": "bert",
    "layer_norm_eps": LAYER_NORM_EPSILON,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def to_json(model: Model, vocabulary: Vocabulary, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the content of ``config.json`` for `transformers`.

    Args:
      model: the sizes.
      vocabulary: its size and the id of [PAD] are written.
      labels: the labels of a token tagger in the order of their ids; () for masked language.
    """
    architecture = "BertForTokenClassification" if labels else "BertForMaskedLM"
    config = {
        "architectures": [architecture],
        "vocab_size": vocabulary.size,
        "pad_token_id": vocabulary.pad,
        "hidden_act": _ACTIVATIONS[model.activation][0],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "initializer_range": 0.02,
        "dtype": "float32",
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        **_BUILT_IN,
    }
    if labels:
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
    return config


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the labels of ``id2label`` in the order of their ids; () where it has none.

    Args:
      config: the content of ``config.json``.
    """
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(number))) for number in range(len(names)))


def sizes_of(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the keys of [model] that a config of BERT determines.

    Args:
      config: the content of ``config.json`` or ``bert_config.json``.
      file: where it comes from, for messages.

    Raises:
      UserError: it is of another architecture, or lacks a size.
    """
    for key, value in _BUILT_IN.items():
        if config.get(key, value) != value:
            raise UserError(
                f"model.init_from: expected a BERT with {key} = {value!r}, but {file} has "
                f"{config[key]!r}; name another folder."
            )
    missing = [theirs for theirs in _SIZES.values() if type(config.get(theirs)) is not int]
    if missing:
        raise UserError(
            f"model.init_from: expected the sizes of a BERT, but {file} has no whole number for "
            f"{', '.join(missing)}; name another folder."
        )
    act = config.get("hidden_act", "gelu")
    activation = next((ours for ours, theirs in _ACTIVATIONS.items() if act in theirs), None)
    if activation is None:
        known = ", ".join(name for theirs in _ACTIVATIONS.values() for name in theirs)
        raise UserError(
            f"model.init_from: expected a hidden_act that this BERT has ({known}), but {file} has "
            f"{act!r}; name another folder."
        )
    sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    return {**sizes, "activation": activation}

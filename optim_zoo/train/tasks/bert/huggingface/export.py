"""Writes a trained BERT as a folder that `transformers` loads."""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optim_zoo import ranges
from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.huggingface import configs, names
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary, tokenizer
from optim_zoo.tree import Tree

FORMATS = ("huggingface",)


def export(
    run_dir: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: str = "huggingface",
    step: int | None = None,
    best: bool = False,
    averaged: bool | None = None,
) -> Path:
    """Exports the BERT that a run has trained, and returns the folder.

    Args:
      run_dir: the run folder of a task with a BERT (masked_language or token_tagging).
      folder: must not exist, or be empty; see `write` for its files.
      format: ``huggingface``, which is the only one.
      step: see `optim_zoo.train.load`.
      best: see `optim_zoo.train.load`.
      averaged: see `optim_zoo.train.load`.

    Raises:
      ArgumentValueError: there is no such format.
      UserError: the run cannot be loaded or is of another task, or the folder exists or cannot be
        written. Nothing is overwritten.
    """
    # Imported lazily: they import the tasks.
    from optim_zoo.train import load
    from optim_zoo.train.tasks.bert.loaded import LoadedBert

    ranges.check_choice("format", format, FORMATS)
    target = check_free(folder)
    loaded = load(os.fspath(run_dir), step, best, averaged)
    if not isinstance(loaded, LoadedBert):
        raise UserError(
            f"expected a run whose model is a BERT, but {run_dir} is a run of the task "
            f"{type(loaded.task).__name__}; export a run of masked_language or token_tagging"
        )
    return write(
        target, loaded.params, loaded.model.config, loaded.vocabulary, tuple(loaded.labels)
    )


def check_free(folder: str | os.PathLike[str]) -> Path:
    """Returns the path of a folder that does not exist, or is empty.

    Raises:
      UserError: something is there.
    """
    path = Path(os.path.abspath(Path(folder).expanduser()))
    try:
        free = not path.is_symlink() and (not path.exists() or not any(path.iterdir()))
    except OSError:  # a file, or a folder that cannot be read
        free = False
    if not free:
        raise UserError(
            f"expected a folder that does not exist or is empty, but {path} exists; nothing is "
            "overwritten: name another folder, or remove this one"
        )
    return path


def write(
    folder: str | os.PathLike[str],
    params: Tree,
    model: Model,
    vocabulary: Vocabulary,
    labels: Sequence[str] = (),
) -> Path:
    """Writes a folder for ``from_pretrained`` of `transformers`, and returns its path.

    The folder has ``model.safetensors`` (float32), ``config.json``, ``tokenizer.json``,
    ``tokenizer_config.json`` and ``vocab.txt``. It is written under a temporary name and then
    renamed, so that it is complete or does not exist.

    Args:
      folder: must not exist, or be empty.
      params: the parameters of the model.
      model: its sizes.
      vocabulary: its vocabulary.
      labels: the labels of a token tagger in the order of their ids; () for masked language.

    Raises:
      UserError: the folder exists, cannot be written, or the model has parameters that BERT in
        `transformers` does not have.
    """
    from safetensors.numpy import save  # Imported lazily: only exports need it.

    target = check_free(folder)
    files = {
        "model.safetensors": save(_tensors(params), metadata={"format": "pt"}),
        "config.json": _json(configs.to_json(model, vocabulary, labels)),
        "tokenizer.json": _tokenizer_json(vocabulary).encode(),
        "tokenizer_config.json": _json(_tokenizer_config(model, vocabulary)),
        "vocab.txt": "".join(f"{token}\n" for token in vocabulary.tokens).encode(),
    }
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        os.replace(temporary, target)  # fails unless the target is an empty folder or missing
    except OSError as error:
        raise UserError(
            f"expected to write the folder {target}, got {error.strerror}; make room, or name "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _tensors(params: Tree) -> dict[str, names.Array]:
    """Returns the arrays by the names of `transformers`, with its axes."""
    tensors = {}
    for path, array in names.unstacked(params).items():
        name = names.hugging_face(path)
        if name is None:
            raise UserError(
                f"expected the parameters of a BERT, but the model also has {path}, for which "
                "transformers has no name; export a run of masked_language or token_tagging"
            )
        array = array.astype(np.float32)
        tensors[name] = np.ascontiguousarray(array.T if names.is_kernel(path) else array)
    return tensors


def _tokenizer_json(vocabulary: Vocabulary) -> str:
    """Returns our tokenizer, which here also adds [CLS] and [SEP], as `tokenizers` writes it."""
    from tokenizers import AddedToken, decoders, processors

    built = tokenizer(vocabulary)
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    built.decoder = decoders.WordPiece(prefix="##")
    built.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary.cls), ("[SEP]", vocabulary.sep)],
    )
    return str(built.to_str(pretty=True))


def _tokenizer_config(model: Model, vocabulary: Vocabulary) -> dict[str, Any]:
    normalizer = json.loads(tokenizer(vocabulary).to_str())["normalizer"]
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],  # None: accents go where case goes
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        "model_max_length": model.max_positions,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

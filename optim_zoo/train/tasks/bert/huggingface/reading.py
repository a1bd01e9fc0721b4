"""Reads the parameters, sizes and vocabulary of a BERT that another program has written."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train import foreign_errors
from optim_zoo.train.tasks.bert.huggingface import configs, names
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary, of_tokens, read_vocabulary

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class Tensor(NamedTuple):
    """An array of a file, which is read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], names.Array]


@dataclass(frozen=True)
class Source:
    """A BERT to start from."""

    text: str  # what it is, for messages
    sizes: Mapping[str, Any]  # key of [model] -> value
    vocabulary: Vocabulary
    tensors: Mapping[str, Tensor]  # by the names of its own format
    name_of: Callable[[str], str | None]  # our path -> its name
    transposes: bool  # whether it stores our kernels transposed
    digest: str  # hex SHA-256 of its parameters
    notes: Sequence[str] = ()  # sentences for the user
    labels: tuple[str, ...] = ()  # of a tagger, in the order of their ids

    def find(self, path: str) -> Tensor | None:
        """Returns the array for one of our paths of one layer, with our axes; None without one."""
        tensor = self.tensors.get(self.name_of(path) or "")
        if tensor is None or not (self.transposes and names.is_kernel(path)):
            return tensor
        return Tensor(tensor.shape[::-1], lambda: tensor.read().T)


def from_folder(folder: Path) -> Source:
    """Returns the BERT in a folder that ``save_pretrained`` of `transformers` has written.

    Args:
      folder: has ``config.json``; ``model.safetensors``, or ``model.safetensors.index.json`` and
        its parts; and ``vocab.txt`` or ``tokenizer.json``.

    Raises:
      UserError: a file is missing, cannot be read, or is not of a BERT.
    """
    config = _json(folder / "config.json")
    sizes = configs.sizes_of(config, folder / "config.json")
    vocabulary = _vocabulary(folder)
    files = _weight_files(folder)
    tensors = {_current(name): x for file in files for name, x in _safetensors(file).items()}
    if not any(name.startswith("bert.") for name in tensors):  # written by BertModel, without head
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    source = Source(
        text=str(folder),
        sizes=sizes,
        vocabulary=vocabulary,
        tensors=tensors,
        name_of=names.hugging_face,
        transposes=True,
        digest=_digest(files),
        notes=_case_notes(folder, vocabulary),
        labels=configs.labels_of(config),
    )
    _check_vocabulary(source, config)
    return source


def from_npz(file: Path) -> Source:
    """Returns the BERT in an ``.npz`` file whose arrays have the names of google-research/bert.

    Args:
      file: ``bert_config.json`` and ``vocab.txt`` must be in the same folder.

    Raises:
      UserError: a file is missing, cannot be read, or is not of a BERT.
    """
    config = _json(file.with_name("bert_config.json"))
    sizes = configs.sizes_of(config, file.with_name("bert_config.json"))
    vocabulary = _vocabulary(file.parent)
    with _reading(file, "an .npz file of NumPy"), np.load(file, allow_pickle=False) as arrays:
        read = {name.removesuffix(":0"): arrays[name] for name in arrays.files}
    source = Source(
        text=str(file),
        sizes=sizes,
        vocabulary=vocabulary,
        tensors={name: Tensor(x.shape, lambda x=x: x) for name, x in read.items()},  # type: ignore[misc]
        name_of=names.tensorflow,
        transposes=False,
        digest=_digest([file]),
    )
    _check_vocabulary(source, config)
    return source


def _current(name: str) -> str:
    """Returns the name that `transformers` uses now for a tensor of an old file."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise UserError(
            f"model.init_from: expected {WEIGHTS} or {INDEX}, but {folder} has neither; save the "
            "model there with save_pretrained of transformers, which writes it."
        )
    parts = _json(folder / INDEX).get("weight_map")
    files = set(parts.values()) if isinstance(parts, dict) else set()
    if not files or not all(isinstance(file, str) for file in files):
        raise UserError(
            f"model.init_from: expected a weight_map from names to files, but {folder / INDEX} has "
            "none; copy the folder again."
        )
    return [folder / file for file in sorted(files)]


def _safetensors(file: Path) -> dict[str, Tensor]:
    """Returns the arrays of a safetensors file by name."""
    from safetensors import safe_open  # Imported lazily: only such folders need it.

    def read(name: str) -> names.Array:
        with _reading(file, "a safetensors file"), safe_open(file, "numpy") as opened:
            array: names.Array = opened.get_tensor(name)
            return array

    with _reading(file, "a safetensors file"), safe_open(file, "numpy") as opened:
        found = list(opened.keys())
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in found}
    return {name: Tensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _vocabulary(folder: Path) -> Vocabulary:
    """Returns the vocabulary in ``vocab.txt``, or else in ``tokenizer.json``."""
    if (folder / "vocab.txt").exists():
        return read_vocabulary(str(folder / "vocab.txt"))
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(
            f"model.init_from: expected the vocabulary of the model, but {folder} has no vocab.txt "
            "and no tokenizer.json; copy it there."
        )
    model = _json(file).get("model")
    ids = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(ids, dict) or sorted(map(str, ids.values())) != sorted(
        map(str, range(len(ids)))
    ):
        raise UserError(
            f"model.init_from: expected the WordPiece vocabulary of a BERT, but {file} has none "
            "whose ids count from 0; add the model's vocab.txt to the folder."
        )
    return of_tokens(sorted(ids, key=ids.__getitem__), str(file))


def _case_notes(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Returns a warning if text would be encoded with another case than in `transformers`."""
    file = folder / "tokenizer_config.json"
    lower = _json(file).get("do_lower_case") if file.exists() else None
    ours = "A" not in vocabulary.tokens
    if not isinstance(lower, bool) or lower == ours:
        return []
    return [
        f"warning: {file} has do_lower_case = {str(lower).lower()}, but text is "
        f"{'lowercased' if ours else 'not lowercased'}, because the vocabulary has "
        f"{'no' if ours else 'a'} token A"
    ]


def _check_vocabulary(source: Source, config: Mapping[str, Any]) -> None:
    """Checks that the vocabulary has a token for every row of the embeddings.

    Raises:
      UserError: it has more or fewer.
    """
    table = source.find("embeddings/word_embeddings/embedding")
    rows = table.shape[0] if table is not None and table.shape else config.get("vocab_size")
    if rows != source.vocabulary.size:
        raise UserError(
            f"model.init_from: expected a vocabulary for the {rows} rows of the embeddings, but "
            f"that of {source.text} has {source.vocabulary.size} tokens; use the vocabulary that "
            "the model was trained with."
        )


def _digest(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of files, one after another."""
    sha = hashlib.sha256()
    for path in files:
        with _reading(path, "a file"), path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _json(file: Path) -> dict[str, Any]:
    with _reading(file, "a file with a JSON object"):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"model.init_from: expected a JSON object, but {file} has none.")
    return content


@contextlib.contextmanager
def _reading(file: Path, kind: str) -> Iterator[None]:
    """Turns every error of reading a file into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"model.init_from: expected {kind}, but {file} does not exist; add it, or correct "
            "model.init_from."
        ) from error
    except Exception as error:  # safetensors, zipfile, zlib and NumPy raise many types.
        reason = foreign_errors.why_not_written_or_read(error)
        raise UserError(
            f"model.init_from: expected {kind}, but {file} cannot be read ({reason}); copy it "
            "again, or name another folder."
        ) from error

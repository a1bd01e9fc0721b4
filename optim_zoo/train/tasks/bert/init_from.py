"""Starts a task from the parameters of another run, or of a folder of another program.

Sizes and vocabulary come from there too. The run folder keeps them in a file of its own, so that a
run resumes, and is loaded, after what it started from is gone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optim_zoo import tree
from optim_zoo.errors import ArgumentError, UserError
from optim_zoo.train.files import replace_file
from optim_zoo.train.run_folder import saved_steps
from optim_zoo.train.tasks.bert.huggingface import names, reading
from optim_zoo.train.tasks.bert.huggingface.reading import Source, Tensor
from optim_zoo.train.tasks.bert.sections import INHERITED, Model
from optim_zoo.train.tasks.bert.vocabulary import Vocabulary, of_tokens, read_vocabulary
from optim_zoo.tree import Tree

RECORD = "init_from.json"  # the name of the file in the folder of the task's cache
IDENTITY = "pretrained model"  # the name of its digest in `Task.identity`
_POSITIONS = "embeddings/position_embeddings/embedding"
_BACKBONE = ("embeddings/", "encoder/")
_KEYS = ("path", "sizes", "digest", "notes", "tokens")  # of the record
# Tensors that are no parameters: tied to another, a range of numbers, TensorFlow's optimizer.
_DERIVED = re.compile(r"cls\.predictions\.decoder\.|position_ids$|adam_[mv]$|^global_step$")
_LISTED = 6  # names in a note


@dataclasses.dataclass
class Start:
    """What a task starts from: the sizes, the vocabulary and, unless it starts anew, a source."""

    model: Model  # every size is set
    vocabulary: Vocabulary
    path: str = ""  # the absolute path of the source; "" without one
    digest: str = ""  # hex SHA-256 of the source's parameters
    record: Path = Path()  # the file that keeps this for a resumed run
    notes: Sequence[str] = ()  # sentences for the user
    source: Source | None = None  # None without one, and where the record was read instead
    labels: tuple[str, ...] = ()  # those of the task, if it has a tagger

    @property
    def identity(self) -> Mapping[str, str]:
        """What to add to `Task.identity`: the digest of the source, if there is one.

        A checkpoint of a run that started elsewhere is thus refused, and all processes of a run
        start from the same parameters. A resumed run takes the digest from its own folder.
        """
        return {IDENTITY: self.digest} if self.path else {}

    def match(self, params: Tree, labels: Sequence[str] = ()) -> None:
        """Matches the parameters of the task with those of the source, and sets ``notes``.

        Args:
          params: the initial parameters or their shapes.
          labels: those of a tagger by id. Only a source with the same ones gives its classifier.

        Raises:
          UserError: embeddings or encoder have other shapes or are incomplete, or nothing matches.
        """
        self.labels = tuple(labels)
        if self.source is None:
            return
        wanted = _parts(params)
        found = {path: self.source.find(path) for path in wanted}
        if not any(tensor for path, tensor in found.items() if path.startswith(_BACKBONE)):
            raise UserError(
                f"model.init_from: expected the parameters of a BERT, but {self.source.text} has "
                f"none of their names, such as {self.source.name_of(_POSITIONS)}; name another one."
            )
        missing = [path for path, tensor in found.items() if tensor is None]
        if lost := [path for path in missing if path.startswith(_BACKBONE)]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UserError(
                f"model.init_from: expected {self.source.name_of(lost[0])}{more} by the sizes of "
                f"the model, but {self.source.text} has none; name the folder of another model."
            )
        misfit = []
        for path, tensor in found.items():
            if tensor is None or self._fits(self.source, path, wanted[path]):
                continue
            if path.startswith(_BACKBONE):
                raise UserError(
                    f"model.init_from: expected {self.source.name_of(path)} of shape "
                    f"{wanted[path]} (with our axes) by the sizes of the model, but "
                    f"{self.source.text} has {tensor.shape}; name the folder of another model."
                )
            misfit.append(path)
        used = {self.source.name_of(path) for path in wanted}
        unused = [x for x in self.source.tensors if x not in used and not _DERIVED.search(x)]
        notes = [
            *self.source.notes,
            *_note("parameters that it does not have, which start anew", missing),
            *_note("parameters whose shapes or labels do not fit, which start anew", misfit),
            *_note("parameters of it that this task does not have", unused),
        ]
        self.notes = [f"model.init_from={self.path}: {note}" for note in notes]
        if not self._begun_elsewhere():
            self._save()

    def _begun_elsewhere(self) -> bool:
        """Returns whether the run has checkpoints and a record of another source."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or damaged
            content = json.loads(self.record.read_text(encoding="utf-8"))
            return content["digest"] != self.digest and bool(saved_steps(self.record.parent.parent))
        return False

    def params(self, params: Tree) -> Tree:
        """Returns ``params`` with the arrays of the source wherever it has one that fits.

        Raises:
          UserError: the source cannot be read, or has changed.
        """
        if not self.path:
            return params
        source = self.source or self._again()

        def find(path: str, array: names.Array) -> names.Array:
            tensor = source.find(path)
            if tensor is None or not self._fits(source, path, array.shape):
                return array
            if path != _POSITIONS:
                return tensor.read()
            rows = min(len(array), tensor.shape[0])
            return np.concatenate([tensor.read()[:rows].astype(array.dtype), array[rows:]])

        return names.stacked(find, params)

    def _fits(self, source: Source, path: str, wanted: tuple[int, ...]) -> bool:
        """Returns whether an array of the source can be the parameter of a path."""
        shape = tensor.shape if (tensor := source.find(path)) else ()
        if path == _POSITIONS and len(shape) == 2 and self.model.resize_positions:
            return shape[1:] == wanted[1:]
        # A row of the classifier belongs to a label.
        return shape == wanted and (not path.startswith("tagger/") or source.labels == self.labels)

    def _again(self) -> Source:
        """Returns the source, which must be what it was when the record was written."""
        source = _open(self.path)
        if source.digest != self.digest:
            raise UserError(
                f"model.init_from: expected what {self.record} describes, but {self.path} has "
                f"changed since; remove that file to start from what is there now."
            )
        return source

    def _save(self) -> None:
        assert self.source is not None
        sizes = dict(self.source.sizes)
        values = (self.path, sizes, self.digest, list(self.notes), list(self.vocabulary.tokens))
        self.record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.record, json.dumps(dict(zip(_KEYS, values, strict=True))).encode())


def resolve(model: Model, vocabulary_path: str, cache: Path) -> Start:
    """Returns the sizes and the vocabulary of a task, and where its parameters come from.

    Without ``model.init_from`` these are the task's own. Otherwise they come from the source, or,
    where the run has started from it before, from the record that ``cache`` holds.

    Args:
      model: the section [model]. Its unset sizes come from the source.
      vocabulary_path: ``data.vocabulary``; "" takes that of the source.
      cache: the folder for files of the task.

    Raises:
      UserError: the source cannot be read, or the config sets a size or a vocabulary that differs.
    """
    if not model.init_from:
        return Start(model, read_vocabulary(vocabulary_path))
    path = os.path.abspath(os.path.expanduser(model.init_from))
    record = cache / RECORD
    start = _recorded(path, model, record)
    if start is None:
        source = _open(path)
        start = Start(
            model=_filled(model, source.sizes, path),
            vocabulary=source.vocabulary,
            path=path,
            digest=source.digest,
            record=record,
            source=source,
        )
    if vocabulary_path:
        _check_vocabulary(read_vocabulary(vocabulary_path), vocabulary_path, start)
    return start


def _recorded(path: str, model: Model, record: Path) -> Start | None:
    """Returns what an earlier start from ``path`` has recorded, or None."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        of_source, sizes, digest, notes, tokens = (content[key] for key in _KEYS)
        vocabulary = of_tokens(tokens, str(record))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # there is none, or it is damaged
    if of_source != path:
        return None
    return Start(_filled(model, sizes, path), vocabulary, path, digest, record, notes)


def _filled(model: Model, sizes: Mapping[str, Any], path: str) -> Model:
    """Returns the section with the sizes of the source, from which it may not differ."""
    kept = {}
    for name in INHERITED:
        own, value = getattr(model, name), sizes[name]
        if name == "max_positions" and model.resize_positions and own is not None:
            kept[name] = own
            continue
        if own in (None, "", value):
            kept[name] = value
            continue
        resize = ", or set model.resize_positions=true" if name == "max_positions" else ""
        raise UserError(
            f"model.{name}: expected {value!r}, which {path} has (model.init_from), but the config "
            f"sets {own!r}; remove the key{resize}."
        )
    try:
        return dataclasses.replace(model, **kept)
    except ArgumentError as error:
        raise UserError(f"model.init_from: {path} has sizes that are refused: {error}") from error


def _check_vocabulary(own: Vocabulary, path: str, start: Start) -> None:
    if own.digest != start.vocabulary.digest:
        raise UserError(
            f"data.vocabulary: expected the {start.vocabulary.size} tokens of {start.path} "
            f"(model.init_from), but {path} has {own.size} tokens, and they differ; remove the key."
        )


def _open(path: str) -> Source:
    """Returns the source at an absolute path, of whichever kind it is."""
    place = Path(path)
    if place.suffix == ".npz":
        return reading.from_npz(place)
    if (place / "config.toml").is_file():
        return _of_run(place)
    if (place / "config.json").is_file():
        return reading.from_folder(place)
    there = "is neither" if place.exists() else "does not exist"
    raise UserError(
        "model.init_from: expected a run folder, a folder with config.json and model.safetensors, "
        f"or an .npz file, but {path} {there}; correct the path."
    )


def _of_run(folder: Path) -> Source:
    """Returns the last checkpoint of another run."""
    from optim_zoo.train import load  # Imported lazily: they import the tasks.
    from optim_zoo.train.tasks.bert.loaded import LoadedBert

    loaded = load(folder)
    if not isinstance(loaded, LoadedBert):
        raise UserError(
            f"model.init_from: expected a run whose model is a BERT, but {folder} is a run of the "
            f"task {type(loaded.task).__name__}; name another one."
        )
    arrays = names.unstacked(jax.device_get(loaded.params))
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return Source(
        text=f"step {loaded.step} of {folder}",
        sizes={name: getattr(loaded.model.config, name) for name in INHERITED},
        vocabulary=loaded.vocabulary,
        tensors={name: Tensor(x.shape, lambda x=x: x) for name, x in arrays.items()},  # type: ignore[misc]
        name_of=lambda path: path,
        transposes=False,
        digest=sha.hexdigest(),
        labels=tuple(loaded.labels),
    )


def _parts(params: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the path and the shape of every parameter of one layer."""
    return {
        path: shape
        for leaf, x in tree.by_path(params).items()
        for path, shape in names.parts(leaf, x.shape).items()
    }


def _note(what: str, found: Sequence[str]) -> list[str]:
    """Returns a sentence that lists names, if there are any."""
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return [f"{what}: {', '.join(found[:_LISTED])}{more}"] if found else []

"""Folders for transformers: their content, and what they may not overwrite."""

import json
import os
import string
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo import tree
from optim_zoo.errors import ArgumentValueError, UserError
from optim_zoo.train.tasks import base
from optim_zoo.train.tasks.bert.huggingface import export, names, reading
from optim_zoo.train.tasks.bert.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    of_tokens,
    read_vocabulary,
    tokenizer,
)
from tests.train.tasks.bert.huggingface.small import (
    ACCENTED,
    CASED,
    LOWER,
    RECORDED,
    logits,
    model,
    params,
)

FILES = {
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_what_is_written_is_read_back_to_the_bit(
    scan_layers: bool, activation: str, tmp_path: Path
) -> None:
    sizes = model(scan_layers=scan_layers, activation=activation)
    before = params(sizes, LOWER)
    folder = export.write(tmp_path / "new" / "folder", before, sizes, LOWER)
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    source = reading.from_folder(folder)
    assert source.sizes == {name: getattr(sizes, name) for name in source.sizes}
    assert source.vocabulary == LOWER

    def find(path: str, _: object) -> Any:
        tensor = source.find(path)
        assert tensor is not None
        return tensor.read()

    after = names.stacked(find, params(sizes, LOWER, seed=1))
    for path, array in tree.by_path(before).items():
        np.testing.assert_array_equal(tree.by_path(after)[path], array, err_msg=path)


def test_bfloat16_parameters_are_written_in_float32(tmp_path: Path) -> None:
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), params(model(), LOWER))
    source = reading.from_folder(export.write(tmp_path / "folder", narrow, model(), LOWER))
    arrays = [tensor.read() for tensor in source.tensors.values()]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("activation", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new")])
def test_the_config_has_every_value_of_the_one_that_transformers_writes(
    activation: str, theirs: str, tmp_path: Path
) -> None:
    sizes = model(activation=activation)
    folder = export.write(tmp_path / "folder", params(sizes, LOWER), sizes, LOWER)
    written, recorded = content(folder, "config.json"), content(RECORDED, "config.json")
    own = {
        "hidden_act": theirs,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "vocab_size": LOWER.size,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    assert written == {**{key: recorded.get(key) for key in written}, **own} | {
        "position_embedding_type": "absolute"
    }


def test_a_tagger_has_its_labels(tmp_path: Path) -> None:
    head = {"kernel": np.ones((16, 2), np.float32), "bias": np.zeros(2, np.float32)}
    tagger = {**params(model(), LOWER), "tagger": head}
    del tagger["masked_language"], tagger["output_bias"]
    folder = export.write(tmp_path / "folder", tagger, model(), LOWER, ["O", "B-name"])
    config = content(folder, "config.json")
    assert config["architectures"] == ["BertForTokenClassification"]
    assert config["id2label"] == {"0": "O", "1": "B-name"}
    assert config["label2id"] == {"O": 0, "B-name": 1}
    assert reading.from_folder(folder).tensors["classifier.weight"].shape == (2, 16)


@pytest.mark.parametrize(("vocabulary", "lower"), [(LOWER, True), (CASED, False)])
def test_the_tokenizer_files_say_how_text_is_split(
    vocabulary: Vocabulary, lower: bool, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    folder = export.write(tmp_path / "folder", params(model(), vocabulary), model(), vocabulary)
    config = content(folder, "tokenizer_config.json")
    assert (config["do_lower_case"], config["strip_accents"]) == (lower, None)
    assert config["model_max_length"] == 12
    built = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "A Über café naïve É the rates."
    plain = built.encode(text, add_special_tokens=False).ids
    assert plain == tokenizer(vocabulary).encode(text, add_special_tokens=False).ids
    assert built.encode(text).ids == [vocabulary.cls, *plain, vocabulary.sep]
    assert built.encode("[MASK]", add_special_tokens=False).ids == [vocabulary.mask]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    other.mkdir()
    if kind == "folder":
        target.mkdir()
        (target / "config.json").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="nothing is overwritten") as caught:
        export.write(target, params(model(), LOWER), model(), LOWER)
    assert str(target) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    if kind in ("folder", "file"):
        assert (target / "config.json" if kind == "folder" else target).read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = export.write(tmp_path, params(model(), LOWER), model(), LOWER)
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="got No space left on device"):
        export.write(tmp_path / "folder", params(model(), LOWER), model(), LOWER)
    assert not list(tmp_path.iterdir())


def test_parameters_that_bert_does_not_have_are_refused(tmp_path: Path) -> None:
    more = {**params(model(), LOWER), "extra": {"kernel": np.ones((2, 2))}}
    with pytest.raises(UserError, match="the model also has extra/kernel"):
        export.write(tmp_path / "folder", more, model(), LOWER)
    assert not list(tmp_path.iterdir())


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match="huggingface"):
        export.export(tmp_path / "run", tmp_path / "folder", format="onnx")


def test_a_run_of_another_task_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Digits:
        pass

    digits: Any = Digits()
    monkeypatch.setattr("optim_zoo.train.load", lambda *_: base.Loaded(digits, None, {}, None, 1))
    with pytest.raises(UserError, match="is a run of the task Digits"):
        export.export(tmp_path / "run", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def text() -> list[str]:
    """Returns 1,000 lines of the standard library that spell no special token."""
    lines = Path(json.__file__).with_name("decoder.py").read_text("utf-8").splitlines()
    for name in ("argparse.py", "ast.py", "typing.py"):
        lines += (Path(os.__file__).with_name(name)).read_text("utf-8").splitlines()
    plain = [line for line in lines if line.strip() and not any(t in line for t in "[]")]
    accented = ["Über café", "É naïve A", "a cafe\u0301", "\u4e2d A", "\t\u00a0\u200b ."]
    return [*plain[:995], *accented]


def letters() -> Vocabulary:
    """Returns a cased vocabulary of single letters, some with accents."""
    alphabet = string.ascii_letters + string.digits + string.punctuation + ACCENTED
    continued = [f"##{letter}" for letter in alphabet]
    return of_tokens([*SPECIAL_TOKENS, *alphabet, *continued], "letters")


@pytest.mark.references
@pytest.mark.parametrize("vocabulary", [read_vocabulary(""), letters()], ids=["lower", "cased"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_transformers_computes_the_same_logits_and_tokens(
    vocabulary: Vocabulary, activation: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = model(activation=activation)
    tree_of = params(sizes, vocabulary)
    folder = export.write(tmp_path / "folder", tree_of, sizes, vocabulary)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    ids = np.random.default_rng(0).integers(0, vocabulary.size, (2, 12))
    types, mask = np.zeros_like(ids), np.ones_like(ids)
    types[:, 5:], mask[1, 8:] = 1, 0
    with torch.no_grad():
        expected = theirs(
            torch.tensor(ids),
            token_type_ids=torch.tensor(types),
            attention_mask=torch.tensor(mask),
        ).logits.numpy()
    ours = np.asarray(logits(sizes, vocabulary, tree_of, ids, types, mask))
    # Float32 rounding of three layers is about 3e-6; a mistake in the mapping gives 0.1.
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = tokenizer(vocabulary)
    lines = text()
    assert len(lines) == 1000
    for line in lines:
        assert (
            read.encode(line, add_special_tokens=False)
            == encoder.encode(line, add_special_tokens=False).ids
        )

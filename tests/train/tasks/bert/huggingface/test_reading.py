"""Folders and files of other programs, and what is wrong with some of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optim_zoo.errors import UserError
from optim_zoo.train.tasks.bert.huggingface import export, names, reading
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.bert.vocabulary import tokenizer
from optim_zoo.train.tasks.token_tagging.model import Tagger
from tests.train.tasks.bert.huggingface.small import RECORDED, logits, params

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a copy of the folder that transformers has written."""
    return Path(shutil.copytree(RECORDED, tmp_path / "folder"))


def read_params(source: reading.Source) -> Any:
    def find(path: str, _: object) -> Any:
        tensor = source.find(path)
        assert tensor is not None
        return tensor.read()

    return names.stacked(find, params(Model(**source.sizes), source.vocabulary))


def check_recorded(source: reading.Source) -> None:
    """Compares the logits and the loss of a source with the recorded ones."""
    with np.load(RECORDED / "recorded.npz") as file:
        recorded = dict(file)
    ours = np.asarray(
        logits(
            Model(**source.sizes),
            source.vocabulary,
            read_params(source),
            recorded["input_ids"],
            recorded["token_type_ids"],
            recorded["attention_mask"],
        )
    )
    kept = recorded["attention_mask"] == 1
    # Float32 rounding of two layers is about 2e-6; the smallest mistake in the mapping gives 0.1.
    np.testing.assert_allclose(ours[kept], recorded["logits"][kept], rtol=0, atol=1e-4)
    scored = recorded["labels"] >= 0
    chosen = ours[scored].astype(np.float64)
    log_p = chosen - np.log(np.exp(chosen).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(chosen)), recorded["labels"][scored]].mean()
    np.testing.assert_allclose(loss, recorded["loss"], rtol=0, atol=1e-4)


def test_the_logits_are_those_that_transformers_computed(folder: Path) -> None:
    source = reading.from_folder(folder)
    assert source.notes == []
    check_recorded(source)


def test_the_logits_of_a_tagger_are_those_that_transformers_computed() -> None:
    folder = RECORDED.with_name("recorded_tagger")
    source = reading.from_folder(folder)
    assert source.labels == ("B-X", "I-X", "O")
    tagger = Tagger(Model(**source.sizes), source.vocabulary.size, 3)
    with np.load(folder / "recorded.npz") as file:
        recorded = dict(file)
    check_tagger(tagger, read_tagger(source, tagger), recorded)


def test_a_tagger_that_is_exported_is_that_of_transformers(tmp_path: Path) -> None:
    """What is read from their folder and written again has the same tensors and labels."""
    folder = RECORDED.with_name("recorded_tagger")
    source = reading.from_folder(folder)
    sizes = Model(**source.sizes)
    tree = read_tagger(source, Tagger(sizes, source.vocabulary.size, 3))
    written = export.write(tmp_path / "out", tree, sizes, source.vocabulary, source.labels)
    own, theirs = (load_file(each / "model.safetensors") for each in (written, folder))
    assert own.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(own[name], array, err_msg=name)
    configs = [json.loads((each / "config.json").read_text()) for each in (written, folder)]
    for key in ("architectures", "id2label", "label2id"):
        assert configs[0][key] == configs[1][key]


def read_tagger(source: reading.Source, tagger: Tagger) -> Any:
    """Returns the parameters of a tagger from its source."""

    def find(path: str, _: object) -> Any:
        tensor = source.find(path)
        assert tensor is not None
        return tensor.read()

    ids = jnp.zeros(4, jnp.int32)
    shapes: Any = jax.eval_shape(lambda: tagger.init(jax.random.key(0), ids, deterministic=True))
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["params"])
    return names.stacked(find, empty)


def check_tagger(tagger: Tagger, params: Any, recorded: dict[str, Any]) -> None:
    def one(*sequence: jax.Array) -> Any:
        return tagger.apply({"params": params}, *sequence, method="logits")

    batch = (recorded[key] for key in ("input_ids", "token_type_ids", "attention_mask"))
    ours = np.asarray(jax.jit(jax.vmap(one))(*map(jnp.asarray, batch)))
    kept = recorded["attention_mask"] == 1
    # Float32 rounding of two layers is about 2e-6; the smallest mistake in the mapping gives 0.1.
    np.testing.assert_allclose(ours[kept], recorded["logits"][kept], rtol=0, atol=1e-4)


@pytest.mark.references
def test_transformers_loads_an_exported_tagger(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = reading.from_folder(RECORDED.with_name("recorded_tagger"))
    tagger = Tagger(Model(**source.sizes), source.vocabulary.size, 3)
    tree = read_tagger(source, tagger)
    folder = export.write(tmp_path / "out", tree, tagger.config, source.vocabulary, source.labels)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "BertForTokenClassification"
    assert theirs.config.id2label == {0: "B-X", 1: "I-X", 2: "O"}
    assert theirs.config.label2id == {"B-X": 0, "I-X": 1, "O": 2}
    ids = np.random.default_rng(0).integers(0, source.vocabulary.size, (2, 12))
    types, mask = np.zeros_like(ids), np.ones_like(ids)
    types[:, 5:], mask[1, 8:] = 1, 0
    batch = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    with torch.no_grad():
        made = theirs(**{k: torch.tensor(v) for k, v in batch.items()}).logits.numpy()
    check_tagger(tagger, tree, {**batch, "logits": made})


def test_the_tokens_are_those_that_transformers_made(folder: Path) -> None:
    vocabulary = reading.from_folder(folder).vocabulary
    for line, expected in json.loads((folder / "tokens.json").read_text("utf-8")).items():
        assert tokenizer(vocabulary).encode(line, add_special_tokens=False).tokens == expected


def test_a_model_in_several_files_is_read(folder: Path) -> None:
    whole = folder / "model.safetensors"
    arrays = load_file(whole)
    half = sorted(arrays)[::2]
    files = {name: f"model-{1 if name in half else 2}.safetensors" for name in arrays}
    for file in set(files.values()):
        save_file({n: x for n, x in arrays.items() if files[n] == file}, folder / file)
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    check_recorded(reading.from_folder(folder))


def test_old_names_and_names_without_a_head_are_read(folder: Path) -> None:
    """Files from before 2020 have gamma and beta, and those of BertModel lack the prefix."""
    arrays = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in load_file(folder / "model.safetensors").items()
        if name.startswith("bert.")
    }
    save_file(arrays, folder / "model.safetensors")
    found = reading.from_folder(folder).find("encoder/layer_1/output_LayerNorm/bias")
    assert found is not None
    np.testing.assert_array_equal(found.read(), arrays["encoder.layer.1.output.LayerNorm.beta"])


def test_half_precision_is_read(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    save_file({n: x.astype(np.float16) for n, x in arrays.items()}, folder / "model.safetensors")
    found = reading.from_folder(folder).find("embeddings/word_embeddings/embedding")
    assert found is not None
    assert found.read().dtype == np.float16


def test_tensorflow_names_are_read(folder: Path) -> None:
    """The arrays keep our axes, as google-research/bert has them."""
    tree = names.unstacked(read_params(reading.from_folder(folder)))
    arrays = {f"{names.tensorflow(path)}:0": array for path, array in tree.items()}
    np.savez(folder / "bert.npz", **arrays, global_step=np.int64(3))
    vocabulary = reading.from_folder(folder).vocabulary
    (folder / "vocab.txt").write_text("".join(f"{x}\n" for x in vocabulary.tokens), "utf-8")
    (folder / "config.json").rename(folder / "bert_config.json")
    (folder / "tokenizer.json").unlink()
    check_recorded(reading.from_npz(folder / "bert.npz"))


def test_a_case_that_the_vocabulary_contradicts_is_noted(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    [note] = reading.from_folder(folder).notes
    assert "do_lower_case = true, but text is not lowercased" in note


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text("utf-8"))
        kept = {k: v for k, v in {**content, **changes}.items() if v is not None}
        (folder / file).write_text(json.dumps(kept))

    return apply


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index(content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return apply


BAD = {
    "another architecture": (edit("config.json", model_type="roberta"), "model_type = 'bert'"),
    "another activation": (edit("config.json", hidden_act="relu"), "has 'relu'"),
    "another epsilon": (edit("config.json", layer_norm_eps=1e-5), "layer_norm_eps = 1e-12"),
    "relative positions": (
        edit("config.json", position_embedding_type="relative_key"),
        "position_embedding_type = 'absolute'",
    ),
    "no sizes": (edit("config.json", hidden_size=None), "no whole number for hidden_size"),
    "broken config": (overwrite("config.json", b"{"), "config.json cannot be read"),
    "config is a list": (overwrite("config.json", b"[]"), "expected a JSON object"),
    "no weights": (remove("model.safetensors"), "has neither"),
    "broken weights": (overwrite("model.safetensors", b"x" * 99), "model.safetensors cannot"),
    "cut weights": (cut, "model.safetensors cannot be read"),
    "empty weights": (overwrite("model.safetensors", b""), "model.safetensors cannot be read"),
    "index without files": (index("{}"), "expected a weight_map"),
    "index of a missing file": (index('{"weight_map": {"a": "b.safetensors"}}'), "does not exist"),
    "no vocabulary": (remove("tokenizer.json"), "no vocab.txt and no tokenizer.json"),
    "another tokenizer": (edit("tokenizer.json", model={"vocab": [["a", 1]]}), "WordPiece"),
    "too few tokens": (
        overwrite("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"),
        "has 6 tokens",
    ),
    "broken vocabulary": (overwrite("vocab.txt", b"\xff"), "expected UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_with_a_sentence(name: str, folder: Path) -> None:
    spoil, expected = BAD[name]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        reading.from_folder(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["bert.npz", "bert_config.json", "vocab.txt"])
def test_an_npz_file_names_what_it_needs(missing: str, folder: Path) -> None:
    np.savez(folder / "bert.npz", x=np.ones(2))
    (folder / "config.json").rename(folder / "bert_config.json")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing):
        reading.from_npz(folder / "bert.npz")

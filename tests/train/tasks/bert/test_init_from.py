"""``model.init_from``: what comes from the source, what is refused, and what outlives it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optim_zoo import tree
from optim_zoo.errors import UserError
from optim_zoo.train import config_file, load, loop, saved_config
from optim_zoo.train.tasks import base
from optim_zoo.train.tasks.bert import init_from
from optim_zoo.train.tasks.bert.huggingface import export, reading
from optim_zoo.train.tasks.bert.sections import INHERITED
from optim_zoo.tree import Tree
from tests.train.one_device import OneDevice, use_devices
from tests.train.tasks.bert.huggingface.small import LOWER, RECORDED, model, params

CONFIG = """
[task]
name = "{task}"
[data]
text = "{folder}/text.*"
sequence_length = 12
{more}
[model]
init_from = "{folder}/source"
[optimizer]
name = "adam"
[schedule]
name = "constant"
learning_rate = 0.01
[train]
steps = 1
batch_size = 8
[output]
sinks = []
"""
SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "max_positions": 12,
    "activation": "gelu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with a text, a config and ``source``, which transformers has written."""
    shutil.copytree(RECORDED, tmp_path / "source")
    words = ["the", "learning", "rate", "of", "a", "grows", "with", "its", "norm"]
    text = np.random.default_rng(0).choice(words, 3000)
    (tmp_path / "text.txt").write_text(" ".join(text))
    more = "held_out = 0.1"
    (tmp_path / "run.toml").write_text(
        CONFIG.format(task="masked_language", folder=tmp_path, more=more)
    )
    return tmp_path


def make(folder: Path, *overrides: str, cache: str = "cache") -> Any:
    config = config_file.load(folder / "run.toml", overrides)
    return config_file.make_task(config, folder / cache)


def initial(task: base.Task) -> Tree:
    """Returns parameters of 0.5, because to compute the task's own takes seconds."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes)


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        make(folder, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(one: Tree, other: Tree) -> None:
    for path, array in tree.by_path(one).items():
        np.testing.assert_array_equal(tree.by_path(other)[path], array, err_msg=path)


def test_sizes_vocabulary_and_parameters_come_from_the_source(folder: Path) -> None:
    task = make(folder)
    assert {name: getattr(task.model_sizes, name) for name in INHERITED} == SIZES
    assert task.vocabulary == reading.from_folder(folder / "source").vocabulary
    assert not any("init_from" in note for note in task.notes)
    arrays = load_file(folder / "source" / "model.safetensors")
    started = task.pretrained(initial(task))
    stack = started["encoder"]["layers"]["attention"]["query"]["kernel"]
    for i in range(2):
        name = f"bert.encoder.layer.{i}.attention.self.query.weight"
        np.testing.assert_array_equal(stack[i], arrays[name].T)
    np.testing.assert_array_equal(started["output_bias"], arrays["cls.predictions.bias"])


def test_a_task_without_a_source_starts_anew(folder: Path) -> None:
    task = make(folder, "model.init_from=''", "model.max_positions=12")
    before = initial(task)
    assert task.pretrained(before) is before
    assert init_from.IDENTITY not in task.identity
    assert not (folder / "cache" / init_from.RECORD).exists()


@pytest.mark.parametrize("key", INHERITED)
def test_a_size_may_be_set_only_to_that_of_the_source(key: str, folder: Path) -> None:
    """Also where it is set to its default, which the dataclass could not tell from unset."""
    make(folder, f"model.{key}={SIZES[key]}")
    others = {"num_heads": 4, "max_positions": 512, "activation": "gelu_tanh", "num_layers": 3}
    other = others.get(key, INHERITED[key])
    error = refused(folder, f"model.{key}={other}")
    assert error.startswith(f"model.{key}: expected {SIZES[key]!r}, which {folder}/source has")
    assert f"the config sets {other!r}" in error
    assert ("model.resize_positions=true" in error) == (key == "max_positions")


def test_the_vocabulary_may_be_set_only_to_that_of_the_source(folder: Path) -> None:
    tokens = make(folder).vocabulary.tokens
    same, other = folder / "same", folder / "other"
    same.write_text("".join(f"{token}\n" for token in tokens), "utf-8")
    other.write_text("".join(f"{token}\n" for token in reversed(tokens)), "utf-8")
    make(folder, f"data.vocabulary={same}")
    assert "they differ; remove the key" in refused(folder, f"data.vocabulary={other}")


@pytest.mark.parametrize(("positions", "length"), [(20, 16), (9, 9)])
def test_the_position_table_is_resized_only_on_request(
    positions: int, length: int, folder: Path
) -> None:
    own = [f"model.max_positions={positions}", f"data.sequence_length={length}"]
    assert "or set model.resize_positions=true" in refused(folder, *own)
    task = make(folder, *own, "model.resize_positions=true")
    before = initial(task)
    after = task.pretrained(before)
    table, fresh = (x["embeddings"]["position_embeddings"]["embedding"] for x in (after, before))
    name = "bert.embeddings.position_embeddings.weight"
    theirs = load_file(folder / "source" / "model.safetensors")[name]
    rows = min(12, positions)
    assert table.shape == (positions, 16)
    np.testing.assert_array_equal(table[:rows], theirs[:rows])
    np.testing.assert_array_equal(table[rows:], fresh[rows:])


def test_longer_sequences_than_the_source_has_positions_are_refused(folder: Path) -> None:
    error = refused(folder, "data.sequence_length=13")
    assert "model.max_positions must be at least the sequence length 13, got 12" in error


def test_parameters_without_a_counterpart_are_listed_and_start_anew(folder: Path) -> None:
    file = folder / "source" / "model.safetensors"
    arrays = load_file(file)
    kept = {name: x for name, x in arrays.items() if not name.startswith("cls.")}
    save_file({**kept, "bert.pooler.dense.bias": np.ones(16, np.float32)}, file)
    task = make(folder)
    [missing, unused] = [note for note in task.notes if note.startswith("model.init_from=")]
    assert "parameters that it does not have, which start anew: " in missing
    assert "masked_language/transform/kernel" in missing
    assert unused.endswith("parameters of it that this task does not have: bert.pooler.dense.bias")
    before = initial(task)
    after = task.pretrained(before)
    equal(before["masked_language"], after["masked_language"])


def test_a_head_of_another_shape_is_listed_and_starts_anew(folder: Path) -> None:
    file = folder / "source" / "model.safetensors"
    arrays = load_file(file)
    save_file({**arrays, "cls.predictions.bias": np.ones(3, np.float32)}, file)
    task = make(folder)
    assert any("do not fit, which start anew: output_bias" in note for note in task.notes)
    np.testing.assert_array_equal(task.pretrained(initial(task))["output_bias"], 0.5)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.intermediate.dense.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.LayerNorm.bias",
    ],
)
def test_a_file_whose_shapes_contradict_its_config_is_refused(name: str, folder: Path) -> None:
    file = folder / "source" / "model.safetensors"
    arrays = load_file(file)
    save_file({**arrays, name: np.concatenate([arrays[name]] * 2)}, file)
    assert f"expected {name} of shape" in refused(folder)


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.dense.bias", "bert.embeddings.LayerNorm.weight"]
)
def test_a_file_without_a_part_of_the_encoder_is_refused(name: str, folder: Path) -> None:
    file = folder / "source" / "model.safetensors"
    arrays = load_file(file)
    del arrays[name]
    save_file(arrays, file)
    assert f"expected {name} by the sizes of the model, but" in refused(folder)
    layers = {"num_hidden_layers": 3}
    config = json.loads((folder / "source" / "config.json").read_text())
    (folder / "source" / "config.json").write_text(json.dumps({**config, **layers}))
    assert re.search(r"expected \S+ and \d+ more by the sizes", refused(folder))


def test_a_run_that_has_begun_keeps_its_record(folder: Path) -> None:
    """A command with another source is refused later, by its digest, and must change nothing."""
    make(folder, cache="run/tokens")
    (folder / "run" / "checkpoints" / "2").mkdir(parents=True)
    record = folder / "run" / "tokens" / init_from.RECORD
    before = record.read_bytes()
    file = shutil.copytree(folder / "source", folder / "other") / "model.safetensors"
    arrays = load_file(file)
    save_file({**arrays, "cls.predictions.bias": arrays["cls.predictions.bias"] + 1}, file)
    task = make(folder, f"model.init_from={folder}/other", cache="run/tokens")
    assert record.read_bytes() == before
    assert task.identity[init_from.IDENTITY] != json.loads(before)["digest"]
    # The same parameters at another place are the same source.
    (folder / "source").rename(folder / "moved")
    make(folder, f"model.init_from={folder}/moved", cache="run/tokens")
    assert json.loads(record.read_bytes())["path"] == str(folder / "moved")


def test_a_file_without_any_known_name_is_refused(folder: Path) -> None:
    file = folder / "source" / "model.safetensors"
    save_file({f"model.{name}": x for name, x in load_file(file).items()}, file)
    assert "has none of their names" in refused(folder)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder", "npz"])
def test_a_path_without_a_model_is_refused(kind: str, folder: Path) -> None:
    path = folder / ("other.npz" if kind == "npz" else "other")
    if kind == "file":
        path.write_text("x")
    elif kind == "empty folder":
        path.mkdir()
    assert str(path.parent) in refused(folder, f"model.init_from={path}")


def test_a_run_of_another_task_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Digits:
        pass

    digits: Any = Digits()
    (folder / "digits").mkdir()
    (folder / "digits" / "config.toml").touch()
    monkeypatch.setattr("optim_zoo.train.load", lambda *_: base.Loaded(digits, None, {}, None, 1))
    error = refused(folder, f"model.init_from={folder}/digits")
    assert "is a run of the task Digits" in error


def test_sizes_that_the_model_refuses_name_the_source(folder: Path) -> None:
    path = folder / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_attention_heads": 3}))
    assert "source has sizes that are refused: hidden_size" in refused(folder)


def test_what_the_run_folder_keeps_outlives_the_source(folder: Path) -> None:
    before = make(folder)
    shutil.rmtree(folder / "source")
    again = make(folder)
    assert again.model_sizes == before.model_sizes
    assert again.vocabulary == before.vocabulary
    assert again.identity == before.identity
    assert again.notes == before.notes
    with pytest.raises(UserError, match="does not exist"):
        again.pretrained(initial(again))
    assert "does not exist" in refused(folder, f"model.init_from={folder}/elsewhere")
    with pytest.raises(UserError, match="does not exist"):
        make(folder, cache="another")


def test_a_run_does_not_start_anew_from_a_source_that_has_changed(folder: Path) -> None:
    make(folder)
    file = folder / "source" / "model.safetensors"
    arrays = load_file(file)
    save_file({n: x + 1 for n, x in arrays.items()}, file)
    again = make(folder)
    with pytest.raises(UserError, match="has changed since; remove that file"):
        again.pretrained(initial(again))
    (folder / "cache" / init_from.RECORD).unlink()
    started = make(folder)
    after = started.pretrained(initial(started))
    np.testing.assert_array_equal(after["output_bias"], arrays["cls.predictions.bias"] + 1)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"path": 1, "tokens": ["a"]}'])
def test_a_damaged_record_is_written_again(content: str, folder: Path) -> None:
    before = make(folder)
    record = folder / "cache" / init_from.RECORD
    whole = record.read_bytes()
    record.write_text(content)
    assert make(folder).identity == before.identity
    assert record.read_bytes() == whole


def test_another_source_has_another_identity(folder: Path) -> None:
    sizes = model()
    export.write(folder / "other", params(sizes, LOWER), sizes, LOWER)
    own = ["model.num_layers=3", f"model.init_from={folder}/source"]
    assert "model.num_layers" in refused(folder, *own)
    shutil.copytree(folder / "source", folder / "copy")
    first, copied = make(folder), make(folder, f"model.init_from={folder}/copy")
    assert first.identity == copied.identity
    file = folder / "copy" / "model.safetensors"
    save_file({n: -x for n, x in load_file(file).items()}, file)
    (folder / "cache" / init_from.RECORD).unlink()
    changed = make(folder, f"model.init_from={folder}/copy").identity
    assert {n for n in changed if changed[n] != first.identity[n]} == {init_from.IDENTITY}


def test_a_saved_config_keeps_what_is_unset(folder: Path) -> None:
    config = config_file.load(folder / "run.toml")
    (folder / "config.toml").write_text(saved_config.of_run(config, folder / "run"))
    again = saved_config.load(folder / "config.toml")
    assert again.task_sections["model"] == config.task_sections["model"]
    assert saved_config.differences(again, config) == []


def write_tagged(folder: Path, **tags: str) -> None:
    """Replaces text and config by those of a tagger; other words than those named have ``O``."""
    lines = [f"{word}\t{tags.get(word, 'O')}" for word in ("the", "rate", "grows")]
    (folder / "text.conll").write_text("\n".join([*lines, ""] * 40))
    (folder / "text.txt").unlink(missing_ok=True)
    (folder / "run.toml").write_text(
        CONFIG.format(task="token_tagging", folder=folder, more="held_out = 0.2")
    )


def test_a_tagger_starts_from_the_encoder(folder: Path) -> None:
    write_tagged(folder, rate="B-X")
    task = make(folder)
    [missing, unused] = [note for note in task.notes if note.startswith("model.init_from=")]
    assert missing.endswith("start anew: tagger/bias, tagger/kernel")
    assert "cls.predictions.transform.dense.weight" in unused
    after = task.pretrained(initial(task))
    name = "bert.embeddings.word_embeddings.weight"
    arrays = load_file(folder / "source" / "model.safetensors")
    np.testing.assert_array_equal(after["embeddings"]["word_embeddings"]["embedding"], arrays[name])


@pytest.mark.parametrize(("first", "same"), [("B-X", True), ("B-Y", False)])
def test_a_tagger_takes_the_classifier_of_the_same_labels_only(
    first: str, same: bool, folder: Path
) -> None:
    """The folder of a tagger has the labels B-X, I-X and O."""
    shutil.rmtree(folder / "source")
    shutil.copytree(RECORDED.with_name("recorded_tagger"), folder / "source")
    write_tagged(folder, the=first, rate=f"I-{first[2:]}")
    arrays = load_file(folder / "source" / "model.safetensors")
    # The second task reads the record of the first one; neither run has begun.
    for task in (make(folder), make(folder)):
        after = task.pretrained(initial(task))
        expected = arrays["classifier.weight"].T if same else np.full((16, 3), 0.5, np.float32)
        np.testing.assert_array_equal(after["tagger"]["kernel"], expected)
        name = "bert.encoder.layer.1.output.dense.weight"
        kernel = after["encoder"]["layers"]["output"]["kernel"][1]
        np.testing.assert_array_equal(kernel, arrays[name].T)
        notes = [note for note in task.notes if "start anew" in note]
        assert bool(notes) != same
        assert all("labels do not fit, which start anew: tagger/" in note for note in notes)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled", "quick_to_compile")
def test_a_run_resumes_and_is_a_source_after_its_own_source_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run stores its layers separately; the first one stacks them."""
    use_devices(monkeypatch, OneDevice())

    def train(name: str, *overrides: str) -> Tree:
        config = config_file.load(folder / "run.toml", overrides)
        loop.run(config, folder / name)
        return load(folder / name).params

    first = train("first", "schedule.learning_rate=1e-30")
    source = make(folder)
    equal(first, source.pretrained(initial(source)))
    shutil.rmtree(folder / "source")
    train("first", "train.steps=2", "run.accept_changes=true")
    assert load(folder / "first").step == 2
    own = (f"model.init_from={folder}/first", "model.scan_layers=false")
    second = make(folder, *own, cache="second")
    last = load(folder / "first").params
    started = second.pretrained(initial(second))
    np.testing.assert_array_equal(
        started["encoder"]["layer_1"]["output"]["kernel"],
        last["encoder"]["layers"]["output"]["kernel"][1],
    )
    equal(started["masked_language"], last["masked_language"])
    exported = export.export(folder / "first", folder / "exported")
    third = make(folder, f"model.init_from={exported}", cache="third")
    equal(third.pretrained(initial(third)), last)


@pytest.mark.references
def test_the_held_out_loss_is_that_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    task = make(folder)
    total, weight = (0.0, 0.0)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder / "source").eval()
    expected = 0.0
    started = task.pretrained(initial(task))
    for batch in task.held_out():
        loss, number = task.measure(started, batch)["loss"]
        total, weight = total + float(loss), weight + float(number)
        labels = np.full_like(batch["input_ids"], -100)
        targets = np.where(batch["masked_weights"] > 0, batch["masked_targets"], -100)
        np.put_along_axis(labels, batch["masked_positions"], targets, axis=1)
        with torch.no_grad():
            made = theirs(
                torch.tensor(batch["input_ids"]),
                token_type_ids=torch.tensor(batch["type_ids"]),
                labels=torch.tensor(labels).long(),
            )
        expected += float(made.loss) * float(number)
    # Float32 rounding is about 1e-6; the exact GELU instead of tanh's would give 1e-4.
    np.testing.assert_allclose(total / weight, expected / weight, rtol=0, atol=2e-5)

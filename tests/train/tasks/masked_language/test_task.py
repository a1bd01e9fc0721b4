"""The masked-language task: its loss computed by hand, its batches and its held-out set."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import config_file
from optim_zoo.train.config import Config, Stage
from optim_zoo.train.random_numbers import KEYS
from optim_zoo.train.tasks.base import Task
from optim_zoo.train.tasks.bert import vocabulary
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.bert.sections import Model
from optim_zoo.train.tasks.masked_language.sections import Data
from optim_zoo.tree import Tree
from tests.train.tasks.masked_language.small_text import PLAIN_WORDS, write_random_text

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = (
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.max_positions=32",
    "data.sequence_length=16",
    "data.held_out=0.2",
    "train.batch_size=8",
    "output.evaluation_batches=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a few documents of a few words."""
    folder = tmp_path_factory.mktemp("text")
    write_random_text(folder)
    (folder / "run.toml").write_text("[schedule]\nlearning_rate = 0.01\nwarmup_steps = 2\n")
    return folder


def load(folder: Path, *overrides: str) -> Config:
    own = (f"data.text={folder}/*.txt", f"data.vocabulary={folder / 'vocabulary'}")
    return config_file.load(folder / "run.toml", (*own, *SMALL, *overrides))


def make(folder: Path, *overrides: str) -> Task:
    return config_file.make_task(load(folder, *overrides), folder / "tokens")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Task:
    """Returns the task without overrides, for tests that compile its losses."""
    return make(folder)


@pytest.fixture(scope="module")
def params(plain: Task) -> Tree:
    return jax.jit(plain.init)(jax.random.key(0))


def stage(batch_size: int = 8, sequence_length: int = 16) -> Stage:
    data = {"data": Data(sequence_length=sequence_length)}
    return Stage(1, batch_size, 1, schedule={}, sections=data, table={}, settings={})


def held_out_loss(task: Task, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
    return task.measure(params, batch)["loss"]


def equal(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def log_probabilities(folder: Path, params: Tree, batch: Tree) -> np.ndarray:
    """Returns log p of every masked target as `(batch, masked)` float64, row by row."""
    model = Bert(
        load(folder).task_sections["model"],
        len(vocabulary.SPECIAL_TOKENS) + len(PLAIN_WORDS.split()),
    )
    apply = jax.jit(functools.partial(model.apply, deterministic=True))
    rows = []
    for i in range(len(batch["input_ids"])):
        inputs = (batch[k][i] for k in ("input_ids", "type_ids", "masked_positions"))
        logits = np.asarray(apply({"params": params}, *inputs), np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        rows.append(log_p[np.arange(len(log_p)), batch["masked_targets"][i]])
    return np.array(rows)


def test_the_loss_is_a_sum_and_its_weight(folder: Path, plain: Task, params: Tree) -> None:
    params = jax.tree.map(
        lambda x: np.asarray(x) * 5, params
    )  # scaled, so that predictions are not uniform
    batch = plain.batch(3, load(folder).stages[0])
    batch["masked_weights"][0] = 0  # a row without any weight
    batch["masked_weights"][1, 0] = 0
    log_p = log_probabilities(folder, params, batch)
    for loss in (plain.loss, functools.partial(held_out_loss, plain)):
        total, weight = jax.jit(loss)(params, batch)
        assert weight == batch["masked_weights"].sum() == 8 * 2 - 3
        # The logits of the one-layer model are float32.
        assert float(total) == pytest.approx(-(log_p * batch["masked_weights"]).sum(), rel=1e-5)


def test_targets_without_weight_have_no_gradient(folder: Path, plain: Task, params: Tree) -> None:
    batch = plain.batch(0, load(folder).stages[0])
    batch["masked_weights"][2] = 0
    other = {**batch, "masked_targets": batch["masked_targets"].copy()}
    other["masked_targets"][2] = 5
    gradient = jax.jit(jax.grad(lambda p, b: plain.loss(p, b)[0]))
    first, second = gradient(params, batch), gradient(params, other)
    assert any(np.any(x) for x in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_batches_are_a_pure_function_of_seed_and_step(folder: Path) -> None:
    one, again = make(folder, "model.dropout=0.1"), make(folder, "model.dropout=0.1")
    other = make(folder, "model.dropout=0.1", "run.seed=1")
    later = one.batch(7, stage())
    assert equal(again.batch(7, stage()), later)
    assert equal(one.batch(7, stage()), later)
    assert not equal(one.batch(8, stage()), later)
    assert not equal(other.batch(7, stage()), later)
    for name in ("input_ids", "dropout_keys"):
        assert not np.array_equal(one.batch(8, stage())[name], later[name])
        assert not np.array_equal(other.batch(7, stage())[name], later[name])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_valid_seed_gives_keys_and_batches(seed: int, folder: Path) -> None:
    task = make(folder, f"run.seed={seed}", "model.dropout=0.1")
    jax.random.key(seed)
    assert task.batch(2**31 - 1, stage())["input_ids"].shape == (8, 16)


def test_each_sequence_has_a_dropout_key_if_there_is_dropout(folder: Path) -> None:
    without = make(folder).batch(0, stage())
    keyed = make(folder, "model.dropout=0.1").batch(0, stage())
    assert without.keys() == keyed.keys() - {"dropout_keys"}
    assert equal({name: keyed[name] for name in without}, without)
    assert keyed["dropout_keys"].shape == (8, 2)
    assert keyed["dropout_keys"].dtype == np.uint32
    assert len(np.unique(keyed["dropout_keys"], axis=0)) == 8


def test_dropout_is_on_only_in_training(folder: Path, params: Tree) -> None:
    task = make(folder, "model.dropout=0.5")
    batch = task.batch(0, stage())
    on, off = (
        jax.jit(task.loss)(params, batch),
        jax.jit(functools.partial(held_out_loss, task))(params, batch),
    )
    assert abs(float(on[0] - off[0])) > 1e-4
    assert on[1] == off[1]


def test_batches_have_the_shape_of_their_stage(folder: Path) -> None:
    two = make(
        folder,
        "stages.1.steps=3",
        "stages.1.sequence_length=32",
        "stages.1.batch_size=4",
    )
    assert two.batch(0, stage())["input_ids"].shape == (8, 16)
    assert two.batch(0, stage(4, 32))["input_ids"].shape == (4, 32)
    assert two.batch(0, stage(4, 32))["masked_positions"].shape == (4, 5)


def test_the_text_must_be_long_enough_for_the_longest_stage(folder: Path) -> None:

    with pytest.raises(UserError, match="2000"):
        make(
            folder,
            "model.max_positions=2000",
            "stages.1.steps=3",
            "stages.1.sequence_length=2000",
        )


def baseline_loss(task: Task) -> float:
    assert task.baseline is not None
    return task.baseline.metrics["loss"]


def held_out_rows(task: Task) -> set[bytes]:
    return {
        row.tobytes()
        for batch in task.held_out()
        for row, weights in zip(batch["input_ids"], batch["masked_weights"], strict=True)
        if weights.any()
    }


def test_held_out_batches_are_always_the_same(folder: Path) -> None:
    task = make(folder, "model.dropout=0.5")
    first, second = task.held_out(), task.held_out()
    assert len(first) == 2
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert held_out_rows(make(folder)) == held_out_rows(task)
    assert len(held_out_rows(task)) == 16


def test_held_out_batches_have_the_size_of_micro_batches(folder: Path) -> None:
    """A full batch may not fit in memory. The windows are the same."""
    whole, parts = make(folder), make(folder, "train.micro_batches=4")
    assert {len(batch["input_ids"]) for batch in parts.held_out()} == {2}
    assert held_out_rows(parts) == held_out_rows(whole)
    assert baseline_loss(parts) == pytest.approx(baseline_loss(whole), rel=1e-12)


def test_the_baseline_is_the_loss_of_the_token_frequencies(folder: Path) -> None:
    """Words are drawn uniformly from 17, so the loss is log(17) nats."""
    assert baseline_loss(make(folder)) == pytest.approx(
        np.log(len(set(PLAIN_WORDS.split()))), rel=0.02
    )


def test_identity_changes_with_the_vocabulary_and_with_the_text(
    folder: Path, tmp_path: Path
) -> None:
    before = make(folder).identity
    assert before.keys() == {"vocabulary", "text"}
    assert make(folder).identity == before
    longer = tmp_path / "vocabulary"
    longer.write_text((folder / "vocabulary").read_text() + "word\n")
    changed = make(folder, f"data.vocabulary={longer}").identity
    assert changed["vocabulary"] != before["vocabulary"]
    changed = make(folder, f"data.text={folder}/[01]*.txt").identity
    assert changed["vocabulary"] == before["vocabulary"]
    assert changed["text"] != before["text"]


def test_the_layer_specs_are_those_of_the_model(folder: Path) -> None:
    assert make(folder).layers == layer_rules(Model())
    assert make(folder, "model.scan_layers=false").layers == []


def test_zero_weight_gives_zero_loss_not_nan(plain: Task, params: Tree) -> None:
    batch: dict[str, Any] = plain.batch(0, stage())
    batch["masked_weights"] = np.zeros_like(batch["masked_weights"])
    total, weight = jax.jit(plain.loss)(params, batch)
    assert (float(total), float(weight)) == (0, 0)


@pytest.mark.slow
def test_random_numbers_do_not_depend_on_the_default_generator(folder: Path) -> None:
    """TPU users often choose another generator, whose keys have another size."""
    task = make(folder, "model.dropout=0.5")
    params = task.init(jax.random.key(0, impl=KEYS))
    batch = task.batch(0, stage())
    before = task.loss(params, batch)[0]
    with jax.default_prng_impl("rbg"):
        after = task.loss(params, batch)[0]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("unknown", "warned"), [(0, False), (2, False), (10, True), (45, True), (55, None), (100, None)]
)
def test_unknown_tokens_are_reported_warned_about_or_refused(
    unknown: int, warned: bool | None, folder: Path, tmp_path: Path
) -> None:
    """Each character outside the vocabulary becomes an unknown token."""
    words = ["the"] * (100 - unknown) + ["\u65e5"] * unknown
    texts = np.random.default_rng(1).permutation(words * 20)
    (tmp_path / "t.txt").write_text(" ".join(texts), encoding="utf-8")
    overrides = (f"data.text={tmp_path}/t.txt",)
    if warned is None:
        with pytest.raises(
            UserError, match=rf"{unknown}\.0% of the tokens.*data\.vocabulary should"
        ):
            make(folder, *overrides)
        return
    task = make(folder, *overrides)
    assert task.facts["unknown tokens"] == f"{unknown}.00% of the text"
    assert [note.startswith(f"warning: {unknown}.0% of") for note in task.notes] == [True] * warned


def test_a_held_out_part_with_only_unknown_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the " * 900 + "\u65e5" * 300, encoding="utf-8")
    with pytest.raises(UserError, match="expected known tokens in the held-out part"):
        make(folder, f"data.text={tmp_path}/t.txt")

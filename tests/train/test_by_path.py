"""Learning rates by path and by layer, and frozen parameters, as a config sets them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import optim_zoo
from optim_zoo import metrics, saved_state, sharding, stacked
from optim_zoo.errors import UserError
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train import by_path, config_file, loop, optimization, saved_config
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.config import Stage
from optim_zoo.train.tasks.base import Batch, Task
from optim_zoo.tree import Tree
from tests.train.one_device import OneDevice, use_devices

pytestmark = [
    pytest.mark.usefixtures("quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
CONFIG = """
[task]
name = "tests.train.test_by_path:Stack"
[optimizer]
name = "{name}"
weight_decay = 0.1
[schedule]
name = "constant"
learning_rate = 0.1
[train]
steps = 4
batch_size = 8
[output]
sinks = []
log_every = 1
evaluate_every = 4
checkpoint_every = 2
"""
LAYERS = [("layers", stacked(0))]


def parameters() -> Tree:
    return {
        "embedding": jnp.linspace(-1.0, 2.0, 16).reshape(8, 2),
        "layers": {"kernel": jnp.linspace(0.5, 1.5, 48).reshape(3, 2, 8)},
        "head": jnp.array([-0.0, 1.0, 3.0]),
    }


class Stack(Task):
    """Parameters of three kinds, each with a gradient that is not 0."""

    layers = LAYERS

    def init(self, key: jax.Array) -> Tree:
        return parameters()

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        total = sum(jnp.sum(jnp.sin(x) * 3) for x in jax.tree.leaves(params))
        return WeightedLoss(total * jnp.sum(batch["a"]), jnp.sum(batch["a"]))

    def batch(self, number: int, stage: Stage) -> Batch:
        return {"a": np.full(stage.batch_size, 1.0 + number, np.float32)}

    def held_out(self) -> list[Batch]:
        return [{"a": np.ones(8, np.float32)}]


def load(tmp_path: Path, *overrides: str, name: str = "adamw") -> Any:
    path = tmp_path / "stack.toml"
    path.write_text(CONFIG.format(name=name))
    return config_file.load(path, overrides)


def make(tmp_path: Path, *overrides: str, name: str = "adamw") -> Any:
    return optimization.make_optimizer(load(tmp_path, *overrides, name=name), LAYERS)


def updates_of(tx: Any, steps: int = 2) -> tuple[Tree, Tree]:
    """Returns the updates and the state of the last of several steps."""
    params, updates = parameters(), None
    state = tx.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


def first_update(tx: Any) -> Tree:
    return updates_of(tx, steps=1)[0]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_factors_scale_what_the_optimizer_returns(name: str, tmp_path: Path) -> None:
    plain = first_update(make(tmp_path, name=name))
    factors = 'optimizer.learning_rate_factors=[["embed", 0.5], ["layers", [1.0, 2, 0.25]]]'
    scaled = first_update(make(tmp_path, factors, name=name))
    np.testing.assert_array_equal(scaled["embedding"], 0.5 * plain["embedding"])
    vector = np.array([1.0, 2.0, 0.25], np.float32)[:, None, None]
    np.testing.assert_array_equal(scaled["layers"]["kernel"], vector * plain["layers"]["kernel"])
    np.testing.assert_array_equal(scaled["head"], plain["head"])


def test_the_layerwise_decay_follows_the_layer_rules_of_the_task(tmp_path: Path) -> None:
    """Depth 0 is the embedding, 1 to 3 are the layers, and the head above them has factor 1."""
    plain = first_update(make(tmp_path))
    decayed = first_update(make(tmp_path, "optimizer.layerwise_decay=0.5"))
    np.testing.assert_array_equal(decayed["embedding"], 0.5**4 * plain["embedding"])
    vector = np.array([0.125, 0.25, 0.5], np.float32)[:, None, None]
    np.testing.assert_array_equal(decayed["layers"]["kernel"], vector * plain["layers"]["kernel"])
    np.testing.assert_array_equal(decayed["head"], plain["head"])


def test_factors_frozen_parameters_and_decay_multiply(tmp_path: Path) -> None:
    """Frozen embeddings do not move the depths of the other layers."""
    keys = (
        'optimizer.frozen=["embed"]',
        "optimizer.layerwise_decay=0.5",
        'optimizer.learning_rate_factors=[["kernel", 2.0]]',
        "train.clip_norm=inf",
    )
    plain = first_update(make(tmp_path, "train.clip_norm=inf"))
    both = first_update(make(tmp_path, *keys))
    assert both["embedding"].tobytes() == np.full((8, 2), -0.0, np.float32).tobytes()
    vector = 2 * np.array([0.125, 0.25, 0.5], np.float32)[:, None, None]
    np.testing.assert_array_equal(both["layers"]["kernel"], vector * plain["layers"]["kernel"])
    np.testing.assert_array_equal(both["head"], plain["head"])


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "torch.AdamW"])
def test_a_model_without_its_frozen_parameters_is_trained_alike(name: str, tmp_path: Path) -> None:
    """Updates, clipping and metrics are those of an optimizer that never sees the embedding."""
    frozen = make(tmp_path, 'optimizer.frozen=["embed", "head"]', name=name)
    updates, state = updates_of(frozen)
    config = load(tmp_path, name=name)
    alone, params = optimization.make_optimizer(config, LAYERS), {"layers": parameters()["layers"]}
    expected_state = alone.init(params)
    for _ in range(2):
        expected, expected_state = alone.update(
            jax.tree.map(jnp.cos, params), expected_state, params
        )
        params = optax.apply_updates(params, expected)
    np.testing.assert_array_equal(updates["layers"]["kernel"], expected["layers"]["kernel"])
    assert np.asarray(updates["head"]).tobytes() == np.full(3, -0.0, np.float32).tobytes()
    figures, same = metrics.read(state), metrics.read(expected_state)
    assert figures.keys() == same.keys()
    for key, value in same.items():
        np.testing.assert_array_equal(figures[key], value, err_msg=key)
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sizes == [x.size for x in jax.tree.leaves(expected_state)]


def test_without_the_keys_the_state_is_that_of_earlier_versions(tmp_path: Path) -> None:
    tx = make(tmp_path)
    rate = optim_zoo.schedules.mixed_batch(
        [optim_zoo.schedules.Stage(4, optim_zoo.schedules.constant(0.1))]
    )
    before = optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.adamw(rate))
    params = parameters()
    assert saved_state.differences(saved_state.describe(before.init(params)), tx.init(params)) == []


ALL = ('optimizer.frozen=["head"]', "optimizer.layerwise_decay=0.5",
       'optimizer.learning_rate_factors=[["kernel", 2.0]]')  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        ["parallel.zero1=true"],
        ["parallel.mode=shard_map", "accumulation.every=2"],
        ["precision.parameters=bfloat16", "parallel.zero1=true"],
    ],
    ids=["zero1", "shard_map", "bfloat16"],
)
def test_frozen_parameters_compose_with_wrappers_and_sharding(
    more: list[str], tmp_path: Path
) -> None:
    config = load(tmp_path, *ALL, *more)
    tx = optimization.wrapped(config, optimization.make_optimizer(config, LAYERS))
    dtype = config.precision.parameters
    params = jax.tree.map(lambda x: x.astype(dtype), parameters())

    def loss(params: Tree, batch: Tree) -> WeightedLoss:
        return Stack.loss(None, params, batch)  # type: ignore[arg-type]

    def trained(mesh: Mesh, *, zero1: bool) -> tuple[Tree, Tree]:
        step = sharding.data_parallel(
            loss, tx, mesh=mesh, mode=config.parallel.mode, zero1="data" if zero1 else None
        )
        own, state = step.init(params)
        for _ in range(2 * config.accumulation.every):
            own, state, _ = step(own, state, {"a": np.ones(8, np.float32)})
        return step.params(own), step.global_arrays(state)

    eight, one = (Mesh(np.array(jax.devices()[:n]), ("data",)) for n in (8, 1))
    got, state = trained(eight, zero1=config.parallel.zero1)
    expected, same = trained(one, zero1=False)
    assert np.asarray(got["head"]).tobytes() == np.asarray(params["head"]).tobytes()
    assert np.any(np.asarray(got["embedding"]) != np.asarray(params["embedding"]))
    # Sums over eight devices are taken in another order than over one; bfloat16 has 8 bits.
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-6), got, expected
    )
    assert saved_state.differences(saved_state.describe(same), state) == []


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_devices(monkeypatch, OneDevice())


@pytest.mark.usefixtures("one_device")
def test_a_run_with_frozen_parameters_saves_and_resumes(tmp_path: Path) -> None:
    config, folder = load(tmp_path, *ALL), tmp_path / "run"
    loop.run(config, folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoints" / "4").rename(tmp_path / "4")
    loop.run(config, folder)
    again = (folder / "metrics.jsonl").read_text()

    def without_speed(text: str) -> list[str]:
        return [line for line in text.splitlines() if '"held_out"' in line]

    assert without_speed(again) == without_speed(text)
    saved = saved_config.load(folder / "config.toml")
    assert saved_config.differences(saved, config) == []
    assert list(saved.optimizer.arguments["frozen"]) == ["head"]
    bare = optimization.make_optimizer(config, LAYERS)
    tx = optimization.wrapped(config, bare)
    with Checkpoints(folder, 3) as checkpoints:
        restored = checkpoints.restore(parameters(), tx.init(parameters()))
    assert restored.step == 4
    np.testing.assert_array_equal(restored.params["head"], parameters()["head"])


# Bad input


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('optimizer.frozen=["embedings"]',
         "[optimizer] frozen: 'embedings' matches no leaf; the nearest paths are embedding"),
        ('optimizer.frozen=["."]', "[optimizer] frozen must leave a leaf to train, got ('.',)"),
        ('optimizer.learning_rate_factors=[["heat", 1.0]]',
         "[optimizer] learning_rate_factors: 'heat' matches no leaf"),
        ('optimizer.learning_rate_factors=[["layers", [1.0, 0.5]]]',
         "[optimizer] learning_rate_factors: layers/kernel has 3 layers"),
        ('optimizer.frozen="head"',
         "[optimizer] frozen must be a list of path patterns, got the string 'head'"),
        ('optimizer.frozen=["(head"]', "[optimizer] frozen: '(head' is not a regular expression"),
        ("optimizer.frozen=[1]", "[optimizer] frozen must be a list of path patterns"),
        ('optimizer.learning_rate_factors=["head"]',
         "[optimizer] learning_rate_factors must be a list of pairs"),
        ('optimizer.learning_rate_factors=[["head", -1.0]]',
         "[optimizer] learning_rate_factors: the factor of 'head' must be in [0, inf)"),
        ('optimizer.learning_rate_factors=[["head", "much"]]',
         "[optimizer] learning_rate_factors: the factor of 'head' must be "),
        ("optimizer.layerwise_decay=1.5", "[optimizer] layerwise_decay must be in (0, 1], got 1.5"),
        ("optimizer.layerwise_decay=0", "[optimizer] layerwise_decay must be in (0, 1], got 0"),
        ('optimizer.layerwise_decay="x"', "[optimizer] layerwise_decay must be a number"),
        ("optimizer.layerwise_decy=0.9", "did you mean layerwise_decay or weight_decay?"),
        ('optimizer.frosen=["head"]', "did you mean frozen?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_key(
    override: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        loop.run(load(tmp_path, override), tmp_path / "run")
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_patterns_of_the_optimizer_are_checked_against_frozen_parameters_too(
    tmp_path: Path,
) -> None:
    """A pattern of frozen parameters is no mistake, and one that matches nothing still is."""
    keys: Mapping[str, Any] = {"frozen": ["head"]}
    fits = optim_zoo.adamw(0.1, weight_decay=0.1, exclude_from_weight_decay=["head"])
    by_path.apply(fits, by_path.ByPath(**keys), ()).init(parameters())
    misses = optim_zoo.adamw(0.1, weight_decay=0.1, exclude_from_weight_decay=["bias"])
    with pytest.raises(ValueError, match="'bias' matches no leaf"):
        by_path.apply(misses, by_path.ByPath(**keys), ()).init(parameters())

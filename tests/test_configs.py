"""The configs of the repository load, have a header, and describe models of published sizes."""

import math
from pathlib import Path

import jax
import pytest

from optim_zoo import metrics, schedules
from optim_zoo.train import config, config_file, job, optimization
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.masked_language.task import init_bert, sequence_length
from optim_zoo.tree import Tree

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
BERT_VOCABULARY = 30_522
PODS = {"bert_base_lamb_32k": 109_514_298, "bert_large_lamb_64k_32k": 335_174_458}


def named(name: str) -> config.Config:
    (path,) = (path for path in CONFIGS if path.stem == name)
    return config_file.load(path)


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end]


def test_the_configs_are_found() -> None:
    assert {"smoke", "bert_tiny_lamb", *PODS} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_batch_sizes_divide(path: Path) -> None:
    loaded = config_file.load(path)
    job.check_batches(loaded, 1)
    rates = [
        float(optimization.make_schedule(loaded)(step)) for step in (0, 1, loaded.total_steps - 1)
    ]
    assert rates[1] > 0
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_its_time_and_its_expected_result(path: Path) -> None:
    lines = header(path)
    assert f"optim-zoo train configs/{path.name}" in "\n".join(lines)
    assert any(line.startswith("# Time: ") for line in lines)
    assert any(line.startswith(("# Result: ", "# Result to expect: ")) for line in lines)
    assert "TODO" not in path.read_text()


def shapes(loaded: config.Config) -> tuple[Tree, Tree]:
    """Returns the shapes of the parameters and of the optimizer state of a run."""
    sizes = loaded.task_sections["model"]
    model = Bert(sizes, BERT_VOCABULARY)
    length = sequence_length(loaded.stages[-1])

    tx = optimization.make_optimizer(loaded, layer_rules(sizes))
    params = jax.eval_shape(lambda: init_bert(model, length, jax.random.key(0)))
    return params, jax.eval_shape(tx.init, params)


@pytest.mark.parametrize("name", PODS)
def test_pod_sized_models_have_the_published_sizes(name: str) -> None:
    loaded = named(name)
    params, state = shapes(loaded)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert count == PODS[name]
    moments = [x for x in jax.tree.leaves(state) if math.prod(x.shape) > 10_000]
    assert sum(math.prod(x.shape) for x in moments) == pytest.approx(2 * count, rel=0.01)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jax.numpy.dtype("float32")}


@pytest.mark.parametrize("name", PODS)
def test_pod_sized_runs_have_one_trust_ratio_per_layer(name: str) -> None:
    loaded = named(name)
    _, state = shapes(loaded)
    ratios = {k: v.shape for k, v in metrics.read(state).items() if k.startswith("trust_ratio/")}
    stacked = {k: shape for k, shape in ratios.items() if "encoder/layers/" in k}
    assert len(stacked) >= 6
    assert set(stacked.values()) == {(loaded.task_sections["model"].num_layers,)}
    assert {shape for k, shape in ratios.items() if k not in stacked} == {()}


def test_bert_base_follows_the_recipe_of_its_batch_size() -> None:
    """The recipe is table 4 of arXiv 1904.00962 at batch size 32,768 with its warmup ratio."""
    loaded = named("bert_base_lamb_32k")
    recipe = schedules.lamb_recipe(32_768)
    assert {stage.batch_size for stage in loaded.stages} == {32_768}
    assert loaded.schedule.arguments["learning_rate"] == recipe.learning_rate == 0.005
    assert loaded.schedule.arguments["warmup_steps"] == recipe.warmup_steps(loaded.stages[0].steps)
    assert loaded.total_steps == 15_625


def test_bert_large_follows_the_published_mixed_batch_run() -> None:
    loaded = named("bert_large_lamb_64k_32k")
    assert [stage.batch_size for stage in loaded.stages] == [65_536, 32_768]
    assert [sequence_length(stage) for stage in loaded.stages] == [128, 512]
    assert loaded.total_steps == 8_599
    schedule = optimization.make_schedule(loaded)
    assert float(schedule(loaded.stages[0].steps)) == 0  # warms up again
    assert float(schedule(loaded.stages[0].steps - 1)) > 0

"""A trained model is loaded from its run folder, in any later process, without its data."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import config_file, load, saved_config
from optim_zoo.train.config import Config
from optim_zoo.train.job import initial_params
from optim_zoo.train.tasks.base import Loaded
from optim_zoo.train.tasks.bert.loaded import LoadedBert
from tests.train.saved_run import scaled, write_run
from tests.train.tasks.masked_language.small_text import write_random_text

pytestmark = [
    pytest.mark.usefixtures("quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
SIZES = (
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.max_positions=32",
    "data.sequence_length=16",
    "schedule.learning_rate=0.01",
    "schedule.warmup_steps=2",
    "precision.parameters=bfloat16",
    "precision.wrapper=none",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a masked-language run whose text is gone; tests must not change it."""
    parent = tmp_path_factory.mktemp("loading")
    write_random_text(parent)
    own = (f"data.text={parent}/*.txt", f"data.vocabulary={parent / 'vocabulary'}")
    folder = write_run(parent / "run", *own, *SIZES)
    for file in parent.glob("*.txt"):
        file.unlink()
    return folder


def config_of(run: Path) -> Config:
    return saved_config.load(run / "config.toml")


def copied(run: Path, parent: Path) -> Path:
    return shutil.copytree(run, parent / "run")


@pytest.mark.parametrize(("step", "expected"), [(None, 6), (4, 4)])
def test_the_parameters_of_a_step_are_loaded_on_one_device(
    step: int | None, expected: int, run: Path
) -> None:
    config = config_of(run)
    task = config_file.make_task(config, run / "tokens", reads_data=False)
    loaded = load(str(run), step)
    assert isinstance(loaded, LoadedBert)
    assert (loaded.step, loaded.model) == (expected, task.loaded({}, 0).model)
    wanted = scaled(initial_params(config, task), expected)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        assert (x.dtype, x.devices()) == (jnp.bfloat16, {jax.local_devices()[0]})
        np.testing.assert_array_equal(x, y)


def test_the_average_of_the_parameters_is_loaded(run: Path) -> None:
    config = config_of(run)
    task = config_file.make_task(config, run / "tokens", reads_data=False)
    loaded, initial = load(run, averaged=True), initial_params(config, task)
    assert loaded.step == 6
    for x, y in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(initial), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y)


def test_a_task_without_methods_of_its_own_has_the_plain_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "task.name=digits", *SIZES[6:8])
    loaded = load(folder)
    assert type(loaded) is Loaded
    assert (loaded.step, loaded.tokenizer, type(loaded.task).__name__) == (6, None, "Digits")
    batch = loaded.task.held_out()[0]
    assert np.isfinite(loaded.task.measure(loaded.params, batch)["loss"][0])


def test_a_folder_without_a_run_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the folder of a run, but .* no config\.toml"):
        load(tmp_path)
    folder = copied(run, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="has nothing saved yet"):
        load(folder)


def test_what_was_not_saved_is_one_sentence(run: Path) -> None:
    with pytest.raises(UserError, match="has no step 5: the steps saved are 4, 6"):
        load(run, step=5)
    with pytest.raises(UserError, match=r"has no best parameters: .*output\.keep_best"):
        load(run, best=True)


def test_a_damaged_checkpoint_is_refused_or_passed_over_with_a_warning(
    run: Path, tmp_path: Path
) -> None:
    folder = copied(run, tmp_path)
    (folder / "checkpoints" / "6" / "info" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"/6, it is damaged .*another step \(saved: 4\)$"):
        load(folder, step=6)
    with pytest.warns(UserWarning, match="step 6 is damaged .*; step 4 is read instead"):
        assert load(folder).step == 4


@pytest.mark.parametrize("more", [[], ["another"]])
def test_a_changed_vocabulary_is_refused(more: list[str], run: Path, tmp_path: Path) -> None:
    """Also where its number of tokens has changed, and with it the shapes of the parameters."""
    folder = copied(run, tmp_path)
    path = Path(config_of(run).task_sections["data"].vocabulary)
    tokens = [*path.read_text().split()[::-1], *more]
    (tmp_path / "vocabulary").write_text("\n".join(tokens))
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace(str(path), str(tmp_path / "vocabulary")))
    for step in (None, 4):
        with pytest.raises(UserError, match="expected the vocabulary that the run in "):
            load(folder, step)


def test_parameters_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("max_positions = 32", "max_positions = 33"))
    with pytest.raises(UserError, match=r"another model: params/embeddings/position_embeddings/"):
        load(folder)

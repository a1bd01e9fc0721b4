"""Parameters are read from a run folder without its optimizer state, and nothing is changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo.errors import UserError
from optim_zoo.train import checkpoint_records, saved_params
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.tree import Tree

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
INFO = {"machine": {"cores": "2"}, "identity": {"text": "abc"}}


def parameters(scale: float) -> Tree:
    """Returns parameters whose ``kernel`` is large enough for a file of its own."""
    kernel = scale * jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32)
    return {"dense": {"kernel": kernel, "bias": jnp.full(3, scale, jnp.bfloat16)}, "pair": [kernel]}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run folder with checkpoints of steps 4 and 6; tests must not change it."""
    folder = tmp_path_factory.mktemp("two_steps")
    tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.lamb(0.1))
    with Checkpoints(folder, 2) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, parameters(step), tx.init(parameters(step)), INFO)
    return folder


def shapes() -> Tree:
    return jax.eval_shape(lambda: parameters(1.0))


def assert_same_bits(a: Tree, b: Tree) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("step", "expected"), [(None, 6), (4, 4), (6, 6)])
def test_the_parameters_of_a_step_are_read_with_every_bit(
    step: int | None, expected: int, two_steps: Path
) -> None:
    before = contents(two_steps)
    read = saved_params.read(two_steps, shapes(), step=step)
    assert (read.step, read.info, read.notes) == (expected, INFO, [])
    assert_same_bits(read.params, parameters(expected))
    device = jax.devices()[0]
    assert all(x.devices() == {device} for x in jax.tree.leaves(read.params))
    assert contents(two_steps) == before


def test_parameters_have_the_sharding_that_is_asked_for(two_steps: Path) -> None:
    mesh = jax.make_mesh((2,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = parameters(0.0)
    like["dense"]["kernel"] = jax.device_put(like["dense"]["kernel"], rows)
    read = saved_params.read(two_steps, like)
    assert read.params["dense"]["kernel"].sharding == rows
    assert_same_bits(read.params, parameters(6))


def damaged(two_steps: Path, parent: Path, path: str) -> Path:
    """Returns a copy of the run folder in which a byte of a file of step 6 has changed."""
    folder = shutil.copytree(two_steps, parent / "run")
    file = folder / "checkpoints" / "6" / path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    return folder


@pytest.mark.parametrize("path", ["info/metadata", "training/manifest.ocdbt"])
def test_a_damaged_step_is_passed_over_and_stays_where_it_is(
    path: str, two_steps: Path, tmp_path: Path
) -> None:
    folder = damaged(two_steps, tmp_path, path)
    before = contents(folder)
    read = saved_params.read(folder, shapes())
    assert read.step == 4
    assert_same_bits(read.params, parameters(4))
    assert len(read.notes) == 1
    assert read.notes[0].startswith("the checkpoint of step 6 is damaged (")
    with pytest.raises(
        UserError, match=r"/checkpoints/6, it is damaged \(.*another step \(saved: 4\)$"
    ):
        saved_params.read(folder, shapes(), step=6)
    assert contents(folder) == before


def test_no_changed_byte_of_any_file_gives_wrong_parameters(
    two_steps: Path, tmp_path: Path
) -> None:
    """The last step is read with the right bits, or the one before it; both happen."""
    step = two_steps / "checkpoints" / "6"
    files = [p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size]
    seen = []
    for number, file in enumerate(files):
        folder = damaged(two_steps, tmp_path / str(number), str(file.relative_to(step)))
        read = saved_params.read(folder, shapes())
        assert_same_bits(read.params, parameters(read.step))
        seen += [note for note in read.notes if "the values of params/" in note] or [read.step]
        shutil.rmtree(folder)
    assert {6, 4} <= set(seen)
    assert any("params/dense/kernel" in str(note) or "params/pair/0" in str(note) for note in seen)


def test_a_step_that_is_removed_while_it_is_read_is_passed_over(
    two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is training removes old checkpoints, and saves new ones."""
    folder = shutil.copytree(two_steps, tmp_path / "run")
    read_step = saved_params._read

    def removed_first(path: Path, *arguments: Any) -> Any:
        if path.name == "6" and path.exists():
            path.rename(path.with_name("8"))
        return read_step(path, *arguments)

    monkeypatch.setattr(saved_params, "_read", removed_first)
    read = saved_params.read(folder, shapes())
    assert (read.step, read.notes) == (8, [])
    assert_same_bits(read.params, parameters(6))


def test_parameters_of_another_model_are_refused_with_their_paths(two_steps: Path) -> None:
    like = shapes()
    like["dense"]["bias"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    like["more"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(UserError) as caught:
        saved_params.read(two_steps, like)
    message = str(caught.value)
    assert f"saved in {two_steps / 'checkpoints' / '6'} are of another model: " in message
    assert "params/dense/bias was bfloat16(3,) and is bfloat16(4,)" in message
    assert "params/more is missing in the checkpoint" in message


def test_what_is_not_saved_is_one_sentence(two_steps: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no step 5: the steps saved are 4, 6$"):
        saved_params.read(two_steps, shapes(), step=5)
    with pytest.raises(UserError, match=r"has no best parameters: .*output\.keep_best"):
        saved_params.read(two_steps, shapes(), best=True)
    with pytest.raises(UserError, match="has nothing saved yet"):
        saved_params.read(tmp_path, shapes())


def test_if_every_step_is_damaged_the_error_says_why(two_steps: Path, tmp_path: Path) -> None:
    folder = damaged(two_steps, tmp_path, "info/metadata")
    (folder / "checkpoints" / "4" / "info" / "metadata").unlink()
    with pytest.raises(UserError, match=r"can be read \(step 6: .*; step 4: "):
        saved_params.read(folder, shapes())


# The average of the parameters


@pytest.fixture(scope="module")
def averages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run folder whose state has an average inside a guard and an accumulation."""
    folder = tmp_path_factory.mktemp("averages")
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(3, parameters(3), averaging_state(), INFO)
    return folder


def averaging_state() -> Tree:
    tx = optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.lamb(0.1))
    tx = optim_zoo.averaging.average_parameters(tx, 0.9)
    tx = optim_zoo.accumulation.accumulate(optim_zoo.guards.skip_nonfinite(tx, 9), 2)
    return tx.init(parameters(2))


def test_the_average_is_read_from_the_state_in_the_dtypes_of_the_parameters(
    averages: Path,
) -> None:
    read = saved_params.read(averages, shapes(), averaged=True)
    assert_same_bits(read.params, parameters(2))
    assert_same_bits(saved_params.read(averages, shapes()).params, parameters(3))


def test_a_damaged_average_is_not_read(averages: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(averages, tmp_path / "run")
    path = folder / "checkpoints" / "3" / "info" / "metadata"
    record = json.loads(path.read_text())
    record["checksums"] = {
        key: value + ("average/dense" in key) for key, value in record["checksums"].items()
    }
    del record["sha256"]
    path.write_text(json.dumps({**record, "sha256": checkpoint_records._digest(record)}))
    with pytest.raises(UserError, match="the values of params/dense/bias and 1 more have changed"):
        saved_params.read(folder, shapes(), averaged=True)
    saved_params.read(folder, shapes())


def test_a_run_without_an_average_is_one_sentence(two_steps: Path) -> None:
    with pytest.raises(UserError, match=r"has no average of .*averaging\.decay"):
        saved_params.read(two_steps, shapes(), averaged=True)

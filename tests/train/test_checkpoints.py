"""Checkpoints: bit for bit, the last few, damaged or foreign ones refused, donation survived."""

import functools
import gc
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo.train.checkpoints import Checkpoints
from optim_zoo.train.errors import UserError
from optim_zoo.tree import Tree

# Where Orbax fails it leaves coroutines and closed event loops behind, which Python then reports.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
INFO = {"machine": {"cores": "2"}, "identity": {"text": "abc"}}


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What Orbax left behind is reported here, not in some later test."""
    yield
    gc.collect()


def parameters(size: int = 6, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    shapes = {
        "encoder": {"layers": {"kernel": (3, size, size), "bias": (3, size)}},
        "LayerNorm": {"scale": (size,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def optimizer(name: str = "lamb") -> optax.GradientTransformation:
    """LAMB as the job makes it, with what is masked (decay) and left out (adaptation)."""
    exclude = ["bias", "LayerNorm"]
    schedule = optim_zoo.schedules.mixed_batch(
        [
            optim_zoo.schedules.Stage(5, optim_zoo.schedules.warmup_polynomial(0.1, 2, 5)),
            optim_zoo.schedules.Stage(5, optim_zoo.schedules.warmup_polynomial(0.05, 2, 5)),
        ]
    )
    if name == "adamw":
        return optax.chain(optim_zoo.clip_by_global_norm(1.0), optim_zoo.adamw(schedule))
    return optax.chain(
        optim_zoo.clip_by_global_norm(1.0),
        optim_zoo.lamb(
            schedule,
            weight_decay=0.01,
            exclude_from_weight_decay=exclude,
            exclude_from_layer_adaptation=exclude,
            layers=[("layers", optim_zoo.stacked(0))],
        ),
    )


@functools.cache
def compiled_step() -> Any:
    tx = optimizer()

    def step(params: Tree, state: Tree, seed: jax.Array) -> tuple[Tree, Tree]:
        gradients = jax.tree.map(lambda x: jnp.sin(x * 7 + seed), params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def train(params: Tree, state: Tree, first: int, steps: int) -> tuple[Tree, Tree]:
    for seed in range(first, first + steps):
        params, state = compiled_step()(params, state, jnp.float32(seed))
    return params, state


def begun(size: int = 6) -> tuple[Tree, Tree]:
    params = parameters(size)
    return train(params, optimizer().init(params), 0, 4)


def on_host(*trees: Tree) -> Tree:
    return jax.tree.map(lambda x: np.array(x, copy=True), trees)


def assert_same_bits(a: Tree, b: Tree) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    params, state = begun()
    saved = on_host(params, state)
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.last_step is None
        checkpoints.save(4, params, state, INFO)
    fresh = parameters(seed=9)
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.last_step == 4
        assert checkpoints.info() == INFO
        step, *restored = checkpoints.restore(fresh, optimizer().init(fresh))
    assert step == 4
    assert_same_bits(tuple(restored), saved)
    assert jax.tree.structure(restored[1]) == jax.tree.structure(state)


def test_awkward_numbers_keep_their_bits(tmp_path: Path) -> None:
    params = {
        "float32": jnp.asarray(np.array([np.nan, -0.0, np.inf, 1e-45, 1 / 3], np.float32)),
        "bfloat16": jnp.asarray([1 / 3, -0.0, np.inf], jnp.bfloat16),
        "scalar": jnp.float32(0.1),
    }
    state = {"count": jnp.int32(2**31 - 1)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, params, state, INFO)
        checkpoints.wait()
        zeros = jax.tree.map(jnp.zeros_like, (params, state))
        _, *restored = checkpoints.restore(*zeros)
    assert_same_bits(tuple(restored), on_host(params, state))


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Across the boundary of two stages of the schedule, at step 5."""
    unbroken = on_host(*train(*begun(), 4, 4))
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(4, *begun(), INFO)
        checkpoints.wait()
        fresh = parameters(seed=9)
        _, params, state = checkpoints.restore(fresh, optimizer().init(fresh))
    assert_same_bits(on_host(*train(params, state, 4, 4)), unbroken)


def test_steps_that_donate_their_buffers_do_not_reach_what_is_being_saved(tmp_path: Path) -> None:
    """A save goes on in the background while the next steps write into the same memory."""
    params, state = begun(size=400)  # 480 k numbers: slow enough to be overtaken
    old = jax.tree.leaves(params)
    params, state = train(params, state, 4, 1)
    assert any(x.is_deleted() for x in old)  # or there would be nothing to show
    expected = {}
    with Checkpoints(tmp_path, 10) as checkpoints:
        for step in range(4, 10, 2):
            expected[step] = on_host(params, state)
            checkpoints.save(step, params, state, INFO)
            params, state = train(params, state, step, 5)
    for step, saved in sorted(expected.items(), reverse=True):
        with Checkpoints(tmp_path, 10) as checkpoints:
            assert checkpoints.last_step == step
            _, *restored = checkpoints.restore(params, state)
        assert_same_bits(tuple(restored), saved)
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    params, state = begun()
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, params, state, INFO)
        checkpoints.wait()
        assert checkpoints.last_step == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    params, state = begun()
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(4, params, state, INFO)
        checkpoints.wait()
        before = digests(tmp_path)
        checkpoints.save(4, jax.tree.map(jnp.zeros_like, params), state, INFO)
    assert digests(tmp_path) == before


def foreign(name: str) -> tuple[Tree, Tree]:
    if name == "another size":
        params = parameters(size=7)
        return params, optimizer().init(params)
    params = parameters()
    if name == "another optimizer":
        return params, optimizer("adamw").init(params)
    params["more"] = jnp.zeros(3)
    return params, optimizer().init(params)


@pytest.mark.parametrize("name", ["another size", "another optimizer", "another leaf"])
def test_another_model_or_optimizer_is_refused_and_nothing_is_touched(
    name: str, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(4, *begun(), INFO)
    before = digests(tmp_path)
    with pytest.raises(UserError) as caught, Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.restore(*foreign(name))
    said = str(caught.value)
    assert "\n" not in said
    assert str(tmp_path / "checkpoints" / "4") in said
    assert "another model or optimizer" in said
    assert said.endswith("remove it to start anew")
    assert digests(tmp_path) == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of the steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    params, state = begun()
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(4, params, state, INFO)
        checkpoints.save(6, *train(params, state, 4, 2), INFO)
    return folder


def kinds(folder: Path) -> list[Path]:
    """The files of checkpoint 6; of the array files under d/ those with numbers in them."""
    step = folder / "checkpoints" / "6"
    files = [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]
    arrays = [path for path in files if path.parent.name == "d"]
    largest = sorted(arrays, key=lambda path: path.stat().st_size)[-2:]
    return [path for path in files if path not in arrays] + largest


def read_all(folder: Path) -> tuple[Any, ...]:
    """What a resume reads, in its order."""
    fresh = parameters(seed=9)
    with Checkpoints(folder, 2) as checkpoints:
        info = checkpoints.info()
        step, *restored = checkpoints.restore(fresh, optimizer().init(fresh))
        return info, step, on_host(*restored)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "emptied":
        content.clear()
    elif how == "cut in half":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        path.unlink()
        return
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["emptied", "cut in half", "flipped", "removed"])
def test_a_damaged_checkpoint_is_never_read_as_other_numbers(
    how: str, whole: Path, tmp_path: Path
) -> None:
    """Every kind of file: either a sentence, with the folder untouched, or the right numbers.

    (Orbax keeps some files, such as the shardings, that a restore can do without.)
    """
    expected = read_all(whole)
    refused = []
    for number, name in enumerate(path.relative_to(whole) for path in kinds(whole)):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder / name, how)
        before = digests(folder)
        try:
            info, step, trees = read_all(folder)
        except UserError as error:
            refused.append(str(name))
            said = str(error)
            assert "\n" not in said, name
            assert len(said) < 700, name
            assert f"cannot read the checkpoint {folder / 'checkpoints' / '6'}" in said, name
            assert said.endswith("remove it to go on from step 4"), name
        else:
            assert (info, step) in [(expected[0], 6), (expected[0], 4)], name
            if step == 6:
                assert_same_bits(trees, expected[2])
        assert digests(folder) == before, name
    largest = str(kinds(whole)[-1].relative_to(whole))
    assert largest in refused


def test_after_the_damaged_one_is_removed_the_one_before_is_used(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    _, step, trees = read_all(folder)
    assert step == 4
    assert_same_bits(trees, on_host(*begun()))


def test_what_a_killed_save_leaves_behind_is_no_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    half = folder / "checkpoints" / "8.orbax-checkpoint-tmp-3"
    shutil.copytree(folder / "checkpoints" / "6" / "training", half / "training")
    _, step, _ = read_all(folder)
    assert step == 6
    params, state = begun()
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(8, params, state, INFO)
    assert read_all(folder)[1] == 8


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_file_in_the_way_is_one_sentence(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if where:
        folder.mkdir()
    (folder / where).write_text("a file")
    with pytest.raises(UserError) as caught:
        Checkpoints(folder, 2)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"cannot write a checkpoint to {folder / 'checkpoints'}: ")
    assert "none is saved yet" in said


def test_a_full_disk_is_one_sentence_and_what_was_saved_before_is_whole(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        params, state = begun()
        noise = np.random.default_rng(0).normal(size=500_000).astype(np.float32)

        def save() -> None:
            with Checkpoints(tmp_path, 2) as checkpoints:
                checkpoints.save(4, params, state, INFO)
                checkpoints.save(6, {"noise": jnp.asarray(noise)}, state, INFO)

        with pytest.raises(UserError) as caught:
            save()
        assert str(caught.value) == (
            f"cannot write a checkpoint to {tmp_path / 'checkpoints'}: No space left on device; "
            f"the last whole one is of step 4: make room, or make the folder writable, and start "
            f"again"
        )
        _, step, trees = read_all(tmp_path)
        assert step == 4
        assert_same_bits(trees, on_host(params, state))
        # What the failed save took is free again.
        assert shutil.disk_usage(tmp_path).free > 700_000
        with Checkpoints(tmp_path, 2) as checkpoints:
            checkpoints.save(6, params, state, INFO)
        assert read_all(tmp_path)[1] == 6
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_folder_that_goes_away_is_one_sentence(tmp_path: Path) -> None:
    params, state = begun()

    def save() -> None:
        with Checkpoints(tmp_path, 2) as checkpoints:
            checkpoints.save(4, params, state, INFO)
            checkpoints.wait()
            shutil.rmtree(tmp_path / "checkpoints")
            (tmp_path / "checkpoints").write_text("a file")
            checkpoints.save(6, params, state, INFO)

    with pytest.raises(UserError, match="cannot write a checkpoint to") as caught:
        save()
    assert "\n" not in str(caught.value)

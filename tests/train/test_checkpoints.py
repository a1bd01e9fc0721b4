"""Checkpoints restore every bit. Other models are refused, and damaged files are moved away."""

import functools
import gc
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optim_zoo
from optim_zoo import saved_state
from optim_zoo.errors import UserError
from optim_zoo.train import checkpoints as checkpoints_module
from optim_zoo.train.checkpoints import Checkpoints, Restored
from optim_zoo.tree import Tree
from optim_zoo.wrappers.precision import StochasticRoundingState

# After a failure Orbax leaves coroutines and event loops, about which Python warns.
pytestmark = [
    pytest.mark.usefixtures("quick_to_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
INFO = {"machine": {"cores": "2"}, "identity": {"text": "abc"}}


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """Collects garbage here, so that Python's warnings do not appear in another module."""
    yield
    gc.collect()


def parameters(size: int = 16, seed: int = 0) -> Tree:
    """Returns parameters that are large enough for separate files.

    Orbax writes small arrays into its index.
    """
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
    """Returns LAMB with exclusions, as the job makes it."""
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


def begun(size: int = 16) -> tuple[Tree, Tree]:
    params = parameters(size)
    return train(params, optimizer().init(params), 0, 4)


@functools.cache
def fresh() -> tuple[Tree, Tree]:
    """Returns what a resumed run starts with: other values of the same shapes."""
    params = parameters(seed=9)
    return params, optimizer().init(params)


@functools.cache
def expected(step: int) -> tuple[Tree, Tree]:
    """Returns parameters and state after a step, on the host."""
    return on_host(*train(*begun(), 4, step - 4))


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


def test_restored_values_equal_the_saved_ones_bit_for_bit(tmp_path: Path) -> None:
    params, state = begun()
    saved = on_host(params, state)
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.last_step is None
        checkpoints.save(4, params, state, INFO)
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert checkpoints.last_step == 4
        restored = checkpoints.restore(*fresh())
    assert (restored.step, restored.info, restored.notes) == (4, INFO, [])
    assert_same_bits((restored.params, restored.state), saved)


def test_special_float_values_keep_their_bits(tmp_path: Path) -> None:
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
        restored = checkpoints.restore(*zeros)
    assert_same_bits((restored.params, restored.state), on_host(params, state))


def test_keys_bfloat16_and_masked_nodes_keep_their_bits_and_sharding(tmp_path: Path) -> None:
    """Only the bfloat16 parameter has master weights; the state is sharded over eight devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    tx = optim_zoo.precision.master_weights(optim_zoo.adam(0.1))

    def made(scale: float, seed: int) -> tuple[Tree, Tree]:
        numbers = np.arange(24.0).reshape(8, 3) * scale
        params = {"narrow": jnp.asarray(numbers, jnp.bfloat16), "wide": jnp.asarray(numbers)}
        key = jax.device_put(jax.random.key(seed, impl="rbg"), replicated)
        state = jax.device_put(tx.init(params), jax.tree.map(
            lambda x: sharded if x.ndim else replicated, tx.init(params)))  # fmt: skip
        return jax.device_put(params, sharded), StochasticRoundingState(key, state)

    saved, like = made(1 / 7, 5), made(0.0, 6)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, *saved, INFO)
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored = checkpoints.restore(*like)
    assert (restored.step, restored.notes) == (1, [])
    back = (restored.params, restored.state)
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    assert isinstance(restored.state.inner.master["wide"], optax.MaskedNode)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(saved), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
    assert restored.state.key.dtype == saved[1].key.dtype
    assert_same_bits(words(back), words(saved))


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_with_an_earlier_state_layout_is_refused_and_kept(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx, params = optim_zoo.radam(0.1), {"x": jnp.arange(3.0)}
    state, description = tx.init(params), saved_state.describe

    def describe(state: Tree) -> dict[str, Any]:
        containers = ["containers"] if version > 1 else []
        return {"version": version, **{k: description(state)[k] for k in ["arrays", *containers]}}

    with Checkpoints(tmp_path, 1) as checkpoints, monkeypatch.context() as patched:
        patched.setattr(saved_state, "describe", describe)
        checkpoints.save(1, params, state, INFO)
    refused = rf"was version {version} and is version 3\): restore it with the version of optim_zoo"
    with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(UserError, match=refused) as error:
        checkpoints.restore(params, state)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def words(tree: Tree) -> Tree:
    """Returns a tree with the key data in place of each random key."""

    def of_leaf(x: jax.Array) -> jax.Array:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(of_leaf, tree)


def test_resumed_training_gives_the_same_bits(tmp_path: Path) -> None:
    """The steps cross the boundary of two stages of the schedule, at step 5."""
    unbroken = on_host(*train(*begun(), 4, 4))
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(4, *begun(), INFO)
        checkpoints.wait()
        _, params, state, *_ = checkpoints.restore(*fresh())
    assert_same_bits(on_host(*train(params, state, 4, 4)), unbroken)


def test_steps_with_donated_buffers_do_not_change_a_save_in_progress(tmp_path: Path) -> None:
    """A save runs in the background while the next steps write to the same memory."""
    params, state = begun(
        size=400
    )  # 480,000 numbers, so that the next steps start before the save ends
    old = jax.tree.leaves(params)
    params, state = train(params, state, 4, 1)
    assert any(x.is_deleted() for x in old)  # the buffers were donated
    expected = {}
    with Checkpoints(tmp_path, 10) as checkpoints:
        for step in range(4, 10, 2):
            expected[step] = on_host(params, state)
            checkpoints.save(step, params, state, INFO)
            params, state = train(params, state, step, 5)
    for step, saved in sorted(expected.items(), reverse=True):
        with Checkpoints(tmp_path, 10) as checkpoints:
            assert checkpoints.last_step == step
            restored = checkpoints.restore(params, state)
        assert_same_bits((restored.params, restored.state), saved)
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    params, state = begun()
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, params, state, INFO)
        checkpoints.wait()
        assert checkpoints.last_step == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_saved_step_is_not_saved_again(tmp_path: Path) -> None:
    params, state = begun()
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(4, params, state, INFO)
        checkpoints.wait()
        before = digests(tmp_path)
        checkpoints.save(4, jax.tree.map(jnp.zeros_like, params), state, INFO)
    assert digests(tmp_path) == before


def foreign(name: str) -> tuple[Tree, Tree]:
    if name == "another size":
        params = parameters(size=17)
        return params, optimizer().init(params)
    params = parameters()
    if name == "another optimizer":
        return params, optimizer("adamw").init(params)
    if name == "another dtype":
        params["LayerNorm"] = optax.tree.cast(params["LayerNorm"], jnp.bfloat16)
    else:
        params["more"] = jnp.zeros(3)
    return params, optimizer().init(params)


FOREIGN = {
    "another size": "params/LayerNorm/scale was float32(16,) and is float32(17,); ",
    "another optimizer": '"encoder/layers/kernel" is only in the checkpoint; ',
    "another leaf": "(params/more is missing in the checkpoint; ",
    "another dtype": "(params/LayerNorm/scale was float32(16,) and is bfloat16(16,)",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused_with_the_differing_paths(
    name: str, two_checkpoints: Path
) -> None:
    before = digests(two_checkpoints)
    with pytest.raises(UserError) as caught, Checkpoints(two_checkpoints, 2) as checkpoints:
        checkpoints.restore(*foreign(name))
    message = str(caught.value)
    assert "\n" not in message
    assert f"{two_checkpoints / 'checkpoints' / '6'} is of another model or optimizer: " in message
    assert FOREIGN[name] in message
    assert message.endswith(" it was saved with, or choose another folder with run.dir")
    assert len(message) < 900
    assert digests(two_checkpoints) == before


def test_the_check_of_the_caller_runs_before_arrays_are_read(two_checkpoints: Path) -> None:
    before = digests(two_checkpoints)
    seen = []

    def check(step: int, info: Mapping[str, Any]) -> None:
        seen.append((step, info))
        raise UserError("another text")

    with (
        pytest.raises(UserError, match=r"^another text$"),
        Checkpoints(two_checkpoints, 2) as checkpoints,
    ):
        checkpoints.restore(*foreign("another size"), check=check)
    assert seen == [(6, INFO)]
    assert digests(two_checkpoints) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_and_kept(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    """The JSON file of an earlier version holds only the field that is now called info."""
    folder = copied(two_checkpoints, tmp_path)
    (folder / "checkpoints" / "6" / "info" / "metadata").write_text(json.dumps(INFO))
    before = digests(folder)
    with pytest.raises(UserError, match="saved by an earlier version of optim_zoo: ") as caught:
        read_all(folder)
    assert str(folder / "checkpoints" / "6") in str(caught.value)
    assert digests(folder) == before


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run folder with checkpoints of steps 4 and 6; tests must not change it."""
    folder = tmp_path_factory.mktemp("two_checkpoints")
    params, state = begun()
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(4, params, state, INFO)
        checkpoints.save(6, *train(params, state, 4, 2), INFO)
    return folder


def copied(two_checkpoints: Path, parent: Path) -> Path:
    return shutil.copytree(two_checkpoints, parent / "run")


def kinds(folder: Path) -> list[Path]:
    """Returns the files of checkpoint 6."""
    step = folder / "checkpoints" / "6"
    return [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]


def read(folder: Path) -> Restored:
    with Checkpoints(folder, 2) as checkpoints:
        restored = checkpoints.restore(*fresh())
        assert checkpoints.last_step == restored.step
        return restored


def read_all(folder: Path) -> tuple[Any, ...]:
    """Restores a checkpoint as a resumed run does."""
    restored = read(folder)
    return restored.info, restored.step, on_host(restored.params, restored.state)


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
def test_a_damaged_checkpoint_is_never_restored_with_wrong_values(
    how: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    """Damages every file in turn: either the values are right, or step 4 is restored with a note.

    A restore does not need every file of Orbax, for example not the shardings.
    """
    notes = {}
    for number, name in enumerate(
        path.relative_to(two_checkpoints) for path in kinds(two_checkpoints)
    ):
        folder = copied(two_checkpoints, tmp_path / str(number))
        damage(folder / name, how)
        before = digests(folder)
        restored = read(folder)
        assert restored.info == INFO, name
        assert_same_bits((restored.params, restored.state), expected(restored.step))
        if restored.step == 6:
            assert restored.notes == [], name
            assert digests(folder) == before, name
        else:
            (notes[str(name)],) = restored.notes
            moved = {
                path.replace("checkpoints/6/", "damaged/6/"): digest
                for path, digest in before.items()
            }
            assert digests(folder) == moved, name
    for name, note in notes.items():
        assert re.fullmatch(
            r"the checkpoint of step 6 is damaged \(.+\) and was moved to /.+/run/damaged/6; "
            r"resuming from step 4",
            note,
        ), name
        assert len(note) < 700, name
    assert "checkpoints/6/info/metadata" in notes
    if how == "flipped":  # a file of plain numbers can be read after any change
        assert any("(the values of " in note for note in notes.values())


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    """It can be repeated, also with several damaged checkpoints and with an empty folder."""
    folder = copied(two_checkpoints, tmp_path)
    for times, name in enumerate(["6", "6.1", "6.2"], start=1):
        damage(folder / "checkpoints" / "6" / "info" / "metadata", "emptied")
        if times == 3:
            (folder / "checkpoints" / "8").mkdir()
        with Checkpoints(folder, 2) as checkpoints:
            step, params, state, _, notes = checkpoints.restore(*fresh())
            assert (step, checkpoints.last_step) == (4, 4)
            checkpoints.save(6, *train(params, state, 4, 2), INFO)
        moved = ["8", name] if times == 3 else [name]
        assert [re.findall(r"moved to (\S+);", note)[0] for note in notes] == [
            str(folder / "damaged" / name) for name in moved
        ]
        assert len(list((folder / "damaged").iterdir())) == times + (times == 3)
        _, step, trees = read_all(folder)
        assert step == 6
        assert_same_bits(trees, expected(6))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize("place", ["checksums", "description", "info"])
def test_a_changed_digit_in_the_description_counts_as_damage(
    place: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    """It is not mistaken for a checkpoint of another model, although it now describes one."""
    folder = copied(two_checkpoints, tmp_path)
    path = folder / "checkpoints" / "6" / "info" / "metadata"
    text = path.read_text()
    digit = re.compile(r"\d").search(text, text.index(f'"{place}"'))
    assert digit is not None
    changed = str((int(digit[0]) + 1) % 10)
    path.write_text(text[: digit.start()] + changed + text[digit.end() :])
    restored = read(folder)
    assert restored.step == 4
    assert "(its description has changed since it was saved)" in restored.notes[0]


def test_a_random_key_without_metadata_counts_as_damage(tmp_path: Path) -> None:
    """Orbax then returns an array of the key's words."""
    params = {"x": jnp.ones(3, jnp.bfloat16)}
    state = StochasticRoundingState(jax.random.key(5), optim_zoo.sgd(0.1).init(params))
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, params, state, INFO)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "training" / "array_metadatas")
    with Checkpoints(tmp_path, 2) as checkpoints:
        restored = checkpoints.restore(params, state)
    assert restored.step == 1
    assert_same_bits(words(restored.state), words(state))


def test_if_all_checkpoints_are_damaged_none_is_moved(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copied(two_checkpoints, tmp_path)
    damage(folder / "checkpoints" / "6" / "info" / "metadata", "emptied")
    shutil.rmtree(folder / "checkpoints" / "4" / "training")
    before = digests(folder)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    assert message.startswith(f"no checkpoint in {folder / 'checkpoints'} can be read (step 6: ")
    assert "; step 4: " in message
    assert message.endswith(
        "); none was moved. Move that folder away and run the same command to start anew, or "
        "choose another folder with run.dir"
    )
    assert digests(folder) == before


def test_if_the_last_undamaged_checkpoint_is_of_another_model_none_is_moved(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copied(two_checkpoints, tmp_path)
    damage(folder / "checkpoints" / "6" / "info" / "metadata", "removed")
    before = digests(folder)
    with (
        pytest.raises(UserError, match="4 is of another model or optimizer: "),
        Checkpoints(folder, 2) as checkpoints,
    ):
        checkpoints.restore(*foreign("another optimizer"))
    assert digests(folder) == before


def test_a_damaged_checkpoint_that_cannot_be_moved_is_reported_in_one_sentence(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = copied(two_checkpoints, tmp_path)
    damage(folder / "checkpoints" / "6" / "info" / "metadata", "emptied")
    (folder / "damaged").write_text("a file")
    before = digests(folder)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    assert str(caught.value) == (
        f"the checkpoint {folder / 'checkpoints' / '6'} is damaged and cannot be moved to "
        f"{folder / 'damaged'}: File exists; remove it to resume from step 4"
    )
    assert digests(folder) == before


def test_several_processes_do_not_restore_an_earlier_checkpoint(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeveralProcesses:
        """Replaces JAX in this module only, because Orbax would wait for other processes."""

        process_count = staticmethod(lambda: 2)

        def __getattr__(self, name: str) -> Any:
            return getattr(jax, name)

    folder = copied(two_checkpoints, tmp_path)
    damage(folder / "checkpoints" / "6" / "info" / "metadata", "emptied")
    before = digests(folder)
    monkeypatch.setattr(checkpoints_module, "jax", SeveralProcesses())
    with Checkpoints(folder, 2) as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.restore(*fresh())
        message = str(caught.value)
    path = folder / "checkpoints" / "6"
    assert message.startswith(f"cannot read the checkpoint {path}, it is damaged (")
    assert message.endswith("): remove it to resume from step 4")
    assert digests(folder) == before
    shutil.rmtree(path)
    assert read_all(folder)[1] == 4


def test_a_killed_save_leaves_no_checkpoint(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    half = folder / "checkpoints" / "8.orbax-checkpoint-tmp-3"
    shutil.copytree(folder / "checkpoints" / "6" / "training", half / "training")
    _, step, _ = read_all(folder)
    assert step == 6
    params, state = begun()
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(8, params, state, INFO)
    assert read_all(folder)[1] == 8


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_file_at_the_path_of_the_folder_is_reported_in_one_sentence(
    where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if where:
        folder.mkdir()
    (folder / where).write_text("a file")
    with pytest.raises(UserError) as caught:
        Checkpoints(folder, 2)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot write a checkpoint to {folder / 'checkpoints'}: ")
    assert "none is saved yet" in message


def test_a_full_disk_is_reported_in_one_sentence_and_earlier_checkpoints_stay_complete(
    tmp_path: Path,
) -> None:
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
            f"the last complete one is of step 4: make room, or make the folder writable, and "
            f"start again"
        )
        _, step, trees = read_all(tmp_path)
        assert step == 4
        assert_same_bits(trees, on_host(params, state))
        # The space that the failed save took is free again.
        assert shutil.disk_usage(tmp_path).free > 700_000
        with Checkpoints(tmp_path, 2) as checkpoints:
            checkpoints.save(6, params, state, INFO)
        assert read_all(tmp_path)[1] == 6
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_removed_folder_is_reported_in_one_sentence(tmp_path: Path) -> None:
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

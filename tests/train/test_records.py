import json
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import errors
from optim_zoo.train import records

QUERY = "trust_ratio/encoder/layers/attention/query/kernel"
TABLE = "trust_ratio/embeddings/word_embeddings/embedding"


def run_lines(first: int, last: int) -> Iterator[Mapping[str, object]]:
    """Returns the lines of steps first to last of a run whose numbers depend only on the step."""
    for step in range(first, last + 1):
        ratios = np.random.default_rng(step).uniform(size=3).astype(np.float32)
        yield {"kind": "train", "step": step, "loss": 6 / step, QUERY: ratios, TABLE: 2.0}
        if step % 4 == 0:
            yield {"kind": "held_out", "step": step, "loss": 7 / step}


def write(path: pathlib.Path, *lines: Mapping[str, object]) -> pathlib.Path:
    path.write_text(
        "".join(
            json.dumps({name: records.plain(name, value) for name, value in line.items()}) + "\n"
            for line in lines
        )
    )
    return path


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "metrics.jsonl"


def test_columns_are_read_as_steps_and_values(path: pathlib.Path) -> None:
    read = records.read(write(path, *run_lines(1, 8)))
    steps, losses = read.train["loss"]
    np.testing.assert_array_equal(steps, np.arange(1, 9))
    np.testing.assert_array_equal(losses, 6 / np.arange(1, 9))
    assert steps.dtype == losses.dtype == np.float64
    np.testing.assert_array_equal(read.held_out["loss"], [[4, 8], [7 / 4, 7 / 8]])


def test_stacked_leaves_become_one_row_per_layer_in_file_order(path: pathlib.Path) -> None:
    read = records.read(write(path, *run_lines(1, 8)))
    names, values = read.layers("trust_ratio")
    assert names == [
        "encoder/layers[0]/attention/query/kernel",
        "encoder/layers[1]/attention/query/kernel",
        "encoder/layers[2]/attention/query/kernel",
        "embeddings/word_embeddings/embedding",
    ]
    expected = [np.random.default_rng(step).uniform(size=3) for step in range(1, 9)]
    np.testing.assert_array_equal(
        values[:3].astype(np.float32), np.transpose(expected).astype(np.float32)
    )
    np.testing.assert_array_equal(values[3], np.full(8, 2.0))
    np.testing.assert_array_equal(read.layer_steps("trust_ratio"), np.arange(1, 9))


def test_the_index_follows_a_path_that_has_no_segment_named_layers(path: pathlib.Path) -> None:
    line = {"kind": "train", "step": 1, "update_norm/blocks/qkv/kernel": [1.0, 2.0]}
    names, _ = records.read(write(path, line)).layers("update_norm")
    assert names == ["blocks/qkv/kernel[0]", "blocks/qkv/kernel[1]"]


def test_a_quantity_that_was_not_logged_has_no_rows(path: pathlib.Path) -> None:
    read = records.read(write(path, *run_lines(1, 3)))
    names, values = read.layers("parameter_norm")
    assert names == []
    assert values.shape == (0, 0)


def test_layers_missing_on_some_lines_are_nan_at_those_steps(
    path: pathlib.Path,
) -> None:
    lines = [
        {"kind": "train", "step": 1, "trust_ratio/a": 1.0},
        {"kind": "train", "step": 2, "loss": 5.0},
        {"kind": "train", "step": 3, "trust_ratio/a": 3.0, "trust_ratio/b": 4.0},
    ]
    read = records.read(write(path, *lines))
    names, values = read.layers("trust_ratio")
    assert names == ["a", "b"]
    np.testing.assert_array_equal(values, [[1, 3], [np.nan, 4]])
    np.testing.assert_array_equal(read.layer_steps("trust_ratio"), [1, 3])


def test_float32_arrays_survive_writing_and_reading(path: pathlib.Path) -> None:
    third = np.float32(1) / np.float32(3)
    line = {
        "kind": "train",
        "step": np.int64(7),
        "loss": jnp.float32(0.1),
        "learning_rate": third,
        "half": jnp.bfloat16(0.1),
        "trust_ratio/a": jnp.array([0.1, 1e-30, 3e38], jnp.float32),
    }
    write(path, line)
    plain = json.loads(path.read_text())
    assert plain["step"] == 7
    assert plain["loss"] == 0.1
    assert np.float32(plain["learning_rate"]) == third
    assert jnp.bfloat16(plain["half"]) == jnp.bfloat16(0.1)
    np.testing.assert_array_equal(
        np.array(plain["trust_ratio/a"], np.float32), np.array([0.1, 1e-30, 3e38], np.float32)
    )


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(
    path: pathlib.Path,
) -> None:
    line = {"kind": "train", "step": 1, "loss": float("nan"), QUERY: jnp.array([1.0, -jnp.inf])}
    write(path, line)
    plain = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert plain["loss"] is None
    assert plain[QUERY] == [1.0, None]
    read = records.read(path)
    assert np.isnan(read.train["loss"][1]).all()
    np.testing.assert_array_equal(read.layers("trust_ratio")[1], [[1.0], [np.nan]])


def test_an_incomplete_last_line_is_ignored(path: pathlib.Path) -> None:
    content = write(path, *run_lines(1, 3)).read_bytes()
    path.write_bytes(content[:-9])
    np.testing.assert_array_equal(records.read(path).steps, [1, 2])


@pytest.mark.parametrize(
    "broken", ['{"kind": "tra', '{"kind": "other", "step": 1}', '{"kind": "train"}', "[1]"]
)
def test_an_invalid_line_before_the_last_is_named(path: pathlib.Path, broken: str) -> None:
    path.write_text(f'{{"kind": "train", "step": 1}}\n{broken}\n{{"kind": "train", "step": 2}}\n')
    with pytest.raises(errors.UserError, match="line 2: expected a JSON object"):
        records.read(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("trust_ratio/a", ([1.0, 2.0], [1.0])),
        ("trust_ratio/a", ([1.0, 2.0], 1.0)),
        ("loss", ("six", 1.0)),
        ("loss", ([1.0], [2.0])),
    ],
)
def test_a_value_of_the_wrong_type_or_shape_is_named(
    path: pathlib.Path, name: str, values: tuple[object, object]
) -> None:
    lines = [{"kind": "train", "step": step, name: v} for step, v in enumerate(values)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(errors.UserError, match=f"expected {name} to be a number"):
        records.read(path)


def test_a_missing_file_is_named(path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=f"expected to read the metrics in {path}"):
        records.read(path)

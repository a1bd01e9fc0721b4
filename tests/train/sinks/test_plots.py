import dataclasses
import itertools
import json
import pathlib

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from optim_zoo.train import records
from optim_zoo.train.sinks import plots
from optim_zoo.train.sinks.plots import classes, heat_maps, lines
from optim_zoo.train.tasks.base import Baseline

Array = npt.NDArray[np.float64]
BY_FREQUENCY = Baseline("token frequency", {"loss": 7.3, "accuracy": 0.1})
NAMES = ["loss.png", "learning_rate.png", "gradient_norm.png", "critical_batch_size.png"]
NAMES += ["trust_ratio.png"]


def run(leaves: dict[str, Array], steps: Array | None = None) -> records.Records:
    """Returns records of a run with these trust ratios: (lines,) or (lines, layers) per path."""
    count = len(next(iter(leaves.values())))
    steps = np.arange(1.0, count + 1) * 10 if steps is None else steps
    rows = np.arange(count)
    rng = np.random.default_rng(0)
    train = {
        "loss": (steps, 3 + 7 * np.exp(-rows / count) + rng.normal(0, 0.1, count)),
        "learning_rate": (steps, rows * 1e-4),
        "gradient_norm": (steps, rng.lognormal(size=count)),
        "critical_batch_size": (steps, 1e3 * rng.lognormal(size=count)),
    }
    by_path = {
        f"trust_ratio/{path}": records.Leaf(rows, values.reshape(count, -1), values.ndim == 2)
        for path, values in leaves.items()
    }
    held_out = {"loss": (steps[::2], np.linspace(9, 4, steps[::2].size))}
    return records.Records(steps, train, held_out, by_path)


def draw_loss(
    recorded: records.Records, path: pathlib.Path, baseline: Baseline | None = BY_FREQUENCY
) -> Figure | None:
    return lines.loss(recorded, path, baseline=baseline, unit="nats")


def write_all(
    recorded: records.Records, folder: pathlib.Path, baseline: Baseline | None = BY_FREQUENCY
) -> list[pathlib.Path]:
    return plots.write_all(recorded, folder, baseline=baseline, loss_unit="nats")


def ratios(*shape: int) -> Array:
    return np.random.default_rng(1).lognormal(size=shape)


SMALL = {"a/query/kernel": ratios(5), "b/query/kernel": ratios(5), "b/query/bias": ratios(5)}
LARGE = {
    "embeddings/word_embeddings/embedding": ratios(30),
    **{
        f"encoder/layers/{leaf}/kernel": ratios(30, 24)
        for leaf in (
            *("attention/key", "attention/output/dense", "attention/query", "attention/value"),
            *("intermediate/dense", "mlp/gate/a", "mlp/gate/b", "output/dense"),
        )
    },
    "pooler/dense/kernel": ratios(30),
}


def mesh_of(figure: Figure) -> QuadMesh:
    (mesh,) = (c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    return mesh


def row_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


@pytest.mark.parametrize("leaves", [SMALL, LARGE], ids=["3 rows", "194 rows"])
def test_heat_map_has_one_named_row_per_layer(
    leaves: dict[str, Array], tmp_path: pathlib.Path
) -> None:
    recorded = run(leaves)
    figure = drawn(heat_maps.trust_ratio(recorded, tmp_path / "trust_ratio.png"))
    names, values = recorded.layers("trust_ratio")
    shown = mesh_of(figure).get_array()
    assert shown.shape == values.shape
    labels = row_labels(figure)
    assert len(set(labels)) == len(names)
    for label, row in zip(labels, shown, strict=True):
        (source,) = (i for i, name in enumerate(names) if name.removesuffix("/kernel") == label)
        np.testing.assert_array_equal(row, values[source])
    np.testing.assert_array_equal(figure.axes[0].get_yticks(), np.arange(len(names)))
    assert figure.axes[0].yaxis_inverted()


@pytest.mark.parametrize("leaves", [SMALL, LARGE], ids=["3 rows", "194 rows"])
def test_texts_of_the_heat_map_do_not_overlap_and_are_inside_the_picture(
    leaves: dict[str, Array], tmp_path: pathlib.Path
) -> None:
    figure = drawn(heat_maps.trust_ratio(run(leaves), tmp_path / "trust_ratio.png"))
    assert_readable(figure)


def assert_readable(figure: Figure) -> None:
    """Checks that no two texts overlap and that all are inside the picture."""
    figure.draw_without_rendering()
    undrawn = {text for axes in figure.axes for text in ticks_beyond(axes)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t not in undrawn]
    assert len(boxes) > 5
    for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
        assert not box_a.overlaps(box_b), f"{a} at {box_a} overlaps {b} at {box_b}"
    for name, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, name


def ticks_beyond(axes: Axes) -> list[Text]:
    """Returns the labels of ticks beyond the ends of an axis, which are not drawn."""
    return [
        label
        for i, axis in enumerate((axes.xaxis, axes.yaxis))
        for label in axis.get_ticklabels()
        if not min(axis.get_view_interval())
        <= label.get_position()[i]
        <= max(axis.get_view_interval())
    ]


def test_layers_of_a_leaf_are_adjacent_rows_in_numeric_order(
    tmp_path: pathlib.Path,
) -> None:
    unstacked = {
        f"encoder/layer_{i}/{leaf}/kernel": ratios(4)
        for i in sorted(range(12), key=str)
        for leaf in ("key", "query")
    }
    stacked = {f"encoder/layers/{leaf}/kernel": ratios(4, 12) for leaf in ("key", "query")}
    figure = drawn(heat_maps.trust_ratio(run(unstacked), tmp_path / "unstacked.png"))
    assert row_labels(figure) == [f"layer_{i}/{x}" for x in ("key", "query") for i in range(12)]
    figure = drawn(heat_maps.trust_ratio(run(stacked), tmp_path / "stacked.png"))
    assert row_labels(figure) == [f"layers[{i}]/{x}" for x in ("key", "query") for i in range(12)]


def test_row_names_drop_their_common_prefix_and_stay_distinct(tmp_path: pathlib.Path) -> None:
    leaves = {f"net/qkv{end}": ratios(3) for end in ("", "/kernel", "/bias")}
    figure = drawn(heat_maps.trust_ratio(run(leaves), tmp_path / "distinct.png"))
    assert row_labels(figure) == ["qkv", "qkv/kernel", "qkv/bias"]
    figure = drawn(heat_maps.trust_ratio(run({"net/qkv/kernel": ratios(3, 2)}), tmp_path / "x.png"))
    assert row_labels(figure) == ["qkv[0]", "qkv[1]"]


def test_columns_are_as_wide_as_their_steps(tmp_path: pathlib.Path) -> None:
    recorded = run({"a": ratios(4)}, steps=np.array([10.0, 20.0, 60.0, 70.0]))
    figure = drawn(heat_maps.trust_ratio(recorded, tmp_path / "trust_ratio.png"))
    edges = mesh_of(figure).get_coordinates()[0, :, 0]
    np.testing.assert_array_equal(edges, [5, 15, 40, 65, 75])


@pytest.mark.parametrize(
    "values",
    [[1.0], [2.0, 2.0], [0.0, 1.0], [np.nan, 3.0], [np.inf, 3.0], [1e-30, 1e30], [1.01, 1.02]],
    ids=str,
)
def test_unusual_values_are_drawn_without_a_warning(
    values: list[float], tmp_path: pathlib.Path
) -> None:
    ratio = np.array(values)
    figure = drawn(heat_maps.trust_ratio(run({"a": ratio}), tmp_path / "trust_ratio.png"))
    shown = np.ma.getmaskarray(mesh_of(figure).get_array())[0]
    np.testing.assert_array_equal(shown, ~np.isfinite(ratio) | (ratio <= 0))
    bar = figure.axes[1]
    assert ("grey" in bar.get_xlabel()) == bool(shown.any())
    assert 2 <= len(bar.get_xticks()) <= 10


def test_the_colour_scale_is_logarithmic_and_ignores_an_outlier(
    tmp_path: pathlib.Path,
) -> None:
    tame = np.linspace(0.5, 2, 400)
    for values, extend in ((tame, "neither"), (np.append(tame, 1e9), "max")):
        figure = drawn(heat_maps.trust_ratio(run({"a": values}), tmp_path / "trust_ratio.png"))
        mesh = mesh_of(figure)
        assert isinstance(mesh.norm, LogNorm)
        assert (mesh.norm.vmin, mesh.colorbar.extend) == (0.5, extend)
        assert mesh.norm.vmax < 10
        assert figure.axes[1].get_xlabel() == "trust ratio (log scale)"


def test_every_axis_has_a_label(tmp_path: pathlib.Path) -> None:
    recorded = run(SMALL)
    for figure, ylabel in (
        (draw_loss(recorded, tmp_path / "a.png"), "loss (nats)"),
        (lines.learning_rate(recorded, tmp_path / "b.png"), "learning rate"),
        (lines.gradient_norm(recorded, tmp_path / "c.png"), "gradient norm"),
        (lines.critical_batch_size(recorded, tmp_path / "e.png"), "examples"),
        (heat_maps.trust_ratio(recorded, tmp_path / "d.png"), "layer"),
    ):
        axes = drawn(figure).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", ylabel)


def test_texts_of_the_line_plots_do_not_overlap(tmp_path: pathlib.Path) -> None:
    recorded = run({"a": ratios(200)}, steps=np.arange(1.0, 201) * 5000)
    for figure in (
        draw_loss(recorded, tmp_path / "a.png"),
        lines.learning_rate(recorded, tmp_path / "b.png"),
        lines.gradient_norm(recorded, tmp_path / "c.png"),
        lines.critical_batch_size(recorded, tmp_path / "d.png"),
    ):
        assert_readable(drawn(figure))


def test_the_loss_plot_shows_raw_smoothed_held_out_and_baseline_losses(
    tmp_path: pathlib.Path,
) -> None:
    recorded = run({"a": ratios(200)})
    axes = drawn(draw_loss(recorded, tmp_path / "loss.png")).axes[0]
    shown = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}
    assert list(shown) == [
        "training",
        "training, smoothed",
        "held-out",
        "by token frequency (7.30)",
    ]
    raw, smooth = shown["training"], shown["training, smoothed"]
    np.testing.assert_array_equal(raw, recorded.train["loss"][1])
    assert np.diff(smooth).std() < np.diff(raw).std() / 3
    np.testing.assert_allclose(
        smooth[100], raw[96:105].mean()
    )  # the window is 200 / 50 = 4 steps on either side
    np.testing.assert_allclose(smooth[-1], raw[-5:].mean())
    np.testing.assert_array_equal(shown["by token frequency (7.30)"], 7.3)
    without = drawn(draw_loss(recorded, tmp_path / "loss.png", None)).axes[0]
    assert len(without.get_lines()) == 3


def test_write_all_writes_only_readable_pictures(tmp_path: pathlib.Path) -> None:
    paths = write_all(run(SMALL), tmp_path)
    assert [path.name for path in paths] == NAMES
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = imread(path)
        assert pixels[..., :3].std() > 0.01
        assert pixels.shape[1] > 700
    assert set(NAMES) < set(plots.CAPTIONS)


def test_without_trust_ratios_there_is_no_heat_map(tmp_path: pathlib.Path) -> None:
    recorded = run({"a": np.full(3, np.nan)})
    assert [path.name for path in write_all(recorded, tmp_path, None)] == NAMES[:-1]
    assert len(list(tmp_path.iterdir())) == len(NAMES) - 1


def test_a_run_without_any_finite_number_has_no_pictures(tmp_path: pathlib.Path) -> None:
    nothing = (np.array([1.0]), np.array([np.nan]))
    recorded = records.Records(
        nothing[0], dict.fromkeys(["loss", "gradient_norm"], nothing), {}, {}
    )
    assert write_all(recorded, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_recorded_norms_are_plotted_by_layer(tmp_path: pathlib.Path) -> None:
    leaf = records.Leaf(np.arange(3), ratios(3, 2), stacked=True)
    leaves = {"parameter_norm/layers/a": leaf, "update_norm/layers/a": leaf}
    recorded = records.Records(np.arange(3.0), {}, {}, leaves)
    paths = write_all(recorded, tmp_path, None)
    assert [path.name for path in paths] == ["parameter_norm.png", "update_norm.png"]


def test_update_norms_are_plotted_only_for_layers_with_a_trust_ratio(
    tmp_path: pathlib.Path,
) -> None:
    """For other leaves, the recorded norm includes the learning rate."""
    leaf = records.Leaf(np.arange(3), ratios(3, 2), stacked=True)
    adapted = {f"{name}/layers/a": leaf for name in ("trust_ratio", "update_norm")}
    both = {**adapted, "update_norm/bias": records.Leaf(np.arange(3), ratios(3, 1), False)}
    recorded = records.Records(np.arange(3.0), {}, {}, both)
    figure = drawn(heat_maps.update_norm(recorded, tmp_path / "update_norm.png"))
    assert row_labels(figure) == ["layers[0]/a", "layers[1]/a"]


def test_skipped_steps_are_plotted_and_marked_in_the_loss(tmp_path: pathlib.Path) -> None:
    recorded = run(SMALL)
    counts = {"skipped_steps": [0, 2, 2, 2, 3], "skipped_micro_batches": [0, 0, 0, 1, 1]}
    train = {name: (recorded.steps, np.array(c, float)) for name, c in counts.items()}
    recorded = dataclasses.replace(recorded, train={**recorded.train, **train})
    assert tmp_path / "skipped.png" in write_all(recorded, tmp_path)
    figure = drawn(lines.skipped(recorded, tmp_path / "skipped.png"))
    shown = {str(line.get_label()): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(shown["steps"].get_ydata(), counts["skipped_steps"])
    np.testing.assert_array_equal(
        shown["micro-batches"].get_ydata(), counts["skipped_micro_batches"]
    )
    loss = drawn(draw_loss(recorded, tmp_path / "loss.png")).axes[0]
    (marks,) = (line for line in loss.lines if line.get_label() == "skipped")
    np.testing.assert_array_equal(marks.get_xdata(), [20, 40, 50])
    nothing = {name: (recorded.steps, np.zeros(5)) for name in counts}
    without = dataclasses.replace(recorded, train={**recorded.train, **nothing})
    assert lines.skipped(without, tmp_path / "skipped.png") is None
    axes = drawn(draw_loss(without, tmp_path / "loss.png")).axes[0]
    assert "skipped" not in [line.get_label() for line in axes.lines]


def test_plots_do_not_change_the_global_state_of_matplotlib(tmp_path: pathlib.Path) -> None:
    before = dict(matplotlib.rcParams)
    write_all(run(SMALL), tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_metrics_of_classes_are_drawn_together(tmp_path: pathlib.Path) -> None:
    evaluations = [
        {"loss": 1.0, "f1": value, "f1/a": value, "f1/b": 0.0}
        | {"confusion/O/O": 0.0, "confusion/O/a": 0.0}
        | {"confusion/a/O": 1 - value, "confusion/a/a": value}
        for value in (0.25, 0.75)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"kind": "held_out", "step": step, **line}) + "\n"
            for step, line in enumerate(evaluations, 1)
        )
    )
    read = records.read(path)
    bars = classes.by_class(read, "f1", tmp_path / "bars.png")
    assert bars is not None
    assert bars.axes[0].get_title(loc="left") == "Held-out F1 by class"
    assert [bar.get_width() for bar in bars.axes[0].patches] == [0.75, 0]  # the last evaluation
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()] == ["a", "b"]
    matrix = classes.matrix(read, "confusion", tmp_path / "matrix.png")
    assert matrix is not None
    assert [text.get_text() for text in matrix.axes[0].texts] == ["75", "25"]
    assert [label.get_text() for label in matrix.axes[0].get_yticklabels()] == ["a", "O"]
    assert classes.matrix(read, "f1", tmp_path / "none.png") is None
    assert classes.by_class(read, "confusion", tmp_path / "none.png") is None
    written = plots.write_all(read, tmp_path, baseline=None, loss_unit="")
    assert [path.name for path in written] == [
        "loss.png", "held_out_f1.png", "held_out_f1_by_class.png", "held_out_confusion.png"
    ]  # fmt: skip


def test_every_plot_of_a_held_out_metric_has_a_sentence_as_its_caption() -> None:
    captions = [
        plots.caption(plots.held_out_file(name)) for name in ("f1", "f1/a", "edit_distance")
    ]
    assert captions == [
        "F1 on the held-out data, at every evaluation.",
        "F1 of each class on the held-out data, at the last evaluation.",
        "Edit distance on the held-out data, at every evaluation.",
    ]
    assert plots.caption("held_out_confusion.png") == plots.CAPTIONS["held_out_confusion.png"]

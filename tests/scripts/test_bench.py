"""The benchmark scripts: measurements, output and errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from optim_zoo import stacked
from tests.scripts.importing import imported

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    with imported("bench", "harness", "update", "growth", "wrappers", "trees") as modules:
        monkeypatch.setattr(modules[0], "WARMUP_ROUNDS", 1)
        yield modules


@pytest.fixture
def harness(scripts: list[ModuleType]) -> Any:
    return scripts[0]


@pytest.fixture
def update(scripts: list[ModuleType]) -> Any:
    return scripts[1]


@pytest.fixture
def growth(scripts: list[ModuleType]) -> Any:
    return scripts[2]


@pytest.fixture
def wrappers(scripts: list[ModuleType]) -> Any:
    return scripts[3]


@pytest.fixture
def trees(scripts: list[ModuleType]) -> Any:
    return scripts[4]


@pytest.fixture
def no_memory(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves no free memory beyond what is reserved for XLA and Python."""
    monkeypatch.setattr(harness, "_free_bytes", lambda: harness.RESERVED_BYTES)


@pytest.fixture
def tiny(trees: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the name of a tree of 144 parameters; 128 of them are two layers in one array."""
    shapes = {
        "stack": jax.ShapeDtypeStruct((2, 8, 8), "float32"),
        "bias": jax.ShapeDtypeStruct((16,), "float32"),
    }
    monkeypatch.setitem(trees.TREES, "tiny", lambda: (shapes, [("stack", stacked(0))]))
    return "tiny"


def _printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("tree", "leaves", "parameters"),
    [
        ("bert-base", 202, 109_514_298),
        ("bert-base-scan", 26, 109_514_298),
        ("bert-large", 394, 335_174_458),
        ("small-leaves", 2000, 20_000_000),
    ],
)
def test_trees_have_the_expected_leaves_and_parameters(
    tree: str, leaves: int, parameters: int, trees: Any
) -> None:
    shapes, layers = trees.TREES[tree]()
    assert len(jax.tree.leaves(shapes)) == leaves
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    assert bool(layers) == (tree == "bert-base-scan")


def test_each_step_continues_from_the_last_one_with_the_next_input(harness: Any) -> None:
    tx = optax.sgd(1.0)
    params, inputs = jnp.zeros(3), [(jnp.full(3, x),) for x in (-1.0, -10.0)]
    step = harness.Step(tx, harness.update(tx), params, inputs[0])
    step.start(params, *inputs)
    assert [float(step()[0][0]) for _ in range(3)] == [1, 11, 12]
    assert step.held_bytes == 12
    assert step.lower_seconds > 0
    assert step.compile_seconds > 0


def test_candidates_are_timed_in_turn(harness: Any) -> None:
    called = []
    times = harness.interleaved({x: lambda x=x: called.append(x) for x in "ab"}, 3)
    assert called == ["a", "b"] * (1 + 3)
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("on_a_gpu", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_group_prints_a_line_for_each_candidate_and_the_ratios(
    on_a_gpu: bool,
    update: Any,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(update, "bandwidth_is_measured", lambda: on_a_gpu)
    monkeypatch.setattr(update.ReadAndWrite, "num_bytes", 4000)
    peers = ["optim_zoo.lamb, metrics out", "optax.adamw"]
    update.main(["--trees", tiny, "--rounds", "2", "--peers", *peers])
    lines = _printed(capsys)
    end = ["read and write"] * on_a_gpu + ["ratios of medians"]
    names = ["optim_zoo.lamb", *peers, *end, "optim_zoo.lars", "optax.adamw", *end]
    assert [line["what"] for line in lines] == names
    lamb, with_metrics, adamw, *_, ratios = lines[: names.index("optim_zoo.lars")]
    lars = lines[names.index("optim_zoo.lars")]
    for line, fewest in ((lamb, 40), (adamw, 28), (lars, 28)):
        assert line["quartiles_ms"][0] <= line["median_ms"] <= line["quartiles_ms"][1]
        # Step counts, learning rates and norms of three layers add about 50 bytes.
        assert fewest <= line["fewest_bytes_per_parameter"] < fewest + 1.5
        assert line["bytes_per_parameter"] >= fewest
        assert ("share_of_bandwidth" in line) == on_a_gpu
        assert (line["parameters"], line["leaves"]) == (144, 2)
    expected = with_metrics["median_ms"] / lamb["median_ms"]
    assert len([name for name in ratios if " / " in name]) == 2
    assert ratios[f"{peers[0]} / optim_zoo.lamb"] == expected


def test_state_sizes_of_bfloat16_parameters(
    update: Any, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trees", tiny, "--groups", "lamb", "--rounds", "2", "--dtype", "bfloat16"]
    update.main([*arguments, "--peers", "optax.adamw"])
    ours, optaxs, *_ = _printed(capsys)
    assert ours["state_bytes_per_parameter"] >= 8
    assert 4 <= optaxs["state_bytes_per_parameter"] < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers"], "group lamb on tiny needs "),
        (["--peers", "sgd"], "--peers: sgd is not one of those here: optim_zoo.lamb; "),
        (["--rounds", "1"], "--rounds must be at least 2"),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: list[str],
    message: str,
    update: Any,
    no_memory: None,
    tiny: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        update.main(["--trees", tiny, *arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err


SMALL = ["--rounds", "2", "--parameters", "200", "800", "--leaves", "1", "3"]
SMALL += ["--fixed-leaves", "2", "--fixed-parameters", "300"]


@pytest.mark.slow
def test_growth_is_measured_and_plotted(
    growth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    growth.main([*SMALL, "--plot", str(tmp_path / "growth.png")])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["what"] for line in lines] == list(growth.OPTIMIZERS) * 4
    trees = [(line["grows"], line["parameters"], line["leaves"]) for line in lines[::3]]
    # Leaves are square: 2 of width 10, 2 of width 20, 1 of width 17, 3 of width 10.
    assert trees == [
        ("parameters", 200, 2),
        ("parameters", 800, 2),
        ("leaves", 289, 1),
        ("leaves", 300, 3),
    ]
    assert all(line["together"] for line in lines)

    (tmp_path / "lines.jsonl").write_text(printed, "utf-8")
    monkeypatch.delattr(growth, "measure")
    growth.main(["--from", str(tmp_path / "lines.jsonl"), "--plot", str(tmp_path / "again.png")])
    pictures = [(tmp_path / name).read_bytes() for name in ("growth.png", "again.png")]
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]
    assert not capsys.readouterr().out


def test_a_candidate_that_does_not_fit_in_memory_is_skipped(
    growth: Any, harness: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """AdamW needs the gradients, the parameters and two moments; LAMB needs a temporary too.

    The scalars of the state are negligible compared with a leaf of 6,400 entries.
    """
    monkeypatch.setattr(harness, "_free_bytes", lambda: harness.RESERVED_BYTES + 4.5 * 4 * 6400)
    lines = growth.measure("leaves", 6400, 1, rounds=2)
    assert _printed(capsys) == lines
    assert {line["what"]: line.get("skipped", "")[:5] for line in lines} == {
        "optim_zoo.lamb": "needs",
        "optax.lamb": "needs",
        "optax.adamw": "",
    }
    assert not any(line["together"] for line in lines)
    assert ["median_ms" in line for line in lines] == [False, False, True]


def test_wrappers_are_measured_and_shown_in_a_table(
    wrappers: Any, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = ["accumulate", "precision"]
    wrappers.main(
        ["--trees", tiny, "--optimizers", "adamw", "--groups", *groups, "--rounds", "2", "--table"]
    )
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in printed if line.startswith("{")]
    names = [line["what"] for line in lines]
    split = names.index("ratios of medians") + 1
    assert {line["group"] for line in lines[:split]} == {"accumulate"}
    ours, peer = "accumulate(adamw, 4)", "optax.MultiSteps(adamw, 4)"
    assert names[:split] == [
        "adamw",
        *(f"{outer}, {when}" for outer in (ours, peer) for when in ("step", "between")),
        *(f"{outer}, mean of 4" for outer in (ours, peer)),
        "ratios of medians",
    ]
    medians = {line["what"]: line.get("median_ms") for line in lines[:split]}
    step, between = medians[f"{ours}, step"], medians[f"{ours}, between"]
    assert medians[f"{ours}, mean of 4"] == (step + 3 * between) / 4
    ratios = lines[split - 1]
    assert ratios[f"{ours}, between / {ours}, step"] == between / step
    # The state has two moments, in `accumulate` the sum of gradients, and 30 bytes of scalars.
    state = {line["what"]: line.get("state_bytes_per_parameter") for line in lines}
    assert [round(state[name]) for name in ("adamw", f"{ours}, step")] == [8, 12]
    low = lines[split:]
    assert [line.get("dtype") for line in low] == ["float32", *["bfloat16"] * 3, None]
    table = printed[len(lines) :]
    measured = [line for line in lines if line["what"] != "ratios of medians"]
    assert [row.split(" | ")[1] for row in table[2:]] == [line["what"] for line in measured]
    assert f"{between / step:.2f} x {ours}, step" in table[2 + names.index(f"{ours}, between")]


@pytest.mark.parametrize("outer", ["accumulate", "optax.MultiSteps"])
def test_a_candidate_always_measures_the_same_kind_of_micro_batch(
    outer: str, wrappers: Any
) -> None:
    group = wrappers.accumulate_group("sgd", optax.sgd(1.0))
    moved = {}
    for when in ("step", "between"):
        candidate = group.candidates[f"{outer}(sgd, 4), {when}"]
        step = wrappers.compiled(candidate, jnp.zeros(3))
        step.start(jnp.zeros(3), [jnp.ones(3), jnp.asarray(candidate.at)])
        ends = [float(step()[0][0]) for _ in range(6)]
        moved[when] = [new != old for old, new in zip([0.0, *ends], ends, strict=False)]
    assert moved == {"step": [True] * 6, "between": [False] * 6}


def test_a_candidate_always_or_never_computes_norms(wrappers: Any) -> None:
    group = wrappers.metrics_group("sgd", optax.sgd(1.0))
    norms = {}
    for when in ("taken", "between"):
        candidate = group.candidates[f"with_metrics(sgd, 10), {when}"]
        step = wrappers.compiled(candidate, {"w": jnp.ones(4)})
        step.start({"w": jnp.ones(4)}, [{"w": jnp.ones(4)}, jnp.asarray(candidate.at)])
        norms[when] = [float(step()[1].gradient_norm) for _ in range(3)]
    assert norms == {"taken": [2.0] * 3, "between": [0.0] * 3}
    # Every group measures the candidates that its table compares.
    for make in wrappers.GROUPS.values():
        candidates, ratios, means = make("sgd", optax.sgd(1.0))
        assert {name for pair in ratios for name in pair} <= {*candidates, *means}
        assert {part for parts in means.values() for part in parts} <= {*candidates}


def test_wrappers_that_do_not_fit_in_memory_are_refused(
    wrappers: Any, no_memory: None, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        wrappers.main(["--trees", tiny, "--optimizers", "adamw", "--groups", "guards"])
    assert stopped.value.code == 2
    assert "group guards of adamw on tiny needs " in capsys.readouterr().err

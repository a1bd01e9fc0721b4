import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from optim_zoo import recorded, registry
from optim_zoo.recorded.agreement import follow
from tests.scripts.importing import imported


@pytest.fixture(scope="module")
def modules() -> Iterator[list[ModuleType]]:
    with imported("docs", "gallery_settings", "gallery_numbers", "gallery_text") as found:
        yield found


@pytest.fixture
def settings(modules: list[ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture
def numbers(modules: list[ModuleType]) -> ModuleType:
    return modules[1]


@pytest.fixture
def text(modules: list[ModuleType]) -> ModuleType:
    return modules[2]


def test_the_cases_of_a_setting_share_their_input(settings: ModuleType) -> None:
    assert set(settings.SETTINGS) <= set(registry.OPTIMIZERS)
    for of_optimizer in settings.SETTINGS.values():
        for setting in of_optimizer:
            trajectories = [recorded.get(case).load() for case in setting.cases]
            first, *others = [jax.tree.leaves((t.params0, t.grads)) for t in trajectories]
            for other in others:
                assert all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_every_source_has_the_hyperparameters_of_its_setting(settings: ModuleType) -> None:
    for of_optimizer in settings.SETTINGS.values():
        for setting in of_optimizer:
            for source in settings.sources(setting):
                inner = source.case.inner or {"arguments": {}}
                given = {**source.case.arguments, **inner["arguments"]}
                betas = dict(zip(("b1", "b2"), given.pop("betas", ()), strict=False))
                for name, value in setting.hyperparameters.items():
                    names = (name, *settings.SYNONYMS.get(name, ()))
                    found = [(given | betas)[n] for n in names if n in given | betas]
                    assert all(x == value or not (x or value) for x in found), source


def test_only_sources_with_other_hyperparameters_are_run_again(settings: ModuleType) -> None:
    cases = ("optax_rmsprop", "keras_rmsprop")
    hyperparameters = {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-8}
    setting = settings.Setting(hyperparameters=hyperparameters, cases=cases)
    optax, keras = settings.sources(setting)
    assert optax.from_recording
    assert optax.case == recorded.get("optax_rmsprop")
    assert not keras.from_recording
    changed = {**recorded.get("keras_rmsprop").arguments, "epsilon": 1e-8}
    assert keras.case.arguments == changed


def test_distance_is_relative_to_the_movement(numbers: ModuleType) -> None:
    start = {"a": np.ones(3), "b": np.ones(2), "c": np.ones(1)}
    moved = {"a": np.full(3, 3.0), "b": np.ones(2), "c": np.full(1, 2.0)}
    back = {"a": np.full(3, -1.0), "b": np.ones(2), "c": np.ones(1)}
    assert numbers.distance(start, moved, moved) == [0, 0, 0]
    assert numbers.distance(start, moved, back) == [2, 0, 1]


def test_sources_that_compute_the_same_share_a_row(
    settings: ModuleType, numbers: ModuleType
) -> None:
    """Uses only recorded trajectories, so that nothing is compiled."""
    setting = settings.Setting(
        hyperparameters={},
        cases=("optax_lamb", "paper_lamb_wd", "apex_fusedlamb_default", "tfa_lamb_f32_defaults"),
    )
    found = numbers.distances(setting)
    assert [len(group.labels) for group in found.groups] == [3, 1]
    assert found.groups[1].labels == ("NVIDIA/apex 6424da3 FusedLAMB",)
    assert found.largest[0][1] == found.largest[1][0] > 0.1
    assert found.largest[0][0] < numbers.SAME_FLOAT32
    assert found.median[0][1] <= found.largest[0][1]


def test_memory_includes_state_and_traffic(numbers: ModuleType) -> None:
    memory = numbers.memory(registry.get("momentum"), "bfloat16")
    assert memory.state == 4  # one float32 average
    assert (
        memory.least == 3 * 2 + 2 * 4
    )  # reads gradient, parameter and average; writes the last two
    assert memory.moved >= memory.least


def made_up(numbers: ModuleType, text: ModuleType, name: str) -> object:
    """Returns numbers of the right form without computing them."""
    group = numbers.Group(("one", "two"), (False, True))
    apart = ((0.0, 0.5, 2e-9), (0.5, 0.0, 0.123), (2e-9, 0.123, 0.0))
    return numbers.Numbers(
        followed=(numbers.Followed("optax_lamb", 3.1e-15), numbers.Followed("albert_lamb", 2e-7)),
        distances=tuple(
            numbers.Distances((group, group, group), apart, apart)
            for _ in text.SETTINGS.get(name, ())
        ),
        memory={"float32": numbers.Memory(8.0, 28.0, 40.0)},
    )


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_a_page_has_every_section(numbers: ModuleType, text: ModuleType, name: str) -> None:
    entry = registry.get(name)
    page = text.page(entry, made_up(numbers, text, name))
    assert page.startswith(f"# {name}\n")
    for argument in inspect.signature(entry.constructor).parameters:
        assert f"| `{argument}` | " in page
    assert entry.example in page
    assert entry.variant.rstrip(".") in page
    assert "| optax 0.2.8 optax.lamb | float64 | 1 | 3.1e-15 | 14 |" in page
    assert "| float32 | 8 | 28 | 40 |" in page
    if name in text.SETTINGS:
        assert "| **B**: one, two † | 50 % (50 %) |   | 12 % (12 %) |" in page
        assert "2e-7 % (2e-7 %)" in page
    # All rows of a table have the same number of cells.
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_formulas_have_balanced_brackets_and_explain_their_symbols(text: ModuleType) -> None:
    assert set(text.FORMULAS) <= set(registry.OPTIMIZERS)
    for name, lines in text.FORMULAS.items():
        formula = text._formula(registry.get(name))
        for left, right in ("{}", "()", (r"\begin", r"\end"), (r"\left", r"\right")):
            of_lines = " ".join(lines).replace(r"\leftarrow", "")
            assert of_lines.count(left) == of_lines.count(right), (name, left)
        explanation = formula.partition("Here ")[2]
        used = set(re.findall(r"\\(?:eta|beta_1|beta_2|epsilon|lambda|alpha|tau)\b", formula))
        assert all(rf"\({letter}\) is" in explanation for letter in used), name


def test_an_optimizer_without_latex_shows_its_docstring(
    text: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "FORMULAS", {})
    assert text._formula(registry.get("adam")) == f"```text\n{registry.get('adam').formula}\n```"


def test_ports_with_known_defects_are_found(text: ModuleType) -> None:
    found = {
        name
        for entry in registry.OPTIMIZERS.values()
        for name, port in text.ports_of(entry)
        if text.defect(port)
    }
    assert {
        "ports.lifeiteng.LookaheadOptimizer",
        "ports.timm.Lookahead",
        "ports.pytorch_optimizer.Ranger",
    } <= found
    assert "ports.torch.AdamW" not in found


def test_a_defect_is_described_by_its_first_and_last_sentences(text: ModuleType) -> None:
    def port() -> None:
        """Goes uphill.

        ::

            x <- x + g

        It has the wrong sign. Repaired: `sgd`.

        Args:
          none: at all
        """

    assert text.defect(port) == "Goes uphill.\nIt has the wrong sign. Repaired: `sgd`."


def test_the_overview_has_a_row_for_each_optimizer(numbers: ModuleType, text: ModuleType) -> None:
    entries = list(registry.OPTIMIZERS.values())
    rows = text.overview(entries, {e.name: made_up(numbers, text, e.name) for e in entries})
    for entry, row in zip(entries, rows.splitlines()[2:], strict=True):
        assert row.startswith(f"| [{entry.name}]({entry.name}.md) | ")
    assert "| 14; 6 in float32 |" in rows


def test_numbers_are_cached_until_the_package_changes(
    numbers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "new" / "numbers.json"
    computed = []

    def once(name: str) -> object:
        computed.append(name)
        return numbers.Numbers((numbers.Followed("optax_lamb", 1e-15),), (), {})

    monkeypatch.setattr(numbers, "_numbers", once)
    first = numbers.numbers(["lamb"], cache)
    assert numbers.numbers(["lamb"], cache) == first
    assert computed == ["lamb"]
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "key": "of another package"}))
    assert numbers.numbers(["lamb"], cache) == first
    assert computed == ["lamb", "lamb"]


def test_numbers_compare_with_a_recorded_trajectory(
    numbers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "SETTINGS", {})
    monkeypatch.setattr(numbers, "memory", lambda entry, dtype: numbers.Memory(0.0, 0.0, 0.0))
    (followed,) = numbers.numbers(["momentum"])["momentum"].followed
    case = recorded.get(followed.case)
    (comparison,) = numbers.catalogue.comparisons("momentum")
    expected = follow(case, comparison.constructor, comparison.arguments)
    assert followed.difference == expected.difference

"""Tests the contents of the registry, and the proofs that each optimizer is correct.

Every optimizer has an independent implementation in ``tests/reference``, which a test in
``tests/optimizers`` compares with it in float64. Recorded trajectories of other people's code are
further proofs, where they exist.
"""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

import optim_zoo
from optim_zoo import recorded, registry
from optim_zoo.recorded.agreement import follow
from optim_zoo.recorded.proofs import PROOFS, Proof
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64

pytestmark = pytest.mark.usefixtures("quick_to_compile")

TESTS = Path(__file__).parent
entries = pytest.mark.parametrize(
    "entry", registry.OPTIMIZERS.values(), ids=lambda entry: entry.name
)
EVERY_PROOF = [
    pytest.param(name, proof, id=f"{name}-{proof.case}")
    for name, proofs_of_name in PROOFS.items()
    for proof in proofs_of_name
]


def test_every_optimizer_is_registered() -> None:
    """Every file of ``optim_zoo/optimizers`` is an optimizer of the registry."""
    files = (TESTS.parent / "optim_zoo" / "optimizers").glob("*.py")
    assert list(registry.OPTIMIZERS) == sorted({file.stem for file in files} - {"__init__"})


@entries
def test_an_entry_is_complete(entry: registry.Entry) -> None:
    assert registry.get(entry.name) is entry
    assert getattr(optim_zoo, entry.name) is entry.constructor
    first, second, *_ = inspect.signature(entry.constructor).parameters
    assert first == "learning_rate" or entry.wraps
    assert not entry.wraps or second in ("learning_rate", "sync_period")
    assert re.search(r"arXiv \d{4}\.\d{4,5}|, (19|20)\d\d$| 20\d\d$", entry.paper)
    for text in (entry.description, entry.variant):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")


@entries
def test_the_formula_of_an_entry_is_in_the_docstring(entry: registry.Entry) -> None:
    assert entry.formula
    assert "<-" in entry.formula
    assert not entry.formula.startswith(" ")
    for line in entry.formula.splitlines():
        assert line.strip() in (entry.constructor.__doc__ or "")


@entries
def test_the_example_of_an_entry_makes_an_optimizer(entry: registry.Entry) -> None:
    assert entry.example.startswith(f"optim_zoo.{entry.name}(")
    tx = eval(entry.example, {"optim_zoo": optim_zoo})
    assert isinstance(tx, optax.GradientTransformation)


# Proofs.


@entries
def test_every_optimizer_has_an_independent_reference(entry: registry.Entry) -> None:
    """The reference imports NumPy, and neither JAX, optax nor this package."""
    source = ast.parse((TESTS / "reference" / f"{entry.name}.py").read_text("utf-8"))
    nodes = [node for node in ast.walk(source) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {
        name.partition(".")[0]
        for node in nodes
        for name in (
            [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert "numpy" in imported
    assert imported <= {"numpy"} | sys.stdlib_module_names


@entries
def test_the_tests_of_every_optimizer_use_its_reference(entry: registry.Entry) -> None:
    """One test of each optimizer ``x`` compares it with ``reference.x`` by `assert_same_path`."""
    source = ast.parse((TESTS / "optimizers" / f"test_{entry.name}.py").read_text("utf-8"))
    imports = [
        ast.unparse(node) for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert f"from tests.reference import {entry.name} as reference" in imports
    tests = [
        ast.unparse(node)
        for node in source.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert any(f"reference.{entry.name}(" in test and "assert_same_path(" in test for test in tests)


@pytest.mark.parametrize("name", [n for n, entry in registry.OPTIMIZERS.items() if not entry.wraps])
def test_every_optimizer_follows_its_reference_with_default_arguments(
    name: str, rng: np.random.Generator
) -> None:
    """Both must have the same defaults. Optimizers that wrap another one have their own tests."""
    # 13 steps are two periods of Lookahead. No optimizer excludes these paths by default.
    params, grads = problem(rng, steps=13)
    paths = dict(zip(params, "abcdef", strict=True))
    params, *grads = ({paths[k]: x for k, x in tree.items()} for tree in (params, *grads))
    constructor = registry.get(name).constructor
    trajectory = train_in_float64(lambda: constructor(schedule), params, grads)
    reference = getattr(importlib.import_module(f"tests.reference.{name}"), name)
    assert_same_path(trajectory, reference(params, grads, learning_rate=schedule))


def test_every_proof_is_for_a_registered_optimizer() -> None:
    assert PROOFS.keys() <= registry.OPTIMIZERS.keys()


@pytest.mark.parametrize(("name", "proof"), EVERY_PROOF)
def test_every_optimizer_agrees_with_its_proof(name: str, proof: Proof) -> None:
    case = recorded.get(proof.case)
    agreement = follow(case, f"optim_zoo.{name}", proof.arguments)
    assert agreement.agrees, agreement.difference


def test_an_unknown_name_suggests_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lamp'; did you mean lamb"):
        registry.get("lamp")
    with pytest.raises(ValueError, match=r"expected adadelta, adagrad, .*, sgd"):
        registry.get("???")


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        registry.OPTIMIZERS["x"] = registry.OPTIMIZERS["lamb"]  # type: ignore[index]

import inspect
import re

import optax
import pytest

import optim_zoo
from optim_zoo import optimizers, recorded, registry
from optim_zoo.recorded.agreement import follow
from optim_zoo.recorded.proofs import PROOFS, Proof

entries = pytest.mark.parametrize(
    "entry", registry.OPTIMIZERS.values(), ids=lambda entry: entry.name
)
EVERY_PROOF = [
    pytest.param(name, proof, id=f"{name}-{proof.case}")
    for name, proofs_of_name in PROOFS.items()
    for proof in proofs_of_name
]


def test_every_optimizer_is_registered() -> None:
    assert list(registry.OPTIMIZERS) == sorted(optimizers.__all__)


@entries
def test_entry(entry: registry.Entry) -> None:
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
def test_formula_is_that_of_the_docstring(entry: registry.Entry) -> None:
    assert entry.formula
    assert "<-" in entry.formula
    assert not entry.formula.startswith(" ")
    for line in entry.formula.splitlines():
        assert line.strip() in (entry.constructor.__doc__ or "")


@entries
def test_example_makes_an_optimizer(entry: registry.Entry) -> None:
    assert entry.example.startswith(f"optim_zoo.{entry.name}(")
    tx = eval(entry.example, {"optim_zoo": optim_zoo})
    assert isinstance(tx, optax.GradientTransformation)


@entries
def test_every_optimizer_is_proved(entry: registry.Entry) -> None:
    of_its_own = [c for c in recorded.cases() if c.constructor == f"optim_zoo.{entry.name}"]
    assert of_its_own or PROOFS[entry.name]


def test_proofs_are_of_registered_optimizers() -> None:
    assert PROOFS.keys() <= registry.OPTIMIZERS.keys()


@pytest.mark.parametrize(("name", "proof"), EVERY_PROOF)
def test_proof(name: str, proof: Proof) -> None:
    case = recorded.get(proof.case)
    agreement = follow(case, f"optim_zoo.{name}", proof.arguments)
    assert agreement.agrees, agreement.difference


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lamp'; did you mean lamb"):
        registry.get("lamp")
    with pytest.raises(ValueError, match=r"expected adadelta, adagrad, .*, sgd"):
        registry.get("???")


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        registry.OPTIMIZERS["x"] = registry.OPTIMIZERS["lamb"]  # type: ignore[index]

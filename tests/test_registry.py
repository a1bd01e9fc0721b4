import inspect
import re

import pytest

import optim_zoo
from optim_zoo import optimizers, registry


def test_every_optimizer_is_registered() -> None:
    assert list(registry.OPTIMIZERS) == sorted(optimizers.__all__)


@pytest.mark.parametrize("entry", registry.OPTIMIZERS.values(), ids=lambda entry: entry.name)
def test_entry(entry: registry.Entry) -> None:
    assert registry.get(entry.name) is entry
    assert getattr(optim_zoo, entry.name) is entry.constructor
    assert entry.constructor.__name__ == entry.name
    assert next(iter(inspect.signature(entry.constructor).parameters)) == "learning_rate"
    assert re.fullmatch(r"arXiv \d{4}\.\d{4,5}", entry.paper)
    for text in (entry.description, entry.variant):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lamp'; did you mean lamb"):
        registry.get("lamp")
    with pytest.raises(ValueError, match="adamw, bert_adamw, lamb"):
        registry.get("???")


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        registry.OPTIMIZERS["x"] = registry.OPTIMIZERS["lamb"]  # type: ignore[index]

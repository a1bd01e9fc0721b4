"""Checks that the docstrings of public transformations and schedules are complete."""

import inspect
import re
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest

import optim_zoo
from optim_zoo import accumulation, averaging, guards, metrics, precision, registry, schedules

SECTIONS = ("Args", "Returns", "Raises", "Example")
PARAMS = {"stack": jnp.ones((2, 3, 4)), "norm": jnp.ones(4), "bias": jnp.ones(4)}
# Words that docs/vocabulary.md and plain English replace.
UNWANTED = re.compile(r"\b(told|beside|so far|as it is|goes on from|borne|lies in)\b")
SCHEDULES = [
    schedules.bert_warmup_polynomial, schedules.constant, schedules.exponential,
    schedules.lamb_recipe, schedules.mixed_batch, schedules.scale_by_square_root,
    schedules.scale_linearly,
    schedules.warmup_cosine, schedules.warmup_polynomial,
]  # fmt: skip
PUBLIC = {name: getattr(optim_zoo, name) for name in registry.__all__}
PUBLIC |= {f"schedules.{schedule.__name__}": schedule for schedule in SCHEDULES}
PUBLIC |= {
    "accumulation.accumulate": accumulation.accumulate,
    "averaging.average_parameters": averaging.average_parameters,
    "averaging.average_uniformly": averaging.average_uniformly,
    "guards.skip_nonfinite": guards.skip_nonfinite,
    "guards.skip_spikes": guards.skip_spikes,
    "metrics.with_metrics": metrics.with_metrics,
    "precision.master_weights": precision.master_weights,
    "precision.stochastic_rounding": precision.stochastic_rounding,
    "precision.store_state": precision.store_state,
}
every = pytest.mark.parametrize("name", PUBLIC)


def _sections(name: str) -> dict[str, str]:
    """Returns the dedented text of each section, with the summary under the key ``""``."""
    doc = inspect.getdoc(PUBLIC[name]) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    titles, texts = parts[1::2], parts[2::2]
    assert [s for s in SECTIONS if s in titles] == titles
    return {"": parts[0], **{t: textwrap.dedent(x) for t, x in zip(titles, texts, strict=True)}}


def _items(section: str) -> list[str]:
    return re.findall(r"^\*?(\w+): [\w`]", section, re.MULTILINE)


@every
def test_every_argument_is_described(name: str) -> None:
    sections = _sections(name)
    assert _items(sections.get("Args", "")) == list(inspect.signature(PUBLIC[name]).parameters)
    assert sections["Returns"].strip()
    errors = _items(sections["Raises"])
    assert set(errors) <= {"ArgumentValueError", "ArgumentTypeError"}
    assert errors


@every
def test_the_summary_is_one_sentence_that_begins_with_a_verb(name: str) -> None:
    summary, blank, *_ = [*_sections(name)[""].splitlines(), ""]
    assert re.fullmatch(r"[A-Z][a-z]+s .*\.", summary)
    assert ". " not in summary
    assert not blank
    assert not UNWANTED.search(inspect.getdoc(PUBLIC[name]) or "")


@every
def test_the_example_makes_a_transformation(name: str) -> None:
    code = re.fullmatch(r"```python\n(.*)```\n?", _sections(name)["Example"], re.DOTALL)
    assert code
    assert f"optim_zoo.{name}(" in code[1]
    names = {"optim_zoo": optim_zoo, "optax": optax, "jax": jax}
    exec(code[1], names)
    state = jax.eval_shape(names["tx"].init, PARAMS)
    assert isinstance(names["tx"], optax.GradientTransformation)
    assert state is not None

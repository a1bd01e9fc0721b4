import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import adamw, bert_adamw
from tests.optimizers.problems import assert_same_path, problem, schedule, train_in_float64
from tests.reference import bert_adamw as reference

PARAMS = {
    "encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "LayerNorm": {"scale": jnp.ones(2)},
    "layer_norm_1": {"scale": jnp.ones(2)},
}
GRADS = jax.tree.map(lambda x: 0.01 * x, PARAMS)


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        ({}, {"undecayed": ("bias",)}),
        (
            {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3,
             "exclude_from_weight_decay": ["^conv$"]},
            {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.3, "undecayed": ("conv",)},
        ),
    ],
)  # fmt: skip
def test_steps_follow_the_reference(rng: np.random.Generator, ours: dict, papers: dict) -> None:
    params, grads = problem(rng)
    trajectory = train_in_float64(lambda: bert_adamw(schedule, **ours), params, grads)
    assert_same_path(
        trajectory, reference.bert_adamw(params, grads, learning_rate=schedule, **papers)
    )


def test_bert_adamw_equals_adamw_without_bias_correction(rng: np.random.Generator) -> None:
    params, grads = problem(rng)
    assert_same_path(
        train_in_float64(
            lambda: bert_adamw(schedule, weight_decay=0.3, exclude_from_weight_decay=()),
            params,
            grads,
        ),
        train_in_float64(
            lambda: adamw(schedule, eps=1e-6, weight_decay=0.3, bias_correction=False),
            params,
            grads,
        ),
    )


def test_the_defaults_are_those_of_the_code_of_bert() -> None:
    plain = adamw(0.1, 0.9, 0.999, 1e-6, 0.01, bias_correction=False,
                  exclude_from_weight_decay=["LayerNorm", "layer_norm", "bias"])  # fmt: skip
    bert = bert_adamw(0.1)
    jax.tree.map(
        np.testing.assert_array_equal,
        bert.update(GRADS, bert.init(PARAMS), PARAMS)[0],
        plain.update(GRADS, plain.init(PARAMS), PARAMS)[0],
    )


def test_without_bias_correction_the_first_step_is_larger() -> None:
    """The step is (1 - b1) g / sqrt((1 - b2) g^2) = 0.1 / sqrt(0.001), that of Adam is 1."""
    tx = bert_adamw(1.0, eps=0.0, weight_decay=0.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.1 / np.sqrt(0.001), rtol=1e-5)


def test_the_default_exclusions_need_not_match() -> None:
    params = {"w": jnp.ones(2)}
    tx = bert_adamw(0.1)
    tx.update(params, tx.init(params), params)

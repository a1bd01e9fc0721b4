import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_zoo import sgd
from optim_zoo.errors import UserError
from optim_zoo.train import config_file, critical_batch_size, job, loop, records
from optim_zoo.wrappers.accumulation import accumulate
from tests.train.one_device import OneDevice, use_devices

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = Path(__file__).parents[2] / "configs" / "digits_lars.toml"
MEASURED = ["train.noise_scale=true", "output.log_every=1", "output.evaluate_every=100"]


def _config(*overrides: str) -> Any:
    return config_file.load(CONFIG, [*MEASURED, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("train.batch_size=64", "train.micro_batches=4"),
            id="micro-batches",
            marks=pytest.mark.slow,
        ),
        pytest.param(("train.batch_size=16", "accumulation.every=4"), id="accumulation"),
    ],
)
def test_a_run_logs_draws_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """The weights of digits count images, so that both figures are the same."""
    use_devices(monkeypatch, OneDevice())
    config = _config(*overrides, "train.steps=3", "schedule.warmup_steps=1")
    figures = loop.run(config, tmp_path / "run")
    seen = records.read(tmp_path / "run" / "metrics.jsonl").train
    steps, scales = seen["gradient_noise_scale"]
    np.testing.assert_array_equal(steps, [1, 2, 3])
    assert (scales > 0).all()
    np.testing.assert_allclose(seen["critical_batch_size"][1], scales, rtol=1e-6)  # a factor of 1
    text = figures["estimated critical batch size"]
    assert re.fullmatch(r"[\d.,]+ examples", text)
    assert "estimated critical batch size" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "critical_batch_size.png").exists()


def test_weights_are_converted_to_examples() -> None:
    """Two batches of 64 examples in a step; each example has 10 units of weight on average."""
    config = _config("train.batch_size=64", "accumulation.every=2")
    tx = accumulate(sgd(0.1), 2, noise_scale=True)
    state = tx.init(jnp.ones(2))
    for gradient, weight in (([1.0, 1.0], 600.0), ([1.0, 1.5], 680.0)):
        _, state = tx.update(jnp.array(gradient), state, jnp.ones(2), weight=weight)
    (found,) = critical_batch_size.in_examples(config, 1, state).values()
    assert float(found) == pytest.approx(float(state.inner.noise_scale) / 10, rel=1e-6)
    assert critical_batch_size.in_examples(config, 1, sgd(0.1).init(jnp.ones(2))) == {}


@pytest.mark.parametrize(
    ("examples", "weights", "unit", "text"),
    [
        (1234.4, 20000.0, "masked tokens", "1,234 examples (20,000 masked tokens)"),
        (1234.4, 1234.4, "examples", "1,234 examples"),
        (0.1234, 0.5, "", "0.12 examples"),
        (np.nan, np.nan, "", "not measured: the noise of the gradients hides their mean"),
    ],
)
def test_texts(examples: float, weights: float, unit: str, text: str) -> None:
    steps = np.arange(2.0)
    columns = {"critical_batch_size": examples, "gradient_noise_scale": weights}
    train = {name: (steps, np.array([1.0, value])) for name, value in columns.items()}
    assert critical_batch_size.describe(records.Records(steps, train, {}, {}), unit) == text
    assert critical_batch_size.describe(records.Records(steps, {}, {}, {}), unit) == ""


@pytest.mark.parametrize(
    ("devices", "overrides", "refused"),
    [
        (1, (), True),
        (1, ("train.micro_batches=2", "stages.0.micro_batches=1", "stages.0.steps=40"), True),
        (2, (), False),
        (1, ("train.micro_batches=2",), False),
        (1, ("accumulation.every=2",), False),
        (1, ("train.noise_scale=false",), False),
    ],
)
def test_a_step_with_one_gradient_is_refused(
    devices: int, overrides: tuple[str, ...], refused: bool
) -> None:
    config = _config(*overrides)
    if refused:
        with pytest.raises(UserError, match=r"train\.noise_scale=true .* one device has only one"):
            job.check_batches(config, devices)
    else:
        job.check_batches(config, devices)


def test_it_is_off_by_default() -> None:
    assert not config_file.load(CONFIG).train.noise_scale
    assert jax.tree.leaves(critical_batch_size.in_examples(_config(), 1, ())) == []

"""The estimated critical batch size of a run: its gradient noise scale, converted to examples."""

import math

import jax
import numpy as np

from optim_zoo.errors import UserError
from optim_zoo.train.config import Config
from optim_zoo.train.records import Records
from optim_zoo.tree import Tree
from optim_zoo.wrappers.noise_scale import NoiseScaleState, noise_scale_states


def check(config: Config, devices: int) -> None:
    """Checks that every step has several gradients to compare, where ``train.noise_scale`` is set.

    Raises:
      UserError: a stage has steps of one micro-batch on one device.
    """
    if not config.train.noise_scale or config.accumulation.every > 1 or devices > 1:
        return
    if any(stage.micro_batches == 1 for stage in config.stages):
        raise UserError(
            "train.noise_scale=true compares the gradients within a step, and a step with "
            "train.micro_batches=1 and accumulation.every=1 on one device has only one: set one "
            "of them to 2 or more"
        )


def in_examples(config: Config, done: int, state: Tree) -> dict[str, jax.Array]:
    """Returns ``critical_batch_size``, and nothing where the noise scale is not measured.

    The noise scale counts weights, such as masked tokens. It is multiplied by the examples of step
    ``done`` (from 1) and divided by the sum of their weights.

    Args:
      config: the config of the run.
      done: the number of steps made.
      state: the optimizer state after them. In mode ``pmap`` the result has an axis of devices.
    """
    states: list[NoiseScaleState] = noise_scale_states(state)
    if not states:
        return {}
    stage = config.stages[config.stage_of(done - 1)]
    examples = stage.batch_size * config.accumulation.every
    return {"critical_batch_size": states[0].noise_scale * examples / states[0].spread.weight}


def describe(seen: Records, weight_unit: str) -> str:
    """Returns the last estimate as text, or "" where the noise scale is not measured.

    Args:
      seen: the metrics of the run.
      weight_unit: what the weights of the loss count, or "".
    """
    if "critical_batch_size" not in seen.train:
        return ""
    examples, weights = (
        float(seen.train[name][1][-1]) for name in ("critical_batch_size", "gradient_noise_scale")
    )
    if not math.isfinite(examples):
        return "not measured: the noise of the gradients hides their mean"
    same = weight_unit in ("", "examples")
    return f"{_rounded(examples)} examples" + (
        "" if same else f" ({_rounded(weights)} {weight_unit})"
    )


def _rounded(value: float) -> str:
    """Returns two significant digits of a small number, and a whole number otherwise."""
    return (
        f"{value:,.0f}" if value >= 10 else np.format_float_positional(value, 2, fractional=False)
    )

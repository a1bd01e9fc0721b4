"""The fit of steps-to-target against batch size, and its bootstrap intervals over seeds.

::

    S(B) = S_min (1 + B_crit / B)

S_min is the number of steps with an unlimited batch, B_crit the batch size at which twice as many
are needed (McCandlish et al., arXiv 1812.06162, section 2.3). The fit is linear in 1/B and
minimizes the relative errors, as steps vary by orders of magnitude.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optim_zoo.train.records import Floats

LEAST_BATCH_SIZES = 3  # two determine the curve exactly, so that nothing would be fitted


class Fit(NamedTuple):
    """The two parameters of the curve, each with a 95 % interval, or None with one seed."""

    least_steps: float  # S_min
    critical_batch: float  # B_crit
    least_steps_interval: tuple[float, float] | None
    critical_batch_interval: tuple[float, float] | None

    def steps(self, batch_sizes: Floats) -> Floats:
        """Returns S(B)."""
        return self.least_steps * (1 + self.critical_batch / batch_sizes)


def fit(steps: Mapping[int, Sequence[float]], resamples: int = 1000) -> Fit | str:
    """Fits the curve to the steps of each batch size and seed.

    Args:
      steps: batch size -> the steps to the target, one for each seed.
      resamples: the number of bootstrap samples. Each draws as many seeds as there are, with
        replacement and independently for every batch size.

    Returns:
      The fit, or the reason why there is none, as a clause.
    """
    if len(steps) < LEAST_BATCH_SIZES:
        return (
            f"the target was reached at {len(steps)} batch sizes with a tuned learning rate, and a "
            "fit needs three"
        )
    batches = np.array(sorted(steps), np.float64)
    values = [np.array(steps[int(batch)], np.float64) for batch in batches]
    best = _line(batches, np.array([each.mean() for each in values]))
    if best is None:
        return "the steps do not fall with the batch size as S_min (1 + B_crit/B) does"
    if min(map(len, values)) < 2:
        return Fit(*best, None, None)
    rng = np.random.default_rng(0)
    drawn = [
        _line(batches, np.array([rng.choice(each, len(each)).mean() for each in values]))
        for _ in range(resamples)
    ]
    found = np.array([pair for pair in drawn if pair is not None])
    low, high = np.percentile(found, [2.5, 97.5], axis=0)
    return Fit(*best, (float(low[0]), float(high[0])), (float(low[1]), float(high[1])))


def _line(batches: Floats, steps: Floats) -> tuple[float, float] | None:
    """Returns S_min and B_crit, or None where the best line has no positive ones."""
    design = np.stack([np.ones_like(batches), 1 / batches], axis=1) / steps[:, None]
    (least, slope), *_ = np.linalg.lstsq(design, np.ones_like(steps), rcond=None)
    return (float(least), float(slope / least)) if least > 0 and slope > 0 else None


def crossing(steps: Floats, values: Floats, target: float) -> float | None:
    """Returns the step at which a metric first reaches a target from above, or None.

    Between two evaluations the metric is taken as linear.
    """
    reached = np.flatnonzero(values <= target)
    if not reached.size:
        return None
    at = int(reached[0])
    if at == 0:
        return float(steps[0])
    share = (values[at - 1] - target) / (values[at - 1] - values[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))

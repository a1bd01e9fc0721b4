"""The rule by which a sweep searches for a learning rate.

First every rate of a coarse grid is tried. Then, until the budget of rates is spent:

- If the best rate has tried rates on both sides, the search tries the geometric means of it and of
  either neighbour; if one rate is left in the budget, that towards the better neighbour.
- If the best rate is at an end of the tried range, the search extends the range there by the ratio
  of the outermost two rates of the coarse grid.
- If no run has ended with a finite metric, the search extends the range downwards.

Every optimizer gets the same number of rates, and the rule reads nothing but the metric of each
rate, so that a sweep that was stopped continues with the same rates.
"""

import math
from collections.abc import Mapping, Sequence

Scores = Mapping[float, float]
"""Learning rate -> metric. A smaller value is better, and a diverged run has infinity."""


def next_rates(scores: Scores, coarse: Sequence[float], runs: int) -> list[float]:
    """Returns the learning rates to try next, which is empty once the budget is spent.

    Args:
      scores: the metric of every rate that was tried.
      coarse: the coarse grid, in ascending order; at least two positive rates.
      runs: the budget, the number of rates to try in all; at least as many as ``coarse`` has.
    """
    missing = [rate for rate in coarse if rate not in scores]
    if missing:
        return missing
    left = runs - len(scores)
    if left <= 0:
        return []
    rates, at = sorted(scores), _best_index(scores)
    if at is None or at == 0:
        return [_rounded(rates[0] * coarse[0] / coarse[1])]
    if at == len(rates) - 1:
        return [_rounded(rates[-1] * coarse[-1] / coarse[-2])]
    below, best, above = rates[at - 1 : at + 2]
    sides = sorted((below, above), key=lambda rate: (scores[rate], rate))
    tried = [_rounded(math.sqrt(best * side)) for side in sides[:left]]
    return sorted({rate for rate in tried if rate not in scores})


def best_rate(scores: Scores) -> tuple[float, bool] | None:
    """Returns the best learning rate, and whether rates were tried on both sides of it.

    Of rates with equal metrics the smallest is the best. The result is None if no run has ended
    with a finite metric.
    """
    at = _best_index(scores)
    return None if at is None else (sorted(scores)[at], 0 < at < len(scores) - 1)


def _best_index(scores: Scores) -> int | None:
    """Returns the index of the best rate among the sorted rates, if one has a finite metric."""
    rates = sorted(scores)
    finite = [index for index, rate in enumerate(rates) if math.isfinite(scores[rate])]
    return min(finite, key=lambda index: scores[rates[index]], default=None)


def _rounded(rate: float) -> float:
    """Rounds to four significant digits, so that the rates are readable in tables and names."""
    return float(f"{rate:.4g}")

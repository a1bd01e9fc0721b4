import math

import pytest

from optim_zoo.lab import search

COARSE = (0.01, 0.1, 1.0)


def searched(best: float, runs: int) -> dict[float, float]:
    scores: dict[float, float] = {}
    while due := search.next_rates(scores, COARSE, runs):
        scores |= {rate: abs(math.log10(rate / best)) for rate in due}
    return scores


@pytest.mark.parametrize("runs", [3, 4, 5, 6, 9])
@pytest.mark.parametrize("best", [1e-5, 0.03, 0.1, 0.5, 300.0])
def test_every_search_spends_its_budget(best: float, runs: int) -> None:
    assert len(searched(best, runs)) == runs


def test_an_interior_best_is_refined_towards_both_neighbours() -> None:
    scores = {0.01: 2.0, 0.1: 1.0, 1.0: 3.0}
    assert search.next_rates(scores, COARSE, 9) == [0.03162, 0.3162]
    assert search.next_rates(scores, COARSE, 4) == [0.03162]  # the better neighbour


def test_the_range_grows_where_the_best_is_at_its_edge() -> None:
    assert search.next_rates({0.01: 1.0, 0.1: 2.0, 1.0: 3.0}, COARSE, 9) == [0.001]
    assert search.next_rates({0.01: 3.0, 0.1: 2.0, 1.0: 1.0}, COARSE, 9) == [10.0]
    diverged = dict.fromkeys(COARSE, math.inf)
    assert search.next_rates(diverged, COARSE, 9) == [0.001]
    assert search.best_rate(diverged) is None


def test_the_best_rate_comes_close_and_its_edge_is_reported() -> None:
    rate, interior = search.best_rate(searched(0.5, 9)) or (0.0, False)
    assert interior
    assert rate == pytest.approx(0.5, rel=0.3)  # nine rates of four per decade
    assert search.best_rate(searched(1e9, 5)) == (100.0, False)
    # A diverged neighbour is a tried one.
    assert search.best_rate({0.01: 2.0, 0.1: 1.0, 1.0: math.inf}) == (0.1, True)

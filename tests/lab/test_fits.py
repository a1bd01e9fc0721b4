import numpy as np
import pytest

from optim_zoo.lab import fits


def curve(batch: float) -> float:
    return 50 * (1 + 300 / batch)


def test_the_fit_recovers_an_exact_curve() -> None:
    found = fits.fit({batch: [curve(batch)] for batch in (32, 128, 512)})
    assert isinstance(found, fits.Fit)
    assert found.least_steps == pytest.approx(50)
    assert found.critical_batch == pytest.approx(300)
    assert found.critical_batch_interval is None
    assert found.steps(np.array([64.0])) == pytest.approx(curve(64))


def test_the_interval_contains_the_truth_in_most_samples() -> None:
    """A bootstrap over 16 seeds covers a little less than its nominal 95 %."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(40):
        steps = {
            batch: list(curve(batch) * (1 + 0.1 * rng.normal(size=16)))
            for batch in (32, 128, 512, 2048)
        }
        found = fits.fit(steps, resamples=100)
        assert isinstance(found, fits.Fit)
        low, high = found.critical_batch_interval or (0, 0)
        covered += low < 300 < high
    assert 32 <= covered < 40  # 80 % and more, and not an interval that covers everything


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({32: [5.0], 64: [4.0]}, "2 batch sizes"),
        ({32: [5.0], 64: [6.0], 128: [7.0]}, "do not fall"),
    ],
)
def test_data_that_do_not_allow_a_fit_have_a_reason(
    steps: dict[int, list[float]], expected: str
) -> None:
    found = fits.fit(steps)
    assert isinstance(found, str)
    assert expected in found


def test_the_crossing_lies_between_two_evaluations() -> None:
    steps, values = np.array([10.0, 20.0, 30.0]), np.array([3.0, 1.0, 2.0])
    assert fits.crossing(steps, values, 2.0) == 15
    assert fits.crossing(steps, values, 4.0) == 10
    assert fits.crossing(steps, values, 0.5) is None

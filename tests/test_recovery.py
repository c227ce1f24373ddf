"""Slope and forecast, on curves whose answer is known; and what training does with them, exactly across a resume."""

from __future__ import annotations

import numpy as np
import pytest

from compress.recovery import forecast, has_levelled, slope, steps_after_stop
from compress.schedules import learning_rate_factor
from compress.settings import Curve


def curve(a: float, b: float, c: float, tokens: np.ndarray) -> list[tuple[float, float]]:
    return [(float(t), a + b * float(t) ** -c) for t in tokens]


def test_the_slope_of_a_line_is_its_own_whatever_its_level_and_its_noise_evens_out() -> None:
    line = [(t, 3 - 0.25 * t / 1e6) for t in (1e6, 2e6, 5e6, 6e6)]
    assert slope(line) == pytest.approx(-0.25)
    assert slope([(t, kl + 7) for t, kl in line]) == pytest.approx(-0.25)
    noisy = [(t, kl + noise) for (t, kl), noise in zip(line, (0.01, -0.01, -0.01, 0.01), strict=True)]
    assert slope(noisy) == pytest.approx(-0.25, abs=0.01)


def test_levelled_looks_at_the_last_points_only_and_needs_them_all() -> None:
    falling = [(t * 1e6, 2 - 0.5 * t) for t in range(3)]
    level = [(t * 1e6, 0.9 - 0.001 * t) for t in range(3, 7)]
    assert not has_levelled(falling, 3, 0.01)
    assert has_levelled(falling + level, 4, 0.01)
    assert not has_levelled(falling + level, 4, 0.0005), "it falls by 0.001 a million"
    assert not has_levelled(falling + level, 6, 0.01), "the steep part is within six"
    assert not has_levelled(level, 5, 0.01)
    assert has_levelled([(t, -kl) for t, kl in falling], 3, 0.01), "a KL that rises has levelled"


@pytest.mark.parametrize(("a", "b", "c"), [(0.3, 40.0, 0.35), (0.0, 3.0, 0.1), (0.1, 1e6, 1.0), (0.5, 0.0, 1.0)])
def test_a_power_law_is_foretold_from_its_first_fiftieth(a: float, b: float, c: float) -> None:
    points = curve(a, b, c, np.linspace(2e5, 2e6, 10))
    end = a + b * 1e8**-c
    assert forecast(points, 1e8) == pytest.approx(end, rel=0.03)
    assert forecast(points[:3], 1e8) is None


def test_a_forecast_with_noise_stays_near_and_never_below_nothing() -> None:
    rng = np.random.default_rng(0)
    points = [(t, kl * (1 + 0.01 * rng.standard_normal())) for t, kl in curve(0.2, 40, 0.35, np.linspace(2e5, 4e6, 40))]
    assert forecast(points, 1e8) == pytest.approx(0.2 + 40 * 1e8**-0.35, rel=0.25)
    steep = [(t * 1e6, 1 - 0.24 * t) for t in range(1, 5)]  # a straight line to below zero
    found = forecast(steep, 1e9)
    assert found is not None
    assert 0 <= found < 0.04
    rising = [(t * 1e6, 1 + 0.1 * t) for t in range(1, 5)]
    assert forecast(rising, 1e9) == pytest.approx(1.25)


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("done", [20, 37, 100])
def test_the_decay_after_a_stop_is_that_of_a_run_planned_so(warmup: int, share: float, done: int) -> None:
    last = steps_after_stop(done, warmup, share)
    rates = [learning_rate_factor(step, last, warmup, 0.1, Curve.wsd, share) for step in range(last)]
    assert rates[warmup:done] == [1.0] * (done - warmup), "what was done is what the plan had"
    assert min(rates[done : done + 2]) < 1
    assert rates[-1] == pytest.approx(0.1)
    assert last - done == pytest.approx(share * (last - warmup), abs=2), "the decay's share of the steps stays"

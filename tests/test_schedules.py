"""Curves of the learning rate and of a term's weight and temperature, over the steps of a phase."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.schedules import learning_rate_factor
from compress.settings import Curve, DistillConfig, TermConfig
from compress.training import terms_at

STEPS = st.integers(3, 200)


def _terms(curve: Curve, max_steps: int, warmup: int, share: float = 0.25) -> list[tuple[float, float]]:
    """(weight, temperature) of each step of a term that goes from 1 to 0.5 and from 2 to 4."""
    term = TermConfig(weight=1, weight_end=0.5, temperature=2, temperature_end=4, curve=curve)
    settings = DistillConfig(objectives=[term], warmup_steps=warmup, decay_share=share)
    found = [terms_at(settings, step, max_steps)[0] for step in range(max_steps)]
    return [(term.weight, term.temperature) for term in found]


@pytest.mark.parametrize("curve", [Curve.linear, Curve.cosine, Curve.wsd])
@given(max_steps=STEPS, warmup=st.integers(0, 20))
def test_a_term_starts_at_its_first_value_and_ends_at_its_last(curve: Curve, max_steps: int, warmup: int) -> None:
    found = _terms(curve, max_steps, min(warmup, max_steps - 2))
    assert found[0] == (1, 2)
    assert found[-1] == pytest.approx((0.5, 4))
    assert all(one[0] >= other[0] and one[1] <= other[1] for one, other in itertools.pairwise(found))


def test_curves_by_hand() -> None:
    """Five steps: 0, a quarter, a half, three quarters, all of the way; wsd goes in the last half of it."""
    assert [weight for weight, _ in _terms(Curve.linear, 5, 0)] == [1, 0.875, 0.75, 0.625, 0.5]
    cosine = [0.5 + 0.25 * (1 + math.cos(math.pi * n / 4)) for n in range(5)]
    assert [weight for weight, _ in _terms(Curve.cosine, 5, 0)] == pytest.approx(cosine)
    assert [weight for weight, _ in _terms(Curve.wsd, 5, 0, 0.5)] == pytest.approx([1, 1, 1, 0.75, 0.5])
    rates = [learning_rate_factor(step, 7, 2, 0.1, Curve.linear) for step in range(7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325, 0.1])
    assert {learning_rate_factor(step, 7, 2, 0.1, Curve.constant) for step in range(2, 7)} == {1}


@given(max_steps=STEPS, warmup=st.integers(0, 20), share=st.floats(0.05, 1))
def test_wsd_of_a_term_goes_when_the_learning_rate_does(max_steps: int, warmup: int, share: float) -> None:
    warmup = min(warmup, max_steps - 2)
    for step, (weight, _) in enumerate(_terms(Curve.wsd, max_steps, warmup, share)):
        if step >= warmup:
            factor = learning_rate_factor(step, max_steps, warmup, 0.5, Curve.wsd, share)
            assert weight == pytest.approx(factor)
        else:
            assert weight == 1

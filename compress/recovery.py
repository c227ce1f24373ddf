"""The recovery curve: how fast the student still nears its teacher, where that ends, and when to stop.

Pure functions of (tokens, KL) pairs, in tokens trained on and nats per token, in the order measured.
"""

# M measurements

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]
FORECAST_SHARE = 0.02  # of the tokens, after which the end is foretold
FORECAST_POINTS = 4  # three are fitted exactly by any curve of three numbers
_EXPONENTS = np.geomspace(0.02, 3.0, 60)


def slope(points: Sequence[Point]) -> float:
    """Nats per million tokens by which KL changes along the straight line nearest to the points; negative = it falls.

    At least two points at different tokens.
    """
    tokens_M, kl_M = np.asarray(points, dtype=np.float64).T
    millions_M = (tokens_M - tokens_M.mean()) / 1e6
    return float((millions_M * (kl_M - kl_M.mean())).sum() / (millions_M**2).sum())


def has_levelled(points: Sequence[Point], num_points: int, threshold: float) -> bool:
    """Whether KL fell slower than `threshold` nats per million tokens over the last num_points measurements."""
    return len(points) >= num_points and -slope(points[-num_points:]) < threshold


def forecast(points: Sequence[Point], at_tokens: float) -> float | None:
    """KL at `at_tokens` by the nearest curve a + b * tokens**-c with a, b >= 0, in least squares.

    For every c of a grid, and of a finer one around the best, a and b follow from linear algebra. None for fewer than
    FORECAST_POINTS. What a schedule still has in store (a decay, another phase) is not in the curve.
    """
    if len(points) < FORECAST_POINTS:
        return None
    tokens_M, kl_M = np.asarray(points, dtype=np.float64).T
    scaled_M, scaled = tokens_M / tokens_M[-1], at_tokens / tokens_M[-1]  # so that no power over- or underflows

    def fit(exponent: float) -> tuple[float, float]:
        """(sum of squared errors, the curve's end) of the best a and b."""
        falling_M = scaled_M**-exponent
        found = [(float(((a + b * falling_M - kl_M) ** 2).sum()), a + b * scaled**-exponent)
                 for a, b in _fits(falling_M, kl_M)]  # fmt: skip
        return min(found)

    best = min(_EXPONENTS.tolist(), key=lambda exponent: fit(exponent)[0])
    ratio = float(_EXPONENTS[1] / _EXPONENTS[0])
    finer = np.geomspace(best / ratio, best * ratio, 101).tolist()
    return min(fit(exponent) for exponent in finer)[1]


def _fits(falling_M: np.ndarray, kl_M: np.ndarray) -> list[tuple[float, float]]:
    """The least squares of kl = a + b * falling, or of its edges a = 0 and b = 0 where that leaves the quadrant."""
    centred_M = falling_M - falling_M.mean()
    b = float((centred_M * (kl_M - kl_M.mean())).sum() / (centred_M**2).sum())
    a = float(kl_M.mean() - b * falling_M.mean())
    if a >= 0 and b >= 0:
        return [(a, b)]
    return [(0.0, float((falling_M * kl_M).sum() / (falling_M**2).sum())), (float(kl_M.mean()), 0.0)]


def steps_after_stop(done: int, warmup_steps: int, decay_share: float) -> int:
    """How long a run must be for its wsd decay to begin after `done` steps: the schedule of one that was planned so."""
    return warmup_steps + 1 + math.ceil((done - warmup_steps) / (1 - decay_share))

"""How a quantity goes from its first value to its last in the course of training: one set of curves for all."""

from __future__ import annotations

import math

from compress.settings import Curve


def moved(curve: Curve, progress: float, decay_share: float = 0.2) -> float:
    """The share of the way from start to end at `progress` within 0 and 1 of training.

    wsd (warm-up, stable, decay) stays at the start and goes straight down over the last decay_share.
    """
    progress = min(1.0, max(0.0, progress))
    if curve is Curve.constant:
        return 0.0
    if curve is Curve.linear:
        return progress
    if curve is Curve.cosine:
        return 0.5 * (1 - math.cos(math.pi * progress))
    return max(0.0, (progress - (1 - decay_share)) / decay_share) if decay_share else float(progress >= 1)


def between(start: float, end: float | None, curve: Curve, progress: float, decay_share: float = 0.2) -> float:
    """The value at `progress`; the start where there is no end."""
    return start if end is None else start + (end - start) * moved(curve, progress, decay_share)


def learning_rate_factor(
    step: int,
    max_steps: int,
    warmup_steps: int,
    min_ratio: float,
    curve: Curve = Curve.cosine,
    decay_share: float = 0.2,
) -> float:
    """Multiplier for the step numbered from 0: linear warm-up, then the curve down to min_ratio at the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return between(1.0, min_ratio, curve, progress_after(warmup_steps, step, max_steps), decay_share)


def progress_after(warmup_steps: int, step: int, max_steps: int) -> float:
    """The share of the way from the first step after the warm-up to the last that the step numbered from 0 has come."""
    return max(0.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))

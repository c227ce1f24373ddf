"""A loss is a sum of terms: an objective, its weight and temperature at this step, and the objective's own options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One summand of the loss, as it stands at one step; an option that its objective doesn't use is ignored."""

    objective: str
    weight: float = 1.0
    temperature: float = 1.0  # both distributions are softmax(logits / temperature)
    squared: bool = False  # times temperature**2, which keeps the gradient's size when temperatures are compared
    k: int = 8  # bild, top_k_kl: how many of the largest logits
    beta: float = 0.5  # jensen_shannon: the teacher's share of the mixture
    skew: float = 0.1  # skew_kl, skew_reverse_kl: the other distribution's share
    head_mass: float = 0.5  # adaptive_kl: probability of the teacher's head
    lower_quantile: float = 0.0  # dac_kl: of the teacher's probabilities, what is kept
    upper_quantile: float = 1.0
    smoothing: float = 0.5  # label_smoothing: the teacher's share of the target
    max_temperature: float = 3.0  # dynamic_kl: of a token that the teacher is sure of, as a multiple of temperature
    # hidden_*, minilm_*: [student, teacher] pairs of layers, from 0, negative from the end; None: the last of each
    layers: Sequence[Sequence[int]] | None = None

    @property
    def factor(self) -> float:
        return self.weight * (self.temperature**2 if self.squared else 1.0)


OPTIONS = tuple(f.name for f in fields(Term))[4:]


class Rows:
    """R loss tokens over the whole vocabulary, at one temperature, in float32 or better; what is asked for is kept.

    Args:
        student_RV: logits / temperature.
        teacher_RV: the teacher's, or None where only labels are.
        labels_R: the next token's id.
        paired_R: whether the row after is the next token of the same document.
    """

    def __init__(self, student_RV: Tensor, teacher_RV: Tensor | None, labels_R: Tensor, paired_R: Tensor) -> None:
        self.student_RV = student_RV
        self._teacher_RV = teacher_RV
        self.labels_R = labels_R
        self.paired_R = paired_R

    @property
    def teacher_RV(self) -> Tensor:
        assert self._teacher_RV is not None, "an objective without a teacher's logits asks for them"
        return self._teacher_RV

    @cached_property
    def log_q_RV(self) -> Tensor:
        return torch.log_softmax(self.student_RV, -1)

    @cached_property
    def q_RV(self) -> Tensor:
        return self.log_q_RV.exp()

    @cached_property
    def log_p_RV(self) -> Tensor:
        return torch.log_softmax(self.teacher_RV, -1)

    @cached_property
    def p_RV(self) -> Tensor:
        return self.log_p_RV.exp()


@dataclass(frozen=True)
class SparseRows:
    """R loss tokens of which the teacher is known at K ids each, by a cache.

    probabilities_RK are its own at a top-k, and an unbiased estimate, counts over draws, at a sample; unused places
    hold id 0 and probability 0. entropy_R is the teacher's, in nats, over the whole vocabulary.
    """

    log_q_RV: Tensor
    ids_RK: Tensor
    probabilities_RK: Tensor
    entropy_R: Tensor


def times_log_ratio(weight: Tensor, log_one: Tensor, log_other: Tensor) -> Tensor:
    """weight * (log_one - log_other), 0 where weight is: 0 log 0 counts for nothing, whatever stands beside it; what is
    not a number stays so."""
    return torch.where(weight == 0, 0, weight * (log_one - log_other))


def through_softmax(slope_RV: Tensor, q_RV: Tensor) -> Tensor:
    """d loss / d logits from d loss / d q."""
    return q_RV * (slope_RV - (q_RV * slope_RV).sum(-1, keepdim=True))

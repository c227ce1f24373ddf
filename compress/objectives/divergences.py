"""Divergences between teacher p and student q over the whole vocabulary, and their gradients in closed form.

Each takes `Rows` and a `Term` and gives (loss per token (R,) in nats, its gradient on the student's logits over the
temperature (R, V)). Everything stays in log space where a probability may underflow.
"""

# R tokens, V vocabulary; p teacher, q student, m a mixture of the two

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.objectives.terms import Rows, Term, times_log_ratio

Result = tuple[Tensor, Tensor]


def forward_kl(rows: Rows, _term: Term) -> Result:
    """KL(p || q), Minitron's whole retraining loss (arXiv 2407.14679, section 4.1, practice 5)."""
    return rows.total(times_log_ratio(rows.p_RV, rows.log_p_RV, rows.log_q_RV)), rows.q_RV - rows.p_RV


def reverse_kl(rows: Rows, _term: Term) -> Result:
    """KL(q || p); MiniLLM's exact single-step term (arXiv 2306.08543). Infinite where the teacher bans a token."""
    ratio_RV = rows.log_q_RV - rows.log_p_RV
    loss_R = rows.total(times_log_ratio(rows.q_RV, rows.log_q_RV, rows.log_p_RV))
    return loss_R, rows.q_RV * (ratio_RV - loss_R[:, None])


def jensen_shannon(rows: Rows, term: Term) -> Result:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, section 3)."""
    log_m_RV = _log_mixture(rows.log_p_RV, rows.log_q_RV, term.beta)
    teacher_R = rows.total(times_log_ratio(rows.p_RV, rows.log_p_RV, log_m_RV))
    student_R = rows.total(times_log_ratio(rows.q_RV, rows.log_q_RV, log_m_RV))
    loss_R = term.beta * teacher_R + (1 - term.beta) * student_R
    slope_RV = (1 - term.beta) * (rows.log_q_RV - log_m_RV)  # what the mixture's own change adds is a constant
    return loss_R, rows.through_softmax(slope_RV)


def skew_kl(rows: Rows, term: Term) -> Result:
    """KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898, section 3.1)."""
    log_m_RV = _log_mixture(rows.log_p_RV, rows.log_q_RV, term.skew)
    loss_R = rows.total(times_log_ratio(rows.p_RV, rows.log_p_RV, log_m_RV))
    share_RV = (1 - term.skew) * (rows.log_p_RV + rows.log_q_RV - log_m_RV).exp()
    return loss_R, rows.q_RV * rows.total(share_RV)[:, None] - share_RV


def skew_reverse_kl(rows: Rows, term: Term) -> Result:
    """KL(q || (1 - skew) p + skew q) (DistiLLM, section 3.1)."""
    log_m_RV = _log_mixture(rows.log_q_RV, rows.log_p_RV, term.skew)
    ratio_RV = rows.log_q_RV - log_m_RV
    loss_R = rows.total(times_log_ratio(rows.q_RV, rows.log_q_RV, log_m_RV))
    return loss_R, rows.through_softmax(ratio_RV - term.skew * ratio_RV.exp())


def total_variation(rows: Rows, _term: Term) -> Result:
    """sum |p - q| / 2."""
    difference_RV = rows.q_RV - rows.p_RV
    return rows.total(difference_RV.abs()) / 2, rows.through_softmax(difference_RV.sign() / 2)


def adaptive_kl(rows: Rows, term: Term) -> Result:
    """Forward and reverse KL, weighted by how far p and q are apart in p's head and in its tail.

    The head is as many of p's largest tokens as hold at most head_mass of it, one at least; the weights carry no
    gradient (Wu et al., arXiv 2404.02657, section 4).
    """
    sorted_RV, order_RV = rows.p_RV.sort(dim=-1, descending=True, stable=True)
    tail_RV = sorted_RV.cumsum(-1) > term.head_mass
    tail_RV[:, 0] = False
    gap_RV = (rows.p_RV - rows.q_RV).abs().gather(-1, order_RV)
    gap_R, tail_R = gap_RV.sum(-1), (gap_RV * tail_RV).sum(-1)
    reverse_R1 = torch.where(gap_R > 0, tail_R / gap_R, 0.0)[:, None]
    (forward_R, forward_RV), (backward_R, backward_RV) = forward_kl(rows, term), reverse_kl(rows, term)
    share_R = reverse_R1[:, 0]
    return (
        (1 - share_R) * forward_R + share_R * backward_R,
        (1 - reverse_R1) * forward_RV + reverse_R1 * backward_RV,
    )


def cross_entropy(rows: Rows, _term: Term) -> Result:
    """-log q of the text's next token."""
    labels_R1 = rows.labels_R[:, None]
    slope_RV = rows.q_RV.clone()
    rows.add_(slope_RV, labels_R1, slope_RV.new_full(labels_R1.shape, -1))
    return -rows.take(rows.log_q_RV, labels_R1)[:, 0], slope_RV


def label_smoothing(rows: Rows, term: Term) -> Result:
    """Cross-entropy against (1 - smoothing) next token + smoothing p: the teacher smooths the label."""
    labels_R, labels_RV = cross_entropy(rows, term)
    soft_R = -rows.total(torch.where(rows.p_RV > 0, rows.p_RV * rows.log_q_RV, 0))
    share = term.smoothing
    return (1 - share) * labels_R + share * soft_R, (1 - share) * labels_RV + share * (rows.q_RV - rows.p_RV)


def uncertainty_kl(rows: Rows, _term: Term) -> Result:
    """H(q) / log V * KL(p || q), the weight without gradient: what the student is unsure of counts (Dynamic KD,
    Li et al., EMNLP 2021)."""
    weight_R = _entropy(rows, rows.log_q_RV)
    loss_R, slope_RV = forward_kl(rows, Term("forward_kl"))
    return weight_R * loss_R, weight_R[:, None] * slope_RV


def dynamic_kl(rows: Rows, term: Term) -> Result:
    """(1 - u) tau^2 KL(p || q) at tau = 1 + (max_temperature - 1) d: u is p's entropy over log V, d the distance of its
    two largest probabilities; neither carries a gradient.

    Ours, for DynSDPB (arXiv 2411.16991), whose own rule could not be read: where the teacher is unsure it counts less,
    where it is sure it is softened more. With max_temperature 1 and weight 1 - u = 1 it is forward KL.
    """
    largest_R2 = rows.take(rows.p_RV, rows.largest(rows.p_RV, 2))
    tau_R1 = 1 + (term.max_temperature - 1) * (largest_R2[:, :1] - largest_R2[:, 1:])
    weight_R1 = (1 - _entropy(rows, rows.log_p_RV))[:, None] * tau_R1
    at = Rows(rows.student_RV / tau_R1, rows.teacher_RV / tau_R1, rows.labels_R, rows.paired_R, rows.shard)
    loss_R, slope_RV = forward_kl(at, term)
    return (weight_R1 * tau_R1)[:, 0] * loss_R, weight_R1 * slope_RV


def _entropy(rows: Rows, log_RV: Tensor) -> Tensor:
    """In units of log V: within 0 and 1."""
    return -rows.total(torch.where(log_RV > -torch.inf, log_RV.exp() * log_RV, 0)) / math.log(rows.vocab_size)


def _log_mixture(log_one_RV: Tensor, log_other_RV: Tensor, share: float) -> Tensor:
    """log(share * one + (1 - share) * other), exact at both ends."""
    if share == 0:
        return log_other_RV
    if share == 1:
        return log_one_RV
    return torch.logaddexp(log_one_RV + math.log(share), log_other_RV + math.log1p(-share))

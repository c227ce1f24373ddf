"""Objectives that look at a part of the vocabulary, or at two neighbouring tokens; signature as in `divergences.py`."""

# R tokens, V vocabulary, K ids, P pairs of ids; p teacher, q student

from __future__ import annotations

import torch
from torch import Tensor

from compress.objectives.divergences import Result
from compress.objectives.terms import Rows, SparseRows, Term, times_log_ratio


def top_k_kl(rows: Rows, term: Term) -> Result:
    """KL over the teacher's k largest tokens and one bucket for all others, whose mass is not lost.

    Without the bucket, or renormalised, it would not be a divergence of the models (Team Megatron's "ghost token").
    """
    ids_RK = rows.largest(rows.teacher_RV, term.k)
    log_q_RK, log_p_RK = rows.take(rows.log_q_RV, ids_RK), rows.take(rows.log_p_RV, ids_RK)
    loss_R, of_rest_R, slope_RK = _bucketed(log_q_RK, log_p_RK)
    slope_RV = rows.q_RV * of_rest_R[:, None]
    return loss_R, rows.put_(slope_RV, ids_RK, slope_RK)


def sparse_top_k_kl(rows: SparseRows, _term: Term) -> Result:
    """`top_k_kl` from a cache, whose ids it takes."""
    log_p_RK = rows.probabilities_RK.clamp_min(torch.finfo(rows.log_q_RV.dtype).tiny).log()
    loss_R, of_rest_R, slope_RK = _bucketed(rows.log_q_RV.gather(-1, rows.ids_RK), log_p_RK)
    slope_RV = rows.log_q_RV.exp() * of_rest_R[:, None]
    return loss_R, slope_RV.scatter_(-1, rows.ids_RK, slope_RK)


def sparse_forward_kl(rows: SparseRows, _term: Term) -> Result:
    """-sum p^ log q - H(p): as its gradient, unbiased when p^ is, since it is linear in p (RS-KD, arXiv 2503.16870)."""
    taken_RK = rows.log_q_RV.gather(-1, rows.ids_RK)
    loss_R = -(rows.probabilities_RK * taken_RK).sum(-1) - rows.entropy_R
    slope_RV = rows.log_q_RV.exp() * rows.probabilities_RK.sum(-1, keepdim=True)
    return loss_R, slope_RV.scatter_add_(-1, rows.ids_RK, -rows.probabilities_RK)


def bild(rows: Rows, term: Term) -> Result:
    """Bi-directional logits difference (BiLD, arXiv 2406.13555): over the pairwise differences of the k largest logits,
    KL(softmax(teacher's) || softmax(student's)), once with the teacher's k and once with the student's."""
    slope_RV = torch.zeros_like(rows.student_RV)
    loss_R = slope_RV.new_zeros(len(slope_RV))
    one, other = torch.triu_indices(term.k, term.k, 1, device=slope_RV.device)
    for leader_RV in (rows.teacher_RV, rows.student_RV):
        ids_RK = rows.largest(leader_RV, term.k)
        student_RK, teacher_RK = rows.take(rows.student_RV, ids_RK), rows.take(rows.teacher_RV, ids_RK)
        log_q_RP = torch.log_softmax(student_RK[:, one] - student_RK[:, other], -1)
        log_p_RP = torch.log_softmax(teacher_RK[:, one] - teacher_RK[:, other], -1)
        loss_R += times_log_ratio(log_p_RP.exp(), log_p_RP, log_q_RP).sum(-1)
        error_RP = log_q_RP.exp() - log_p_RP.exp()
        slope_RK = torch.zeros_like(student_RK)
        slope_RK.index_add_(1, one, error_RP).index_add_(1, other, -error_RP)
        rows.add_(slope_RV, ids_RK, slope_RK)
    return loss_R, slope_RV


def dac_kl(rows: Rows, term: Term) -> Result:
    """KL between p and q, both renormalised on the tokens whose p lies between two quantiles, and p's largest.

    Ours: the fixed-quantile ablation of DAC-KL (arXiv 2407.10068), whose learned quantiles could not be read.
    """
    levels = torch.tensor([term.lower_quantile, term.upper_quantile], dtype=rows.p_RV.dtype, device=rows.p_RV.device)
    low_R, high_R = _quantiles(rows.p_RV, levels)
    kept_RV = ~((rows.p_RV < low_R[:, None]) | (rows.p_RV > high_R[:, None]))  # also what is not a number
    kept_RV.scatter_(-1, rows.p_RV.argmax(-1, keepdim=True), True)
    log_q_RV = torch.log_softmax(rows.student_RV.masked_fill(~kept_RV, -torch.inf), -1)
    log_p_RV = torch.log_softmax(rows.teacher_RV.masked_fill(~kept_RV, -torch.inf), -1)
    p_RV = log_p_RV.exp()
    return times_log_ratio(p_RV, log_p_RV, log_q_RV).sum(-1), log_q_RV.exp() - p_RV


def span_relation(rows: Rows, _term: Term) -> Result:
    """|| p_t p_t+1 - q_t q_t+1 ||^2 of each token and the one after it; R rows give R - 1 losses and R slopes.

    0 where the row after is no neighbour.

    Ours, after MGSR's span term (arXiv 2407.10068): neighbours instead of a chunker's phrases, and the square.
    """
    teacher_RV, student_RV = rows.p_RV[:-1] * rows.p_RV[1:], rows.q_RV[:-1] * rows.q_RV[1:]
    error_RV = (student_RV - teacher_RV) * rows.paired_R[:-1, None]
    slope_RV = torch.zeros_like(rows.q_RV)
    slope_RV[:-1] += 2 * error_RV * rows.q_RV[1:]
    slope_RV[1:] += 2 * error_RV * rows.q_RV[:-1]
    return rows.total(error_RV.square()), rows.through_softmax(slope_RV)


def _bucketed(log_q_RK: Tensor, log_p_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (R,), what q_v of the other tokens is multiplied by to be their slope (R,), slope of the k (R, K))."""
    log_p_R, log_q_R = _log_rest(log_p_RK), _log_rest(log_q_RK)
    p_RK, p_R, q_R = log_p_RK.exp(), log_p_R.exp(), log_q_R.exp()
    loss_R = times_log_ratio(p_RK, log_p_RK, log_q_RK).sum(-1) + times_log_ratio(p_R, log_p_R, log_q_R)
    return loss_R, 1 - p_R / q_R, log_q_RK.exp() - p_RK


def _log_rest(log_RK: Tensor) -> Tensor:
    """log(1 - sum exp) without the cancellation of a sum close to 1, and not below what rounding leaves of one."""
    rest_R = -torch.expm1(log_RK.logsumexp(-1).clamp_max(0))
    return rest_R.clamp_min(torch.finfo(log_RK.dtype).eps).log()


def _quantiles(values_RV: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """By linear interpolation between sorted values, of any number of them (torch.quantile stops at 2**24)."""
    sorted_RV = values_RV.sort(-1).values
    places = levels.double() * (values_RV.shape[-1] - 1)
    low, share = places.floor().long(), (places - places.floor()).to(values_RV.dtype)
    high = (low + 1).clamp_max(values_RV.shape[-1] - 1)
    found = torch.lerp(sorted_RV[:, low], sorted_RV[:, high], share)
    return found[:, 0], found[:, 1]

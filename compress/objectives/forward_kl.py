"""Forward KL alone, the objective of nearly every run: in place, in buffers that stay in a CPU's caches."""

# C tokens of a chunk, R rows of a block, V vocabulary, K ids of a token

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_COMPILED_ROWS = 16  # of a compiled block on a CPU: two float32 blocks of a 49k vocabulary are 6 MiB
_ROWS_PER_THREAD = 2  # of a CPU's elementwise blocks: three float32 rows of a 49k vocabulary are 0.6 MB


def block_rows(logits: Tensor) -> int:
    """Rows per elementwise block: on a CPU what its threads' caches hold, elsewhere the whole chunk."""
    return _ROWS_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else max(1, logits.shape[0])


def forward_kl_(
    student_CV: Tensor, teacher_CV: Tensor, temperature: float, scale: float | None, compiled: bool = False
) -> Tensor:
    """Per-token KL(p || q) in float32 (float64 in, float64 out); overwrites student_CV by scale * d KL / d logits.

    With scale None no gradient is formed.

    Every pass writes into one of three block-sized buffers, so that nothing of vocabulary size is allocated per block.
    Compiled there are four passes and two exponentials instead of twelve and four: half the time.
    """
    if compiled and scale is not None and len(student_CV):
        size, kernel = _COMPILED_ROWS if student_CV.device.type == "cpu" else len(student_CV), _compiled()
        blocks = zip(student_CV.split(size), teacher_CV.split(size), strict=True)
        return torch.cat([kernel(*block, temperature, scale / temperature) for block in blocks])
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    loss_C = torch.empty(student_CV.shape[0], dtype=dtype, device=student_CV.device)
    rows = min(block_rows(student_CV), student_CV.shape[0])
    buffers = torch.empty(3, rows, student_CV.shape[1], dtype=dtype, device=student_CV.device)
    for start in range(0, student_CV.shape[0], rows):
        block = slice(start, min(start + rows, student_CV.shape[0]))
        one_RV, two_RV, log_q_RV = buffers[:, : block.stop - start]
        student_RV = one_RV.copy_(student_CV[block])
        teacher_RV = two_RV.copy_(teacher_CV[block])
        if temperature != 1:
            student_RV.div_(temperature)
            teacher_RV.div_(temperature)
        torch.log_softmax(student_RV, -1, out=log_q_RV)
        log_p_RV = torch.log_softmax(teacher_RV, -1, out=one_RV)
        p_RV = torch.exp(log_p_RV, out=two_RV)
        # A token that the teacher bans (logit -inf) has p = 0 and log p = -inf: any finite number in its place keeps
        # 0 * inf out of the sum.
        difference_RV = log_p_RV.sub_(log_q_RV).clamp_(min=torch.finfo(dtype).min)
        torch.sum(difference_RV.mul_(p_RV), -1, out=loss_C[block])
        if scale is not None:
            gradient_RV = log_q_RV.exp_().sub_(p_RV)
            student_CV[block] = gradient_RV if scale == temperature else gradient_RV.mul_(scale / temperature)
    return loss_C


def _whole_kl_(student_RV: Tensor, teacher_RV: Tensor, temperature: float, factor: float) -> Tensor:
    """`forward_kl_` of a block, to be compiled: the exponentials are kept, and normalised where they are used."""
    dtype = torch.promote_types(student_RV.dtype, torch.float32)
    s_RV, t_RV = student_RV.to(dtype), teacher_RV.to(dtype)
    s_max, t_max = s_RV.amax(-1, keepdim=True), t_RV.amax(-1, keepdim=True)
    s_exp, t_exp = ((s_RV - s_max) / temperature).exp(), ((t_RV - t_max) / temperature).exp()
    s_sum, t_sum = s_exp.sum(-1, keepdim=True), t_exp.sum(-1, keepdim=True)
    difference_RV = ((t_RV - s_RV) / temperature).clamp(min=torch.finfo(dtype).min)  # as in forward_kl_
    cross = (t_exp * difference_RV).sum(-1, keepdim=True) / t_sum
    student_RV.copy_(s_exp * (factor / s_sum) - t_exp * (factor / t_sum))
    return (cross + (s_max - t_max) / temperature + s_sum.log() - t_sum.log()).squeeze(-1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    kernel: Callable[..., Tensor] = torch.compile(_whole_kl_, dynamic=True)
    return kernel


def sampled_forward_kl_(
    student_CV: Tensor, ids_CK: Tensor, probabilities_CK: Tensor, entropy_C: Tensor, scale: float | None
) -> Tensor:
    """`forward_kl_` at temperature 1 from a cached sample, as `partial.sparse_forward_kl`: -sum p^ log q - H(p)."""
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    loss_C = torch.empty(student_CV.shape[0], dtype=dtype, device=student_CV.device)
    rows = min(block_rows(student_CV), student_CV.shape[0])
    buffers = torch.empty(2, rows, student_CV.shape[1], dtype=dtype, device=student_CV.device)
    for start in range(0, student_CV.shape[0], rows):
        block = slice(start, min(start + rows, student_CV.shape[0]))
        one_RV, log_q_RV = buffers[:, : block.stop - start]
        torch.log_softmax(one_RV.copy_(student_CV[block]), -1, out=log_q_RV)
        ids_RK, p_RK = ids_CK[block], probabilities_CK[block].to(dtype)
        loss_C[block] = -(p_RK * log_q_RV.gather(-1, ids_RK)).sum(-1) - entropy_C[block]
        if scale is not None:
            gradient_RV = log_q_RV.exp_().mul_(p_RK.sum(-1, keepdim=True) * scale)
            student_CV[block] = gradient_RV.scatter_add_(-1, ids_RK, p_RK * -scale)
    return loss_C

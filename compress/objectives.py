"""The distillation objective: output head and divergence in chunks of tokens, its gradient formed in the forward.

The full tokens-by-vocabulary matrix never exists. For forward KL at temperature T the gradient on the student's
logits has a closed form, (q - p) / T, so each chunk is turned into its gradient on hidden states and head while it is
in the cache, and nothing of vocabulary size is kept for the backward.
"""

# N loss tokens, C tokens of a chunk, R rows of a block, V vocabulary, D student hidden, E teacher hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 1024
_BLOCK_BYTES = 3 << 20  # one float32 block of logits; a few of them stay in a CPU core's second-level cache


def _block_rows(logits: Tensor) -> int:
    """Rows per elementwise block: on a CPU what fits the cache (3x fewer memory passes), elsewhere the whole chunk."""
    if logits.device.type != "cpu":
        return logits.shape[0]
    return max(1, _BLOCK_BYTES // (4 * logits.shape[1]))


def _forward_kl_(student_CV: Tensor, teacher_CV: Tensor, temperature: float, need_grad: bool) -> Tensor:
    """Per-token KL(p || q) in float32 (float64 in, float64 out); overwrites student_CV by d KL / d logits."""
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    loss_C = torch.empty(student_CV.shape[0], dtype=dtype, device=student_CV.device)
    rows = _block_rows(student_CV)
    for start in range(0, student_CV.shape[0], rows):
        block = slice(start, start + rows)
        log_q_RV = torch.log_softmax(student_CV[block].to(dtype).div_(temperature), -1)
        log_p_RV = torch.log_softmax(teacher_CV[block].to(dtype).div_(temperature), -1)
        p_RV = log_p_RV.exp()
        # sum p (log p - log q), a product and a sum in one pass. A token that the teacher bans (logit -inf) has p = 0
        # and log p = -inf: any finite number in its place keeps 0 * inf out.
        log_p_RV.sub_(log_q_RV).clamp_(min=torch.finfo(dtype).min)
        loss_C[block] = torch.linalg.vecdot(p_RV, log_p_RV)
        if need_grad:
            student_CV[block] = log_q_RV.exp_().sub_(p_RV).div_(temperature)
    return loss_C


class _ChunkedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        accumulate = torch.promote_types(student_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=student_ND.device)
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.zeros_like(student_ND) if need_hidden else None
        grad_VD: Tensor | None = None
        for start in range(0, student_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            student_CV = student_ND[chunk] @ student_head_VD.T
            teacher_CV = teacher_NE[chunk] @ teacher_head_VE.T
            loss += _forward_kl_(student_CV, teacher_CV, temperature, need_hidden or need_head).sum()
            if grad_ND is not None:
                grad_ND[chunk] = student_CV @ student_head_VD
            if need_head:
                product = student_CV.T @ student_ND[chunk]
                grad_VD = product.to(accumulate) if grad_VD is None else grad_VD.add_(product)
        if need_head:
            grad_VD = torch.zeros_like(student_head_VD) if grad_VD is None else grad_VD.to(student_head_VD.dtype)
        ctx.grads = grad_ND, grad_VD
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("distillation_loss can't be differentiated a second time: call it again")
        grad_ND, grad_VD = ctx.grads
        ctx.grads = None  # scaled in place below
        scale = grad.item() if grad.device.type == "cpu" else grad
        return (
            None if grad_ND is None else grad_ND.mul_(scale),
            None if grad_VD is None else grad_VD.mul_(scale),
            *[None] * 4,
        )


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """KL(teacher || student) in nats, summed over the N tokens given; not multiplied by temperature**2.

    Forward KL on logits is Minitron's whole retraining loss (arXiv 2407.14679, section 4.1, practice 5).

    Args:
        student_hidden: (N, D) final hidden states at the loss tokens only, after the last norm.
        student_head: (V, D) output head; when it is tied, its gradient adds to the embedding's.
        teacher_hidden, teacher_head: (N, E) and (V, E); no gradient is formed for them.
        temperature: both distributions are softmax(logits / temperature).
        chunk_tokens: tokens per matrix product; 2 * chunk_tokens * V elements is the extra memory.

    Returns:
        a scalar in float32 (float64 for float64 inputs). With N = 0 it is 0 and its gradients are zeros, so that a
        batch without loss tokens still takes part in every collective.
    """
    loss: Tensor = _ChunkedForwardKL.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk_tokens
    )
    return loss

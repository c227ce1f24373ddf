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

CHUNK_TOKENS = 2048
_ROWS_PER_THREAD = 2  # of a CPU's elementwise blocks: three float32 rows of a 49k vocabulary are 0.6 MB


def _block_rows(logits: Tensor) -> int:
    """Rows per elementwise block: on a CPU what its threads' caches hold, elsewhere the whole chunk."""
    return _ROWS_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else logits.shape[0]


def _forward_kl_(student_CV: Tensor, teacher_CV: Tensor, temperature: float, need_grad: bool) -> Tensor:
    """Per-token KL(p || q) in float32 (float64 in, float64 out); overwrites student_CV by d KL / d logits.

    Every pass writes into one of three block-sized buffers, so that nothing of vocabulary size is allocated per block.
    """
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    loss_C = torch.empty(student_CV.shape[0], dtype=dtype, device=student_CV.device)
    rows = min(_block_rows(student_CV), student_CV.shape[0])
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
        if need_grad:
            gradient_RV = log_q_RV.exp_().sub_(p_RV)
            student_CV[block].copy_(gradient_RV if temperature == 1 else gradient_RV.div_(temperature))
    return loss_C


def soft_cap_(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), in place; the logits themselves where there is no cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


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
        student_softcap: float | None,
        teacher_softcap: float | None,
    ) -> Tensor:
        accumulate = torch.promote_types(student_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=student_ND.device)
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_ND = torch.zeros_like(student_ND) if need_hidden else None
        grad_VD: Tensor | None = None
        for start in range(0, student_ND.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            student_CV = soft_cap_(student_ND[chunk] @ student_head_VD.T, student_softcap)
            teacher_CV = soft_cap_(teacher_NE[chunk] @ teacher_head_VE.T, teacher_softcap)
            slope_CV = None if student_softcap is None else 1 - (student_CV / student_softcap).square_()
            loss += _forward_kl_(student_CV, teacher_CV, temperature, need_hidden or need_head).sum()
            if slope_CV is not None:
                student_CV *= slope_CV
            if grad_ND is not None:
                grad_ND[chunk] = student_CV @ student_head_VD
            if need_head:
                product = student_CV.T @ student_ND[chunk]
                # A single chunk's product is the gradient; several are summed in float32.
                grad_VD = product if grad_VD is None else grad_VD.to(accumulate).add_(product)
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
            *[None] * 6,
        )


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """KL(teacher || student) in nats, summed over the N tokens given; not multiplied by temperature**2.

    Forward KL on logits is Minitron's whole retraining loss (arXiv 2407.14679, section 4.1, practice 5).

    Args:
        student_hidden: (N, D) final hidden states at the loss tokens only, after the last norm.
        student_head: (V, D) output head; when it is tied, its gradient adds to the embedding's.
        teacher_hidden, teacher_head: (N, E) and (V, E); no gradient is formed for them.
        temperature: both distributions are softmax(logits / temperature).
        chunk_tokens: tokens per matrix product; 2 * chunk_tokens * V elements is the extra memory.
        student_softcap, teacher_softcap: c where the model's logits are c * tanh(logits / c), as Gemma 2's.

    Returns:
        a scalar in float32 (float64 for float64 inputs). With N = 0 it is 0 and its gradients are zeros, so that a
        batch without loss tokens still takes part in every collective.
    """
    loss: Tensor = _ChunkedForwardKL.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        temperature,
        chunk_tokens,
        student_softcap,
        teacher_softcap,
    )
    return loss

"""The output head and the objectives in chunks of tokens, the gradient formed in the forward.

The full tokens-by-vocabulary matrix never exists: each chunk's logits are turned into their gradient on hidden states
and head while they are at hand, and nothing of vocabulary size but the head's gradient is kept for the backward.
"""

# N loss tokens, C tokens of a chunk, R rows of a block, V vocabulary, D student hidden, E teacher hidden, K terms

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.attention import cpu_has
from compress.models import OutputHead, logits_of
from compress.objectives.forward_kl import block_rows, forward_kl_, sampled_forward_kl_
from compress.objectives.hidden import Recorded
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Rows, SparseRows, Term, VocabularyShard

_BLOCKS = 8  # of the elementwise blocks of forward KL alone: several results at a time
CHUNK_BYTES = 192 << 20  # of the student's and the teacher's logits together
ROW_BYTES = 1024  # of a column of a CPU's products to and from logits: what they make is still in its caches when read


@dataclass(frozen=True)
class DenseSignal:
    """A teacher's final hidden states (N, E) at the loss tokens, to be put through its own head chunk by chunk.

    Handing over hidden states instead of logits is V / E times less memory and loses nothing. `recorded` is what else
    its forward kept, where a term asks for it.
    """

    hidden_NE: Tensor
    head: OutputHead
    recorded: Recorded | None = None


@dataclass(frozen=True)
class SparseSignal:
    """What a cache holds of N loss tokens: see `terms.SparseRows`. kind: "sample" (unbiased) or "top_k".

    vocab_size: rows of the teacher's head; None: as many as the student's.
    """

    kind: str
    ids_NK: Tensor
    probabilities_NK: Tensor
    entropy_N: Tensor
    vocab_size: int | None = None

    def rows(self, chunk: slice) -> SparseSignal:
        ids_NK, probabilities_NK = self.ids_NK[chunk], self.probabilities_NK[chunk]
        return SparseSignal(self.kind, ids_NK, probabilities_NK, self.entropy_N[chunk], self.vocab_size)


Signal = DenseSignal | SparseSignal | None


@dataclass(frozen=True)
class Targets:
    """What the text says at N loss tokens: the next token's id, and whether the loss token after is the next one of
    the same document (the pairs of `span_relation`)."""

    labels_N: Tensor
    paired_N: Tensor


def _blockwise_(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    sparse: SparseSignal | None,
    targets: Targets,
    terms: Sequence[Term],
    scales: Sequence[float],
    own: int,
    carry_V: Tensor | None,
    sums_K: Tensor,
    shard: VocabularyShard | None,
) -> Tensor | None:
    """Add each term's loss to sums_K and overwrite student_CV's first `own` rows by the scaled gradient.

    A pair's second token may lie in the next block or chunk: what it owes that row is handed on as carry_V.
    """
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    step = _BLOCKS * block_rows(student_CV)
    paired = any(OBJECTIVES[term.objective].pairs for term in terms)
    for start in range(0, own, step):
        stop = min(start + step, own)
        ahead = min(stop + 1, len(student_CV)) if paired else stop
        slope_RV = torch.zeros(ahead - start, student_CV.shape[1], dtype=dtype, device=student_CV.device)
        if carry_V is not None:
            slope_RV[0] += carry_V
        made: dict[tuple[float, int], Rows] = {}
        for number, (term, scale) in enumerate(zip(terms, scales, strict=True)):
            objective = OBJECTIVES[term.objective]
            last = ahead if objective.pairs else stop
            rows = made.get((term.temperature, last))
            if rows is None:
                rows = _rows(student_CV, teacher_CV, targets, slice(start, last), term.temperature, shard)
                made[term.temperature, last] = rows
            if sparse is None or objective.labels_only:
                assert objective.function is not None, f"{term.objective} isn't one of logits"
                loss_R, term_RV = objective.function(rows, term)
            else:
                loss_R, term_RV = objective.sparse[sparse.kind](_sparse_rows(rows, sparse, slice(start, last)), term)
            sums_K[number] += loss_R.sum()
            slope_RV[: last - start].add_(term_RV, alpha=scale / term.temperature)
        student_CV[start:stop] = slope_RV[: stop - start]
        carry_V = slope_RV[stop - start] if ahead > stop else None
    return carry_V


def _rows(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    targets: Targets,
    block: slice,
    temperature: float,
    shard: VocabularyShard | None,
) -> Rows:
    dtype = torch.promote_types(student_CV.dtype, torch.float32)
    logits = [None if x is None else x[block].to(dtype) / temperature for x in (student_CV, teacher_CV)]
    assert logits[0] is not None
    return Rows(logits[0], logits[1], targets.labels_N[block], targets.paired_N[block], shard)


def _sparse_rows(rows: Rows, sparse: SparseSignal, block: slice) -> SparseRows:
    dtype = rows.student_RV.dtype
    probabilities_RK, entropy_R = sparse.probabilities_NK[block].to(dtype), sparse.entropy_N[block].to(dtype)
    return SparseRows(rows.log_q_RV, sparse.ids_NK[block], probabilities_RK, entropy_R)


class _ChunkedLoss(torch.autograd.Function):
    """(sum of scale * loss over terms, each term's own sum) and the gradient of the first."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        signal: Signal,
        targets: Targets,
        terms: Sequence[Term],
        scales: Sequence[float],
        size: int,
        compiled: bool,
        shard: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(student_ND.dtype, torch.float32)
        head = OutputHead(weight_VD, head.softcap, bias_V, head.scale)
        sums_K = torch.zeros(len(terms), dtype=dtype, device=student_ND.device)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_ND = torch.zeros_like(student_ND) if need_hidden else None
        grad_VD: Tensor | None = None
        grad_V = torch.zeros_like(bias_V, dtype=dtype) if need_bias and bias_V is not None else None
        alone = [term.objective for term in terms] == ["forward_kl"]
        alone = alone and shard is None
        simple = alone and isinstance(signal, DenseSignal)
        sampled = alone and isinstance(signal, SparseSignal) and signal.kind == "sample" and terms[0].temperature == 1
        carry_V: Tensor | None = None
        scale = scales[0] if any(ctx.needs_input_grad) else None  # of a loss of one term
        paired = any(OBJECTIVES[term.objective].pairs for term in terms)
        total = len(student_ND)
        on_cpu = student_ND.device.type == "cpu"
        block = min(size, rows_per_product(student_ND.element_size())) if on_cpu else size
        size -= size % block
        # AMX takes twice as long for a bfloat16 product whose first factor is turned, here the larger one; AVX-512 a
        # sixth less than for turning what comes of the other product.
        turned = (
            compiled and student_ND.dtype is torch.bfloat16 and cpu_has("amx_bf16") and student_ND.device.type == "cpu"
        )
        logits_CV = student_ND.new_empty(min(size + paired, total), len(weight_VD))
        room_RV = None
        if isinstance(signal, DenseSignal):
            room_RV = signal.hidden_NE.new_empty(min(block + paired, total), len(signal.head.weight_VD))
        for start in range(0, total, block):
            own = min(block, size - start % size, total - start)
            rows, at = slice(start, min(start + own + paired, total)), start % size
            student_RV = logits_of(student_ND[rows], head, logits_CV[at : at + rows.stop - start])
            slope_RV = None if head.softcap is None else 1 - (student_RV[:own] / head.softcap).square_()
            teacher_RV = None
            if isinstance(signal, DenseSignal) and room_RV is not None:
                teacher_RV = logits_of(signal.hidden_NE[rows], signal.head, room_RV[: rows.stop - start])
            sparse = signal.rows(rows) if isinstance(signal, SparseSignal) else None
            if simple and teacher_RV is not None:
                sums_K[0] += forward_kl_(student_RV, teacher_RV, terms[0].temperature, scale, compiled).sum()
            elif sampled and sparse is not None:
                known = sparse.ids_NK, sparse.probabilities_NK, sparse.entropy_N
                sums_K[0] += sampled_forward_kl_(student_RV, *known, scale).sum()
            else:
                part = Targets(targets.labels_N[rows], targets.paired_N[rows])
                carry_V = _blockwise_(student_RV, teacher_RV, sparse, part, terms, scales, own, carry_V, sums_K, shard)
            gradient_RV = student_RV[:own]
            if slope_RV is not None:
                gradient_RV *= slope_RV
            if head.scale != 1:
                gradient_RV *= head.scale
            if grad_ND is not None:
                torch.mm(gradient_RV, weight_VD, out=grad_ND[start : start + own])
            if grad_V is not None:
                grad_V += gradient_RV.sum(0, dtype=dtype)
            stop = start + own
            if need_weight and (at + own == size or stop == total):
                chunk = slice(start - at, stop)
                left, right = logits_CV[: at + own].T, student_ND[chunk]
                if turned:
                    left, right = right.T.contiguous(), left.T
                grad_VD = _plus_product(grad_VD, left, right, last=stop == total)
        if need_weight:
            grad_VD = torch.zeros_like(weight_VD) if grad_VD is None else grad_VD.to(weight_VD.dtype)
            grad_VD = _turn()(grad_VD) if turned and total else grad_VD
        ctx.grads = grad_ND, grad_VD, None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype)
        loss = sums_K @ torch.tensor(scales, dtype=dtype, device=sums_K.device)
        ctx.mark_non_differentiable(sums_K)
        return loss, sums_K

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError("a chunked loss can't be differentiated a second time: call it again")
        grads = ctx.grads
        ctx.grads = None  # scaled in place below
        scale = grad.item() if grad.device.type == "cpu" else grad
        if grad.device.type == "cpu" and scale == 1:
            return *grads, *[None] * 8
        return *[None if one is None else one.mul_(scale) for one in grads], *[None] * 8


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, last: bool) -> Tensor:
    """total + left @ right, where several products are rounded as if added in float32."""
    if total is None:
        return left @ right
    if not last:  # the sum of two is rounded once, whatever it is kept in
        total = total.to(torch.promote_types(total.dtype, torch.float32))
    if left.dtype == total.dtype == torch.promote_types(total.dtype, torch.float32):
        return total.addmm_(left, right)
    return total.add_(left @ right)


@functools.cache
def _turn() -> Callable[[Tensor], Tensor]:
    """The transpose of a matrix in memory, compiled: torch's own copy takes four times as long on a CPU."""
    return torch.compile(lambda matrix: matrix.T.contiguous(), dynamic=True)


def chunked_loss(
    student_ND: Tensor,
    head: OutputHead,
    signal: Signal,
    targets: Targets,
    terms: Sequence[Term],
    scales: Sequence[float] | None = None,
    *,
    chunk_tokens: int | None = None,
    compiled: bool = False,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum of objectives at N loss tokens, without ever holding N rows of logits.

    Args:
        student_ND: final hidden states at the loss tokens only, after the last norm.
        head: the student's; when its weight is tied, the gradient adds to the embedding's. It is respected whole: bias,
            logit scale and soft cap.
        signal: the teacher; None where every term is of labels only.
        terms: at least one; every one must take this kind of signal (`table.check_terms`).
        scales: what each term's sum is multiplied by, its factor over a global count; None: 1 for each.
        chunk_tokens: tokens per product; None: what CHUNK_BYTES of both models' logits hold.
        compiled: with kernels that torch compiles in some seconds at the first call: forward KL alone, and a turn of
            the head's gradient, whose products can be the faster ones then.
        shard: which part of the vocabulary this rank's heads (the student's and the teacher's) have; every rank of its
            group calls it with the same tokens and a dense signal. The gradient on student_ND is this part's, to be
            summed over the group.

    Returns:
        (sum over terms of scale * sum, to be differentiated; each term's sum over tokens (K,), in nats or its own
        unit), float32 or float64. With N = 0 they are 0 and the gradients zeros, so that a micro-batch without loss
        tokens still takes part in every collective.
    """
    size = chunk_tokens or tokens_per_chunk(len(head.weight_VD), student_ND.element_size())
    scales = [1.0] * len(terms) if scales is None else list(scales)
    assert shard is None or not isinstance(signal, SparseSignal), "a cache is of whole vocabularies"
    result: tuple[Tensor, Tensor] = _ChunkedLoss.apply(
        student_ND, head.weight_VD, head.bias_V, head, signal, targets, list(terms), scales, size, compiled, shard
    )
    return result


def rows_per_product(element_bytes: int) -> int:
    """Tokens of a block of logits on a CPU."""
    return ROW_BYTES // element_bytes


def tokens_per_chunk(vocabulary: int, element_bytes: int) -> int:
    return max(1, CHUNK_BYTES // (2 * vocabulary * element_bytes))

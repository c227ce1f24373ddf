"""Causal attention of a training on a CPU without AMX, from the products that its bfloat16 is fast at.

torch's own kernel for such a CPU reaches a fifth of what its matrix products do (benchmarks/attention.py): a quarter of
a distillation step of a small model. The same numbers, by the same formulas (FlashAttention-2, arXiv 2307.08691,
algorithms 1 and 2): scores in float32, never all of them at once, and computed again in the backward.
"""

# B sequences, T tokens, H query heads, G key-value heads, d head size; N = B G, and P = H / G query heads of each.
# Q queries of a block, K = the keys up to its last one.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "compress_blocked"
_QUERIES = 64  # of a block: the least waste above the diagonal with products that are still large


def use_blocked_attention(model: PreTrainedModel) -> None:
    """Let the model's torch attention (sdpa) run as `blocked_attention`; no other kind changes, no other dtype."""
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_NAME)


def blocks_are_faster() -> bool:
    """Whether torch multiplies bfloat16 fast here but not within its attention, which knows of AMX alone."""
    return not torch.cuda.is_available() and cpu_has("avx512_bf16") and not cpu_has("amx_bf16")


@functools.cache
def cpu_has(instructions: str) -> bool:
    """Whether the processor has them, by torch's name for them; an older torch can't tell."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get(instructions))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query (B, H, T, d), key and value (B, G, T, d); returns (B, T, H, d)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bfloat16 = query.dtype == key.dtype == value.dtype == torch.bfloat16
    square = query.shape[2] == key.shape[2] and query.shape[3] == value.shape[3]
    masked = attention_mask is not None and attention_mask.dtype != torch.bool
    further = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not causal or not bfloat16 or not square or masked or dropout or further:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_attention(query, key, value, attention_mask, scale), None


def blocked_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask_B1TT: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v of every token over those up to itself, (B, T, H, d); with a mask (bool) over those of
    them where it is true, of which each token has one at least."""
    out_BTHd: Tensor = torch.ops.compress.blocked_attention(q_BHTd, k_BGTd, v_BGTd, mask_B1TT, scale)[0]
    return out_BTHd


@torch.library.custom_op("compress::blocked_attention", mutates_args=())
def _forward(
    q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask_B1TT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    probabilities, _ = _kernels()
    B, H, T, d = q_BHTd.shape
    G = k_BGTd.shape[1]
    N, P = B * G, H // G
    q_NPTd, v_NTd = q_BHTd.reshape(N, P, T, d), v_BGTd.reshape(N, T, d)
    k32_NTd = k_BGTd.reshape(N, T, d).float()
    out_BTHd, lse_NPT = torch.empty(B, T, H, d, dtype=q_BHTd.dtype), torch.empty(N, P, T)
    for first in range(0, T, _QUERIES):
        end = min(first + _QUERIES, T)
        Q = end - first
        q32_NRd = q_NPTd[:, :, first:end].reshape(N, P * Q, d).float()
        s_NPQK = torch.bmm(q32_NRd, k32_NTd[:, :end].transpose(1, 2)).view(N, P, Q, end)
        p_NPQK, lse_NPT[:, :, first:end] = probabilities(s_NPQK, _kept(mask_B1TT, first, end, G), first, scale)
        block_NRd = torch.bmm(p_NPQK.view(N, P * Q, end), v_NTd[:, :end])
        out_BTHd[:, first:end].view(B, Q, G, P, d).copy_(block_NRd.view(B, G, P, Q, d).permute(0, 3, 1, 2, 4))
    return out_BTHd, lse_NPT


@torch.library.custom_op("compress::blocked_attention_backward", mutates_args=())
def _backward(
    grad_BTHd: Tensor,
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    mask_B1TT: Tensor | None,
    out_BTHd: Tensor,
    lse_NPT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, gradients = _kernels()
    B, H, T, d = q_BHTd.shape
    G = k_BGTd.shape[1]
    N, P = B * G, H // G
    q_NPTd, k_NTd = q_BHTd.reshape(N, P, T, d), k_BGTd.reshape(N, T, d)
    k32_NTd, v32_NTd = k_NTd.float(), v_BGTd.reshape(N, T, d).float()
    grad_NPTd = grad_BTHd.transpose(1, 2).reshape(N, P, T, d)
    delta_NPT = (grad_BTHd.float() * out_BTHd.float()).sum(-1).transpose(1, 2).reshape(N, P, T)
    dq_BTHd = torch.empty(B, T, H, d, dtype=q_BHTd.dtype)
    dk_NTd, dv_NTd = torch.zeros(N, T, d), torch.zeros(N, T, d)
    for first in range(0, T, _QUERIES):
        end = min(first + _QUERIES, T)
        Q = end - first
        q_NRd = q_NPTd[:, :, first:end].reshape(N, P * Q, d)
        grad_NRd = grad_NPTd[:, :, first:end].reshape(N, P * Q, d)
        s_NPQK = torch.bmm(q_NRd.float(), k32_NTd[:, :end].transpose(1, 2)).view(N, P, Q, end)
        dp_NPQK = torch.bmm(grad_NRd.float(), v32_NTd[:, :end].transpose(1, 2)).view(N, P, Q, end)
        rows = slice(first, end)
        kept = _kept(mask_B1TT, first, end, G)
        p_NPQK, ds_NPQK = gradients(s_NPQK, dp_NPQK, lse_NPT[:, :, rows], delta_NPT[:, :, rows], kept, first, scale)
        p_NRK, ds_NRK = p_NPQK.view(N, P * Q, end), ds_NPQK.view(N, P * Q, end)
        dv_NTd[:, :end] += torch.bmm(p_NRK.transpose(1, 2), grad_NRd)
        dk_NTd[:, :end] += torch.bmm(ds_NRK.transpose(1, 2), q_NRd)
        block_NRd = torch.bmm(ds_NRK, k_NTd[:, :end])
        dq_BTHd[:, rows].view(B, Q, G, P, d).copy_(block_NRd.view(B, G, P, Q, d).permute(0, 3, 1, 2, 4))
    return dq_BTHd, dk_NTd.to(k_BGTd.dtype).view(B, G, T, d), dv_NTd.to(v_BGTd.dtype).view(B, G, T, d)


@_forward.register_fake
def _(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask_B1TT: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, d = q_BHTd.shape
    G = k_BGTd.shape[1]
    return q_BHTd.new_empty(B, T, H, d), q_BHTd.new_empty(B * G, H // G, T, dtype=torch.float32)


@_backward.register_fake
def _(
    grad_BTHd: Tensor,
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    mask_B1TT: Tensor | None,
    out_BTHd: Tensor,
    lse_NPT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(out_BTHd), k_BGTd.new_empty(k_BGTd.shape), v_BGTd.new_empty(v_BGTd.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHTd, k_BGTd, v_BGTd, mask_B1TT, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q_BHTd, k_BGTd, v_BGTd, mask_B1TT, *output)


def _differentiate(ctx: Any, grad_BTHd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq_BTHd, dk, dv = torch.ops.compress.blocked_attention_backward(grad_BTHd, *ctx.saved_tensors, ctx.scale)
    return dq_BTHd.transpose(1, 2), dk, dv, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _kept(mask_B1TT: Tensor | None, first: int, end: int, G: int) -> Tensor | None:
    """The mask's rows of a block, (N, 1, Q, K)."""
    return None if mask_B1TT is None else mask_B1TT[:, :, first:end, :end].repeat_interleave(G, 0)


@functools.cache
def _kernels() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]:
    """What lies between the products, each in one pass over the scores."""

    def allowed(s_NPQK: Tensor, kept: Tensor | None, first: int) -> Tensor:
        Q, K = s_NPQK.shape[-2:]
        causal = torch.arange(K)[None] <= (torch.arange(Q) + first)[:, None]
        return causal if kept is None else causal & kept

    def probabilities(s_NPQK: Tensor, kept: Tensor | None, first: int, scale: float) -> tuple[Tensor, Tensor]:
        s_NPQK = torch.where(allowed(s_NPQK, kept, first), s_NPQK * scale, -torch.inf)
        most = s_NPQK.amax(-1, keepdim=True)
        p_NPQK = (s_NPQK - most).exp()
        total = p_NPQK.sum(-1, keepdim=True)
        return (p_NPQK / total).bfloat16(), (most + total.log()).squeeze(-1)

    def gradients(
        s_NPQK: Tensor,
        dp_NPQK: Tensor,
        lse_NPQ: Tensor,
        delta_NPQ: Tensor,
        kept: Tensor | None,
        first: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        p_NPQK = torch.where(allowed(s_NPQK, kept, first), (s_NPQK * scale - lse_NPQ[..., None]).exp(), 0.0)
        return p_NPQK.bfloat16(), (p_NPQK * (dp_NPQK - delta_NPQ[..., None]) * scale).bfloat16()

    return torch.compile(probabilities, dynamic=True), torch.compile(gradients, dynamic=True)

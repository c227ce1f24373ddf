"""Blocked attention is torch's, at least as exact, and nothing of it stays with a model that is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import make_batch, make_model, save_model
from torch import Tensor

from compress.attention import blocked_attention, use_blocked_attention
from compress.step import trunk

SCALE = 0.3


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _torchs(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q_BHTd, k_BGTd, v_BGTd, mask, is_causal=mask is None, scale=SCALE, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [1, 4])
def test_output_and_gradients_are_as_exact_as_torchs(documents: int) -> None:
    """Two whole blocks of queries and a part of one; key-value heads shared by two; strided as the models hand them."""
    B, H, G, T, d = 2, 6, 3, 150, 16
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, d, generator=random).bfloat16().transpose(1, 2) for heads in (H, G, G))
    grad_BTHd = torch.randn(B, T, H, d, generator=random).bfloat16()
    mask = None
    if documents > 1:
        document_BT = torch.randint(0, documents, (B, T), generator=random).sort(-1).values
        mask = (document_BT[:, :, None] == document_BT[:, None, :])[:, None] & torch.ones(T, T).tril().bool()

    def output_and_gradients(dtype: torch.dtype, blocked: bool) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        out_BTHd = blocked_attention(*inputs, mask, SCALE) if blocked else _torchs(*inputs, mask)
        return [out_BTHd, *torch.autograd.grad(out_BTHd, inputs, grad_BTHd.to(dtype))]

    exact = output_and_gradients(torch.float64, blocked=False)
    ours, theirs = (output_and_gradients(torch.bfloat16, blocked) for blocked in (True, False))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert _error(mine, true) <= max(1.2 * _error(other, true), 2**-8)


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3", "gpt_neox"])
def test_a_model_of_packed_documents_is_as_exact_with_it(variant: str, tmp_path: Path) -> None:
    batch = make_batch(tokens=80)
    model = make_model(variant)
    exact = trunk(model.double(), batch).detach()
    model.bfloat16()
    plain = trunk(model, batch)
    use_blocked_attention(model)
    blocked = trunk(model, batch)
    assert blocked.grad_fn is not None
    assert not torch.equal(blocked, plain), "the model's attention is another one now"
    assert _error(blocked, exact) <= 1.2 * _error(plain, exact)
    saved = save_model(tmp_path, model) / "config.json"
    assert "blocked" not in saved.read_text()


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt_oss"])
def test_what_it_does_not_speed_up_stays_as_it_is(variant: str) -> None:
    """float32, and the families whose attention caps its scores or has sinks."""
    batch, model = make_batch(tokens=80), make_model(variant)
    expected = trunk(model, batch)
    use_blocked_attention(model)
    assert torch.equal(trunk(model, batch), expected)

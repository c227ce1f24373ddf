"""Micro-batches as Megatron-Core's model takes them, on ranks that may share a sequence."""

# B sequences, T tokens, C context-parallel ranks

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.megatron.layout import Groups
from compress.tokens import TokenBatch


def own_tokens(num_tokens: int, groups: Groups, rank: int | None = None) -> Tensor:
    """Which tokens of a sequence a context-parallel rank has: of 2 C equal pieces one from the front and its
    counterpart from the end, so that each has as much to look back at (Megatron-Core's order)."""
    count = groups.layout.context
    if count == 1:
        return torch.arange(num_tokens)
    at = groups.context.rank() if rank is None else rank
    pieces = torch.arange(num_tokens).chunk(2 * count)
    return torch.cat([pieces[at], pieces[2 * count - 1 - at]])


def looking_back(batch: TokenBatch, groups: Groups) -> Tensor:
    """(B, 1, own tokens, all tokens): True where a token looks, at itself and at what is before it in its document.

    All tokens in the order in which context-parallel ranks gather them.
    """
    num_tokens = batch.input_ids.shape[1]
    everyones = torch.cat([own_tokens(num_tokens, groups, rank) for rank in range(groups.layout.context)])
    place_T = torch.arange(num_tokens)
    first_BT = place_T - batch.position_ids.cpu()  # of the document
    own = own_tokens(num_tokens, groups)
    looks_BTT = (place_T[everyones] <= place_T[own][:, None]) & (place_T[everyones] >= first_BT[:, own][:, :, None])
    return looks_BTT[:, None].to(batch.input_ids.device)


def inputs_of(batch: TokenBatch, groups: Groups) -> dict[str, Any]:
    """The arguments of a forward.

    Rotary positions count from the sequence's start: between two tokens of a document only their distance matters.
    """
    own = own_tokens(batch.input_ids.shape[1], groups).to(batch.input_ids.device)
    return {
        "input_ids": batch.input_ids[:, own],
        "position_ids": batch.position_ids[:, own],
        "attention_mask": looking_back(batch, groups),
    }


def own_part(values_BT: Tensor, groups: Groups) -> Tensor:
    """Of values of every token those of this context-parallel rank's."""
    return values_BT[:, own_tokens(values_BT.shape[1], groups).to(values_BT.device)]


def gathered(hidden_BTD: Tensor, groups: Groups) -> Tensor:
    """Last hidden states (B, T, D) with every token of this context-parallel rank, ready for a head of which each
    tensor-parallel rank has rows: the backward sums over these ranks."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    if not groups.layout.sequence:
        found: Tensor = copy_to_tensor_model_parallel_region(hidden_BTD, group=groups.tensor)
        return found
    hidden_TBD = hidden_BTD.transpose(0, 1).contiguous()
    whole_TBD: Tensor = gather_from_sequence_parallel_region(hidden_TBD, group=groups.tensor)
    return whole_TBD.transpose(0, 1)


def whole_sequences(hidden_BTD: Tensor, groups: Groups) -> Tensor:
    """`gathered`, and of all context-parallel ranks in the tokens' order; without gradients."""
    own_BTD = gathered(hidden_BTD, groups)
    if groups.layout.context == 1:
        return own_BTD
    parts = [torch.empty_like(own_BTD) for _ in range(groups.layout.context)]
    torch.distributed.all_gather(parts, own_BTD.contiguous(), group=groups.context)
    num_tokens = sum(part.shape[1] for part in parts)
    order = torch.cat([own_tokens(num_tokens, groups, rank) for rank in range(groups.layout.context)])
    return torch.cat(parts, 1)[:, order.argsort()]

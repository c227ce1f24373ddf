"""Minitron's residual merge: a removed attention head is folded into a kept one (arXiv 2407.14679, section 2.3).

Heads are ranked by importance, 1 the best. Pruning L heads to K, kept head i becomes head_i + (head_i - head_j) with
j = 2K - i + 1, for i from 2K - L + 1 (or 1) to K: the best removed head goes to the worst kept one, and so on outwards.
With grouped queries this is done inside each kept group and to the query projections only, as the paper says; where
every head has its own key and value, over the whole layer and to query, key and value alike (our reading: the paper
writes "head"). The printed range begins at 2K - L, whose partner L + 1 doesn't exist.
"""

# H query heads, X elements of a head in a tensor

from __future__ import annotations

from torch import Tensor

from compress.architecture import ModelInfo, layer_of, row_of
from compress.families import Row
from compress.scores import Widths
from compress.slicing import Kept


def merged_weights(info: ModelInfo, scores: Widths, kept: Kept) -> dict[str, Tensor]:
    """Full-size replacements, by the teacher's tensor names, of the projections that make heads.

    `scores`: by the criterion that chose the heads. Empty where no head of a kept group is removed.
    """
    pairs = {
        layer: _pairs(scores["query_heads"][layer], kept["query_heads"][position], info.shape.group_size)
        for position, layer in enumerate(kept["layers"].tolist())
    }
    result = {}
    shards = info.shards
    for name in info.tensors:
        layer, row = layer_of(name), info.rows[row_of(name)]
        if not pairs.get(-1 if layer is None else layer) or not _makes_heads(name, row, info):
            continue
        assert layer is not None
        result[name] = _merge(shards.get(name), row, pairs[layer], info)
    return result


def _pairs(score_H: Tensor, kept_H: Tensor, group_size: int) -> list[tuple[int, int]]:
    """(kept head, the removed head that is folded into it) of one layer."""
    stays = set(kept_H.tolist())
    if group_size == 1:
        groups = [list(range(len(score_H)))]
    else:
        groups = [list(range(g * group_size, (g + 1) * group_size)) for g in sorted({h // group_size for h in stays})]
    pairs = []
    for heads in groups:
        ranked = sorted(heads, key=lambda head: (-float(score_H[head]), head))
        best = [head for head in ranked if head in stays]
        gone = [head for head in ranked if head not in stays]
        pairs += list(zip(reversed(best), gone, strict=False))
    return pairs


def _makes_heads(name: str, row: Row, info: ModelInfo) -> bool:
    """Whether a tensor's rows are heads to be merged: projections and their biases, not norms over heads."""
    module = row_of(name).rpartition(".")[0]
    if len(row.dimensions) == 1 and not (name.endswith(".bias") and f"{module}.weight" in info.rows):
        return False
    axes = {part.axis for part in row.dimensions[0]}
    return "query_heads" in axes or (info.shape.group_size == 1 and "key_value_heads" in axes)


def _merge(tensor: Tensor, row: Row, pairs: list[tuple[int, int]], info: ModelInfo) -> Tensor:
    """In float32 and back; the removed heads stay as they are, since they are cut away."""
    wide = tensor.float()
    result, start = wide.clone(), 0
    for part in row.dimensions[0]:
        if part.axis == "query_heads" or (part.axis == "key_value_heads" and info.shape.group_size == 1):
            each = part.elements_per_unit(info.shape)
            for head, removed in pairs:
                ours, theirs = _block(start, head, each), _block(start, removed, each)
                result[ours] = 2 * wide[ours] - wide[theirs]
        start += part.size(info.shape)
    return result.to(tensor.dtype)


def _block(start: int, head: int, each: int) -> slice:
    return slice(start + head * each, start + (head + 1) * each)

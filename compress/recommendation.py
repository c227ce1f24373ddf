"""Which criterion to go by: the KL to the teacher of the model that each would leave, untrained, on the same text.

Rank correlations say that criteria differ, not which is right. The models are the masked teacher, so nothing is cut.
"""

# N loss tokens of a batch, D hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.families import PRUNABLE, Shape
from compress.masking import masked
from compress.scores import Importance
from compress.slicing import select
from compress.step import divergence
from compress.teacher import Teacher
from compress.tokens import TokenBatch

_WIDTHS = tuple(name for name in PRUNABLE if name != "num_hidden_layers")
SHARE = 0.75  # of an MLP or of the layers, where the shape that is asked for leaves them whole


def compare_criteria(
    model: PreTrainedModel,
    batches: Sequence[TokenBatch],
    importance: Importance,
    teacher: Shape,
    student: Shape,
    progress: Callable[[Iterator[str], int], Iterator[str]] = lambda steps, total: steps,
) -> dict[str, Any]:
    """For `width` and `depth`: the shape that was tried, `kl` of each criterion (nats per loss token), the `best`.

    Width criteria are tried with every layer kept, depth criteria with every width whole, both as `student` asks. A
    depth criterion that doesn't reach so far is left out.
    """
    wide = replace(student, num_hidden_layers=teacher.num_hidden_layers)
    if wide == teacher:
        name = "intermediate_size" if teacher.intermediate_size else "moe_intermediate_size"
        share = int(SHARE * getattr(teacher, name))
        wide = replace(teacher, **{name: share // 16 * 16 or max(1, share)})  # type: ignore[arg-type]
    layers = student.num_hidden_layers
    if layers == teacher.num_hidden_layers:
        layers = max(1, int(SHARE * layers))
    removed = teacher.num_hidden_layers - layers
    deep = {name: found.of(removed) for name, found in importance.depths.items() if len(found.removed) >= removed}
    signals = [Teacher(model).signal(batch) for batch in batches]
    count = sum(int(batch.loss_mask.sum()) for batch in batches)

    @torch.no_grad()
    def kl(shape: Shape, gone: Sequence[int], width: str | None = None) -> float:
        with masked(model, select(importance, shape, gone, width=width)):
            pairs = zip(batches, signals, strict=True)
            return sum(divergence(model, batch, signal).item() for batch, signal in pairs) / count

    width_kl: dict[str, float] = {}
    depth_kl: dict[str, float] = {}

    def trials() -> Iterator[str]:
        for name in importance.widths:
            width_kl[name] = kl(wide, [], name)
            yield name
        for name, gone in deep.items():
            depth_kl[name] = kl(replace(teacher, num_hidden_layers=layers), gone)
            yield name

    for _ in progress(trials(), len(importance.widths) + len(deep)):
        pass
    return {
        "num_tokens": count,
        "width": {"sizes": {n: getattr(wide, n) for n in _WIDTHS}, "kl": width_kl, "best": _best(width_kl)},
        "depth": {"num_hidden_layers": layers, "kl": depth_kl, "best": _best(depth_kl)},
    }


def _best(found: dict[str, float]) -> str | None:
    return min(found, key=found.__getitem__) if found else None

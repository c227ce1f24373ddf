"""Scores by several criteria of one teacher: what they are called, what they hold, and their file."""

# L layers, D hidden, F intermediate, H query heads, G key-value heads, E experts, S = L + 1 depths of the stream

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifacts import open_tensors, save_tensors
from compress.criteria import parse_criterion
from compress.errors import ArtifactError, ConfigError
from compress.families import AXES, Shape

FORMAT_VERSION = 2
Widths = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerRemovals:
    """What depth pruning removes: for 1, 2, ... layers the layers, and the damage once they are gone."""

    removed: list[list[int]]
    cost: list[float]

    def of(self, number: int) -> list[int]:
        return sorted(self.removed[number - 1]) if number else []


@dataclass(frozen=True)
class Importance:
    """Scores of one teacher, float32 on the CPU; higher = keep.

    `widths`: by criterion and axis, hidden (D,), intermediate (L, F), query_heads (L, H), key_value_heads (L, G),
    experts (L, E), expert_intermediate (L, E, F). `depths`: by criterion what to remove. The first of each is the one
    that is used when none is named.
    """

    widths: Mapping[str, Widths]
    depths: Mapping[str, LayerRemovals]
    block_influence_L: Tensor
    num_sequences: int
    num_tokens: int
    similarity_SS: Tensor | None = field(default=None)  # mean cosine between the residual stream at every two depths

    def width(self, criterion: str | None = None) -> Widths:
        """The scores by a criterion; raises ConfigError when it wasn't scored."""
        return _choose(self.widths, criterion and str(parse_criterion(criterion)), "width")

    def depth(self, criterion: str | None = None) -> LayerRemovals:
        """What to remove by a criterion; raises ConfigError when it wasn't scored."""
        return _choose(self.depths, criterion, "depth")


def _choose(found: Mapping[str, Any], criterion: str | None, name: str) -> Any:
    if criterion is None:
        return next(iter(found.values()))
    if criterion not in found:
        raise ConfigError(
            f"prune.{name}_criterion={criterion} was not scored: the scores hold {', '.join(found)}; choose one of "
            f"them, or add it to score.{name} and run stage=score in a run of another name="
        )
    return found[criterion]


def by_block_influence(influence_L: Tensor) -> LayerRemovals:
    """Layers in the order of their block influence, lowest first; the damage is its sum."""
    order = influence_L.argsort(stable=True)[:-1]
    cost = influence_L[order].double().cumsum(0).tolist()
    return LayerRemovals([order[:n].tolist() for n in range(1, len(order) + 1)], cost)


def by_similarity(similarity_SS: Tensor) -> LayerRemovals:
    """For each number n of layers the contiguous block whose input and output are most alike; damage 1 - cosine.

    Gromov et al. (arXiv 2403.17887, section 3.2) take the angle at the last token; this is over all tokens.
    """
    layers = len(similarity_SS) - 1
    removed, cost = [], []
    for number in range(1, layers):
        angle = [1 - float(similarity_SS[start, start + number]) for start in range(layers - number + 1)]
        start = min(range(len(angle)), key=lambda i: angle[i])
        removed.append(list(range(start, start + number)))
        cost.append(angle[start])
    return LayerRemovals(removed, cost)


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's along the last dimension, 1 where both order alike; ties keep their order. 0 for fewer than two."""
    centred = []
    for values in (one, other):
        ranks = values.double().argsort(dim=-1, stable=True).argsort(-1).double()
        centred.append(ranks - ranks.mean(-1, keepdim=True))
    below = torch.linalg.vector_norm(centred[0], dim=-1) * torch.linalg.vector_norm(centred[1], dim=-1)
    return (centred[0] * centred[1]).sum(-1) / below.clamp(min=torch.finfo(torch.float64).tiny)


def save_importance(path: Path, importance: Importance, teacher: str) -> None:
    """Write the scores as safetensors; `teacher` is the fingerprint of the folder they belong to."""
    tensors = {"block_influence": importance.block_influence_L.contiguous()}
    for criterion, widths in importance.widths.items():
        for axis, scores in widths.items():
            tensors[f"width/{criterion}/{axis}"] = scores.contiguous()
    for criterion, found in importance.depths.items():
        padded = torch.full((len(found.removed), len(found.removed)), -1, dtype=torch.int32)
        for number, layers in enumerate(found.removed):
            padded[number, : len(layers)] = torch.tensor(layers, dtype=torch.int32)
        tensors[f"depth/{criterion}/removed"] = padded
        tensors[f"depth/{criterion}/cost"] = torch.tensor(found.cost, dtype=torch.float32)
    if importance.similarity_SS is not None:
        tensors["similarity"] = importance.similarity_SS.contiguous()
    header = {
        "format_version": FORMAT_VERSION,
        "teacher": teacher,
        "width": list(importance.widths),
        "depth": list(importance.depths),
        "num_sequences": importance.num_sequences,
        "num_tokens": importance.num_tokens,
    }
    save_tensors(path, tensors, {"importance": json.dumps(header, sort_keys=True)})


def load_importance(path: Path, shape: Shape, teacher: str) -> Importance:
    """Read the scores and check that they are whole, finite, and of this teacher; ArtifactError otherwise."""
    again = "delete the score folder and run stage=score again"
    with open_tensors(path) as reader:
        try:
            header = json.loads((reader.metadata() or {})["importance"])
            version, owner = header["format_version"], header["teacher"]
            names = {kind: [str(name) for name in header[kind]] for kind in ("width", "depth")}
            counts = {name: int(header[name]) for name in ("num_sequences", "num_tokens")}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not a file of scores (header: {error!r}); {again}") from None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format_version={version}, this release reads {FORMAT_VERSION}; {again}")
        if owner != teacher:
            raise ArtifactError(f"{path} was scored on another teacher ({owner[:12]}, not {teacher[:12]}); {again}")
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
    layers = shape.num_hidden_layers
    sizes = {axis: count for axis, size in AXES.items() if (count := getattr(shape, size))}
    per_axis = {
        axis: (count,) if axis == "hidden" else (layers, shape.num_experts, count) if axis == "expert_intermediate"
        else (layers, count)
        for axis, count in sizes.items()
    }  # fmt: skip
    expected: dict[str, tuple[int, ...] | None] = {"block_influence": (layers,)}
    expected |= {f"width/{name}/{axis}": size for name in names["width"] for axis, size in per_axis.items()}
    expected |= {f"depth/{name}/{part}": None for name in names["depth"] for part in ("removed", "cost")}
    if set(tensors) - {"similarity"} != set(expected) or not names["width"] or not names["depth"]:
        odd = sorted(set(tensors) ^ set(expected))
        raise ArtifactError(f"{path} holds other tensors than its header says, such as {odd[:3]}; {again}")
    for name, size in expected.items():
        if size is not None and tuple(tensors[name].shape) != size:
            raise ArtifactError(
                f"{path}: {name} has size {tuple(tensors[name].shape)}, the teacher's is {size}; {again}"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path}: {name} holds values that are not finite; {again}")
    depths = {}
    for name in names["depth"]:
        cost: list[float] = tensors[f"depth/{name}/cost"].tolist()
        removed = [[layer for layer in row if layer >= 0] for row in tensors[f"depth/{name}/removed"].tolist()]
        whole = all(
            len(set(row)) == number and set(row) < set(range(layers)) for number, row in enumerate(removed, start=1)
        )
        if not whole or len(cost) != len(removed):
            raise ArtifactError(f"{path}: depth/{name}/removed={removed} aren't sets of 1, 2, ... layers; {again}")
        depths[name] = LayerRemovals(removed, cost)
    return Importance(
        widths={name: {axis: tensors[f"width/{name}/{axis}"] for axis in per_axis} for name in names["width"]},
        depths=depths,
        block_influence_L=tensors["block_influence"],
        similarity_SS=tensors.get("similarity"),
        **counts,
    )

"""Importance of every prunable unit from one forward-only pass (Minitron, arXiv 2407.14679, section 2.2), and its file.

Activations are reduced as they appear; what is kept is a few numbers per unit. A score is defined per sequence and then
over sequences, so it doesn't depend on how sequences are put into batches.
"""

# B sequences, T tokens, L layers, D hidden, F intermediate, H query heads, G key-value heads, d head_dim, X any of them

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from compress.architecture import Shape, family_of, shape_of, taps
from compress.artifacts import open_tensors, save_tensors
from compress.errors import ArtifactError, NumericalError
from compress.step import trunk
from compress.tokens import TokenBatch

FORMAT_VERSION = 1
AGGREGATIONS = ("mean", "l2", "variance")


@dataclass(frozen=True)
class Importance:
    """Scores of one teacher, float32 on the CPU; higher = keep.

    `removal_order` and `removal_kl` are there when layers were removed greedily: which layer goes first, second, ...,
    and the KL to the teacher in nats per token once it is gone.
    """

    hidden_D: Tensor
    intermediate_LF: Tensor
    query_heads_LH: Tensor
    key_value_heads_LG: Tensor
    block_influence_L: Tensor
    num_sequences: int
    num_tokens: int
    sequence_aggregation: str
    batch_aggregation: str
    removal_order: Tensor | None = None
    removal_kl: Tensor | None = None


class _Running:
    """Mean and sum of squared deviations over sequences, merged batch by batch (Chan et al.); float64, a few kB."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_X: Tensor = torch.zeros((), dtype=torch.float64)
        self.deviation_X: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, value_BX: Tensor) -> None:
        value_BX = value_BX.to("cpu", torch.float64)
        count = value_BX.shape[0]
        mean_X = value_BX.mean(0)
        deviation_X = (value_BX - mean_X).square().sum(0)
        total = self.count + count
        shift_X = mean_X - self.mean_X
        self.deviation_X = self.deviation_X + deviation_X + shift_X.square() * (self.count * count / total)
        self.mean_X = self.mean_X + shift_X * (count / total)
        self.count = total

    def result(self, aggregation: str) -> Tensor:
        """Over the values of all sequences, which are never negative, so that mean |s| is their mean."""
        if aggregation == "mean":
            return self.mean_X
        if aggregation == "l2":
            return (self.deviation_X + self.count * self.mean_X.square()).sqrt()
        return self.deviation_X / self.count


def aggregate_sequence(values_BTX: Tensor, valid_BT: Tensor | None, aggregation: str) -> Tensor:
    """mean |s|, sqrt(sum s^2) or population variance over each sequence's real tokens; (B, X), in float32 or better.

    `valid_BT` None means that all tokens are real. Every sequence must have a real token.
    """
    if valid_BT is not None:
        values_BTX = values_BTX.masked_fill(~valid_BT[..., None], 0)
        count_B1 = valid_BT.sum(1, keepdim=True)
    else:
        count_B1 = torch.full((values_BTX.shape[0], 1), values_BTX.shape[1], device=values_BTX.device)
    dtype = torch.promote_types(values_BTX.dtype, torch.float32)
    if aggregation == "mean":
        return values_BTX.abs().sum(1, dtype=dtype) / count_B1  # 5x vector_norm's speed over this dimension
    if aggregation == "l2":
        return values_BTX.to(dtype).square().sum(1).sqrt()
    values_BTX = values_BTX.to(dtype)
    mean_B1X = (values_BTX.sum(1) / count_B1)[:, None]
    deviation_BTX = values_BTX - mean_B1X
    if valid_BT is not None:
        deviation_BTX = deviation_BTX.masked_fill(~valid_BT[..., None], 0)
    return deviation_BTX.square().sum(1) / count_B1


class _Listener:
    """The hooks of one pass. `valid_BT` and `real_B` describe the batch that is running."""

    def __init__(self, model: PreTrainedModel, sequence_aggregation: str) -> None:
        self.aggregation = sequence_aggregation
        self.scores: dict[str, _Running] = {}
        self.angle_L = torch.zeros(len(model.model.layers), dtype=torch.float64)
        self.valid_BT: Tensor | None = None
        self.real_B: Tensor | None = None
        self.handles: list[Any] = []
        where = taps(family_of(model.config.to_dict(), "the model"))
        for number, layer in enumerate(model.model.layers):
            self.handles.append(layer.register_forward_hook(self._influence(number), with_kwargs=True))
            for pattern in where.hidden:
                self._listen(model, pattern.replace("*", str(number)), of_output=True)
            for pattern in (where.intermediate, where.query_heads):
                self._listen(model, pattern.replace("*", str(number)), of_output=False)

    def _listen(self, model: PreTrainedModel, name: str, of_output: bool) -> None:
        running = self.scores[name] = _Running()

        def hook(_module: Any, arguments: Any, output: Tensor) -> None:
            values_BTX = output if of_output else arguments[0]
            if self.real_B is not None:
                values_BTX = values_BTX[self.real_B]
            running.add(aggregate_sequence(values_BTX, self.valid_BT, self.aggregation))

        self.handles.append(model.get_submodule(name).register_forward_hook(hook))

    def _influence(self, number: int) -> Callable[..., None]:
        def hook(_module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
            before_BTD = arguments[0] if arguments else keywords["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output
            if self.real_B is not None:
                before_BTD, after_BTD = before_BTD[self.real_B], after_BTD[self.real_B]
            angle_BT = 1 - F.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            if self.valid_BT is not None:
                angle_BT = angle_BT.masked_fill(~self.valid_BT, 0)
            self.angle_L[number] += angle_BT.double().sum().cpu()

        return hook

    def start(self, valid_BT: Tensor) -> None:
        """Say which tokens of the coming batch are real; the usual batch without padding costs no masking."""
        real_B = valid_BT.any(1)
        self.real_B = None if bool(real_B.all()) else real_B
        self.valid_BT = None if bool(valid_BT.all()) else valid_BT[real_B]


@torch.no_grad()
def estimate_importance(
    model: PreTrainedModel,
    batches: Iterable[TokenBatch],
    *,
    sequence_aggregation: str = "mean",
    batch_aggregation: str = "l2",
    weighted: bool = False,
) -> Importance:
    """Scores of every axis from one forward pass of the trunk; the output head doesn't run.

    hidden: outputs of every per-layer norm, summed over them. intermediate: input of down_proj, so after activation
    and gate (as NVIDIA's code; the paper's formula taps before). query_heads: columns of o_proj's input, then L2 over
    head_dim; key_value_heads: L2 over the columns of all heads of the group. Block influence of a layer: 1 - mean
    cosine between its input and output over real tokens. A sequence is a row of a batch.

    With `weighted`, the score of each column of down_proj's and o_proj's input is multiplied by the L2 norm of the
    weights that read it: what the column adds to the residual stream, and not only how large it is.

    Raises NumericalError when a score isn't finite or no batch has a real token.
    """
    assert {sequence_aggregation, batch_aggregation} <= set(AGGREGATIONS), (sequence_aggregation, batch_aggregation)
    shape = shape_of(model.config)
    training = model.training
    model.eval()
    listener = _Listener(model, sequence_aggregation)
    num_sequences = num_tokens = 0
    try:
        for batch in batches:
            real = int(batch.valid_mask.any(1).sum())
            if real:
                listener.start(batch.valid_mask)
                trunk(model, batch)
                num_sequences, num_tokens = num_sequences + real, num_tokens + int(batch.valid_mask.sum())
    finally:
        for handle in listener.handles:
            handle.remove()
        model.train(training)
    if num_tokens == 0:
        raise NumericalError("the calibration batches hold no real token to score; check data.calibration")
    score = {name: running.result(batch_aggregation) for name, running in listener.scores.items()}
    for name, values_X in score.items():
        if not bool(values_X.isfinite().all()):
            raise NumericalError(
                f"{name}: {int((~values_X.isfinite()).sum())} of {values_X.numel()} scores are not finite; "
                "set compute_dtype=float32, or check the teacher's weights"
            )
    where = taps(family_of(model.config.to_dict(), "the model"))

    def stack(pattern: str) -> Tensor:
        return torch.stack([score[pattern.replace("*", str(layer))] for layer in range(shape.num_hidden_layers)])

    if weighted:
        for name, values_X in score.items():
            weight = model.get_submodule(name).weight
            if weight.ndim == 2:
                values_X *= torch.linalg.vector_norm(weight.to(values_X.dtype), dim=0).to(values_X.device)

    columns_LHd = stack(where.query_heads).unflatten(1, (shape.num_attention_heads, shape.head_dim))
    heads_LH = torch.linalg.vector_norm(columns_LHd, dim=2)
    groups_LG = torch.linalg.vector_norm(heads_LH.unflatten(1, (shape.num_key_value_heads, -1)), dim=2)
    influence_L = listener.angle_L / num_tokens
    if not bool(influence_L.isfinite().all()):
        raise NumericalError(
            f"model.layers.{int((~influence_L.isfinite()).nonzero()[0])}: its block influence is not finite; "
            "set compute_dtype=float32, or check the teacher's weights"
        )
    return Importance(
        hidden_D=torch.stack([stack(pattern).sum(0) for pattern in where.hidden]).sum(0).float(),
        intermediate_LF=stack(where.intermediate).float(),
        query_heads_LH=heads_LH.float(),
        key_value_heads_LG=groups_LG.float(),
        block_influence_L=influence_L.float(),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        sequence_aggregation=sequence_aggregation,
        batch_aggregation=batch_aggregation,
    )


_FIELDS = {
    "hidden": "hidden_D",
    "intermediate": "intermediate_LF",
    "query_heads": "query_heads_LH",
    "key_value_heads": "key_value_heads_LG",
    "layers.block_influence": "block_influence_L",
}
_REMOVAL = {"layers.removal_order": "removal_order", "layers.removal_kl": "removal_kl"}
_FACTS = {"num_sequences": int, "num_tokens": int, "sequence_aggregation": str, "batch_aggregation": str}


def save_importance(path: Path, importance: Importance, teacher: str) -> None:
    """Write the scores as safetensors; `teacher` is the fingerprint of the folder they belong to."""
    tensors = {name: getattr(importance, field).contiguous() for name, field in _FIELDS.items()}
    if importance.removal_order is not None and importance.removal_kl is not None:
        tensors["layers.removal_order"] = importance.removal_order.to(torch.int32)
        tensors["layers.removal_kl"] = importance.removal_kl.float()
    facts = {name: getattr(importance, name) for name in _FACTS}
    header = {"format_version": FORMAT_VERSION, "criterion": "minitron", "teacher": teacher, **facts}
    save_tensors(path, tensors, {"importance": json.dumps(header, sort_keys=True)})


def load_importance(path: Path, shape: Shape, teacher: str) -> Importance:
    """Read the scores and check that they are whole, finite, and of this teacher; ArtifactError otherwise."""
    again = "delete the score folder and run stage=score again"
    with open_tensors(path) as reader:
        try:
            header = json.loads((reader.metadata() or {})["importance"])
            version, owner = header["format_version"], header["teacher"]
            facts = {name: kind(header[name]) for name, kind in _FACTS.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not a file of scores (header: {error!r}); {again}") from None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format_version={version}, this release reads {FORMAT_VERSION}; {again}")
        if owner != teacher:
            raise ArtifactError(f"{path} was scored on another teacher ({owner[:12]}, not {teacher[:12]}); {again}")
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
    layers = shape.num_hidden_layers
    expected = {
        "hidden": (shape.hidden_size,),
        "intermediate": (layers, shape.intermediate_size),
        "query_heads": (layers, shape.num_attention_heads),
        "key_value_heads": (layers, shape.num_key_value_heads),
        "layers.block_influence": (layers,),
    }
    if set(tensors) - set(_REMOVAL) != set(expected) or len(set(tensors) & set(_REMOVAL)) == 1:
        raise ArtifactError(f"{path} holds {sorted(tensors)}, expected {sorted(expected)}; {again}")
    for name, size in expected.items():
        if tuple(tensors[name].shape) != size:
            raise ArtifactError(
                f"{path}: {name} has size {tuple(tensors[name].shape)}, the teacher's is {size}; {again}"
            )
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{path}: {name} holds values that are not finite; {again}")
    importance = Importance(**{_FIELDS[name]: tensors[name] for name in expected}, **facts)
    if "layers.removal_order" in tensors:
        order, kl = tensors["layers.removal_order"].long(), tensors["layers.removal_kl"]
        listed = order.tolist()
        if order.shape != kl.shape or len(set(listed)) != len(listed) or not set(listed) < set(range(layers)):
            raise ArtifactError(f"{path}: layers.removal_order={listed} is no order of distinct layers; {again}")
        importance = replace(importance, removal_order=order, removal_kl=kl)
    return importance


def removal_cost(importance: Importance) -> tuple[list[int], list[float]]:
    """(layers in the order of their removal, damage once the first n are gone).

    By the greedy order where there is one, damage in nats per token; else by block influence, damage its sum.
    """
    if importance.removal_order is not None and importance.removal_kl is not None:
        return importance.removal_order.tolist(), importance.removal_kl.tolist()
    influence_L = importance.block_influence_L
    order = influence_L.argsort(stable=True)[:-1]
    cost = influence_L[order].double().cumsum(0).tolist()
    assert all(math.isfinite(c) for c in cost)
    return order.tolist(), cost

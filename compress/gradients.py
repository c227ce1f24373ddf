"""Importance from gradients and from weights alone: what Minitron's activation scores are compared with."""

# B sequences, T tokens, L layers, D hidden, H query heads, E experts, X elements of a dimension, U units of an axis

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import ModelInfo, expert_of, layer_of, row_of, shape_of, taps
from compress.errors import NumericalError
from compress.families import AXES, Part, Row, Shape, family_of_config, holds_all_experts
from compress.importance import experts_of, route_through
from compress.models import decoder_layers, output_head
from compress.parallel import ALONE, Ranks
from compress.scores import Widths
from compress.step import trunk
from compress.tokens import TokenBatch

_ROWS = 8192  # of the vocabulary at a time


def weight_magnitude(info: ModelInfo) -> Widths:
    """L2 norm of all weights of a unit, wherever the table says that a dimension lies on its axis.

    Sees no text and no activation. Reads the checkpoint one tensor at a time. Memory: a layer's largest in float32.
    """
    shape = info.shape
    energy = _empty(shape)
    shards = info.shards
    for name in sorted(info.tensors, key=lambda name: info.tensors[name].shard):
        tensor, row = shards.get(name), info.rows[row_of(name)]
        # The vocabulary's rows are no units: a block of them at a time.
        parts = tensor.split(_ROWS) if row.dimensions[0] == (Part("vocabulary"),) else [tensor]
        for part in parts:
            _add_energy(energy, part, row, shape, layer_of(name), expert_of(name))
    if info.family.field("num_key_value_heads") is None:
        energy["key_value_heads"] = energy["query_heads"]
    return {axis: found.sqrt().float() for axis, found in energy.items()}


def _empty(shape: Shape) -> dict[str, Tensor]:
    """Zeros of the size of every axis that a model of this shape has."""
    sizes = {axis: count for axis, name in AXES.items() if (count := getattr(shape, name))}
    result = {axis: torch.zeros(shape.num_hidden_layers, count, dtype=torch.float64) for axis, count in sizes.items()}
    result["hidden"] = torch.zeros(shape.hidden_size, dtype=torch.float64)
    if shape.num_experts:
        width = shape.num_hidden_layers, shape.num_experts, shape.moe_intermediate_size
        result["expert_intermediate"] = torch.zeros(width, dtype=torch.float64)
    return result


def _add_energy(
    energy: dict[str, Tensor], tensor: Tensor, row: Row, shape: Shape, layer: int | None, expert: int | None
) -> None:
    if holds_all_experts(row):
        for number in range(shape.num_experts):
            _add_energy(energy, tensor[number], Row(row.dimensions[1:]), shape, layer, number)
        return
    squares = tensor.float().square()
    if expert is not None and layer is not None:
        energy["experts"][layer, expert] += squares.sum(dtype=torch.float64)
    for dimension, parts in enumerate(row.dimensions):
        others = [d for d in range(squares.dim()) if d != dimension]
        element_X = squares.sum(others, dtype=torch.float64) if others else squares.double()
        start = 0
        for part in parts:
            stop = start + part.size(shape)
            if part.units in AXES:
                unit_U = element_X[start:stop].unflatten(0, (-1, part.elements_per_unit(shape))).sum(1)
                target = energy[part.units]
                if part.units == "expert_intermediate":
                    target[layer, expert] += unit_U
                elif part.units == "hidden":
                    target += unit_U
                else:
                    target[layer] += unit_U
            start = stop


class _Gradients:
    """Sums over each sequence of activation times gradient, unit by unit, added up as magnitudes over sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shape = shape_of(model.config)
        self.total = _empty(self.shape)
        self.sequence_BD = torch.zeros(0)  # of the hidden channels, over every norm of a batch
        self.valid_BT = torch.zeros(0)
        self.where = taps(family_of_config(model.config))

    def attach(self, layer: nn.Module, number: int) -> list[Callable[[], None]]:
        undo = [
            self._watch(layer, pattern, self._hidden, of_output=True)
            for pattern in (name.partition(".layers.*.")[2] for name in self.where.hidden)
        ]
        if self.where.intermediate is not None:
            undo.append(self._watch(layer, self._inner(self.where.intermediate), self._units("intermediate", number)))
        undo.append(self._watch(layer, self._inner(self.where.query_heads), self._heads(number)))
        experts = experts_of(layer)
        if experts is not None:
            undo.append(self._watch_experts(experts, number))
        return undo

    @staticmethod
    def _inner(pattern: str) -> str:
        return pattern.partition(".layers.*.")[2]

    def _watch(
        self, layer: nn.Module, name: str, take: Callable[[Tensor], None], of_output: bool = False
    ) -> Callable[[], None]:
        def hook(_module: Any, arguments: Any, output: Tensor) -> None:
            value_BTX = output if of_output else arguments[0]
            kept_BTX = value_BTX.detach()
            value_BTX.register_hook(lambda grad: take(self._sum(kept_BTX, grad)))

        return layer.get_submodule(name).register_forward_hook(hook).remove

    def _sum(self, value_BTX: Tensor, grad_BTX: Tensor) -> Tensor:
        product_BTX = value_BTX.float() * grad_BTX.float()
        return product_BTX.masked_fill(~self.valid_BT[..., None], 0).sum(1).double().cpu()

    def _hidden(self, sum_BD: Tensor) -> None:
        self.sequence_BD = self.sequence_BD + sum_BD if len(self.sequence_BD) else sum_BD

    def _units(self, axis: str, number: int) -> Callable[[Tensor], None]:
        def take(sum_BX: Tensor) -> None:
            self.total[axis][number] += sum_BX.abs().sum(0)

        return take

    def _heads(self, number: int) -> Callable[[Tensor], None]:
        """A head's columns, and a group's heads, go together: their sums are added before the magnitude is taken."""

        def take(sum_BX: Tensor) -> None:
            heads_BH = sum_BX.unflatten(1, (self.shape.num_attention_heads, -1)).sum(2)
            groups_BG = heads_BH.unflatten(1, (self.shape.num_key_value_heads, -1)).sum(2)
            self.total["query_heads"][number] += heads_BH.abs().sum(0)
            self.total["key_value_heads"][number] += groups_BG.abs().sum(0)

        return take

    def _watch_experts(self, experts: Any, number: int) -> Callable[[], None]:
        def visit(expert: int, token_M: Tensor, inner_MF: Tensor, outer_MD: Tensor, _weight_M1: Tensor) -> None:
            sequence_N = torch.arange(self.valid_BT.numel()) // self.valid_BT.shape[1]
            valid_N = self.valid_BT.flatten()

            def by_sequence(value_MX: Tensor, grad_MX: Tensor) -> Tensor:
                product_MX = (value_MX.float() * grad_MX.float()) * valid_N[token_M, None]
                sum_BX = torch.zeros(len(self.valid_BT), product_MX.shape[1])
                return sum_BX.index_add_(0, sequence_N[token_M.cpu()], product_MX.cpu())

            units_MF, whole_MD = inner_MF.detach(), outer_MD.detach()

            def take_units(grad_MF: Tensor) -> None:
                sum_BF = by_sequence(units_MF, grad_MF)
                self.total["expert_intermediate"][number, expert] += sum_BF.abs().sum(0).double()

            def take_whole(grad_MD: Tensor) -> None:
                sum_BD = by_sequence(whole_MD, grad_MD)
                self.total["experts"][number, expert] += sum_BD.sum(1).abs().sum().double()

            if len(token_M):
                inner_MF.register_hook(take_units)
                outer_MD.register_hook(take_whole)

        return route_through(experts, visit)

    def end_batch(self) -> None:
        self.total["hidden"] += self.sequence_BD.abs().sum(0)
        self.sequence_BD = torch.zeros(0)


def estimate_taylor(model: PreTrainedModel, batches: Iterable[TokenBatch], ranks: Ranks = ALONE) -> Widths:
    """First-order Taylor importance: by how much the loss would change, to first order, if a unit's activation were 0.

    For each sequence the sum over its tokens (and a unit's elements) of activation times gradient of the mean
    next-token cross-entropy; the mean over sequences of its magnitude (Molchanov et al., arXiv 1906.10771, on
    activations; LLM-Pruner's criterion, arXiv 2305.11627, is the same on weights).

    With several `ranks` each runs its share of the batches, and all return the scores of all.

    Memory: the activations of one micro-batch, as in training without optimizer or weight gradients. Raises
    NumericalError when a score isn't finite or no batch has a loss token.
    """
    found = _Gradients(model)
    training = model.training
    model.eval()
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    undo = [remove for number, layer in enumerate(decoder_layers(model)) for remove in found.attach(layer, number)]
    # Gradients begin at the embedding's output: no weight needs one.
    begin = model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_(True))
    head = output_head(model)
    num_sequences = 0
    try:
        with torch.enable_grad():
            for batch in ranks.mine(batches):
                count_B = batch.loss_mask.sum(1)
                if not bool(count_B.any()):
                    continue
                found.valid_BT = batch.valid_mask
                hidden_ND = trunk(model, batch)[batch.loss_mask]
                logits_NV = (F.linear(hidden_ND, head.weight_VD, head.bias_V) * head.scale).float()
                if head.softcap is not None:
                    logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
                label_N = torch.roll(batch.input_ids, -1, 1)[batch.loss_mask]
                weight_N = (1 / count_B.clamp(min=1)).float()[:, None].expand_as(batch.loss_mask)[batch.loss_mask]
                loss = (F.cross_entropy(logits_NV, label_N, reduction="none") * weight_N).sum()
                torch.autograd.backward(loss)
                found.end_batch()
                num_sequences += int((count_B > 0).sum())
    finally:
        begin.remove()
        for remove in undo:
            remove()
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        model.train(training)
    count, *totals = ranks.sums([torch.tensor(num_sequences), *found.total.values()])
    num_sequences, found.total = int(count), dict(zip(found.total, totals, strict=True))
    if num_sequences == 0:
        raise NumericalError("the calibration batches hold no loss token; check data.calibration and data.loss_on")
    for axis, scores in found.total.items():
        if not bool(scores.isfinite().all()):
            raise NumericalError(f"taylor: scores of {axis} are not finite; set compute_dtype=float32")
    return {axis: (scores / num_sequences).float() for axis, scores in found.total.items()}

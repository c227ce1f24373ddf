"""Least-squares compensation: the kept input columns of a matrix absorb what the removed ones did on calibration text.

For y = W x with only x[kept] left, W' = argmin E |W x - W' x[kept]|^2 has the closed form
W' = W E[x x[kept]^T] E[x[kept] x[kept]^T]^-1. Minitron itself only cuts; the reconstruction is the one that structured
pruners since optimal brain surgeon use, applied once per matrix, on inputs of the model as it will be without its
removed layers.
"""

# B sequences, T tokens, X input columns of a matrix, K kept columns, O its outputs, L kept layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import ModelInfo, Taps, shape_of, taps
from compress.errors import NumericalError
from compress.families import Part, Shape, family_of_config
from compress.importance import experts_of, route_through
from compress.models import decoder_layers, only_layers
from compress.slicing import Kept, kept_elements
from compress.step import trunk
from compress.streaming import LayerStream, Progress, TensorFolder, sweep
from compress.tokens import TokenBatch

DAMPING = 0.01


def reconstruct(weight_OX: Tensor, moment_XX: Tensor, kept_K: Tensor, damping: float = DAMPING) -> Tensor:
    """The full-size weight whose kept columns are the least-squares reconstruction; the removed ones are unchanged.

    Args:
        moment_XX: sum or mean over tokens of x x^T; only its direction counts.
        damping: ridge towards the uncompensated weight, as a share of the moment's mean diagonal. It keeps columns
            that the calibration text hardly excites where they were.

    Solved in float64. Raises NumericalError when the moment isn't finite.
    """
    moment = moment_XX.double()
    weight = weight_OX.double()
    if not bool(moment.isfinite().all()):
        raise NumericalError("the inputs seen on the calibration text are not finite; set compute_dtype=float32")
    ridge = damping * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    normal_KK = moment[kept_K][:, kept_K] + ridge * torch.eye(len(kept_K), dtype=moment.dtype)
    target_OK = weight @ moment[:, kept_K] + ridge * weight[:, kept_K]
    result = weight.clone()
    result[:, kept_K] = torch.linalg.solve(normal_KK, target_OK.T).T
    return result.to(weight_OX.dtype)


class _Moments:
    """Sums over real tokens of x x^T of the matrices of a layer that read a pruned axis."""

    def __init__(self, where: Taps, shape: Shape, kept: Kept) -> None:
        self.where, self.shape, self.kept = where, shape, kept
        self.valid_BT = torch.zeros(0)
        self.moments: dict[str, Tensor] = {}  # by the layer's position and the module's name in it

    def attach(self, layer: nn.Module, position: int) -> list[Callable[[], None]]:
        """Listen to the kept layer of this position; empty where nothing that it reads is pruned."""
        undo = [self._listen(layer, name, position) for name in self._columns(position)]
        if self._units(position):
            undo.append(self._listen_experts(experts_of(layer), position))
        return undo

    def _units(self, position: int) -> dict[int, Tensor]:
        """Kept expert of a layer -> the units that it keeps, where it loses any."""
        if not self.shape.num_experts:
            return {}
        units = self.kept["expert_intermediate"][position]
        if units.shape[1] == self.shape.moe_intermediate_size:
            return {}
        return dict(zip(self.kept["experts"][position].tolist(), units, strict=True))

    def _columns(self, position: int) -> dict[str, Tensor]:
        """Module in a layer -> the columns of its matrix that are kept."""
        found = {}
        for axis, pattern in (("intermediate", self.where.intermediate), ("query_heads", self.where.query_heads)):
            if pattern is None:
                continue
            columns = kept_elements((Part(axis),), position, None, self.kept, self.shape)
            if columns is not None:
                found[pattern.partition(".layers.*.")[2]] = columns
        return found

    def _listen(self, layer: nn.Module, name: str, position: int) -> Callable[[], None]:
        def hook(_module: nn.Module, arguments: Any, _output: Tensor) -> None:
            self._add(f"{position}.{name}", arguments[0][self.valid_BT].float())

        return layer.get_submodule(name).register_forward_hook(hook).remove

    def _add(self, key: str, values_NX: Tensor) -> None:
        if key not in self.moments:
            self.moments[key] = values_NX.new_zeros(values_NX.shape[1], values_NX.shape[1])
        self.moments[key].addmm_(values_NX.T, values_NX)

    def _listen_experts(self, experts: Any, position: int) -> Callable[[], None]:
        """A token counts as much as its router lets the expert say: x is weighted by the router's weight."""
        kept = self._units(position)

        def visit(expert: int, token_M: Tensor, inner_MX: Tensor, _outer_MD: Tensor, weight_M1: Tensor) -> None:
            if expert in kept:
                real_M = self.valid_BT.flatten()[token_M]
                self._add(f"{position}.{expert}", (inner_MX * weight_M1)[real_M].float())

        return route_through(experts, visit)

    def solve(self, layer: nn.Module, position: int) -> dict[str, Tensor]:
        """Tensor of the layer, by its name in the checkpoint -> its full-size weight; the moments are let go."""
        found = {
            f"{name}.weight": reconstruct(
                layer.get_parameter(f"{name}.weight"), self.moments.pop(f"{position}.{name}"), columns
            )
            for name, columns in self._columns(position).items()
        }
        return found | self._solve_experts(layer, position)

    def _solve_experts(self, layer: nn.Module, position: int) -> dict[str, Tensor]:
        units, pattern = self._units(position), self.where.expert_intermediate
        if not units or pattern is None:
            return {}
        name, experts = pattern.partition(".layers.*.")[2], experts_of(layer)
        down_EXX = experts.down_proj.detach().clone()
        for expert, kept_K in units.items():
            weight_OX = down_EXX[expert].T if experts.is_transposed else down_EXX[expert]
            weight_OX.copy_(reconstruct(weight_OX, self.moments.pop(f"{position}.{expert}"), kept_K))
        if "*" not in name:
            return {name: down_EXX}
        return {name.replace("*", str(expert)): down_EXX[expert] for expert in units}


def moment_bytes(shape: Shape, kept: Kept) -> int:
    """What `compensated_weights` holds beside the model: X^2 float32 for every matrix that reads a pruned axis."""
    layers = len(kept["layers"])
    readers = {  # axis -> (units, elements of one, matrices)
        "intermediate": (shape.intermediate_size, 1, layers),
        "query_heads": (shape.num_attention_heads, shape.head_dim, layers),
        "expert_intermediate": (shape.moe_intermediate_size, 1, layers * shape.num_experts),
    }
    return sum(
        4 * count * (units * elements) ** 2
        for axis, (units, elements, count) in readers.items()
        if units and kept[axis].shape[-1] < units
    )


@torch.no_grad()
def compensated_weights(model: PreTrainedModel, batches: Iterable[TokenBatch], kept: Kept) -> dict[str, Tensor]:
    """Full-size replacements, by the teacher's tensor names, for every matrix that reads a pruned axis.

    Those are down_proj where `intermediate` (or every expert's units) is pruned and o_proj where query heads are. One
    forward pass over the batches, of the kept layers only: the moments are of the inputs that the student's layers
    will see, with the teacher's routing. Costs X^2 float32 per matrix, 10 MB for 1536 columns and 822 MB for 14336.

    The model's removed layers are put back before it returns.
    """
    family, layers = family_of_config(model.config), decoder_layers(model)
    found = _Moments(taps(family), shape_of(model.config), kept)
    numbers = kept["layers"].tolist()
    undo = [remove for position, n in enumerate(numbers) for remove in found.attach(layers[n], position)]
    if not undo:
        return {}
    try:
        with only_layers(model, numbers):
            for batch in batches:
                found.valid_BT = batch.valid_mask
                trunk(model, batch)
    finally:
        for remove in undo:
            remove()
    return {
        f"{family.layers}{number}.{name}": weight
        for position, number in enumerate(numbers)
        for name, weight in found.solve(layers[number], position).items()
    }


@torch.no_grad()
def stream_compensated_weights(
    info: ModelInfo,
    dtype: torch.dtype,
    batches: Sequence[TokenBatch],
    kept: Kept,
    spill: Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress = lambda steps, total: steps,
) -> Mapping[str, Tensor]:
    """The weights of `compensated_weights`, with one layer in memory at a time; they lie in files under `spill`."""
    found = _Moments(taps(info.family), info.shape, kept)
    numbers = kept["layers"].tolist()
    result = TensorFolder(spill)

    def visit(model: PreTrainedModel, number: int) -> Callable[[], None]:
        layer, position = decoder_layers(model)[0], numbers.index(number)
        undo = found.attach(layer, position)

        def leave() -> None:
            for remove in undo:
                remove()
            for name, weight in found.solve(layer, position).items():
                result.add(f"{info.family.layers}{number}.{name}", weight)

        return leave

    def before(batch: TokenBatch) -> None:
        found.valid_BT = batch.valid_mask

    stream = LayerStream(info, dtype, trust_remote_code)
    sweep(stream, batches, numbers, visit, before, spill=spill, progress=progress)
    return result

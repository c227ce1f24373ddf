"""Least-squares compensation: the kept input columns of a matrix absorb what the removed ones did on calibration text.

For y = W x with only x[kept] left, W' = argmin E |W x - W' x[kept]|^2 has the closed form
W' = W E[x x[kept]^T] E[x[kept] x[kept]^T]^-1. Minitron itself only cuts; the reconstruction is the one that structured
pruners since optimal brain surgeon use, applied once per matrix, on inputs of the model as it will be without its
removed layers.
"""

# B sequences, T tokens, X input columns of a matrix, K kept columns, O its outputs, L kept layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import Taps, shape_of, taps
from compress.errors import NumericalError
from compress.families import AXES, family_of
from compress.models import decoder_layers, set_decoder_layers
from compress.step import trunk
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


@torch.no_grad()
def compensated_weights(
    model: PreTrainedModel, batches: Iterable[TokenBatch], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Full-size replacements, by the teacher's tensor names, for every matrix that reads a pruned axis.

    Those are down_proj where `intermediate` is pruned and o_proj where query heads are. One forward pass over the
    batches, of the kept layers only: the moments are of the inputs that the student's layers will see. Costs
    X^2 float32 per matrix, 10 MB for 1536 columns and 822 MB for 14336.

    The model's removed layers are put back before it returns.
    """
    where = taps(family_of(model.config.to_dict(), "the model"))
    shape, layers = shape_of(model.config), decoder_layers(model)
    chosen = {
        module.replace("*", str(layer)): kept[axis][position]
        for axis, module in _readers(where).items()
        for position, layer in enumerate(kept["layers"].tolist())
        if kept[axis].shape[1] < getattr(shape, AXES[axis])
    }
    if not chosen:
        return {}
    moments: dict[str, Tensor] = {}
    valid_BT = torch.zeros(0)

    def listen(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: Any, _output: Tensor) -> None:
            values_NX = arguments[0][valid_BT].float()
            if name not in moments:
                moments[name] = values_NX.new_zeros(values_NX.shape[1], values_NX.shape[1])
            moments[name].addmm_(values_NX.T, values_NX)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in chosen]
    try:
        set_decoder_layers(model, [layers[layer] for layer in kept["layers"].tolist()])
        for batch in batches:
            valid_BT = batch.valid_mask
            trunk(model, batch)
    finally:
        set_decoder_layers(model, layers)
        for handle in handles:
            handle.remove()
    result = {}
    for name, kept_units in chosen.items():
        columns = kept_units
        if name.endswith(where.query_heads.rsplit(".", 1)[-1]):
            columns = (kept_units[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()
        result[f"{name}.weight"] = reconstruct(model.get_parameter(f"{name}.weight"), moments[name], columns)
    return result


def _readers(where: Taps) -> dict[str, str]:
    """Axis -> pattern of the module whose input lies on it."""
    readers = {"intermediate": where.intermediate, "query_heads": where.query_heads}
    return {axis: module for axis, module in readers.items() if module is not None}

"""The teacher with everything that isn't kept silenced: what a sliced student must compute, to the last digit.

Masking a unit zeroes what it writes. Masking hidden channels zeroes them in the residual stream, and every norm's mean
runs over the kept ones; so do norms over a head axis (OLMo 2). Gemma's sqrt(hidden_size) scale is the student's.
With plain zeroing the norms would divide by the teacher's width, and logits would differ by 0.25 (measured).
"""

# B sequences, T tokens, D hidden, X elements of an axis, N tokens of a batch, K experts of a token

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from compress.architecture import shape_of, taps
from compress.families import Family, Part, Shape, family_of_config
from compress.importance import experts_of, run_expert
from compress.models import decoder_layers, only_layers
from compress.slicing import Kept, kept_elements


@contextlib.contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[PreTrainedModel]:
    """The teacher as the student is: silenced and without the removed layers, until the block ends.

    Hooks do it and no weight is touched, so that a teacher of any size is masked in no time.
    """
    family, shape = family_of_config(model.config), shape_of(model.config)
    layers = decoder_layers(model)
    numbers = kept["layers"].tolist()
    undo: list[Callable[[], None]] = []
    try:
        undo += mask_outside(model, family, shape, kept)
        for position, number in enumerate(numbers):
            undo += mask_layer(layers[number], position, family, shape, kept)
        with only_layers(model, numbers):
            yield model
    finally:
        for restore in reversed(undo):
            restore()


def mask_outside(model: PreTrainedModel, family: Family, shape: Shape, kept: Kept) -> list[Callable[[], None]]:
    """Mask what lies before and behind the layers: the embedding and its scale, the last norm."""
    embedding: Any = model.get_input_embeddings()
    undo = [_zero_output(embedding, _silent(kept["hidden"], shape.hidden_size))]
    scale = getattr(embedding, "embed_scale", None)
    if torch.is_tensor(scale):
        changed = scale * (len(kept["hidden"]) / shape.hidden_size) ** 0.5
        embedding.embed_scale = changed.to(scale.dtype)
        undo.append(lambda: setattr(embedding, "embed_scale", scale))
    undo.append(_norm_over(model.get_submodule(family.final_norm), kept["hidden"]))
    return undo


def mask_layer(layer: nn.Module, position: int, family: Family, shape: Shape, kept: Kept) -> list[Callable[[], None]]:
    """Mask the kept layer of this position in the student; returns what undoes it."""
    where, undo = taps(family), []
    silent_D = _silent(kept["hidden"], shape.hidden_size)
    for axis, pattern in (("intermediate", where.intermediate), ("query_heads", where.query_heads)):
        if pattern is None:
            continue
        reader = layer.get_submodule(pattern.partition(".layers.*.")[2])
        found = kept_elements((Part(axis),), position, None, kept, shape)
        if found is not None:
            undo.append(_zero_input(reader, _silent(found, Part(axis).size(shape))))
        undo.append(_zero_output(reader, silent_D))
    for name, parts in family.norms.items():
        if ".layers.*." in name:
            found = kept_elements(parts, position, None, kept, shape)
            if found is not None:
                undo.append(_norm_over(layer.get_submodule(name.partition(".layers.*.")[2]), found))
    experts = experts_of(layer)
    if experts is not None:
        undo += _mask_experts(layer, experts, position, kept, silent_D)
    return undo


def _silent(kept: Tensor, size: int) -> Tensor:
    silent_X = torch.ones(size, dtype=torch.bool)
    silent_X[kept] = False
    return silent_X


def _silence(values: Tensor, silent_X: Tensor) -> Tensor:
    return values.masked_fill(silent_X.to(values.device), 0)


def _zero_output(module: nn.Module, silent_X: Tensor) -> Callable[[], None]:
    return module.register_forward_hook(lambda _m, _a, output: _silence(output, silent_X)).remove


def _zero_input(module: nn.Module, silent_X: Tensor) -> Callable[[], None]:
    return module.register_forward_pre_hook(lambda _m, arguments: (_silence(arguments[0], silent_X),)).remove


def _norm_over(norm: Any, kept_X: Tensor) -> Callable[[], None]:
    """Let a norm of any kind see the kept elements alone; the others come out as 0."""
    original = norm.forward
    parameters = {name: parameter[kept_X] for name, parameter in norm.named_parameters()}

    def forward(hidden_BTX: Tensor) -> Tensor:
        del norm.forward  # functional_call goes through it
        whole = getattr(norm, "normalized_shape", None)  # nn.LayerNorm checks it
        try:
            if whole is not None:
                norm.normalized_shape = (len(kept_X),)
            small = functional_call(norm, parameters, (hidden_BTX[..., kept_X],))
        finally:
            if whole is not None:
                norm.normalized_shape = whole
            norm.forward = forward
        result_BTX = torch.zeros_like(hidden_BTX, dtype=small.dtype)
        result_BTX[..., kept_X] = small
        return result_BTX

    norm.forward = forward

    def undo() -> None:
        del norm.forward
        assert norm.forward == original

    return undo


def _mask_experts(
    layer: nn.Module, experts: Any, position: int, kept: Kept, silent_D: Tensor
) -> list[Callable[[], None]]:
    """The router chooses among the kept experts alone, whose removed units are 0."""
    chosen_E = kept["experts"][position]
    router: Any = next(m for m in layer.modules() if hasattr(m, "top_k") and hasattr(m, "weight"))
    original = router.forward
    parameters = {name: parameter[chosen_E] for name, parameter in router.named_parameters()}
    units = kept["expert_intermediate"][position]

    def route(hidden_ND: Tensor) -> Any:
        del router.forward
        try:
            return functional_call(router, parameters, (hidden_ND,))
        finally:
            router.forward = route

    def forward(hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        result_ND = torch.zeros_like(hidden_ND)
        for place, expert in enumerate(chosen_E.tolist()):
            token_M, place_M = (index_NK == place).nonzero(as_tuple=True)
            outer_MD = run_expert(experts, expert, hidden_ND[token_M], units[place])[1]
            outer_MD = (outer_MD * weight_NK[token_M, place_M, None]).to(hidden_ND.dtype)
            result_ND.index_add_(0, token_M, outer_MD)
        return _silence(result_ND, silent_D)

    router.forward, experts.forward = route, forward

    def undo() -> None:
        del router.forward, experts.forward
        assert router.forward == original

    return [undo]

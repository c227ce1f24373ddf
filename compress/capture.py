"""What objectives on hidden states need of the two models: what to listen to, the listening, and the projections."""

# B sequences, T tokens, N loss tokens, D student hidden, E teacher hidden, H query heads, G key-value heads, d head_dim

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import ArchitectureError, ConfigError
from compress.families import Family, Part, family_of_config
from compress.models import decoder_layers
from compress.objectives.hidden import EMBEDDING, LAST, AttentionInputs, Recorded, projection_name
from compress.objectives.table import OBJECTIVES, AnyTerm


@dataclass(frozen=True)
class Listening:
    """What of one model's forward is kept: layers by number, negative ones from the end."""

    outputs: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    embedding: bool = False

    def __bool__(self) -> bool:
        return bool(self.outputs or self.attention or self.embedding)


def listening(terms: Sequence[AnyTerm], to_teacher: bool) -> Listening:
    """What the terms need of the student's forward, or of the teacher's."""
    layers: dict[str, set[int]] = {"outputs": set(), "attention": set()}
    for term in terms:
        if (kind := OBJECTIVES[term.objective].hidden) in layers:
            layers[kind] |= {pair[to_teacher] for pair in term.layers or LAST}
    embedding = any(OBJECTIVES[term.objective].hidden == "embedding" for term in terms)
    return Listening(frozenset(layers["outputs"]), frozenset(layers["attention"]), embedding)


def make_projections(
    terms: Sequence[AnyTerm], student_width: int, teacher_width: int, seed: int, kept_D: Tensor | None = None
) -> nn.ParameterDict:
    """One (E, D) matrix without bias for each pair of layers that a term compares, and for the embeddings.

    Terms on the same pair share it. There is none between equal widths. It starts by putting each of the student's
    channels where it was in the teacher, kept_D; without them it starts random, about keeping the size of what it maps,
    and depends on the seed alone.
    """
    names = set()
    for term in terms:
        if OBJECTIVES[term.objective].hidden == "outputs":
            names |= {projection_name(*pair) for pair in term.layers or LAST}
        elif OBJECTIVES[term.objective].hidden == "embedding":
            names.add(EMBEDDING)
    generator = torch.Generator().manual_seed(seed)
    found = nn.ParameterDict()
    for name in sorted(names) if student_width != teacher_width else ():
        if kept_D is None:
            start_ED = torch.randn(teacher_width, student_width, generator=generator) * student_width**-0.5
        else:
            start_ED = torch.zeros(teacher_width, student_width)
            start_ED[kept_D, torch.arange(student_width)] = 1.0
        found[name] = nn.Parameter(start_ED)
    return found


def check_terms(terms: Sequence[AnyTerm], families: Sequence[Family], num_layers: Sequence[int | None]) -> None:
    """Whether both models have what the terms compare; families and num_layers of (student, teacher), None: unknown.

    Raises ConfigError for a layer that isn't there and ArchitectureError for attention that can't be recomputed.
    """
    for number, term in enumerate(terms):
        kind, where = OBJECTIVES[term.objective].hidden, f"distill.objectives[{number}]"
        for pair in term.layers or () if kind else ():
            for layer, count, whose in zip(pair, num_layers, ("student", "teacher"), strict=True):
                if count is not None and not -count <= layer < count:
                    raise ConfigError(
                        f"{where}.layers={[list(p) for p in term.layers or ()]} of {term.objective}: the {whose} has "
                        f"{count} layers, so no layer {layer}; give [student, teacher] pairs within {-count} and "
                        f"{count - 1} for the {whose}"
                    )
        for family in families if term.objective == "minilm_attention" else ():
            if _has_sinks(family):
                raise ArchitectureError(
                    f"{where}: minilm_attention compares softmaxes over tokens, and the attention of {family.title} "
                    f"({family.model_type}) gives a share to learned sinks; use minilm_value or hidden_cosine instead"
                )


def check_models(terms: Sequence[AnyTerm], student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """`check_terms` of the loaded models."""
    models = (student, teacher)
    check_terms(terms, [family_of_config(m.config) for m in models], [len(decoder_layers(m)) for m in models])


def _has_sinks(family: Family) -> bool:
    """Whether each query head has a weight of its own in the softmax, which no relation between tokens holds."""
    return any(row.dimensions == ((Part("query_head"),),) for row in family.table.values())


@contextmanager
def recording(model: PreTrainedModel, what: Listening, loss_mask_BT: Tensor) -> Iterator[Recorded]:
    """Fill what it yields by the model's forward inside the block; graphs go along where gradients are on.

    Raises ArchitectureError for a model whose attention doesn't go through transformers' attention interface.
    """
    states_ND: dict[int | str, Tensor] = {}
    attention: dict[int, AttentionInputs] = {}

    def keep(name: int | str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states_ND[name] = (output[0] if isinstance(output, tuple) else output)[loss_mask_BT]

        return hook

    with ExitStack() as stack:
        layers = decoder_layers(model)
        for layer in what.outputs:
            stack.callback(layers[layer].register_forward_hook(keep(layer)).remove)
        if what.embedding:
            stack.callback(model.get_input_embeddings().register_forward_hook(keep(EMBEDDING)).remove)
        if what.attention:
            stack.enter_context(_recording_attention(model, what.attention, attention))
        yield Recorded(states_ND, attention)
    missing = what.attention - attention.keys()
    if missing:
        raise ArchitectureError(
            f"model_type={model.config.model_type}: the attention of layer {min(missing)} doesn't go through "
            "transformers' attention interface, so what it is made from can't be recorded; leave minilm_attention and "
            "minilm_value out of distill.objectives"
        )


@contextmanager
def _recording_attention(
    model: PreTrainedModel, layers: frozenset[int], into: dict[int, AttentionInputs]
) -> Iterator[None]:
    """Note what these layers hand to their attention function, of whatever kind: it is called as before.

    Every model of transformers asks one object for its function, so that is where to listen. A layer that recomputes
    runs again in the backward, outside of this block, with nothing noted and the same tensors saved.
    """
    numbers = {
        id(module): [n for n in layers if decoder_layers(model)[n] is decoder_layers(model)[layer]]
        for layer in layers
        for module in decoder_layers(model)[layer].modules()
    }
    plain = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = plain(implementation, default)

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            for number in numbers.get(id(module), ()):
                into[number] = _inputs_of(query, key, value, kwargs)
            return function(module, query, key, value, *args, **kwargs)

        return attend

    ALL_ATTENTION_FUNCTIONS.get_interface = get_interface  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def _inputs_of(query_BHTd: Tensor, key_BGTd: Tensor, value_BGTd: Tensor, options: dict[str, Any]) -> AttentionInputs:
    scale = options.get("scaling")
    return AttentionInputs(
        query_BHTd,
        key_BGTd,
        value_BGTd,
        query_BHTd.shape[-1] ** -0.5 if scale is None else float(scale),
        options.get("softcap"),
        options.get("sliding_window"),
    )

"""stage=selftest: do the axis table's rows describe a family truly? Properties on a tiny model of it say.

The tiny model is the teacher's own class with the teacher's config.json at small, pairwise distinct sizes, and every
tensor is random: fresh norms are 1 and biases 0, behind which a wrong row can hide.
"""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress import slicing
from compress.architecture import config_layer_types, num_parameters, parse_config, shape_of, with_sizes
from compress.artifacts import read_json
from compress.depth import Trials
from compress.errors import ArchitectureError, CompressError
from compress.families import AXES, Family, Shape, family_of
from compress.folders import read_model
from compress.importance import estimate_importance
from compress.inputs import teacher_of
from compress.masking import masked
from compress.models import load_model, only_layers
from compress.scores import Importance, by_block_influence
from compress.settings import CompressConfig
from compress.slicing import select, slice_checkpoint
from compress.step import packed_masks, trunk
from compress.tokens import TokenBatch

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # norms compute in float32; a wrong axis is off by 0.1 and more
# Pairwise distinct, also head_dim times the heads; groups of two query heads.
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_experts": 5,
    "moe_intermediate_size": 26,
    "head_dim": 10,
    "vocab_size": 97,
}
STUDENT = {
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "moe_intermediate_size": 16,
}


def run(config: CompressConfig) -> Table:
    """The properties and whether they hold. Raises ArchitectureError naming those that don't."""
    folder, trust = teacher_of(config), config.teacher.trust_remote_code
    content = read_json(folder / "config.json")
    family = family_of(content, str(folder / "config.json"))
    results = check_family(family, content, trust)
    table = Table(title=f"{family.title} ({family.model_type}): the table's rows on a tiny model", title_justify="left")
    table.add_column("property")
    table.add_column("holds")
    for name, problem in results.items():
        table.add_row(name, "yes" if problem is None else f"NO: {problem}")
    broken = {name: problem for name, problem in results.items() if problem is not None}
    if broken:
        raise ArchitectureError(
            f"{family.model_type}: the axis table's rows are wrong or incomplete: "
            + "; ".join(f"{name}: {problem}" for name, problem in broken.items())
            + ". See docs/families.md"
        )
    return table


def check_family(family: Family, content: dict[str, Any], trust_remote_code: bool = False) -> dict[str, str | None]:
    """Each property, and what is wrong where it doesn't hold. `content` is the teacher's config.json."""
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model = tiny_model(family, content, trust_remote_code)
        model.save_pretrained(scratch / "teacher")
        properties = dict(_properties(model, family, scratch, trust_remote_code))
        for name, holds in properties.items():
            try:
                difference = holds()
                results[name] = None if difference <= TOLERANCE else f"differs by {difference:.2g}"
            except CompressError as error:
                results[name] = str(error).replace(str(scratch), "")
            except (RuntimeError, IndexError, KeyError, ValueError, AttributeError) as error:
                results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return results


def tiny_model(family: Family, content: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of the teacher's class and switches, of SIZES, in float64 and all random."""
    parsed = parse_config(content, "the teacher's config.json")
    small = dict(content)
    sizes = dict(SIZES)
    if family.locked:
        sizes["hidden_size"] = sizes["num_attention_heads"] * sizes["head_dim"]
    for name, size in sizes.items():
        field = family.field(name)
        if field is not None and hasattr(parsed, field):
            small[field] = size
    if family.has_experts:
        small["num_experts_per_tok"] = 2
    types = config_layer_types(parsed)
    if types is not None:  # one of each kind at least, in the teacher's order
        kinds = list(dict.fromkeys(types))
        small["layer_types"] = (kinds + types)[: sizes["num_hidden_layers"]]
    if getattr(parsed, "sliding_window", None):
        small["sliding_window"] = 6
    small |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    small.pop("rope_scaling", None)
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":  # lists as long as the real head_dim
        kept = {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
        small["rope_parameters"] = {"rope_type": "default", **kept}
    config = parse_config(small, "the tiny config")
    model = AutoModelForCausalLM.from_config(
        config,
        trust_remote_code=trust_remote_code,
        experts_implementation="eager",  # grouped kernels know no float64
    )
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:  # norms and biases, about what they were
                noise = parameter + noise / 2
            elif parameter is not model.get_input_embeddings().weight:
                noise = noise * 1.5 / math.prod(parameter.shape[-1:]) ** 0.5
            parameter.copy_(noise)
    return model


@dataclass(frozen=True)
class _Subject:
    """A tiny model with the family's table, and what its properties are measured on; a measure is the largest
    difference, mostly of logits."""

    model: PreTrainedModel
    family: Family
    scratch: Path
    trust: bool

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.model.config)

    @cached_property
    def ids(self) -> Tensor:
        return torch.randint(3, self.shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))

    @cached_property
    def importance(self) -> Importance:
        return random_importance(self.shape)

    def _student(self, kept: dict[str, Tensor], name: str) -> PreTrainedModel:
        folder = self.scratch / name.replace(" ", "_")
        slice_checkpoint(self.scratch / "teacher", folder, kept, trust_remote_code=self.trust)
        return load_model(folder, torch.float64, self.trust).eval()

    def checkpoint(self) -> float:
        found = read_model(self.scratch / "teacher", self.trust)
        return abs(num_parameters(found, self.shape) - sum(p.numel() for p in self.model.parameters()))

    def permuted(self, axis: str) -> float:
        order = permutation(self.shape, axis)
        check, slicing.check_kept = slicing.check_kept, lambda *_: None  # which wants them ascending
        try:
            student = self._student(order, f"permuted {axis}")
            return _difference(logits(self.model, self.ids), logits(student, self.ids))
        finally:
            slicing.check_kept = check

    def sliced(self, sizes: dict[str, int], name: str) -> float:
        kept = select(self.importance, with_sizes(self.shape, sizes))
        with masked(self.model, kept):
            expected = logits(self.model, self.ids)
        return _difference(expected, logits(self._student(kept, name), self.ids))

    def packed(self) -> float:
        lengths = [3, 9, 1, 11]
        row = self.ids[:1, : sum(lengths)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        together = logits(self.model, row, positions)
        alone = [logits(self.model, part) for part in row.split(lengths, dim=1)]
        return _difference(together, torch.cat(alone, 1))

    def scored(self) -> float:
        scores = estimate_importance(self.model, [_calibration(self.ids)]).width()
        found = {axis: one.shape for axis, one in scores.items()}
        wanted = {axis: one.shape for axis, one in self.importance.width().items()}
        return 0.0 if found == wanted else math.inf

    @torch.no_grad()
    def tried(self) -> float:
        batch, last = _calibration(self.ids), self.shape.num_hidden_layers - 1
        places = batch.loss_mask.flatten().nonzero().squeeze(1)
        with only_layers(self.model, range(last)):
            removed_ND = trunk(self.model, batch).flatten(0, 1)[places]
        return _difference(removed_ND, Trials(self.model, [batch], [places]).without([last]))


def _properties(
    model: PreTrainedModel, family: Family, scratch: Path, trust: bool
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name and measure of each property."""
    subject = _Subject(model, family, scratch, trust)
    shape = subject.shape
    yield "the rows are the checkpoint's tensors", subject.checkpoint
    for axis, size in AXES.items():
        if getattr(shape, size) and not (axis == "query_heads" and shape.group_size == 1):
            yield f"permuting {axis} changes nothing", partial(subject.permuted, axis)
    cut = {name: size for name, size in STUDENT.items() if family.field(name) and getattr(shape, name)}
    if family.locked:
        cut["hidden_size"] = cut["num_attention_heads"] * shape.head_dim
    heads = {name: cut[name] for name in ("num_attention_heads", "num_key_value_heads") if name in cut}
    for name, value in cut.items():
        if name in heads or (name == "hidden_size" and family.locked):
            continue
        yield f"slicing {name} equals masking", partial(subject.sliced, {name: value}, f"cut {name}")
    together = heads | ({"hidden_size": cut["hidden_size"]} if family.locked else {})
    yield "slicing heads equals masking", partial(subject.sliced, together, "cut heads")
    yield "slicing everything equals masking", partial(subject.sliced, cut, "cut all")
    yield "packed documents equal each document alone", subject.packed
    yield "scoring gives every unit of every axis a score", subject.scored
    yield "trying a model without a layer equals removing it", subject.tried


def _calibration(ids_BT: Tensor) -> TokenBatch:
    """One document a sequence, without padding."""
    inside_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    loss_BT = inside_BT.clone()
    loss_BT[:, -1] = False
    return TokenBatch(ids_BT, torch.arange(ids_BT.shape[1]).expand_as(ids_BT), loss_BT, inside_BT)


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """(B, T, V), packed documents isolated, as every stage runs a model."""
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT) if position_ids is None else position_ids
    masks = packed_masks(model, positions)
    found: Tensor = model(input_ids=ids_BT, position_ids=positions, attention_mask=masks, use_cache=False).logits
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest, over the spread of the logits; nan counts as infinite."""
    spread = max(one.std().item(), 1e-12)
    found = (one - other).abs().max().item() / spread
    return found if math.isfinite(found) else math.inf


def random_importance(shape: Shape) -> Importance:
    """Scores of every axis, so that each layer, group and expert keeps other units."""
    generator = torch.Generator().manual_seed(2)
    layers = shape.num_hidden_layers
    widths = {}
    for axis, size in AXES.items():
        count = getattr(shape, size)
        if count:
            before = {"hidden": (), "expert_intermediate": (layers, shape.num_experts)}.get(axis, (layers,))
            widths[axis] = torch.rand((*before, count), generator=generator)
    influence_L = torch.rand(layers, generator=generator)
    return Importance({"activation": widths}, {"block_influence": by_block_influence(influence_L)}, influence_L, 1, 1)


def permutation(shape: Shape, axis: str) -> dict[str, Tensor]:
    """Everything kept, in another order along one axis: slicing is an index-select, so that is a slice."""
    layers, generator = shape.num_hidden_layers, torch.Generator().manual_seed(3)

    def order(of: str, *size: int) -> Tensor:
        if of != axis:
            return torch.arange(size[-1]).expand(*size)
        return torch.rand(size, generator=generator).argsort(-1)

    groups_LG = order("key_value_heads", layers, shape.num_key_value_heads)
    inside_LGh = order("query_heads", layers, shape.num_key_value_heads, shape.group_size)
    found = {
        "layers": torch.arange(layers),
        "hidden": order("hidden", shape.hidden_size),
        "key_value_heads": groups_LG,
        "query_heads": (groups_LG[..., None] * shape.group_size + inside_LGh).flatten(1),
    }
    if shape.intermediate_size:
        found["intermediate"] = order("intermediate", layers, shape.intermediate_size)
    if shape.num_experts:
        found["experts"] = order("experts", layers, shape.num_experts)
        found["expert_intermediate"] = order(
            "expert_intermediate", layers, shape.num_experts, shape.moe_intermediate_size
        )
    return found

"""A model's structure by the axis table: what a checkpoint must hold, how many parameters a shape has, where scoring
listens, what a student's config.json says, and which shapes are legal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from compress.artifacts import open_tensors
from compress.errors import ArchitectureError, ConfigError
from compress.families import PRUNABLE, Family, Part, Row, Shape, family_of, family_of_config, holds_all_experts

_LAYER_NUMBER = re.compile(r"(?<=\blayers\.)(\d+)(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: the shard's file name, the size of each dimension, the safetensors dtype ("BF16")."""

    shard: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """A checkpoint's tensors, one shard open at a time: what is mapped is one file and the tensors that are held."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder, self.tensors = folder, tensors
        self._open: tuple[str, Any] | None = None

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises ArtifactError for a shard that can't be read."""
        shard = self.tensors[name].shard
        if self._open is None or self._open[0] != shard:
            self._open = None  # let the last one go first
            self._open = shard, open_tensors(self.folder / shard)
        found: Tensor = self._open[1].get_tensor(name)
        return found

    def close(self) -> None:
        """Let the open shard go, with its mapping once no tensor of it is held."""
        self._open = None


@dataclass(frozen=True)
class ModelInfo:
    """A checked checkpoint folder: every tensor that its config.json asks for, and no other."""

    folder: Path
    config: dict[str, Any]
    family: Family
    shape: Shape
    tensors: dict[str, TensorInfo]

    @property
    def shards(self) -> Shards:
        return Shards(self.folder, self.tensors)

    @cached_property
    def parsed(self) -> PreTrainedConfig:
        return parse_config(self.config, str(self.folder / "config.json"))

    @cached_property
    def rows(self) -> dict[str, Row]:
        return self.family.rows(self.parsed)


@dataclass(frozen=True)
class Taps:
    """The modules where scoring listens (arXiv 2407.14679, section 2.2), layer number as *."""

    hidden: tuple[str, ...]  # their outputs: the norms of a layer; the final norm isn't one (as in NVIDIA's code)
    intermediate: str | None  # its input; None where every MLP is a mixture
    query_heads: str  # its input
    expert_intermediate: str | None  # the tensor of an expert that reads its units, or of all; None in a dense model


def taps(family: Family) -> Taps:
    """Read off the table: the per-layer norms over `hidden`, and the weights whose input axis is the one to score."""

    def reading(axis: str) -> str | None:
        found = [n for n, r in family.table.items() if len(r.dimensions) == 2 and r.dimensions[1] == (Part(axis),)]
        return found[0].removesuffix(".weight") if found else None

    query_heads = reading("query_heads")
    assert query_heads is not None  # _check_table
    return Taps(
        hidden=family.layer_norms,
        intermediate=reading("intermediate"),
        query_heads=query_heads,
        expert_intermediate=next((n for n, r in family.table.items() if _reads_expert_units(n, r)), None),
    )


def _reads_expert_units(name: str, row: Row) -> bool:
    units = (Part("expert_intermediate"),)
    if holds_all_experts(row):  # which way round differs, and so only the name that transformers gives it tells
        return units in row.dimensions and name.rpartition(".")[2] == "down_proj"
    return len(row.dimensions) == 2 and row.dimensions[1] == units


def row_of(name: str) -> str:
    """The table's key of a tensor: its name with the numbers of layer and expert as *."""
    return _EXPERT_NUMBER.sub("*", _LAYER_NUMBER.sub("*", name))


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for the embedding, the final norm and the head."""
    match = _LAYER_NUMBER.search(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The expert that a tensor belongs to, where each has tensors of its own."""
    match = _EXPERT_NUMBER.search(name)
    return int(match[1]) if match else None


def renumber(name: str, layer: int | None, expert: int | None) -> str:
    """The name of the same tensor in another layer and expert."""
    if layer is not None:
        name = _LAYER_NUMBER.sub(str(layer), name, count=1)
    return name if expert is None else _EXPERT_NUMBER.sub(str(expert), name, count=1)


def _instances(row: str, shape: Shape) -> Iterator[str]:
    """Every tensor name of a row of one layer ("*" still there), or of a row outside the layers."""
    if ".experts.*." in row:
        yield from (row.replace(".experts.*.", f".experts.{e}.", 1) for e in range(shape.num_experts))
    else:
        yield row


def tensor_shapes(rows: Mapping[str, Row], shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor name of a model of this shape, in the model's order, and its sizes."""
    sizes = {row: found.size(shape) for row, found in rows.items()}
    first = next(iter(rows))
    inside = [row for row in rows if ".layers.*." in row]
    result = {first: sizes[first]}
    for layer in range(shape.num_hidden_layers):
        for row in inside:
            for name in _instances(row, shape):
                result[name.replace(".layers.*.", f".layers.{layer}.", 1)] = sizes[row]
    return {**result, **{row: sizes[row] for row in rows if row not in inside and row != first}}


def _count(row: str, shape: Shape) -> int:
    """Tensors of a row in a model of this shape."""
    layers = shape.num_hidden_layers if ".layers.*." in row else 1
    return layers * (shape.num_experts if ".experts.*." in row else 1)


def num_parameters(info: ModelInfo, shape: Shape) -> int:
    """Parameters of a model of this family and `shape`; a tied head counts once."""
    return sum(prod(row.size(shape)) * _count(name, shape) for name, row in info.rows.items())


def num_embedding_parameters(info: ModelInfo, shape: Shape) -> int:
    """Those of the embedding and, where it isn't tied, of the output head."""
    names = (info.family.embedding, info.family.head)
    return sum(prod(info.rows[name].size(shape)) for name in names if name in info.rows)


def num_active_parameters(info: ModelInfo, shape: Shape) -> int:
    """Parameters that one token meets: of the experts only num_experts_per_tok."""
    total = num_parameters(info, shape)
    if not shape.num_experts:
        return total
    chosen = info.parsed.num_experts_per_tok
    experts = 0
    for name, row in info.rows.items():
        # Per-expert tensors and fused ones alike; the router isn't of an expert.
        if ".experts." in name:
            experts += prod(row.size(shape)) * _count(name, shape)
    return total - experts + experts * chosen // shape.num_experts


def key_value_cache_bytes(shape: Shape, context_tokens: int, num_sequences: int, item_bytes: int) -> int:
    """Keys and values of so many sequences of `context_tokens`; every layer counted in full, also one that slides."""
    each = 2 * shape.num_key_value_heads * shape.head_dim * item_bytes
    return shape.num_hidden_layers * each * context_tokens * num_sequences


def parse_config(config: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """transformers' own config object, for its defaults and its rules; ArchitectureError when it refuses."""
    family = family_of(config, source)
    if family.model_type not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"{source}: transformers has no config class for model_type={family.model_type!r}; set "
            "teacher.trust_remote_code=true if config.json's auto_map names one that you trust, or install its package"
        )
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    except Exception as error:  # transformers raises its strict-dataclass, ValueError, TypeError and KeyError here
        reason = " ".join(str(error).split())
        raise ArchitectureError(f"{source}: transformers refuses it as a {family.title} config: {reason}") from error


def check_described(family: Family, config: PreTrainedConfig, source: str) -> None:
    """Raise ArchitectureError for a config whose layers the rows don't describe."""
    for field, expected in family.only.items():
        found = getattr(config, field, None)
        if found != expected and not (not found and not expected):
            raise ArchitectureError(
                f"{source}: {field}={found}, but the table's {family.title} rows are for {field}={expected} only"
            )


def shape_of(config: PreTrainedConfig) -> Shape:
    """The sizes of a config, with transformers' defaults for what older files leave out."""
    family = family_of_config(config)

    def size(name: str) -> int:
        field = family.field(name)
        return int(getattr(config, field, None) or 0) if field else 0

    heads = config.num_attention_heads
    return Shape(
        hidden_size=config.hidden_size,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads") or heads,
        num_experts=size("num_experts"),
        moe_intermediate_size=size("moe_intermediate_size"),
        head_dim=size("head_dim") or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


def config_layer_types(config: PreTrainedConfig) -> list[str] | None:
    """Which attention each layer has, where the family distinguishes."""
    types = getattr(config, "layer_types", None)
    return None if types is None else list(types)


def student_config(
    config: Mapping[str, Any], family: Family, shape: Shape, kept_layers: Sequence[int]
) -> dict[str, Any]:
    """The teacher's config.json with the student's sizes.

    `head_dim` becomes explicit (it no longer follows from hidden_size / heads) and each kept layer keeps its own kind
    of attention. Everything else stays.
    """
    assert len(kept_layers) == shape.num_hidden_layers, (kept_layers, shape)
    teacher = parse_config(config, "config.json")
    student = dict(config)
    for name in (*family.prunable, "head_dim"):
        field = family.field(name)
        if field is not None:
            student[field] = getattr(shape, name)
    # One size under two names: the config says it as it said it before, in one place or in both.
    for one, other in getattr(teacher, "attribute_map", {}).items():
        for ours, theirs in ((one, other), (other, one)):
            if theirs in config and ours in student and student[ours] != config.get(ours):
                student[theirs] = student[ours]
                if ours not in config:
                    del student[ours]
    types = config_layer_types(teacher)
    if types is not None:
        student["layer_types"] = [types[layer] for layer in kept_layers]
    if student.get("use_sliding_window") and student.get("max_window_layers") is not None:
        # Engines that don't read layer_types count: sliding attention from this layer on.
        student["max_window_layers"] = sum(layer < student["max_window_layers"] for layer in kept_layers)
    return student


def check_shape(info: ModelInfo, shape: Shape, multiple_of: int, tensor_parallel: int = 1) -> None:
    """Raise ConfigError unless the teacher can be sliced to `shape` and transformers loads the result.

    Hidden, intermediate and expert sizes are multiples of `multiple_of` (matrix units), unless they are the teacher's
    own; every kept key-value head keeps the same number of query heads; `tensor_parallel` ranks get equal parts.
    """
    teacher, family = info.shape, info.family
    assert (shape.head_dim, shape.vocab_size, shape.tied) == (teacher.head_dim, teacher.vocab_size, teacher.tied)
    for name in PRUNABLE:
        value, limit = getattr(shape, name), getattr(teacher, name)
        if limit == 0 and value:
            raise ConfigError(
                f"prune.{name}={value}: a {family.title} model has none; it has "
                f"{', '.join(n for n in family.prunable if getattr(teacher, n))}"
            )
        if limit and not 1 <= value <= limit:
            raise ConfigError(
                f"prune.{name}={value} must be within 1 and the teacher's {limit}; nearest: {min(limit, max(1, value))}"
            )
    if family.locked and shape.hidden_size != shape.num_attention_heads * shape.head_dim:
        heads, hidden = shape.hidden_size / shape.head_dim, shape.num_attention_heads * shape.head_dim
        raise ConfigError(
            f"prune.hidden_size={shape.hidden_size} with num_attention_heads={shape.num_attention_heads}: in "
            f"{family.title} each head is hidden_size / num_attention_heads = {teacher.head_dim} wide, so neither is "
            f"pruned alone; give prune.hidden_size={hidden}"
            + (f" or prune.num_attention_heads={heads:.0f}" if heads.is_integer() and heads >= 1 else "")
            + " with it"
        )
    _check_widths(info, shape, multiple_of)
    _check_heads(info, shape)
    uneven = uneven_size(shape, tensor_parallel)
    if uneven:
        raise ConfigError(
            f"prune.{uneven}={getattr(shape, uneven)} can't be split over shape.tensor_parallel={tensor_parallel} "
            "ranks evenly; choose a multiple, or fewer ranks"
        )
    if shape.num_experts:
        chosen = info.parsed.num_experts_per_tok
        if shape.num_experts < chosen:
            raise ConfigError(
                f"prune.num_experts={shape.num_experts} is fewer than the num_experts_per_tok={chosen} that every "
                f"token is routed to; keep {chosen} at least"
            )
    try:
        parse_config(student_config(info.config, family, shape, range(shape.num_hidden_layers)), "the student's config")
    except ArchitectureError as error:
        raise ConfigError(f"prune.*: {error}; choose other sizes") from error


def uneven_size(shape: Shape, tensor_parallel: int) -> str | None:
    """A size that so many ranks can't share; key-value heads may also be copied, a whole number of times."""
    groups = shape.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
        if getattr(shape, name) % tensor_parallel:
            return name
    return "num_key_value_heads" if groups % tensor_parallel and tensor_parallel % groups else None


def _check_widths(info: ModelInfo, shape: Shape, multiple_of: int) -> None:
    teacher, family = info.shape, info.family
    multiple = f"must be a multiple of shape.multiple_of={multiple_of}"

    def legal(name: str, value: int) -> bool:
        divides = name == "hidden_size" and family.hidden_divisible_by_heads
        family_ok = not divides or value % shape.num_attention_heads == 0
        return family_ok and (value == getattr(teacher, name) or value % multiple_of == 0)

    for name in ("intermediate_size", "moe_intermediate_size", "hidden_size"):
        value = getattr(shape, name)
        # A hidden size that isn't pruned can't be at fault: then it is the number of heads, in _check_heads.
        if value != getattr(teacher, name) and not legal(name, value):
            rule = multiple
            if name == "hidden_size" and family.hidden_divisible_by_heads:
                heads = shape.num_attention_heads
                rule += f" and, for {family.title} in transformers 5, of num_attention_heads={heads}"
            options = [v for v in range(1, getattr(teacher, name) + 1) if legal(name, v)]
            raise ConfigError(f"prune.{name}={value} {rule}; {_nearest(value, options)}")


def _check_heads(info: ModelInfo, shape: Shape) -> None:
    teacher, family, groups = info.shape, info.family, shape.num_key_value_heads

    def legal(heads: int) -> bool:
        family_ok = not family.hidden_divisible_by_heads or shape.hidden_size % heads == 0
        return family_ok and heads % groups == 0 and heads // groups <= teacher.group_size

    if legal(shape.num_attention_heads):
        return
    rule = f"must be 1 to {teacher.group_size} (the teacher's) query heads for each of num_key_value_heads={groups}"
    if family.hidden_divisible_by_heads:
        rule += f" and, for {family.title} in transformers 5, divide hidden_size={shape.hidden_size}"
    options = [v for v in range(1, teacher.num_attention_heads + 1) if legal(v)]
    near = _nearest(shape.num_attention_heads, options)
    raise ConfigError(f"prune.num_attention_heads={shape.num_attention_heads} {rule}; {near}")


def _nearest(value: int, options: Sequence[int]) -> str:
    below, above = [o for o in options if o < value], [o for o in options if o > value]
    near = [*map(str, below[-1:]), *map(str, above[:1])]
    return f"nearest: {' or '.join(near)}" if near else "no value fits; change the other sizes"


def with_sizes(teacher: Shape, sizes: Mapping[str, int]) -> Shape:
    """The teacher's shape with some of its prunable sizes replaced.

    Where every key-value head has one query head, the number of one follows the other's unless both are given.
    """
    assert set(sizes) <= set(PRUNABLE), sizes
    sizes = dict(sizes)
    if teacher.group_size == 1:
        for one, other in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_key_value_heads", "num_attention_heads"),
        ):
            if one in sizes:
                sizes.setdefault(other, sizes[one])
    return replace(teacher, **sizes)  # type: ignore[arg-type]

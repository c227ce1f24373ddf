"""The axis table: for every weight of a model family, which axis each of its dimensions lies on.

Everything structural follows from it: what a checkpoint must hold, how many parameters a shape has, where scoring
listens, and which rows and columns pruning selects. A new family is a few rows here; tests/test_slicing.py proves them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from compress.errors import ArchitectureError, ConfigError

LAYER_PREFIX = "model.layers.*."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by Hugging Face names. Pruning changes the first five."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool  # the output head is the embedding

    @property
    def group_size(self) -> int:
        """Query heads of one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


PRUNABLE = tuple(f.name for f in fields(Shape))[:5]


@dataclass(frozen=True)
class Family:
    """One `model_type`: its axis table, the config switch of each optional row, what its config class insists on."""

    model_type: str
    title: str
    table: Mapping[str, tuple[str, ...]]  # checkpoint name, layer number as *, -> the axis of each dimension
    switches: Mapping[str, str]  # rows that are there only when this config field is true
    hidden_divisible_by_heads: bool = False

    def rows(self, config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
        """The rows that a checkpoint with this config has; a tied head isn't one of them."""
        return {
            name: axes
            for name, axes in self.table.items()
            if not (name in self.switches and not getattr(config, self.switches[name]))
            and not (name == HEAD and config.tie_word_embeddings)
        }


_DECODER = {
    EMBEDDING: ("vocabulary", "hidden"),
    "model.layers.*.input_layernorm.weight": ("hidden",),
    "model.layers.*.self_attn.q_proj.weight": ("query_heads", "hidden"),
    "model.layers.*.self_attn.k_proj.weight": ("key_value_heads", "hidden"),
    "model.layers.*.self_attn.v_proj.weight": ("key_value_heads", "hidden"),
    "model.layers.*.self_attn.o_proj.weight": ("hidden", "query_heads"),
    "model.layers.*.post_attention_layernorm.weight": ("hidden",),
    "model.layers.*.mlp.gate_proj.weight": ("intermediate", "hidden"),
    "model.layers.*.mlp.up_proj.weight": ("intermediate", "hidden"),
    "model.layers.*.mlp.down_proj.weight": ("hidden", "intermediate"),
    "model.norm.weight": ("hidden",),
    HEAD: ("vocabulary", "hidden"),
}
_QKV_BIAS = {
    "model.layers.*.self_attn.q_proj.bias": ("query_heads",),
    "model.layers.*.self_attn.k_proj.bias": ("key_value_heads",),
    "model.layers.*.self_attn.v_proj.bias": ("key_value_heads",),
}
_ATTENTION_BIAS = {**_QKV_BIAS, "model.layers.*.self_attn.o_proj.bias": ("hidden",)}
_MLP_BIAS = {
    "model.layers.*.mlp.gate_proj.bias": ("intermediate",),
    "model.layers.*.mlp.up_proj.bias": ("intermediate",),
    "model.layers.*.mlp.down_proj.bias": ("hidden",),
}
# Over the head's own channels, the same for every head: no width axis, so pruning leaves them as they are.
_QK_NORM = {
    "model.layers.*.self_attn.q_norm.weight": ("head_dim",),
    "model.layers.*.self_attn.k_norm.weight": ("head_dim",),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama",
            {**_DECODER, **_ATTENTION_BIAS, **_MLP_BIAS},
            {**dict.fromkeys(_ATTENTION_BIAS, "attention_bias"), **dict.fromkeys(_MLP_BIAS, "mlp_bias")},
            hidden_divisible_by_heads=True,  # LlamaConfig.validate_architecture, explicit head_dim or not
        ),
        Family("mistral", "Mistral", _DECODER, {}),
        Family("qwen2", "Qwen2", {**_DECODER, **_QKV_BIAS}, {}),
        Family(
            "qwen3",
            "Qwen3",
            {**_DECODER, **_ATTENTION_BIAS, **_QK_NORM},
            dict.fromkeys(_ATTENTION_BIAS, "attention_bias"),
        ),
    )
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: the shard's file name, the size of each dimension, the safetensors dtype ("BF16")."""

    shard: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelInfo:
    """A checked checkpoint folder: every tensor that its config.json asks for, and no other."""

    folder: Path
    config: dict[str, Any]
    family: Family
    shape: Shape
    tensors: dict[str, TensorInfo]

    @cached_property
    def rows(self) -> dict[str, tuple[str, ...]]:
        return self.family.rows(parse_config(self.config, str(self.folder / "config.json")))


@dataclass(frozen=True)
class Taps:
    """The modules where scoring listens (arXiv 2407.14679, section 2.2), layer number as *."""

    hidden: tuple[str, ...]  # their outputs: the norms of a layer; the final norm isn't one (as in NVIDIA's code)
    intermediate: str  # its input
    query_heads: str  # its input


def taps(family: Family) -> Taps:
    """Read off the table: the per-layer norms over `hidden`, and the weights whose input axis is the one to score."""

    def module_reading(axis: str) -> str:
        [name] = [name for name, axes in family.table.items() if len(axes) == 2 and axes[1] == axis]
        return name.removesuffix(".weight")

    norms = [n for n, axes in family.table.items() if axes == ("hidden",) and n.endswith(".weight")]
    return Taps(
        hidden=tuple(n.removesuffix(".weight") for n in norms if n.startswith(LAYER_PREFIX)),
        intermediate=module_reading("intermediate"),
        query_heads=module_reading("query_heads"),
    )


def row_of(name: str) -> str:
    """The table's key of a tensor: its name with the layer number as *."""
    return _LAYER_NUMBER.sub(LAYER_PREFIX, name)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for the embedding, the final norm and the head."""
    match = _LAYER_NUMBER.match(name)
    return int(match[1]) if match else None


def axis_size(axis: str, shape: Shape) -> int:
    """Elements along an axis; on the head axes that is heads times head_dim."""
    return {
        "vocabulary": shape.vocab_size,
        "hidden": shape.hidden_size,
        "intermediate": shape.intermediate_size,
        "query_heads": shape.num_attention_heads * shape.head_dim,
        "key_value_heads": shape.num_key_value_heads * shape.head_dim,
        "head_dim": shape.head_dim,
    }[axis]


def tensor_shapes(rows: Mapping[str, tuple[str, ...]], shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor name of a model of this shape, in the model's order, and its sizes."""
    sizes = {row: tuple(axis_size(axis, shape) for axis in axes) for row, axes in rows.items()}
    per_layer = [row for row in rows if row.startswith(LAYER_PREFIX)]
    layers = (
        (row.replace("*", str(layer), 1), sizes[row]) for layer in range(shape.num_hidden_layers) for row in per_layer
    )
    before = ((row, sizes[row]) for row in rows if row == EMBEDDING)
    after = ((row, sizes[row]) for row in rows if not row.startswith(LAYER_PREFIX) and row != EMBEDDING)
    return dict(chain(before, layers, after))


def num_parameters(info: ModelInfo, shape: Shape) -> int:
    """Parameters of a model of this family and `shape`; a tied head counts once."""
    return sum(
        prod(axis_size(axis, shape) for axis in axes) * (shape.num_hidden_layers if row.startswith(LAYER_PREFIX) else 1)
        for row, axes in info.rows.items()
    )


def parse_config(config: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """transformers' own config object, for its defaults and its rules; ArchitectureError when it refuses."""
    family = family_of(config, source)
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(dict(config))
    except Exception as error:  # transformers raises its strict-dataclass, ValueError, TypeError and KeyError here
        reason = " ".join(str(error).split())
        raise ArchitectureError(f"{source}: transformers refuses it as a {family.title} config: {reason}") from error


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json; ArchitectureError for one that the table lacks."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise ArchitectureError(
            f"{source}: model_type={model_type!r} is not in the axis table; there are {known}. Use a teacher of one of "
            "these, or add the family's rows to compress/architecture.py and its sizes to tests/families.py"
        )
    return FAMILIES[str(model_type)]


def shape_of(config: PreTrainedConfig) -> Shape:
    """The sizes of a config, with transformers' defaults for what older files leave out."""
    heads = config.num_attention_heads
    return Shape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
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
    student = {**config, **{name: getattr(shape, name) for name in PRUNABLE}, "head_dim": shape.head_dim}
    types = config_layer_types(teacher)
    if types is not None:
        student["layer_types"] = [types[layer] for layer in kept_layers]
    if student.get("use_sliding_window") and student.get("max_window_layers") is not None:
        # Engines that don't read layer_types count: sliding attention from this layer on.
        student["max_window_layers"] = sum(layer < student["max_window_layers"] for layer in kept_layers)
    return student


def check_shape(info: ModelInfo, shape: Shape, multiple_of: int) -> None:
    """Raise ConfigError unless the teacher can be sliced to `shape` and transformers loads the result.

    Hidden and intermediate sizes are multiples of `multiple_of` (matrix units), unless they are the teacher's own;
    every kept key-value head keeps the same number of query heads.
    """
    teacher, title = info.shape, info.family.title
    assert (shape.head_dim, shape.vocab_size, shape.tied) == (teacher.head_dim, teacher.vocab_size, teacher.tied)
    for name in PRUNABLE:
        value, limit = getattr(shape, name), getattr(teacher, name)
        if not 1 <= value <= limit:
            raise ConfigError(
                f"prune.{name}={value} must be within 1 and the teacher's {limit}; nearest: {min(limit, max(1, value))}"
            )

    divides = info.family.hidden_divisible_by_heads
    width_rule = f"must be a multiple of shape.multiple_of={multiple_of}"
    heads_rule = f"for {title} in transformers 5, of num_attention_heads={shape.num_attention_heads}"

    def width_ok(name: str, value: int) -> bool:
        family_ok = name != "hidden_size" or not divides or value % shape.num_attention_heads == 0
        return family_ok and (value == getattr(teacher, name) or value % multiple_of == 0)

    def heads_ok(heads: int) -> bool:
        groups = shape.num_key_value_heads
        family_ok = not divides or shape.hidden_size % heads == 0
        return family_ok and heads % groups == 0 and heads // groups <= teacher.group_size

    for name, rule in (
        ("intermediate_size", width_rule),
        ("hidden_size", f"{width_rule} and, {heads_rule}" if divides else width_rule),
    ):
        # A hidden size that isn't pruned can't be at fault: then it is the number of heads, below.
        if getattr(shape, name) != getattr(teacher, name) and not width_ok(name, getattr(shape, name)):
            options = [v for v in range(1, getattr(teacher, name) + 1) if width_ok(name, v)]
            raise ConfigError(f"prune.{name}={getattr(shape, name)} {rule}; {_nearest(getattr(shape, name), options)}")
    if not heads_ok(shape.num_attention_heads):
        rule = (
            f"must be 1 to {teacher.group_size} (the teacher's) query heads for each of "
            f"num_key_value_heads={shape.num_key_value_heads}"
        )
        if divides:
            rule += f" and, for {title} in transformers 5, divide hidden_size={shape.hidden_size}"
        options = [v for v in range(1, teacher.num_attention_heads + 1) if heads_ok(v)]
        near = _nearest(shape.num_attention_heads, options)
        raise ConfigError(f"prune.num_attention_heads={shape.num_attention_heads} {rule}; {near}")
    try:
        parse_config(
            student_config(info.config, info.family, shape, range(shape.num_hidden_layers)), "the student's config.json"
        )
    except ArchitectureError as error:
        raise ConfigError(f"prune.*: {error}; choose other sizes") from error


def _nearest(value: int, options: Sequence[int]) -> str:
    below, above = [o for o in options if o < value], [o for o in options if o > value]
    near = [*map(str, below[-1:]), *map(str, above[:1])]
    return f"nearest: {' or '.join(near)}" if near else "no value fits; change the other sizes"


def with_sizes(teacher: Shape, sizes: Mapping[str, int]) -> Shape:
    """The teacher's shape with some of its prunable sizes replaced."""
    assert set(sizes) <= set(PRUNABLE), sizes
    return replace(teacher, **sizes)  # type: ignore[arg-type]

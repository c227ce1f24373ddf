"""Which tensors of a checkpoint make up a tensor of Megatron-Core, and what of it each rank holds.

Read off the axis table (`families.yaml`): a dimension on query_heads, key_value_heads, intermediate or vocabulary is
what tensor-parallel ranks share, experts are what expert-parallel ranks share. Megatron-Core keeps query, key and value
of one group of heads side by side, then those of the next; and gate above up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.architecture import ModelInfo
from compress.artifacts import open_tensors
from compress.errors import ArchitectureError
from compress.families import Family, Part, Row, Shape

Read = Callable[[str, tuple[slice, ...]], Tensor]  # a tensor of a checkpoint by name, and the stretch of each dimension


class Packing(StrEnum):
    plain = "plain"  # as it is stored
    groups = "groups"  # query, key and value of a group of heads side by side
    halves = "halves"  # gate above up


@dataclass(frozen=True)
class Source:
    """A stretch of a checkpoint's tensor: that of the table's row `name` whose first dimension's part `part` it is."""

    name: str
    part: int = 0


# By Megatron-Core's names (local layer spec), each with the sources of any family that has it: the first whose rows are
# all there counts. A family fits when every row of its table is taken.
_E, _L = "decoder.layers.*.mlp.experts.local_experts.*.", "model.layers.*."
_QKV = "self_attn.qkv_proj.weight"
_GATE_UP = "mlp.gate_up_proj.weight"
_TABLE: dict[str, list[tuple[Packing, tuple[Source, ...]]]] = {
    "embedding.word_embeddings.weight": [(Packing.plain, (Source("model.embed_tokens.weight"),))],
    "decoder.layers.*.input_layernorm.weight": [(Packing.plain, (Source(f"{_L}input_layernorm.weight"),))],
    "decoder.layers.*.self_attention.linear_qkv.weight": [
        (Packing.groups, tuple(Source(f"{_L}self_attn.{one}_proj.weight") for one in "qkv")),
        (Packing.groups, tuple(Source(f"{_L}{_QKV}", part) for part in range(3))),
    ],
    "decoder.layers.*.self_attention.linear_qkv.bias": [
        (Packing.groups, tuple(Source(f"{_L}self_attn.{one}_proj.bias") for one in "qkv")),
    ],
    "decoder.layers.*.self_attention.q_layernorm.weight": [(Packing.plain, (Source(f"{_L}self_attn.q_norm.weight"),))],
    "decoder.layers.*.self_attention.k_layernorm.weight": [(Packing.plain, (Source(f"{_L}self_attn.k_norm.weight"),))],
    "decoder.layers.*.self_attention.linear_proj.weight": [(Packing.plain, (Source(f"{_L}self_attn.o_proj.weight"),))],
    "decoder.layers.*.self_attention.linear_proj.bias": [(Packing.plain, (Source(f"{_L}self_attn.o_proj.bias"),))],
    "decoder.layers.*.pre_mlp_layernorm.weight": [(Packing.plain, (Source(f"{_L}post_attention_layernorm.weight"),))],
    "decoder.layers.*.mlp.linear_fc1.weight": [
        (Packing.halves, (Source(f"{_L}mlp.gate_proj.weight"), Source(f"{_L}mlp.up_proj.weight"))),
        (Packing.halves, (Source(f"{_L}{_GATE_UP}", 0), Source(f"{_L}{_GATE_UP}", 1))),
    ],
    "decoder.layers.*.mlp.linear_fc1.bias": [
        (Packing.halves, (Source(f"{_L}mlp.gate_proj.bias"), Source(f"{_L}mlp.up_proj.bias"))),
    ],
    "decoder.layers.*.mlp.linear_fc2.weight": [(Packing.plain, (Source(f"{_L}mlp.down_proj.weight"),))],
    "decoder.layers.*.mlp.linear_fc2.bias": [(Packing.plain, (Source(f"{_L}mlp.down_proj.bias"),))],
    "decoder.layers.*.mlp.router.weight": [
        (Packing.plain, (Source(f"{_L}mlp.gate.weight"),)),
        (Packing.plain, (Source(f"{_L}block_sparse_moe.gate.weight"),)),
    ],
    f"{_E}linear_fc1.weight": [
        (Packing.halves, (Source(f"{_L}mlp.experts.*.gate_proj.weight"), Source(f"{_L}mlp.experts.*.up_proj.weight"))),
        (
            Packing.halves,
            (
                Source(f"{_L}block_sparse_moe.experts.*.w1.weight"),
                Source(f"{_L}block_sparse_moe.experts.*.w3.weight"),
            ),
        ),
    ],
    f"{_E}linear_fc2.weight": [
        (Packing.plain, (Source(f"{_L}mlp.experts.*.down_proj.weight"),)),
        (Packing.plain, (Source(f"{_L}block_sparse_moe.experts.*.w2.weight"),)),
    ],
    "decoder.final_layernorm.weight": [(Packing.plain, (Source("model.norm.weight"),))],
    "output_layer.weight": [(Packing.plain, (Source("lm_head.weight"),))],
}
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
SHARED_AXES = ("vocabulary", "query_heads", "key_value_heads", "intermediate")  # by tensor-parallel ranks

# Transformer Engine's layers have a norm within the product behind it, and all experts in one module.
_ALIASES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r"mlp.experts.local_experts.\3.\1.\2"),
)
_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")


def plain_name(name: str) -> str:
    """A parameter's name as the local layer spec has it, whichever spec built the model."""
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    return name


@dataclass(frozen=True)
class Place:
    """A rank's place among those that share a model: its tensor-parallel and its expert-parallel rank."""

    tensor_rank: int = 0
    tensor_ranks: int = 1
    expert_rank: int = 0
    expert_ranks: int = 1


WHOLE = Place()


@dataclass(frozen=True)
class Packed:
    """How one tensor of Megatron-Core is made: of which rows of the axis table, how put together."""

    packing: Packing
    sources: tuple[Source, ...]
    rows: tuple[Row, ...]  # of the sources

    @property
    def shared(self) -> int | None:
        """The dimension that tensor-parallel ranks share; None for one that each of them has."""
        for number, dimension in enumerate(self.rows[0].dimensions):
            if any(part.axis in SHARED_AXES for part in dimension):
                return number
        return None

    def parts(self) -> list[Part]:
        """Of the first dimension, in the sources' order."""
        return [row.dimensions[0][source.part] for source, row in zip(self.sources, self.rows, strict=True)]

    def starts(self, shape: Shape) -> list[int]:
        """Where each source begins in the first dimension of its checkpoint tensor."""
        return [
            sum(part.size(shape) for part in row.dimensions[0][: source.part])
            for source, row in zip(self.sources, self.rows, strict=True)
        ]

    def size(self, shape: Shape) -> tuple[int, ...]:
        """Of the whole tensor in Megatron-Core, a padded vocabulary aside."""
        return (sum(part.size(shape) for part in self.parts()), *self.rows[0].size(shape)[1:])


@dataclass(frozen=True)
class WeightMap:
    """What Megatron-Core's tensors are made of, for a model of this family and shape.

    Raises ArchitectureError when it is made for a family of which a tensor has no place in Megatron-Core's GPT model.
    """

    family: Family
    shape: Shape
    rows: Mapping[str, Row]  # that a checkpoint has

    @classmethod
    def of(cls, info: ModelInfo) -> WeightMap:
        found = cls(info.family, info.shape, info.rows)
        taken = {source.name for packed in found.table.values() for source in packed.sources}
        left = [name for name in found.rows if name not in taken]
        if left:
            raise ArchitectureError(
                f"{info.folder}: a {info.family.title} model has {', '.join(left[:3])} ({len(left)} such rows in the "
                "axis table), which Megatron-Core's GPT model has no place for; use distill.engine=torch"
            )
        return found

    @cached_property
    def table(self) -> dict[str, Packed]:
        """By Megatron-Core's name, numbers as *; a tied head is none of them."""
        found = {}
        for name, choices in _TABLE.items():
            for packing, sources in choices:
                if all(source.name in self.rows for source in sources):
                    found[name] = Packed(packing, sources, tuple(self.rows[source.name] for source in sources))
                    break
        return found

    def packed(self, name: str) -> Packed:
        """Of a parameter, by its `plain_name`; a tied head's is the embedding's."""
        row = _EXPERT.sub("*", _NUMBER.sub("*", name))
        if row == HEAD and row not in self.table:
            row = EMBEDDING
        if row not in self.table:
            raise ArchitectureError(
                f"Megatron-Core's model has a parameter {name} that a {self.family.title} model doesn't; please "
                "report this, with the version of megatron-core"
            )
        return self.table[row]

    def local(self, name: str, read: Read, place: Place = WHOLE) -> Tensor:
        """What a rank holds of a parameter. Reads that stretch alone, or the groups of heads that it lies in.

        name: `plain_name`, with the numbers of the whole model's layer and expert. Of a vocabulary that doesn't divide
        by the ranks the last rank is given fewer rows than the others.
        """
        packed = self.packed(name)
        names = [_numbered(source.name, name) for source in packed.sources]
        starts, rest = packed.starts(self.shape), [slice(None)] * (len(packed.rows[0].dimensions) - 1)

        def rows(number: int, start: int, stop: int) -> Tensor:
            offset = starts[number]
            return read(names[number], (slice(offset + start, offset + stop), *rest))

        size = packed.size(self.shape)
        if packed.packing is Packing.groups:
            return self._groups(rows, share(size[0], place))
        if packed.packing is Packing.halves:
            own = share(size[0] // 2, place if packed.shared is not None else WHOLE)
            return torch.cat([rows(0, own.start, own.stop), rows(1, own.start, own.stop)])
        shared = packed.shared
        if shared == 1:
            return read(names[0], (slice(0, size[0]), share(size[1], place)))
        own = slice(0, size[0]) if shared is None else share(size[0], place)
        return rows(0, own.start, own.stop)

    def _groups(self, rows: Callable[[int, int, int], Tensor], own: slice) -> Tensor:
        """Rows `own` of query, key and value group by group: of the groups that they lie in, which are read whole."""
        widths = [self.shape.group_size * self.shape.head_dim, self.shape.head_dim, self.shape.head_dim]
        unit = sum(widths)
        first, last = own.start // unit, -(-own.stop // unit)
        parts = [rows(number, first * width, last * width) for number, width in enumerate(widths)]
        groups = [part.reshape(last - first, width, *part.shape[1:]) for part, width in zip(parts, widths, strict=True)]
        packed = torch.cat(groups, 1).flatten(0, 1)
        return packed[own.start - first * unit : own.stop - first * unit]

    def unpacked(self, name: str, whole: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(name, its first row, rows) of the checkpoint's tensors that a whole parameter is made of, by `local`'s name.

        A padded vocabulary's rows behind its last are left out.
        """
        packed = self.packed(name)
        size = packed.size(self.shape)
        whole = whole[: size[0]]
        assert tuple(whole.shape) == size, (name, tuple(whole.shape), size)
        pieces: Sequence[Tensor]
        if packed.packing is Packing.groups:
            widths = [self.shape.group_size * self.shape.head_dim, self.shape.head_dim, self.shape.head_dim]
            groups = whole.reshape(self.shape.num_key_value_heads, sum(widths), *whole.shape[1:]).split(widths, 1)
            pieces = [group.flatten(0, 1) for group in groups]
        else:
            pieces = whole.chunk(2) if packed.packing is Packing.halves else [whole]
        for source, start, piece in zip(packed.sources, packed.starts(self.shape), pieces, strict=True):
            yield _numbered(source.name, name), start, piece

    def names(self) -> Iterator[str]:
        """Every parameter of the whole model, by `local`'s names."""
        for name in self.table:
            for layer in range(self.shape.num_hidden_layers) if ".layers.*." in name else range(1):
                for expert in range(self.shape.num_experts) if ".local_experts.*." in name else range(1):
                    numbered = name.replace(".layers.*.", f".layers.{layer}.")
                    yield numbered.replace(".local_experts.*.", f".local_experts.{expert}.")


def _numbered(row: str, name: str) -> str:
    """A row of the axis table with the numbers of a parameter of Megatron-Core."""
    layer, expert = _NUMBER.search(name), _EXPERT.search(name)
    if layer is not None:
        row = row.replace(".layers.*.", f".layers.{layer[0]}.")
    return row if expert is None else row.replace(".experts.*.", f".experts.{expert[0]}.")


def share(size: int, place: Place) -> slice:
    """A tensor-parallel rank's stretch of a dimension; where it doesn't divide, the last ones have less."""
    each = -(-size // place.tensor_ranks)
    return slice(min(size, place.tensor_rank * each), min(size, (place.tensor_rank + 1) * each))


class FolderReader:
    """Reads stretches of a folder's tensors, which are mapped and not read whole. One shard is open at a time."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._open: tuple[str, Any] | None = None

    def __call__(self, name: str, stretches: tuple[slice, ...]) -> Tensor:
        shard = self._info.tensors[name].shard
        if self._open is None or self._open[0] != shard:
            self._open = None
            self._open = shard, open_tensors(self._info.folder / shard)
        found: Tensor = self._open[1].get_slice(name)[stretches]
        return found

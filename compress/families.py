"""The axis table: for every weight of a model family, which axis each of its dimensions lies on.

The table is data, `families.yaml`, and so is one for an in-house architecture (`architecture.table`);
tests/test_slicing.py and `stage=selftest` prove the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from compress.errors import ArchitectureError

BUILT_IN = Path(__file__).parent / "families.yaml"


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by Hugging Face names. Pruning changes the first seven.

    A model whose every MLP is a mixture has intermediate_size 0, a dense one num_experts and moe_intermediate_size 0.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    moe_intermediate_size: int
    head_dim: int
    vocab_size: int
    tied: bool  # the output head is the embedding

    @property
    def group_size(self) -> int:
        """Query heads of one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


PRUNABLE = tuple(f.name for f in fields(Shape))[:7]
# The axes that pruning selects along, and the size that counts their units.
AXES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "query_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "experts": "num_experts",
    "expert_intermediate": "moe_intermediate_size",
}
_OTHER_AXES = ("vocabulary", "head_dim", "query_head")


@dataclass(frozen=True)
class Part:
    """A stretch of a dimension that lies on one axis; each unit owns `times` elements, on the head axes of head_dim."""

    axis: str
    times: int = 1

    @property
    def units(self) -> str:
        """The axis whose kept units decide; `query_head` has one element for each of `query_heads`."""
        return "query_heads" if self.axis == "query_head" else self.axis

    def elements_per_unit(self, shape: Shape) -> int:
        return self.times * (shape.head_dim if self.axis in ("query_heads", "key_value_heads") else 1)

    def size(self, shape: Shape) -> int:
        """Elements in a model of this shape."""
        if self.axis in ("vocabulary", "head_dim"):
            return self.times * {"vocabulary": shape.vocab_size, "head_dim": shape.head_dim}[self.axis]
        count: int = getattr(shape, AXES[self.units])
        return count * self.elements_per_unit(shape)


Dimension = tuple[Part, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table: the axis of each dimension of a tensor, and the config field that switches it on."""

    dimensions: tuple[Dimension, ...]
    switch: str | None = None

    def size(self, shape: Shape) -> tuple[int, ...]:
        return tuple(sum(part.size(shape) for part in dimension) for dimension in self.dimensions)


def holds_all_experts(row: Row) -> bool:
    """Whether a tensor stacks what every expert has of its own, so that it is cut expert by expert."""
    units = any(part.axis == "expert_intermediate" for dimension in row.dimensions for part in dimension)
    return units and row.dimensions[0] == (Part("experts"),)


@dataclass(frozen=True)
class Family:
    """One `model_type`: its rows by checkpoint name (numbers as *), and what its config class insists on."""

    model_type: str
    title: str
    table: Mapping[str, Row]
    sizes: Mapping[str, str | None]  # config fields that aren't called as in Shape; None: no such field
    only: Mapping[str, Any]  # config values that the rows describe
    hidden_divisible_by_heads: bool = False
    needs_packed_masks: bool = False  # transformers' code makes its masks without the positions

    def rows(self, config: PreTrainedConfig) -> dict[str, Row]:
        """The rows that a checkpoint with this config has; a tied head isn't one of them."""
        return {
            name: row
            for name, row in self.table.items()
            if not (row.switch and not getattr(config, row.switch))
            and not (name == self.head and config.tie_word_embeddings)
        }

    @cached_property
    def _vocabulary(self) -> list[str]:
        return [name for name, row in self.table.items() if row.dimensions[0] == (Part("vocabulary"),)]

    @property
    def embedding(self) -> str:
        return self._vocabulary[0]

    @property
    def head(self) -> str:
        """The output head's name in a checkpoint; not stored when it is tied."""
        return self._vocabulary[1]

    @cached_property
    def layers(self) -> str:
        """What every name in a layer begins with, such as `model.layers.`."""
        return next(name for name in self.table if ".layers." in name).partition("*")[0]

    @cached_property
    def norms(self) -> dict[str, Dimension]:
        """Modules whose weight is a vector, whatever they are called, and the axis of it. Biases belong to a matrix."""
        return {
            name.removesuffix(".weight"): row.dimensions[0]
            for name, row in self.table.items()
            if len(row.dimensions) == 1 and name.endswith(".weight")
        }

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of a layer over `hidden`, layer number as *."""
        return tuple(name for name in self._hidden_norms if name.startswith(self.layers))

    @property
    def final_norm(self) -> str:
        """The norm over `hidden` behind the last layer."""
        return next(name for name in self._hidden_norms if not name.startswith(self.layers))

    @property
    def _hidden_norms(self) -> list[str]:
        return [name for name, axis in self.norms.items() if axis == (Part("hidden"),)]

    @property
    def locked(self) -> bool:
        """Whether head_dim can't be set and is hidden_size / num_attention_heads: one isn't pruned alone."""
        return self.field("head_dim") is None

    def field(self, size: str) -> str | None:
        """The config field of a size; None where the family has no such size."""
        if size in ("num_experts", "moe_intermediate_size") and size not in self.sizes:
            return size if self.has_experts else None
        return self.sizes.get(size, size)

    @cached_property
    def has_experts(self) -> bool:
        return any(part.axis == "experts" for row in self.table.values() for d in row.dimensions for part in d)

    @property
    def prunable(self) -> tuple[str, ...]:
        """The sizes that pruning can change by a setting of their own."""
        return tuple(name for name in PRUNABLE if self.field(name) is not None)


def _parse_row(text: Any, where: str) -> Row:
    body, _, switch = str(text).partition(" if ")
    dimensions = []
    for written in body.split(","):
        parts = []
        for part in written.split("+"):
            match = re.fullmatch(r"\s*(\w+)(?:\s+x\s+(\d+))?\s*", part)
            if match is None or match[1] not in (*AXES, *_OTHER_AXES):
                raise ArchitectureError(
                    f"{where}: {str(text)!r}: {part.strip()!r} is no axis; write AXIS, AXIS x NUMBER or AXIS + AXIS, "
                    f"of {', '.join((*AXES, *_OTHER_AXES))}"
                )
            parts.append(Part(match[1], int(match[2] or 1)))
        dimensions.append(tuple(parts))
    return Row(tuple(dimensions), switch.strip() or None)


_FIELDS = {
    "title": str, "base": str, "without": list, "sizes": dict, "only": dict, "hidden_divisible_by_heads": bool,
    "needs_packed_masks": bool, "tensors": dict,
}  # fmt: skip


def read_table(path: Path, known: Mapping[str, Family] | None = None) -> dict[str, Family]:
    """The families of a table file; `base` may name one of the file's earlier ones or of `known`.

    Raises ArchitectureError, with the file and the place in it, for anything that isn't a table.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArchitectureError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not content:
        raise ArchitectureError(f"{path}: must hold model_type: {{title: ..., tensors: {{NAME: axes}}}} entries")
    families = dict(known or {})
    found = {}
    for model_type, entry in content.items():
        where = f"{path}: {model_type}"
        if not isinstance(entry, dict):
            raise ArchitectureError(f"{where} must be a mapping with the keys {', '.join(_FIELDS)}")
        for key, value in entry.items():
            if key not in _FIELDS or not isinstance(value, _FIELDS[key]):
                raise ArchitectureError(
                    f"{where}.{key}={value!r}: the keys are "
                    + ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
                )
        base = None
        if "base" in entry:
            if entry["base"] not in families:
                raise ArchitectureError(f"{where}.base={entry['base']}: no such family; known: {', '.join(families)}")
            base = families[entry["base"]]
        table: dict[str, Row] = {}
        if base:
            without = [str(word) for word in entry.get("without", [])]
            table = {name: row for name, row in base.table.items() if not any(word in name for word in without)}
        for name, text in entry.get("tensors", {}).items():
            table[str(name)] = _parse_row(text, f"{where}.tensors.{name}")
        family = Family(
            model_type=str(model_type),
            title=entry.get("title", str(model_type)),
            table=table,
            sizes={**(base.sizes if base else {}), **entry.get("sizes", {})},
            only={**(base.only if base else {}), **entry.get("only", {})},
            **{
                name: bool(entry.get(name, getattr(base, name, False)))
                for name in ("hidden_divisible_by_heads", "needs_packed_masks")
            },
        )
        _check_table(family, where)
        families[family.model_type] = found[family.model_type] = family
    return found


def _check_table(family: Family, where: str) -> None:
    """What the rest of the program relies on. Raises ArchitectureError."""
    unknown = (set(family.sizes) - {f.name for f in fields(Shape)}) | {
        name for name, field in family.sizes.items() if field is not None and not isinstance(field, str)
    }
    if unknown:
        raise ArchitectureError(f"{where}.sizes: {', '.join(sorted(unknown))}: give SIZE: CONFIG_FIELD or SIZE: null")
    wide = {axis: [n for n, r in family.table.items() if r.dimensions[-1] == (Part(axis),) and len(r.dimensions) > 1]
            for axis in ("hidden", "query_heads")}  # fmt: skip
    problems = []
    if len(family._vocabulary) != 2:
        problems.append("two tensors lie on vocabulary, the embedding and then the output head")
    if len(wide["query_heads"]) != 1:
        problems.append("one matrix reads query_heads: its last dimension")
    if not any(".layers.*." in name for name in family.table):
        problems.append("layers are written NAME.layers.*.")
    else:
        outside = len(family._hidden_norms) - len(family.layer_norms)
        if outside != 1:  # one behind the embedding would run before every layer that is scored alone
            problems.append(f"one norm outside of the layers lies on hidden, NAME.weight: hidden (here {outside})")
        if not family.layer_norms:
            problems.append("a norm in the layers lies on hidden, NAME.layers.*.NAME.weight: hidden")
    if problems:
        raise ArchitectureError(f"{where}: the table must say that {'; that '.join(problems)}")


FAMILIES: dict[str, Family] = {}  # the built-in ones, and those of add_families


def add_families(path: Path) -> list[str]:
    """Take the families of a table file into use in this process; returns their model_types.

    A built-in family may be replaced. Raises ArchitectureError as `read_table` does.
    """
    found = read_table(path, FAMILIES)
    FAMILIES.update(found)
    return list(found)


FAMILIES.update(read_table(BUILT_IN))


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json; ArchitectureError for one that the table lacks."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise ArchitectureError(
            f"{source}: model_type={model_type!r} is not in the axis table; there are {known}. Use a teacher of one of "
            "these, or describe the family in a file of your own with architecture.table=FILE.yaml (docs/families.md)"
        )
    return FAMILIES[str(model_type)]


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of a loaded model's config, which every forward asks for: by its model_type alone."""
    return family_of({"model_type": config.model_type}, "the model")

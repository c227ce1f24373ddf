"""LoRA adapters of the teacher, cut along with it: what an adapter adds to a matrix is sliced as the matrix is.

With W + s * B A (arXiv 2106.09685, section 4.1) the rows of B lie on the output axis of W and the columns of A on its
input axis, so slicing the two slices their product: the student with the sliced adapter is the adapted teacher, sliced.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architecture import ModelInfo, expert_of, layer_of, renumber, row_of
from compress.artifacts import open_tensors, read_json, save_tensors, write_json
from compress.errors import ArtifactError, ConfigError
from compress.families import Row
from compress.slicing import Kept, copy_companions, slice_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight|\.bias)?")
_NUMBER = re.compile(r"(?<![\w{,])\d+(?![\w},])")  # a layer's, not a part of a name such as fc1 or of a quantifier
# What changes a module in another way than by a product, or other modules than the table's rows.
_UNSUPPORTED = {
    "use_dora": "its magnitudes are norms over channels that go",
    "layer_replication": "its layers aren't the teacher's",
    "target_parameters": "it adapts fused parameters",
    "trainable_token_indices": "it holds rows of the vocabulary apart",
    "fan_in_fan_out": "its matrices are transposed",
}


def read_adapter(folder: Path, info: ModelInfo) -> dict[str, Any]:
    """The adapter's config, after everything that its headers can tell was checked against the teacher.

    Raises ArtifactError for a folder that isn't a whole PEFT LoRA adapter, ConfigError for one that can't be sliced.
    """
    where = f"prune.adapters: {folder}"
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{where} holds no {CONFIG}; give a folder that peft's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        pickled = (
            "adapter_model.bin is a pickle, which isn't read here; " if (folder / "adapter_model.bin").exists() else ""
        )
        raise ArtifactError(f"{where} holds no {WEIGHTS}; {pickled}save the adapter again with safe_serialization=True")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ConfigError(f"{where}: peft_type={kind} can't be sliced, only LORA; merge it into the teacher instead")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise ConfigError(
                f"{where}: {key}={config[key]}: {reason}, so it can't be sliced; merge it into the teacher"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if any(_NUMBER.search(pattern) for pattern in config.get(key) or {}):
            raise ConfigError(f"{where}: {key} names layers by number, and numbers change; merge it into the teacher")
    reader = open_tensors(folder / WEIGHTS)
    for name in reader.keys():  # noqa: SIM118 (not a dict)
        module, factor = _parse(name, where)
        if expert_of(f"{module}.weight") is not None:
            raise ConfigError(
                f"{where}: it adapts {module}, one of the experts, which are chosen anew; merge the adapter"
            )
        _row(info, module, factor, where, tuple(reader.get_slice(name).get_shape()))
    return config


def slice_adapter(folder: Path, target: Path, info: ModelInfo, kept: Kept) -> None:
    """Write the adapter for the student that keeps `kept` into `target`; tensors of removed layers go.

    Raises what `read_adapter` does.
    """
    where = f"prune.adapters: {folder}"
    config = dict(read_adapter(folder, info))
    reader = open_tensors(folder / WEIGHTS)
    place = {int(layer): position for position, layer in enumerate(kept["layers"].tolist())}
    tensors: dict[str, Tensor] = {}
    for name in reader.keys():  # noqa: SIM118
        module, factor = _parse(name, where)
        layer = layer_of(f"{module}.weight")
        if layer is not None and layer not in place:
            continue
        tensor: Tensor = reader.get_tensor(name)
        row = _row(info, module, factor, where, tuple(tensor.shape))
        position = None if layer is None else place[layer]
        tensors[renumber(name, position, None)] = slice_tensor(tensor, row, position, kept, info.shape)
    if not tensors:
        raise ConfigError(f"{where}: every layer that it adapts is removed; leave it out of prune.adapters")
    if _names_layers(config):  # the modules themselves, by the student's numbers
        factors = (_FACTOR.fullmatch(name.removeprefix(_PREFIX)) for name in tensors)
        config["target_modules"] = sorted({match["module"] for match in factors if match})
        config["layers_to_transform"] = config["layers_pattern"] = config["exclude_modules"] = None
    config["base_model_name_or_path"] = None  # the teacher, which it no longer fits
    target.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, target)
    save_tensors(target / WEIGHTS, tensors, {"format": "pt"})
    write_json(target / CONFIG, config)


def _names_layers(config: dict[str, Any]) -> bool:
    """Whether the config says by number which layers it adapts."""
    if config.get("layers_to_transform") is not None:
        return True
    given = [config.get(key) or [] for key in ("target_modules", "exclude_modules")]
    return any(_NUMBER.search(name) for names in given for name in ([names] if isinstance(names, str) else names))


def _parse(name: str, where: str) -> tuple[str, str]:
    """(module, factor) of a tensor's name; the factor of a module that is saved whole is its `weight` or `bias`."""
    if name.startswith(_PREFIX):
        inner = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(inner)
        if match and match[3] != ".bias":
            return match["module"], match["factor"]
        module, _, leaf = inner.rpartition(".")
        if leaf in ("weight", "bias") and "lora_" not in inner:
            return module.removesuffix(".base_layer"), leaf
    raise ConfigError(f"{where}: tensor {name} is none of LoRA's factors, so it can't be sliced; merge the adapter")


def _row(info: ModelInfo, module: str, factor: str, where: str, shape: tuple[int, ...]) -> Row:
    """Which axes the tensor's dimensions lie on; a rank is an axis that stays whole."""
    whole = module if factor in ("weight", "bias") else f"{module}.weight"
    name = f"{module}.{factor}" if factor in ("weight", "bias") else whole
    base = info.rows.get(row_of(name))
    number = layer_of(name)
    if base is None or (number is not None and number >= info.shape.num_hidden_layers):
        raise ConfigError(
            f"{where}: it adapts {module}, which the teacher {info.folder} doesn't have; is it of another model?"
        )
    rank: tuple[Any, ...] = ()
    rows = {
        "weight": base.dimensions,
        "bias": base.dimensions,
        "lora_A": (rank, *base.dimensions[1:]),
        "lora_B": (base.dimensions[0], rank),
        "lora_embedding_A": (rank, base.dimensions[0]),
        "lora_embedding_B": (*base.dimensions[1:], rank),
    }
    row = Row(rows[factor])
    expected = [sum(part.size(info.shape) for part in dimension) if dimension else None for dimension in row.dimensions]
    if len(shape) != len(expected) or any(e not in (None, n) for e, n in zip(expected, shape, strict=True)):
        raise ConfigError(
            f"{where}: {module}.{factor} is {list(shape)}, where the teacher {info.folder} asks for "
            f"{['rank' if e is None else e for e in expected]}; is it of another model?"
        )
    return row

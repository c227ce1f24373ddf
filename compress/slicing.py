"""Cutting a checkpoint down to the kept units: an index-select along the table's axes, streamed shard by shard."""

# L layers, D hidden, F intermediate, H query heads, G key-value heads; L', D', ... what is kept of them

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import (
    Family,
    ModelInfo,
    Shape,
    layer_of,
    row_of,
    student_config,
    tensor_shapes,
    with_sizes,
)
from compress.artifacts import ERROR, MANIFEST, STARTED, disk_errors, open_tensors, save_tensors, write_json
from compress.errors import ConfigError
from compress.folders import read_model
from compress.importance import Importance, removal_cost

Kept = Mapping[str, Tensor]
MAX_SHARD_BYTES = 5_000_000_000
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Weights in any format: the student has its own. Pickles and code are never copied unasked.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".pkl"}
# These describe the teacher's sizes, or the run that made it.
_TEACHERS_OWN = {"config.json", "params.json", MANIFEST, STARTED, ERROR}
# Other folders of a model repository (original/, onnx/, gguf/) hold the same weights again in other formats.
_FOLDERS = ("additional_chat_templates",)


def select(importance: Importance, shape: Shape, removed_layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """What to keep of each axis for a student of `shape`: sorted int64 indices into the teacher's units.

    `layers` (L',), `hidden` (D',), and per kept layer `intermediate` (L', F'), `key_value_heads` (L', G'),
    `query_heads` (L', H'), of which every kept key-value head keeps equally many (Minitron ranks inside each group).
    Layers go by `removed_layers` when given, else by the greedy order, else by block influence; ties keep the lower
    index. Raises ConfigError when the greedy order doesn't reach far enough.
    """
    layers, groups = importance.key_value_heads_LG.shape
    remove = layers - shape.num_hidden_layers
    if removed_layers is None:
        order, _ = removal_cost(importance)
        if len(order) < remove:
            raise ConfigError(
                f"prune.num_hidden_layers={shape.num_hidden_layers} removes {remove} layers, but the greedy order of "
                f"the scores ends after {len(order)}; delete the score folder and run stage=score again"
            )
        removed_layers = order[:remove]
    assert len(set(removed_layers)) == remove, (removed_layers, shape)
    gone = set(removed_layers)
    kept_L = torch.tensor([layer for layer in range(layers) if layer not in gone])
    kept_LG = _top(importance.key_value_heads_LG[kept_L], shape.num_key_value_heads)
    heads_LGh = importance.query_heads_LH[kept_L].unflatten(1, (groups, -1))  # h: query heads of one group
    group_size = heads_LGh.shape[2]
    heads_LGh = heads_LGh.gather(1, kept_LG[..., None].expand(-1, -1, group_size))
    inside_LGh = _top(heads_LGh, shape.group_size)
    return {
        "layers": kept_L,
        "hidden": _top(importance.hidden_D, shape.hidden_size),
        "intermediate": _top(importance.intermediate_LF[kept_L], shape.intermediate_size),
        "key_value_heads": kept_LG,
        "query_heads": (kept_LG[..., None] * group_size + inside_LGh).flatten(1),
    }


def _top(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` highest scores along the last dimension; equal scores: the lower index stays."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def kept_shape(teacher: Shape, kept: Kept) -> Shape:
    """The student's shape."""
    return with_sizes(
        teacher,
        {
            "hidden_size": len(kept["hidden"]),
            "intermediate_size": kept["intermediate"].shape[1],
            "num_hidden_layers": len(kept["layers"]),
            "num_attention_heads": kept["query_heads"].shape[1],
            "num_key_value_heads": kept["key_value_heads"].shape[1],
        },
    )


def _elements(axis: str, layer: int | None, kept: Kept, teacher: Shape) -> Tensor | None:
    """Indices of the elements kept along an axis of a tensor of the student's `layer`; None: all of them."""
    if axis in ("vocabulary", "head_dim"):
        return None
    if axis == "hidden":
        units, total = kept["hidden"], teacher.hidden_size
    else:
        units = kept[axis][layer]
        total = {
            "intermediate": teacher.intermediate_size,
            "query_heads": teacher.num_attention_heads,
            "key_value_heads": teacher.num_key_value_heads,
        }[axis]
    if torch.equal(units, torch.arange(total)):
        return None
    if axis == "intermediate" or axis == "hidden":
        return units
    return (units[:, None] * teacher.head_dim + torch.arange(teacher.head_dim)).flatten()


def slice_tensor(tensor: Tensor, axes: Sequence[str], layer: int | None, kept: Kept, teacher: Shape) -> Tensor:
    """The kept part of one tensor of the student's `layer` (None outside the layers); dtype and order stay."""
    for dimension, axis in enumerate(axes):
        elements = _elements(axis, layer, kept, teacher)
        if elements is not None:
            tensor = tensor.index_select(dimension, elements.to(tensor.device))
    return tensor.contiguous()


def slice_state_dict(state: Mapping[str, Tensor], family: Family, teacher: Shape, kept: Kept) -> dict[str, Tensor]:
    """The student's state dict, layers renumbered, from the teacher's in memory. A tied head may be in it or not."""
    sliced = {}
    for name, tensor in state.items():
        new = _student_name(name, kept)
        if new is not None:
            sliced[new] = slice_tensor(tensor, family.table[row_of(name)], layer_of(new), kept, teacher)
    return sliced


def _student_name(name: str, kept: Kept) -> str | None:
    """A tensor's name in the student; None when its layer is removed."""
    layer = layer_of(name)
    if layer is None:
        return name
    position = (kept["layers"] == layer).nonzero().flatten().tolist()
    return name.replace(f".{layer}.", f".{position[0]}.", 1) if position else None


def slice_checkpoint(
    src: Path | ModelInfo,
    dst: Path,
    kept: Kept,
    *,
    replaced: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Shape:
    """Write the student's Hugging Face folder into `dst` (new or empty) and return its shape.

    Tensors go one by one from the teacher's shards into shards of at most `max_shard_bytes`; one output shard is in
    memory at a time, so that RAM bounds neither model. Every other file of the teacher comes along: tokenizer, chat
    template, generation config, licence, notice; Python files only with `trust_remote_code`.

    `replaced` holds full-size tensors, by the teacher's names, that are cut instead of the teacher's own (compensated
    weights); they take the dtype of those.
    """
    info = src if isinstance(src, ModelInfo) else read_model(src, trust_remote_code)
    check_kept(kept, info.shape)
    shape = kept_shape(info.shape, kept)
    layers = kept["layers"].tolist()
    with disk_errors(dst):
        dst.mkdir(parents=True, exist_ok=True)
    assert not any(dst.iterdir()), f"{dst} isn't empty"
    sizes = tensor_shapes(info.rows, shape)
    source_of = {}  # student name -> teacher name
    for name in sizes:
        layer = layer_of(name)
        source_of[name] = name if layer is None else name.replace(f".{layer}.", f".{layers[layer]}.", 1)
    size_bytes = {n: prod(size) * _ITEM_BYTES[info.tensors[source_of[n]].dtype] for n, size in sizes.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, needed in size_bytes.items():
        if shards[-1] and used + needed > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += needed
    weight_map = {}
    with contextlib.ExitStack() as stack:
        readers: dict[str, Any] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for name in names:
                shard = info.tensors[source_of[name]].shard
                if shard not in readers:
                    readers[shard] = stack.enter_context(open_tensors(info.folder / shard))
                tensor = readers[shard].get_tensor(source_of[name])
                if replaced and source_of[name] in replaced:
                    tensor = replaced[source_of[name]].to(tensor.dtype)
                tensors[name] = slice_tensor(tensor, info.rows[row_of(name)], layer_of(name), kept, info.shape)
                assert tuple(tensors[name].shape) == sizes[name], name
                weight_map[name] = file
            save_tensors(dst / file, tensors, {"format": "pt"})
            del tensors
    if len(shards) > 1:
        metadata = {"total_size": sum(size_bytes.values())}
        write_json(dst / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    copy_companions(info.folder, dst, trust_remote_code)
    write_json(dst / "config.json", student_config(info.config, info.family, shape, layers))
    return shape


def check_kept(kept: Kept, teacher: Shape) -> None:
    """Raise ConfigError unless the indices are sorted, distinct, within the teacher, and groups keep equal parts."""
    limits = {
        "layers": teacher.num_hidden_layers,
        "hidden": teacher.hidden_size,
        "intermediate": teacher.intermediate_size,
        "key_value_heads": teacher.num_key_value_heads,
        "query_heads": teacher.num_attention_heads,
    }
    if set(kept) != set(limits):
        raise ConfigError(f"kept names the axes {sorted(kept)}, it must name {sorted(limits)}")
    for axis, limit in limits.items():
        indices = kept[axis]
        wanted = 1 if axis in ("layers", "hidden") else 2
        if indices.dtype != torch.int64 or indices.dim() != wanted or indices.numel() == 0:
            raise ConfigError(f"kept[{axis!r}] must be int64 of {wanted} dimensions, and not empty")
        if wanted == 2 and len(indices) != len(kept["layers"]):
            raise ConfigError(f"kept[{axis!r}] has {len(indices)} rows for {len(kept['layers'])} kept layers")
        if bool((indices.diff(dim=-1) <= 0).any()) or int(indices.min()) < 0 or int(indices.max()) >= limit:
            raise ConfigError(f"kept[{axis!r}] must be ascending, distinct, and within 0 and the teacher's {limit - 1}")
    groups_LH = kept["query_heads"] // teacher.group_size
    heads, groups = groups_LH.shape[1], kept["key_value_heads"].shape[1]
    if heads % groups or not torch.equal(groups_LH, kept["key_value_heads"].repeat_interleave(heads // groups, 1)):
        raise ConfigError("kept['query_heads'] must hold equally many heads of each of kept['key_value_heads']")


def copy_companions(src: Path, dst: Path, trust_remote_code: bool = False) -> None:
    """Copy every file of a model folder that is neither weights nor a description of the teacher's sizes."""
    for folder in (src, *(src / name for name in _FOLDERS)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            hidden = file.name.startswith(".") or file.name in _TEACHERS_OWN or file.name.endswith(".index.json")
            code = file.suffix in (".py", ".so") and not trust_remote_code
            if file.is_file() and not (hidden or code or file.suffix in _WEIGHTS):
                target = dst / file.relative_to(src)
                with disk_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)  # follows the hub cache's links; permissions by the umask

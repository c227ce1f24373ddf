"""Cutting a checkpoint down to the kept units: an index-select along the table's axes, streamed shard by shard."""

# L layers, D hidden, F intermediate, H query heads, G key-value heads; L', D', ... what is kept of them

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.architecture import (
    ModelInfo,
    expert_of,
    layer_of,
    renumber,
    row_of,
    student_config,
    tensor_shapes,
    with_sizes,
)
from compress.artifacts import ERROR, MANIFEST, STARTED, disk_errors, save_rows, save_tensors, write_json
from compress.errors import ConfigError
from compress.families import AXES, Dimension, Part, Row, Shape, holds_all_experts
from compress.folders import read_model
from compress.scores import Importance, Widths

Kept = Mapping[str, Tensor]
MAX_SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 1 << 22
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Weights in any format: the student has its own. Pickles and code are never copied unasked.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".pkl"}
# These describe the teacher's sizes, or the run that made it.
_TEACHERS_OWN = {"config.json", "params.json", MANIFEST, STARTED, ERROR}
# Other folders of a model repository (original/, onnx/, gguf/) hold the same weights again in other formats.
_FOLDERS = ("additional_chat_templates",)


def select(
    importance: Importance,
    shape: Shape,
    removed_layers: Sequence[int] | None = None,
    *,
    width: str | None = None,
    depth: str | None = None,
) -> dict[str, Tensor]:
    """What to keep of each axis for a student of `shape`: sorted int64 indices into the teacher's units.

    `layers` (L',), `hidden` (D',), and per kept layer `intermediate` (L', F'), `key_value_heads` (L', G'),
    `query_heads` (L', H'), of which every kept key-value head keeps equally many (Minitron ranks inside each group);
    in a mixture `experts` (L', E') and of each kept one `expert_intermediate` (L', E', F') instead of `intermediate`.
    `width` and `depth` name the criteria, None the first of each; layers go by `removed_layers` when given. Ties keep
    the lower index. Raises ConfigError when the depth criterion's removals don't reach far enough.
    """
    scores = importance.width(width)
    layers = len(scores["query_heads"])
    remove = layers - shape.num_hidden_layers
    if removed_layers is None:
        removals = importance.depth(depth)
        if len(removals.removed) < remove:
            raise ConfigError(
                f"prune.num_hidden_layers={shape.num_hidden_layers} removes {remove} layers, but the scores say what "
                f"to remove up to {len(removals.removed)}; delete the score folder and run stage=score again"
            )
        removed_layers = removals.of(remove)
    assert len(set(removed_layers)) == remove, (removed_layers, shape)
    gone = set(removed_layers)
    kept_L = torch.tensor([layer for layer in range(layers) if layer not in gone])
    of_kept = {axis: scores[axis][kept_L] for axis in ("key_value_heads", "query_heads")}
    groups_LG, heads_LH = select_heads(of_kept, shape.num_key_value_heads, shape.group_size)
    kept = {
        "layers": kept_L,
        "hidden": _top(scores["hidden"], shape.hidden_size),
        "key_value_heads": groups_LG,
        "query_heads": heads_LH,
    }
    if "intermediate" in scores:
        kept["intermediate"] = _top(scores["intermediate"][kept_L], shape.intermediate_size)
    if "experts" in scores:
        kept["experts"] = kept_LE = _top(scores["experts"][kept_L], shape.num_experts)
        width_LEF = scores["expert_intermediate"][kept_L]
        width_LEF = width_LEF.gather(1, kept_LE[..., None].expand(-1, -1, width_LEF.shape[2]))
        kept["expert_intermediate"] = _top(width_LEF, shape.moe_intermediate_size)
    return kept


def select_heads(scores: Widths, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The best groups (L, G'), and `group_size` best query heads inside each of them (L, G' * group_size)."""
    groups_LG = _top(scores["key_value_heads"], num_groups)
    heads_LGh = scores["query_heads"].unflatten(1, (scores["key_value_heads"].shape[1], -1))  # h: of one group
    teachers = heads_LGh.shape[2]
    heads_LGh = heads_LGh.gather(1, groups_LG[..., None].expand(-1, -1, teachers))
    return groups_LG, (groups_LG[..., None] * teachers + _top(heads_LGh, group_size)).flatten(1)


def _top(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the `count` highest scores along the last dimension; equal scores: the lower index stays."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def kept_shape(teacher: Shape, kept: Kept) -> Shape:
    """The student's shape."""
    sizes = {size: kept[axis].shape[-1] for axis, size in AXES.items() if axis in kept}
    return with_sizes(teacher, {**sizes, "num_hidden_layers": len(kept["layers"])})


def kept_elements(
    dimension: Dimension, layer: int | None, expert: int | None, kept: Kept, teacher: Shape
) -> Tensor | None:
    """Indices of the elements kept along a dimension of a tensor of the student's layer and expert; None: all."""
    pieces, start, whole = [], 0, True
    for part in dimension:
        size = part.size(teacher)
        if part.axis in ("vocabulary", "head_dim"):
            pieces.append(torch.arange(start, start + size))
        else:
            units = kept[part.units]
            if part.units != "hidden":
                units = units[layer]
            if part.units == "expert_intermediate":
                units = units[expert]
            each = part.elements_per_unit(teacher)
            whole = whole and torch.equal(units, torch.arange(size // each))
            pieces.append((units[:, None] * each + torch.arange(each)).flatten() + start)
        start += size
    return None if whole else torch.cat(pieces)


def slice_tensor(
    tensor: Tensor, row: Row, layer: int | None, kept: Kept, teacher: Shape, expert: int | None = None
) -> Tensor:
    """The kept part of one tensor of the student's `layer` and `expert` (None outside); dtype and order stay.

    A tensor that holds all experts is cut expert by expert, since each keeps its own units.
    """
    if holds_all_experts(row):
        inner = Row(row.dimensions[1:])
        experts = kept["experts"][layer].tolist()
        parts = [slice_tensor(tensor[e], inner, layer, kept, teacher, expert=i) for i, e in enumerate(experts)]
        return torch.stack(parts)
    for dimension, axes in enumerate(row.dimensions):
        elements = kept_elements(axes, layer, expert, kept, teacher)
        if elements is not None:
            tensor = _take(tensor, dimension, elements)
    return tensor.contiguous()


def _take(tensor: Tensor, dimension: int, elements: Tensor) -> Tensor:
    """index_select. Along the last dimension on a CPU by NumPy on the bits, four times as fast for 2-byte elements."""
    if tensor.device.type != "cpu" or dimension == 0 or dimension != tensor.dim() - 1:
        return tensor.index_select(dimension, elements.to(tensor.device))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    result = torch.empty((*tensor.shape[:-1], len(elements)), dtype=tensor.dtype)
    # mode="clip" writes straight into `out`; check_kept has seen to it that no index is outside.
    np.take(tensor.view(bits).numpy(), elements.numpy(), axis=-1, out=result.view(bits).numpy(), mode="clip")
    return result


def _source_names(names: Iterable[str], kept: Kept) -> dict[str, str]:
    """For each of the student's tensor names the teacher's, from which it is cut."""
    layers = kept["layers"].tolist()
    found = {}
    for name in names:
        layer, expert = layer_of(name), expert_of(name)
        source = None if expert is None or layer is None else int(kept["experts"][layer, expert])
        found[name] = renumber(name, None if layer is None else layers[layer], source)
    return found


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
    source_of = _source_names(sizes, kept)
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
    source = info.shards
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        if len(names) == 1 and size_bytes[names[0]] > max_shard_bytes and _has_whole_rows(info.rows[row_of(names[0])]):
            _save_in_blocks(info, dst / file, names[0], sizes[names[0]], kept)
            weight_map[names[0]] = file
            continue
        tensors = {}
        for name in names:
            tensor = source.get(source_of[name])
            if replaced and source_of[name] in replaced:
                tensor = replaced[source_of[name]].to(tensor.dtype)
            row = info.rows[row_of(name)]
            tensors[name] = slice_tensor(tensor, row, layer_of(name), kept, info.shape, expert_of(name))
            assert tuple(tensors[name].shape) == sizes[name], name
            weight_map[name] = file
        save_tensors(dst / file, tensors, {"format": "pt"})
        del tensors, tensor
    if len(shards) > 1:
        metadata = {"total_size": sum(size_bytes.values())}
        write_json(dst / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    copy_companions(info.folder, dst, trust_remote_code)
    write_json(dst / "config.json", student_config(info.config, info.family, shape, layers))
    return shape


def _has_whole_rows(row: Row) -> bool:
    """Whether rows are tokens of the vocabulary, which all stay: the embedding and the head."""
    return row.dimensions[0] == (Part("vocabulary"),)


def _save_in_blocks(info: ModelInfo, path: Path, name: str, size: Sequence[int], kept: Kept) -> None:
    """An embedding that is larger than a shard may be, without ever holding the whole of it."""
    tensor, row = info.shards.get(name), info.rows[row_of(name)]
    rows = max(1, _BLOCK_BYTES // (tensor[0].numel() * tensor.element_size()))
    blocks = (slice_tensor(part, row, None, kept, info.shape) for part in tensor.split(rows))
    save_rows(path, name, info.tensors[name].dtype, size, blocks)


def num_stored_bytes(info: ModelInfo) -> int:
    """Of the teacher's weights as they are stored."""
    return sum(prod(tensor.shape) * _ITEM_BYTES[tensor.dtype] for tensor in info.tensors.values())


def largest_layer_bytes(info: ModelInfo) -> int:
    """Of the teacher as it is stored: the size of a shard for a student that is made a layer at a time."""
    sizes: dict[int, int] = {}
    for name, tensor in info.tensors.items():
        layer = layer_of(name)
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
    return max(sizes.values())


def check_kept(kept: Kept, teacher: Shape) -> None:
    """Raise ConfigError unless the indices are sorted, distinct, within the teacher, and groups keep equal parts."""
    limits = {"layers": teacher.num_hidden_layers, **{a: n for a, s in AXES.items() if (n := getattr(teacher, s))}}
    if set(kept) != set(limits):
        raise ConfigError(f"kept names the axes {sorted(kept)}, it must name {sorted(limits)}")
    for axis, limit in limits.items():
        indices = kept[axis]
        wanted = {"layers": 1, "hidden": 1, "expert_intermediate": 3}.get(axis, 2)
        if indices.dtype != torch.int64 or indices.dim() != wanted or indices.numel() == 0:
            raise ConfigError(f"kept[{axis!r}] must be int64 of {wanted} dimensions, and not empty")
        if wanted >= 2 and len(indices) != len(kept["layers"]):
            raise ConfigError(f"kept[{axis!r}] has {len(indices)} rows for {len(kept['layers'])} kept layers")
        if bool((indices.diff(dim=-1) <= 0).any()) or int(indices.min()) < 0 or int(indices.max()) >= limit:
            raise ConfigError(f"kept[{axis!r}] must be ascending, distinct, and within 0 and the teacher's {limit - 1}")
    if "experts" in kept and kept["expert_intermediate"].shape[1] != kept["experts"].shape[1]:
        raise ConfigError("kept['expert_intermediate'] must have a row for each of kept['experts']")
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

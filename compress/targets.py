"""The student that prune.* asks for: its shape or the bounds of a search, and the folder cut for what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.architecture import ModelInfo, check_shape, student_config, with_sizes
from compress.artifacts import fingerprint_path, read_json, remedy_for, save_tensors
from compress.compensation import compensated_weights, moment_bytes, stream_compensated_weights
from compress.depth import removal_reach
from compress.errors import ArtifactError, ConfigError
from compress.families import PRUNABLE, Shape
from compress.inputs import KEPT, streams
from compress.merging import merged_weights
from compress.models import load_model
from compress.parallel import resolve_dtype
from compress.progress import track
from compress.scores import Importance, load_importance
from compress.settings import BUDGET, CompressConfig
from compress.shapes import Grid, Limit, active_limit, memory_limit, non_embedding_limit, parameter_limit
from compress.slicing import MAX_SHARD_BYTES, Kept, largest_layer_bytes, slice_checkpoint
from compress.tokens import TokenSet

ADAPTERS = "adapters"
SEARCH_REPORT = "report.json"


def given_sizes(config: CompressConfig) -> dict[str, int]:
    """The sizes that prune.* gives; what is open stays out."""
    return {name: getattr(config.prune, name) for name in PRUNABLE if getattr(config.prune, name) is not None}


def given_shape(config: CompressConfig, info: ModelInfo) -> Shape:
    """The teacher's shape with the given sizes; layers also by prune.removed_layers. Raises ConfigError if illegal."""
    sizes = given_sizes(config)
    total = info.shape.num_hidden_layers
    removed = config.prune.removed_layers
    if removed is not None:
        if len(set(removed)) != len(removed) or not set(removed) <= set(range(total)) or len(removed) == total:
            raise ConfigError(
                f"prune.removed_layers={removed} must be distinct layers within 0 and {total - 1}, and not all of them"
            )
        if sizes.setdefault("num_hidden_layers", total - len(removed)) != total - len(removed):
            raise ConfigError(
                f"prune.num_hidden_layers={sizes['num_hidden_layers']} contradicts prune.removed_layers, which leaves "
                f"{total - len(removed)} of {total}; give one of the two"
            )
    shape = with_sizes(info.shape, sizes)
    check_shape(info, shape, config.shape.multiple_of, config.shape.tensor_parallel)
    if shape == info.shape:
        raise ConfigError(
            "prune.* leaves the teacher as it is; set one of "
            f"{', '.join(f'prune.{name}' for name in info.family.prunable)}, or prune.max_parameters"
        )
    return shape


def cut_info(info: ModelInfo, shape: Shape) -> ModelInfo:
    """What config.json will say of a student of `shape`, whichever layers it keeps; without tensors."""
    config = student_config(info.config, info.family, shape, range(shape.num_hidden_layers))
    return ModelInfo(info.folder, config, info.family, shape, {})


def budget(config: CompressConfig) -> dict[str, float]:
    """The limits that prune.* gives, by key; without any, the shape is the given one."""
    values = {key: getattr(config.prune, key) for key in BUDGET}
    return {key: value for key, value in values.items() if value is not None}


def _limits(config: CompressConfig, info: ModelInfo) -> list[Limit]:
    given = {key: int(value) for key, value in budget(config).items()}
    makers = {
        "max_parameters": parameter_limit,
        "max_non_embedding_parameters": non_embedding_limit,
        "max_active_parameters": active_limit,
    }
    limits = [make(info, given[key]) for key, make in makers.items() if key in given]
    if "max_bytes" in given:
        item_bytes = resolve_dtype(config.export.dtype).itemsize
        context, count = config.shape.context_tokens, config.shape.num_contexts
        limits.append(memory_limit(info, given["max_bytes"], item_bytes, context, count))
    return limits


def grid_of(config: CompressConfig, info: ModelInfo, importance: Importance | None = None) -> Grid:
    """The search's bounds; prune.min_tokens_per_second, which only a measurement can tell, is not among them.

    Greedy scores end somewhere: before scoring that is known from the settings.
    """
    layers = info.shape.num_hidden_layers
    if importance is not None:
        reach = len(importance.depth(config.prune.depth_criterion).removed)
    else:
        chosen = config.prune.depth_criterion or config.score.depth[0]
        wanted, furthest = config.prune.num_hidden_layers, config.score.max_removed_layers
        reach = removal_reach(layers, wanted, furthest) if chosen.is_measured else layers - 1
    return Grid(
        limits=_limits(config, info),
        min_budget_ratio=config.shape.min_budget_ratio,
        multiple_of=config.shape.multiple_of,
        tensor_parallel=config.shape.tensor_parallel,
        max_width_pruning=config.shape.max_width_pruning,
        max_depth_pruning=config.shape.max_depth_pruning,
        max_removed_layers=reach,
        fixed=given_sizes(config),
    )


def importance_of(run_dir: Path, info: ModelInfo) -> Importance:
    """The run's scores, checked against the teacher they must be of."""
    return load_importance(run_dir / "score" / "importance.safetensors", info.shape, fingerprint_path(info.folder))


def winner_of(run_dir: Path, info: ModelInfo) -> Shape:
    """The shape that the search chose."""
    path = run_dir / "search" / SEARCH_REPORT
    found = read_json(path)
    try:
        return with_sizes(info.shape, {name: found["winner"]["sizes"][name] for name in info.family.prunable})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} names no winner ({error}); {remedy_for(path)}") from error


def cut(
    config: CompressConfig,
    run_dir: Path,
    info: ModelInfo,
    importance: Importance,
    kept: Kept,
    folder: Path,
    spill: Path,
) -> Mapping[str, torch.Tensor]:
    """Write the student that keeps `kept` into `folder` (new or empty), with kept.safetensors beside its weights.

    Returns the full-size weights that were cut instead of the teacher's own (prune.compensate, prune.merge_heads). They
    may be mapped from files under `spill`, which the caller removes.
    """
    replaced = _replaced(config, run_dir, info, importance, kept, spill)
    slice_checkpoint(
        info,
        folder,
        kept,
        replaced=replaced,
        max_shard_bytes=largest_layer_bytes(info) if streams(config, info) else MAX_SHARD_BYTES,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    save_tensors(folder / KEPT, dict(kept), {"kept": json.dumps({"format_version": 1, "teacher": asdict(info.shape)})})
    return replaced


def _replaced(
    config: CompressConfig, run_dir: Path, info: ModelInfo, importance: Importance, kept: Kept, spill: Path
) -> Mapping[str, torch.Tensor]:
    if config.prune.compensate:
        return _compensate(config, run_dir, info, kept, spill)
    if config.prune.merge_heads:
        return merged_weights(info, importance.width(config.prune.width_criterion), kept)
    return {}


def _compensate(
    config: CompressConfig, run_dir: Path, info: ModelInfo, kept: Kept, spill: Path
) -> Mapping[str, torch.Tensor]:
    """Full-size replacements of the matrices that read a pruned axis, from one more pass over calibration text."""
    trust, dtype = config.teacher.trust_remote_code, resolve_dtype(config.compute_dtype)
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    size = config.score.micro_batch_size
    count = min(tokens.num_sequences, config.prune.compensate_sequences)
    batches = (tokens.batch(group) for group in tokens.spread(count, size))

    def tracked(steps: Iterable[Any], total: int) -> Iterator[Any]:
        return track(steps, f"compensating on {count} sequences", total, "tok", lambda b: b.input_ids.numel())

    if streams(config, info, moment_bytes(info.shape, kept)):
        return stream_compensated_weights(
            info, dtype, list(batches), kept, spill, trust_remote_code=trust, progress=tracked
        )
    model = load_model(info.folder, dtype, trust)
    model.eval().requires_grad_(False)
    return compensated_weights(model, tracked(batches, -(-count // size)), kept)

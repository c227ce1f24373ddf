"""Stage prune: the student's shape, from settings or a budget, and its Hugging Face folder cut from the teacher's."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.architecture import (
    ModelInfo,
    check_shape,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    with_sizes,
)
from compress.artifacts import building_folder, fingerprint_path, replace_contents, save_tensors, write_json
from compress.compensation import compensated_weights, stream_compensated_weights
from compress.config import CompressConfig
from compress.contract import check_student
from compress.depth import removal_reach
from compress.errors import ConfigError
from compress.families import PRUNABLE, Shape
from compress.folders import read_model
from compress.inputs import streams, teacher_of
from compress.merging import merged_weights
from compress.models import load_model
from compress.parallel import resolve_dtype
from compress.progress import track
from compress.scores import Importance, load_importance
from compress.search import Candidate, Grid, enumerate_shapes, rank
from compress.slicing import MAX_SHARD_BYTES, Kept, largest_layer_bytes, select, slice_checkpoint
from compress.tokens import TokenSet

log = logging.getLogger(__name__)
KEPT = "kept.safetensors"
REPORT = "report.json"
SPILL = ".prune-spill"
NUM_REPORTED = 20  # candidates in the report; the order behind them matters to nobody


def preflight(config: CompressConfig) -> None:
    """Check all that the teacher's headers can tell: family, folder, shape, budget. Reads no weights, writes nothing.

    Raises what `run` would raise for them, before any long work. A student that was pruned elsewhere
    (distill.init_from) needs no shape.
    """
    info = _teacher(config)
    nothing_asked = not (given_sizes(config) or config.prune.removed_layers or config.prune.max_parameters)
    if config.distill.init_from and nothing_asked:
        return
    if config.prune.max_parameters is None:
        _given_shape(config, info)
    else:
        enumerate_shapes(info, _grid(config, info))


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write the student into run_dir/prune: a Hugging Face folder, kept.safetensors and report.json."""
    info = _teacher(config)
    importance = load_importance(
        run_dir / "score" / "importance.safetensors", info.shape, fingerprint_path(info.folder)
    )
    removed, candidates = config.prune.removed_layers, None
    if config.prune.max_parameters is None:
        shape = _given_shape(config, info)
    else:
        shapes = enumerate_shapes(info, _grid(config, info, importance))
        candidates = rank(shapes, importance, info.shape, config.prune.width_criterion, config.prune.depth_criterion)
        shape = candidates[0].shape
        check_shape(info, shape, config.shape.multiple_of)
        log.info("%d legal shapes within the budget; best predicted: %s", len(candidates), _sizes(shape))
    width, depth = config.prune.width_criterion, config.prune.depth_criterion
    kept = select(importance, shape, removed, width=width, depth=depth)
    gone = sorted(set(range(info.shape.num_hidden_layers)) - set(kept["layers"].tolist()))
    building, whole = run_dir / ".prune", not streams(config, info)
    try:
        replaced = _replaced(config, run_dir, info, importance, kept)
        with building_folder(building) as folder:
            slice_checkpoint(
                info,
                folder,
                kept,
                replaced=replaced,
                max_shard_bytes=MAX_SHARD_BYTES if whole else largest_layer_bytes(info),
                trust_remote_code=config.teacher.trust_remote_code,
            )
            save_tensors(
                folder / KEPT, kept, {"kept": json.dumps({"format_version": 1, "teacher": asdict(info.shape)})}
            )
            contract = check_student(folder, info, kept, replaced, config.teacher.trust_remote_code, whole=whole)
            _log_engines(contract["engines"])
            report = _report(config, info, importance, shape, gone, candidates)
            write_json(folder / REPORT, {**report, "contract": contract})
        replace_contents(building, run_dir / "prune")
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(run_dir / SPILL, ignore_errors=True)


def _replaced(
    config: CompressConfig, run_dir: Path, info: ModelInfo, importance: Importance, kept: Kept
) -> Mapping[str, torch.Tensor]:
    """Full-size weights that are cut instead of the teacher's own; none by default."""
    if config.prune.compensate:
        return _compensate(config, run_dir, info, kept)
    if config.prune.merge_heads:
        return merged_weights(info, importance.width(config.prune.width_criterion), kept)
    return {}


def _compensate(config: CompressConfig, run_dir: Path, info: ModelInfo, kept: Kept) -> Mapping[str, torch.Tensor]:
    """Full-size replacements of the matrices that read a pruned axis, from one more pass over calibration text."""
    trust, dtype = config.teacher.trust_remote_code, resolve_dtype(config.compute_dtype)
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    size = config.score.micro_batch_size
    count = min(tokens.num_sequences, config.prune.compensate_sequences)
    batches = (tokens.batch(group) for group in tokens.spread(count, size))

    def tracked(steps: Iterable[Any], total: int) -> Iterator[Any]:
        return track(steps, f"compensating on {count} sequences", total, "tok", lambda b: b.input_ids.numel())

    if streams(config, info):
        spill = run_dir / SPILL
        return stream_compensated_weights(
            info, dtype, list(batches), kept, spill, trust_remote_code=trust, progress=tracked
        )
    model = load_model(info.folder, dtype, trust)
    model.eval().requires_grad_(False)
    return compensated_weights(model, tracked(batches, -(-count // size)), kept)


def _teacher(config: CompressConfig) -> ModelInfo:
    return read_model(teacher_of(config), config.teacher.trust_remote_code)


def given_sizes(config: CompressConfig) -> dict[str, int]:
    """The sizes that prune.* gives; what is open stays out."""
    return {name: getattr(config.prune, name) for name in PRUNABLE if getattr(config.prune, name) is not None}


def _given_shape(config: CompressConfig, info: ModelInfo) -> Shape:
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
    check_shape(info, shape, config.shape.multiple_of)
    if shape == info.shape:
        raise ConfigError(
            "prune.* leaves the teacher as it is; set one of "
            f"{', '.join(f'prune.{name}' for name in info.family.prunable)}, or prune.max_parameters"
        )
    return shape


def _grid(config: CompressConfig, info: ModelInfo, importance: Importance | None = None) -> Grid:
    """The search's bounds. Greedy scores end somewhere: before scoring that is known from the settings."""
    assert config.prune.max_parameters is not None
    layers = info.shape.num_hidden_layers
    if importance is not None:
        reach = len(importance.depth(config.prune.depth_criterion).removed)
    else:
        chosen = config.prune.depth_criterion or config.score.depth[0]
        wanted, furthest = config.prune.num_hidden_layers, config.score.max_removed_layers
        reach = removal_reach(layers, wanted, furthest) if chosen.is_measured else layers - 1
    return Grid(
        max_parameters=int(config.prune.max_parameters),
        min_parameters_ratio=config.shape.min_parameters_ratio,
        multiple_of=config.shape.multiple_of,
        max_width_pruning=config.shape.max_width_pruning,
        max_depth_pruning=config.shape.max_depth_pruning,
        max_removed_layers=reach,
        fixed=given_sizes(config),
    )


def _log_engines(engines: dict[str, dict[str, Any]]) -> None:
    for engine in engines.values():
        reason = f": {'; '.join(engine['why'])}" if engine["why"] else ""
        log.info("sizes for %s: %s%s", engine["title"], engine["runs"], reason)


def _sizes(shape: Shape) -> str:
    return " ".join(f"{name}={getattr(shape, name)}" for name in PRUNABLE if getattr(shape, name))


def _report(
    config: CompressConfig,
    info: ModelInfo,
    importance: Importance,
    shape: Shape,
    removed: Sequence[int],
    candidates: Sequence[Candidate] | None,
) -> dict[str, Any]:
    before, after = num_parameters(info, info.shape), num_parameters(info, shape)
    report: dict[str, Any] = {
        "family": info.family.model_type,
        "teacher": {**asdict(info.shape), "num_parameters": before},
        "student": {**asdict(shape), "num_parameters": after},
        "kept_parameters_ratio": after / before,
        "num_embedding_parameters": num_embedding_parameters(info, shape),
        "num_active_parameters": num_active_parameters(info, shape),
        "removed_layers": list(removed),
        "compensated": config.prune.compensate,
        "merged_heads": config.prune.merge_heads,
        "width_criterion": config.prune.width_criterion or next(iter(importance.widths)),
        "choices": _choices(config, info, importance, shape, candidates is not None),
    }
    if candidates is not None:
        report["max_parameters"] = int(config.prune.max_parameters or 0)
        report["num_candidates"] = len(candidates)
        report["candidates"] = [
            {
                **{name: getattr(candidate.shape, name) for name in PRUNABLE},
                "num_parameters": candidate.num_parameters,
                "predicted_damage": candidate.damage,
                "damage_of": dict(candidate.parts),
            }
            for candidate in candidates[:NUM_REPORTED]
        ]
    return report


def _choices(
    config: CompressConfig, info: ModelInfo, importance: Importance, shape: Shape, searched: bool
) -> dict[str, str]:
    """For each size, where it comes from, and for the layers, by what they were chosen."""
    given = given_sizes(config)
    choices = {}
    for name in info.family.prunable:
        value, teacher = getattr(shape, name), getattr(info.shape, name)
        if name in given:
            choices[name] = f"given: prune.{name}={value}"
        elif searched:
            choices[name] = f"best predicted within prune.max_parameters={config.prune.max_parameters:,.0f}"
        else:
            choices[name] = "the teacher's"
        widths = ("hidden_size", "intermediate_size", "moe_intermediate_size")
        if searched and name in widths and name not in given and value != teacher:
            choices[name] += f", a multiple of shape.multiple_of={config.shape.multiple_of}"
        if name == "hidden_size" and info.family.hidden_divisible_by_heads and value != teacher:
            choices[name] += (
                f"; divisible by num_attention_heads={shape.num_attention_heads} as {info.family.title} asks"
            )
    if config.prune.removed_layers is not None:
        choices["num_hidden_layers"] = f"given: prune.removed_layers={config.prune.removed_layers}"
    elif shape.num_hidden_layers != info.shape.num_hidden_layers:
        by = config.prune.depth_criterion or next(iter(importance.depths))
        choices["num_hidden_layers"] += f"; layers removed by {by}"
    return choices

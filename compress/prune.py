"""Stage prune: the student's shape, from settings or a budget, and its Hugging Face folder cut from the teacher's."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.adapters import read_adapter, slice_adapter
from compress.architecture import (
    ModelInfo,
    check_shape,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
)
from compress.artifacts import building_folder, replace_contents, write_json
from compress.contract import check_student, log_engines
from compress.families import PRUNABLE, Shape
from compress.folders import read_model
from compress.inputs import source_of, streams
from compress.scores import Importance
from compress.settings import CompressConfig
from compress.shapes import HEADS, Candidate, enumerate_shapes, rank
from compress.slicing import select
from compress.targets import (
    ADAPTERS,
    budget,
    cut,
    cut_info,
    given_shape,
    given_sizes,
    grid_of,
    importance_of,
    winner_of,
)

log = logging.getLogger(__name__)
REPORT = "report.json"
MLP_SIZES = ("intermediate_size", "moe_intermediate_size")
NUM_REPORTED = 20  # candidates in the report; the order behind them matters to nobody


def preflight(config: CompressConfig) -> None:
    """Check all that the teacher's headers can tell: family, folder, shape, budget. Reads no weights, writes nothing.

    Raises what `run` would raise for them, before any long work. A student that was pruned elsewhere
    (distill.init_from) needs no shape.
    """
    info = read_model(source_of(config), config.teacher.trust_remote_code)
    if config.distill.init_from and not (given_sizes(config) or config.prune.removed_layers or budget(config)):
        return
    preflight_of(config, info)


def preflight_of(config: CompressConfig, info: ModelInfo) -> ModelInfo:
    """The same for the model `info`; returns what is known of the student: `info` itself before a search."""
    for adapter in config.prune.adapters:
        read_adapter(Path(adapter).expanduser(), info)
    if not budget(config):
        return cut_info(info, given_shape(config, info))
    grid = grid_of(config, info)
    if grid.limits:
        enumerate_shapes(info, grid)
    return info


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write the student into run_dir/prune: a Hugging Face folder, kept.safetensors and report.json."""
    info = read_model(source_of(config), config.teacher.trust_remote_code)
    importance = importance_of(run_dir, info)
    width, depth = config.prune.width_criterion, config.prune.depth_criterion
    candidates = None
    if config.search.num_candidates:
        shape = winner_of(run_dir, info)
    elif budget(config):
        candidates = rank(
            enumerate_shapes(info, grid_of(config, info, importance)), importance, info.shape, width, depth
        )
        shape = candidates[0].shape
        log.info("%d legal shapes within the budget; best predicted: %s", len(candidates), _sizes(shape))
    else:
        shape = given_shape(config, info)
    check_shape(info, shape, config.shape.multiple_of, config.shape.tensor_parallel)
    kept = select(importance, shape, config.prune.removed_layers, width=width, depth=depth)
    gone = sorted(set(range(info.shape.num_hidden_layers)) - set(kept["layers"].tolist()))
    building, spill, whole = run_dir / ".prune", run_dir / ".prune-spill", not streams(config, info)
    try:
        with building_folder(building) as folder:
            replaced = cut(config, run_dir, info, importance, kept, folder, spill)
            for adapter in map(Path, config.prune.adapters):
                slice_adapter(adapter.expanduser(), folder / ADAPTERS / adapter.name, info, kept)
            contract = check_student(folder, info, kept, replaced, config.teacher.trust_remote_code, whole=whole)
            log_engines(contract)
            report = _report(config, info, importance, shape, gone, candidates)
            write_json(folder / REPORT, {**report, "contract": contract})
        replace_contents(building, run_dir / "prune")
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(spill, ignore_errors=True)


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
        "choices": _choices(config, info, importance, shape),
    }
    if candidates is not None:
        report["budget"] = budget(config)
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


def _choices(config: CompressConfig, info: ModelInfo, importance: Importance, shape: Shape) -> dict[str, str]:
    """For each size, where it comes from, and for the layers, by what they were chosen."""
    given = given_sizes(config)
    limits = " and ".join(f"prune.{key}={value:,.0f}" for key, value in budget(config).items())
    searched = bool(limits)
    found = "best of the search" if config.search.num_candidates else "best predicted"
    choices = {}
    for name in info.family.prunable:
        if name in given:
            choices[name] = f"given: prune.{name}={given[name]}"
        elif searched:
            choices[name] = f"{found} within {limits}"
        else:
            choices[name] = "the teacher's"
        roundings = _roundings(config, info, shape, name, chosen=searched and name not in given)
        choices[name] = "; ".join((choices[name], *roundings))
    if config.prune.removed_layers is not None:
        choices["num_hidden_layers"] = f"given: prune.removed_layers={config.prune.removed_layers}"
    elif shape.num_hidden_layers != info.shape.num_hidden_layers:
        by = config.prune.depth_criterion or next(iter(importance.depths))
        choices["num_hidden_layers"] += f"; layers removed by {by}"
    return choices


def _roundings(config: CompressConfig, info: ModelInfo, shape: Shape, name: str, chosen: bool) -> list[str]:
    """The rules that a size was rounded by; `chosen`: the budget's search chose it, so that it keeps to shape.* too."""
    family, tensor_parallel, value = info.family, config.shape.tensor_parallel, getattr(shape, name)
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    changed = value != getattr(info.shape, name)
    rules = []
    if chosen and changed and name in (*MLP_SIZES, "hidden_size"):
        rules.append(f"a multiple of shape.multiple_of={config.shape.multiple_of}")
    if changed and name == "num_attention_heads" and "num_key_value_heads" in family.prunable:
        rules.append(f"heads per group: {shape.group_size} for each of num_key_value_heads={groups}")
    if chosen and tensor_parallel > 1 and name in (*MLP_SIZES, *HEADS):  # what `uneven_size` checks
        shared = f"shape.tensor_parallel={tensor_parallel} ranks"
        even = value % tensor_parallel == 0
        rules.append(
            f"shared evenly by {shared}" if even else f"each copied to {tensor_parallel // groups} of {shared}"
        )
    if changed and name == "hidden_size" and family.hidden_divisible_by_heads:
        rules.append(f"divisible by num_attention_heads={heads} as {family.title} asks")
    return rules

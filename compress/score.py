"""Stage score: importance of every prunable unit by the criteria asked for, from the same calibration text."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from compress.architecture import ModelInfo
from compress.artifacts import fingerprint_path, free_disk_bytes, write_json
from compress.criteria import AGGREGATED, Criterion, parse_criterion
from compress.depth import rank_layers, rank_layers_by_task, removal_reach
from compress.devices import device_of, set_attention
from compress.errors import ArtifactError, ConfigError
from compress.folders import read_model
from compress.gradients import estimate_taylor, weight_magnitude
from compress.importance import estimate_importance, stream_importance
from compress.inputs import (
    check_calibration,
    check_device,
    sequences_scored,
    source_of,
    streams,
    task_items,
    whole_bytes,
)
from compress.models import load_tokenizer
from compress.multiple_choice import encode_choices
from compress.parallel import Ranks, agreed_dtype, free_bytes, joined, resolve_dtype
from compress.progress import console, track
from compress.recommendation import compare_criteria
from compress.scores import Importance, LayerRemovals, by_similarity, rank_correlation, save_importance
from compress.settings import CompressConfig, ComputeDtype, DepthCriterion
from compress.shapes import enumerate_shapes, rank
from compress.streaming import load_on
from compress.targets import budget, given_shape, given_sizes, grid_of
from compress.tokens import TokenBatch, TokenSet

log = logging.getLogger(__name__)
IMPORTANCE = "importance.safetensors"
REPORT = "report.json"
# Lazy greedy. On SmolLM2-135M (8 layers, 4x256 tokens): 87 trials instead of 212 and the same layers in the same order;
# at 0.7 it was 51 trials, and one layer another (KL 0.895 instead of 0.865 once it was gone).
SKIP_SHARE = 0.5


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write score/importance.safetensors and score/report.json. Raises ConfigError when there is too little text.

    Under torchrun every rank calls it and takes its share of the calibration set; the first one writes.
    """
    device = device_of(config.cluster.device)
    with joined() as ranks:
        # What each would measure by itself must be one answer for all.
        dtype = str(agreed_dtype(config.compute_dtype, ranks, device)).removeprefix("torch.")
        info = read_model(source_of(config), config.teacher.trust_remote_code)
        scoring = replace(
            config.score,
            stream=ranks.agree(str(streams(config, info, device=device))) == "True",
            compile=config.score.compile and device.type == "cpu",  # the kernels are for CPUs
        )
        _run(replace(config, compute_dtype=ComputeDtype(dtype), score=scoring), run_dir, ranks, device)


def _run(config: CompressConfig, run_dir: Path, ranks: Ranks, device: torch.device) -> None:
    trust = config.teacher.trust_remote_code
    info = read_model(source_of(config), trust)
    tokens = _calibration(config, run_dir, info, ranks)
    criteria = [parse_criterion(text) for text in config.score.width]
    _check_memory(config, info, device)  # what is free has changed since preflight
    started = time.monotonic()
    model = None
    if streams(config, info):
        importance = _streamed(config, run_dir, info, tokens, criteria, ranks, device)
    else:
        dtype = resolve_dtype(config.compute_dtype)
        model = load_on(device, info.folder, dtype, trust)
        set_attention(model, device, dtype, config, "score")
        importance = _activations(config, model, tokens, criteria, ranks)
    seconds = {"activation": time.monotonic() - started}
    widths = dict(importance.widths)
    for criterion in criteria:
        began = time.monotonic()
        if criterion.kind == "taylor":
            assert model is not None  # preflight
            widths[str(criterion)] = estimate_taylor(model, _tracked(config, tokens, "taylor", device), ranks)
        elif criterion.kind == "weight_magnitude":
            widths[str(criterion)] = weight_magnitude(info)
        else:
            continue
        seconds[str(criterion)] = time.monotonic() - began
    depths, facts = {}, {}
    for depth in config.score.depth:
        began = time.monotonic()
        depths[str(depth)], facts[str(depth)] = _depth(config, info, model, tokens, importance, depth, ranks)
        seconds[str(depth)] = time.monotonic() - began
    # In the order of the settings: the first of each is what pruning goes by when it isn't told.
    importance = replace(importance, widths={str(c): widths[str(c)] for c in criteria}, depths=depths)
    if not ranks.is_main:
        return
    save_importance(run_dir / "score" / IMPORTANCE, importance, fingerprint_path(info.folder))
    agreement = {axis: _agreement(importance, axis) for axis in importance.width()}
    report: dict[str, Any] = {
        "num_sequences": importance.num_sequences,
        "num_tokens": importance.num_tokens,
        "block_influence": importance.block_influence_L.tolist(),
        "width_criteria": list(importance.widths),
        "rank_correlation": agreement,
        "overlap_of_removed_layers": _overlap(depths, info.shape.num_hidden_layers),
        "depth": {name: {"removed": d.removed, "cost": d.cost, **facts[name]} for name, d in depths.items()},
        "seconds": seconds,
    }
    for name, found in depths.items():
        if found.removed:
            log.info("depth by %s: layers %s (%.3f)", name, found.of(len(found.removed)), found.cost[-1])
    if len(criteria) + len(depths) > 2:
        if model is not None:
            report["recommendation"] = _recommendation(config, info, model, tokens, importance)
        console.print(table(report))
    write_json(run_dir / "score" / REPORT, report)


def preflight(config: CompressConfig) -> None:
    """Raise ConfigError for criteria that this teacher, these settings or the device can't give. Reads no weights."""
    check_device(config, "score")
    device = device_of(config.cluster.device)
    info = read_model(source_of(config), config.teacher.trust_remote_code)
    _check_memory(config, info, device)
    if streams(config, info, device=device):
        _check_spill(config, info, device)
    for criterion in config.score.depth:
        if criterion.is_measured:
            _reach(config, info)
    if any(criterion.startswith("task") for criterion in config.score.depth):
        task_items(config)


def _check_memory(config: CompressConfig, info: ModelInfo, device: torch.device) -> None:
    """Raise ConfigError for criteria that need the whole teacher, or states of it, where there isn't the memory."""
    weights, free = whole_bytes(config, info, device), free_bytes(device)
    item = resolve_dtype(config.compute_dtype, device).itemsize
    states = config.score.depth_sequences * config.data.sequence_length * info.shape.hidden_size * item
    states *= info.shape.num_hidden_layers
    measured = [str(criterion) for criterion in config.score.depth if criterion.is_measured]
    larger = "" if device.type == "cpu" else ", or cluster.device=cpu where the machine's own memory is larger"
    if streams(config, info, device=device):
        whole = [text for text in config.score.width if parse_criterion(text).kind == "taylor"]
        whole += [str(c) for c in config.score.depth if c is not DepthCriterion.block_influence]
        if whole:
            beside = f" and {states / 1e9:.1f} GB of hidden states" if measured else ""
            raise ConfigError(
                f"{', '.join(whole)}: needs the whole teacher in memory, {weights / 1e9:.1f} GB of weights{beside}, "
                f"and {free / 1e9:.1f} GB are free (score.stream={config.score.stream}); choose activation, "
                "weighted_activation, weight_magnitude and block_influence, or set score.stream=false on a larger "
                f"machine{larger}"
            )
    elif "score.depth_sequences" in sequences_scored(config) and weights + states > free:
        raise ConfigError(
            f"{', '.join(measured)}: keeps the hidden states of score.depth_sequences={config.score.depth_sequences} "
            f"sequences before every layer, {states / 1e9:.1f} GB beside {weights / 1e9:.1f} GB of weights, and "
            f"{free / 1e9:.1f} GB are free; lower score.depth_sequences, or choose block_influence{larger}"
        )


def _check_spill(config: CompressConfig, info: ModelInfo, device: torch.device) -> None:
    """Raise ArtifactError where the calibration text's hidden states, which streaming keeps on disk, don't fit."""
    run_dir = Path(config.run_dir).expanduser()
    item = resolve_dtype(config.compute_dtype, device).itemsize
    sequence = config.data.sequence_length * info.shape.hidden_size * item
    needed, free = config.score.num_sequences * sequence, free_disk_bytes(run_dir)
    if needed > free:
        raise ArtifactError(
            f"{run_dir / '.score-spill-0'}: the hidden states of the calibration text take {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; lower score.num_sequences={config.score.num_sequences}, or set run_dir= to "
            "a larger disk"
        )


def _recommendation(
    config: CompressConfig, info: ModelInfo, model: PreTrainedModel, tokens: TokenSet, importance: Importance
) -> dict[str, Any]:
    """What the model that each criterion would leave loses, at the shape that prune.* asks for."""
    if budget(config):
        grid = grid_of(config, info, importance)
        shapes = enumerate_shapes(info, grid) if grid.limits else []
        criteria = config.prune.width_criterion, config.prune.depth_criterion
        shape = rank(shapes, importance, info.shape, *criteria)[0].shape if shapes else info.shape
    elif given_sizes(config) or config.prune.removed_layers:
        shape = given_shape(config, info)
    else:  # scored for another run's pruning
        shape = info.shape
    batches = [tokens.batch(group).to(model.device) for group in _unseen(config, tokens)]
    count = sum(len(batch.input_ids) for batch in batches)

    def progress(trials: Iterator[str], total: int) -> Iterator[str]:
        return track(trials, f"comparing criteria on {count} sequences", total, "criterion")

    found = compare_criteria(model, batches, importance, info.shape, shape, progress)
    for axis, key in (("width", "prune.width_criterion"), ("depth", "prune.depth_criterion")):
        if found[axis]["best"]:
            log.info("recommended: %s=%s, KL %.4f untrained", key, found[axis]["best"], min(found[axis]["kl"].values()))
    return found


def _unseen(config: CompressConfig, tokens: TokenSet) -> list[list[int]]:
    """As many sequences as removals were measured on, but others, where there are others.

    A criterion that chose layers by the KL on a text is its text's favourite.
    """
    size, count = config.score.micro_batch_size, min(tokens.num_sequences, config.score.depth_sequences)
    seen = {index for group in tokens.spread(count, size) for index in group}
    others = [index for index in range(tokens.num_sequences) if index not in seen] or sorted(seen)
    chosen = [others[place * len(others) // count] for place in range(min(count, len(others)))]
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def _batches(tokens: TokenSet, num_sequences: int, micro_batch_size: int, device: torch.device) -> Iterator[TokenBatch]:
    """That many sequences, evenly spread over all calibration sources, a micro-batch at a time."""
    return (tokens.batch(group).to(device) for group in tokens.spread(num_sequences, micro_batch_size))


def _tracked(config: CompressConfig, tokens: TokenSet, what: str, device: torch.device) -> Iterator[TokenBatch]:
    """score.num_sequences of calibration text, with a progress bar."""
    count, size = config.score.num_sequences, config.score.micro_batch_size
    return track(
        _batches(tokens, count, size, device),
        f"scoring {count} sequences, {what}",
        -(-count // size),
        "tok",
        lambda batch: batch.input_ids.numel(),
    )


def _calibration(config: CompressConfig, run_dir: Path, info: ModelInfo, ranks: Ranks) -> TokenSet:
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    if tokens.vocab_size > info.shape.vocab_size:
        raise ConfigError(
            f"{run_dir / 'tokens'} has token ids up to {tokens.vocab_size - 1}, the teacher's vocab_size is "
            f"{info.shape.vocab_size}; tokenize again with this teacher's tokenizer"
        )
    check_calibration(config, tokens)
    for key, count in sequences_scored(config).items():
        groups = -(-count // config.score.micro_batch_size)
        if groups < ranks.size:
            raise ConfigError(
                f"WORLD_SIZE={ranks.size}: {key}={count} in micro-batches of score.micro_batch_size="
                f"{config.score.micro_batch_size} gives work to {groups} ranks only; start fewer, or make the "
                "micro-batches smaller"
            )
    return tokens


def _listened(criteria: Sequence[Criterion]) -> list[str]:
    """The criteria of the forward pass, which runs for block influence also where none of them is asked for."""
    return [str(criterion) for criterion in criteria if criterion.kind in AGGREGATED] or ["activation"]


def _activations(
    config: CompressConfig, model: PreTrainedModel, tokens: TokenSet, criteria: Sequence[Criterion], ranks: Ranks
) -> Importance:
    """One forward pass."""
    similarity = DepthCriterion.block_cosine in config.score.depth
    batches = _tracked(config, tokens, "activations", model.device)
    return estimate_importance(
        model, batches, _listened(criteria), similarity=similarity, ranks=ranks, compile=config.score.compile
    )


def _streamed(
    config: CompressConfig,
    run_dir: Path,
    info: ModelInfo,
    tokens: TokenSet,
    criteria: Sequence[Criterion],
    ranks: Ranks,
    device: torch.device,
) -> Importance:
    """The same scores with one layer in memory at a time, the hidden states in a file of the run folder."""
    dtype = resolve_dtype(config.compute_dtype)
    batches = list(_batches(tokens, config.score.num_sequences, config.score.micro_batch_size, device))
    spill = run_dir / f".score-spill-{ranks.rank}"
    try:
        return stream_importance(
            info,
            dtype,
            batches,
            _listened(criteria),
            spill=spill,
            ranks=ranks,
            compile=config.score.compile,
            device=device,
            prepare=lambda model: set_attention(model, device, dtype, config, "score"),
            trust_remote_code=config.teacher.trust_remote_code,
            progress=lambda steps, total: track(
                steps, f"scoring {config.score.num_sequences} sequences, a layer at a time", total, "tok",
                lambda batch: batch.input_ids.numel(),
            ),
        )  # fmt: skip
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _reach(config: CompressConfig, info: ModelInfo) -> int:
    return removal_reach(info.shape.num_hidden_layers, config.prune.num_hidden_layers, config.score.max_removed_layers)


def _depth(
    config: CompressConfig,
    info: ModelInfo,
    model: PreTrainedModel | None,
    tokens: TokenSet,
    importance: Importance,
    criterion: DepthCriterion,
    ranks: Ranks,
) -> tuple[LayerRemovals, dict[str, Any]]:
    """What to remove by one criterion, and what the report says of how it was found."""
    if criterion is DepthCriterion.block_influence:
        return importance.depths["block_influence"], {}
    if criterion is DepthCriterion.block_cosine:
        assert importance.similarity_SS is not None
        return by_similarity(importance.similarity_SS), {}
    reach = _reach(config, info)
    assert model is not None  # preflight

    def progress(trials: Iterator[Any], total: int) -> Iterator[Any]:
        return track(trials, f"removing {reach} layers by {criterion}", total, "trial")

    if criterion.startswith("task"):
        tokenizer = load_tokenizer(info.folder, config.teacher.trust_remote_code)
        items = task_items(config)
        found = encode_choices(tokenizer, items, config.score.micro_batch_size, config.data.sequence_length)
        there = [batch.to(model.device) for batch in found.batches]
        removal = rank_layers_by_task(
            model, there, found.choice_of_row, found.item_of_choice, found.right, reach, criterion, progress=progress
        )  # fmt: skip
        return removal, {"num_trials": removal.num_trials, "num_items": len(items)}
    batches = list(_batches(tokens, config.score.depth_sequences, config.score.micro_batch_size, model.device))
    removal = rank_layers(model, batches, reach, criterion, skip_share=SKIP_SHARE, progress=progress, ranks=ranks)
    return removal, {"num_trials": removal.num_trials, "num_sequences": config.score.depth_sequences}


def _agreement(importance: Importance, axis: str) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of every two criteria, mean over layers."""
    scores = {name: widths[axis] for name, widths in importance.widths.items()}
    return {
        one: {other: float(rank_correlation(scores[one], scores[other]).mean()) for other in scores if other != one}
        for one in scores
    }


def _overlap(depths: Mapping[str, LayerRemovals], num_layers: int) -> dict[str, dict[str, float]]:
    """Of every two criteria, the share of the layers that both remove, at half of all layers or as far as both go."""
    found: dict[str, dict[str, float]] = {one: {} for one in depths}
    for one, other in itertools.permutations(depths, 2):
        count = min(len(depths[one].removed), len(depths[other].removed), num_layers // 2)
        if count:
            found[one][other] = len(set(depths[one].of(count)) & set(depths[other].of(count))) / count
    return found


def table(report: dict[str, Any]) -> Table:
    """The criteria side by side: what each would leave untrained, and how far it agrees with the first one."""
    result = Table(title="criteria", title_justify="left")
    result.add_column("criterion")
    result.add_column("KL, nats/token", justify="right")
    result.add_column("agrees with the first on (rank correlation), or removes")
    axes, advice = report["rank_correlation"], report.get("recommendation")

    def kl(axis: str, name: str) -> str:
        value = advice[axis]["kl"].get(name) if advice else None
        if advice is None or value is None:
            return "-"
        return f"[bold]{value:.4f}[/bold]" if name == advice[axis]["best"] else f"{value:.4f}"

    first = report["width_criteria"][0]
    result.add_row(first, kl("width", first), "(the first)")
    for name in report["width_criteria"][1:]:
        found = {axis: row[first][name] for axis, row in axes.items()}
        agreement = ", ".join(f"{axis} {value:.2f}" for axis, value in found.items())
        result.add_row(name, kl("width", name), agreement)
    overlap = report["overlap_of_removed_layers"]
    first_depth = next(iter(overlap))
    for name, found in report["depth"].items():
        if found["removed"]:
            shared = overlap[first_depth].get(name)
            agreement = "" if shared is None else f"; {shared:.0%} of them as {first_depth}"
            layers = f"layers {sorted(found['removed'][-1])}: {found['cost'][-1]:.4f}"
            result.add_row(name, kl("depth", name), layers + agreement)
    if advice:
        sizes = ", ".join(f"{size}={value}" for size, value in advice["width"]["sizes"].items() if value)
        result.caption = (
            f"KL to the teacher of the untrained model that each leaves, on {advice['num_tokens']:,} tokens: widths at "
            f"{sizes} with every layer, layers at num_hidden_layers={advice['depth']['num_hidden_layers']}"
        )
    return result

"""Stage score: importance of every prunable unit on calibration text, and with depth=greedy_kl the order of layers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.architecture import ModelInfo
from compress.artifacts import fingerprint_path, write_json
from compress.config import CompressConfig, DepthCriterion
from compress.depth import LayerRemoval, greedy_layer_removal, removal_reach
from compress.errors import ConfigError
from compress.folders import read_model
from compress.importance import estimate_importance, save_importance
from compress.inputs import check_calibration, teacher_of
from compress.models import load_model
from compress.parallel import resolve_dtype
from compress.progress import track
from compress.tokens import TokenBatch, TokenSet

log = logging.getLogger(__name__)
IMPORTANCE = "importance.safetensors"
REPORT = "report.json"
# Lazy greedy. On SmolLM2-135M (8 layers, 4x256 tokens): 87 trials instead of 212 and the same layers in the same order;
# at 0.7 it was 51 trials, and one layer another (KL 0.895 instead of 0.865 once it was gone).
SKIP_SHARE = 0.5


def _batches(tokens: TokenSet, num_sequences: int, micro_batch_size: int) -> Iterator[TokenBatch]:
    """That many sequences, evenly spread over all calibration sources, a micro-batch at a time."""
    return (tokens.batch(group) for group in tokens.spread(num_sequences, micro_batch_size))


def _calibration(config: CompressConfig, run_dir: Path, info: ModelInfo) -> TokenSet:
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    if tokens.vocab_size > info.shape.vocab_size:
        raise ConfigError(
            f"{run_dir / 'tokens'} has token ids up to {tokens.vocab_size - 1}, the teacher's vocab_size is "
            f"{info.shape.vocab_size}; tokenize again with this teacher's tokenizer"
        )
    check_calibration(config, tokens)
    return tokens


def _greedy(config: CompressConfig, info: ModelInfo, model: PreTrainedModel, tokens: TokenSet) -> LayerRemoval | None:
    """None when depth isn't measured so, or the layers to remove are given by hand."""
    if config.score.depth != DepthCriterion.greedy_kl or config.prune.removed_layers is not None:
        return None
    num_remove = removal_reach(
        info.shape.num_hidden_layers, config.prune.num_hidden_layers, config.score.max_removed_layers
    )
    if num_remove == 0:
        return None
    return greedy_layer_removal(
        model,
        list(_batches(tokens, config.score.greedy_sequences, config.score.micro_batch_size)),
        num_remove,
        skip_share=SKIP_SHARE,
        progress=lambda trials, total: track(trials, f"removing {num_remove} layers by KL", total, "trial"),
    )


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write score/importance.safetensors and score/report.json. Raises ConfigError when there is too little text."""
    folder = teacher_of(config)
    info = read_model(folder, config.teacher.trust_remote_code)
    tokens = _calibration(config, run_dir, info)
    model = load_model(folder, resolve_dtype(config.compute_dtype), config.teacher.trust_remote_code)
    model.eval().requires_grad_(False)
    size = config.score.micro_batch_size
    batches = -(-config.score.num_sequences // size)
    started = time.monotonic()
    importance = estimate_importance(
        model,
        track(
            _batches(tokens, config.score.num_sequences, size),
            f"scoring {config.score.num_sequences} sequences",
            batches,
            "tok",
            lambda batch: batch.input_ids.numel(),
        ),
        sequence_aggregation=config.score.sequence_aggregation.value,
        batch_aggregation=config.score.batch_aggregation.value,
        weighted=config.score.weighted,
    )
    scored = time.monotonic()
    removal = _greedy(config, info, model, tokens)
    if removal is not None:
        importance = replace(importance, removal_order=torch.tensor(removal.order), removal_kl=torch.tensor(removal.kl))
    save_importance(run_dir / "score" / IMPORTANCE, importance, fingerprint_path(folder))
    report: dict[str, Any] = {
        "num_sequences": importance.num_sequences,
        "num_tokens": importance.num_tokens,
        "sequence_aggregation": importance.sequence_aggregation,
        "batch_aggregation": importance.batch_aggregation,
        "weighted": config.score.weighted,
        "block_influence": importance.block_influence_L.tolist(),
        "importance_seconds": scored - started,
    }
    if removal is not None:
        report["greedy"] = {
            "removed_layers": removal.order,
            "kl_nats_per_token": removal.kl,
            "num_trials": removal.num_trials,
            "num_sequences": config.score.greedy_sequences,
            "seconds": time.monotonic() - scored,
        }
        steps = zip(removal.order, removal.kl, strict=True)
        log.info("layers by KL once they are gone: %s", ", ".join(f"{layer} ({kl:.3f})" for layer, kl in steps))
    write_json(run_dir / "score" / REPORT, report)

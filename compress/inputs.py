"""Where a run's models lie, and whether its calibration text is enough: what several stages ask first."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from compress.architecture import ModelInfo, num_parameters
from compress.artifacts import fingerprint_path, open_tensors
from compress.devices import CPU, device_of, set_attention
from compress.embedded import resolve
from compress.errors import ConfigError
from compress.folders import read_model, teacher_folder, tokenizer_fingerprint, weights_fingerprint
from compress.models import empty_model
from compress.multiple_choice import Item, read_items
from compress.parallel import free_bytes, resolve_dtype
from compress.settings import CacheKind, CompressConfig
from compress.signals import Form, SignalCache
from compress.tokens import Ints, TokenSet

KEPT = "kept.safetensors"  # beside a pruned student's weights: what of its teacher it is
CORRECTED = Path("correct", "export")  # under run_dir
MEMORY_SHARE = 0.7  # of what is free may be weights; the rest is activations and the system's


def teacher_of(config: CompressConfig, config_only: bool = False) -> Path:
    """The teacher's local folder. Raises ArtifactError or ConfigError as `folders.teacher_folder` does."""
    teacher = config.teacher
    cache = Path(config.cache_dir).expanduser()
    return teacher_folder(teacher.path, teacher.revision, cache, teacher.trust_remote_code, config_only)


def learned_from(config: CompressConfig, run_dir: Path) -> Path:
    """The teacher that is distilled from: the corrected one where stage correct has made one."""
    corrected = run_dir / CORRECTED
    return corrected if config.correct.num_tokens is not None and corrected.is_dir() else teacher_of(config)


def source_of(config: CompressConfig) -> Path:
    """The model that is scored and pruned: prune.source, such as an earlier round's student, or the teacher itself."""
    return Path(config.prune.source).expanduser() if config.prune.source else teacher_of(config)


def student_of(config: CompressConfig, run_dir: Path) -> Path:
    """The untrained student: distill.init_from, one pruned elsewhere, or else this run's own."""
    elsewhere = config.distill.init_from
    return Path(elsewhere).expanduser() if elsewhere else run_dir / "prune"


def start_of(config: CompressConfig, run_dir: Path) -> Path:
    """The weights that distill starts from: the untrained student, or the search's winner, a little trained."""
    return run_dir / "search" / "winner" if config.search.continue_winner else student_of(config, run_dir)


def kept_channels(config: CompressConfig, run_dir: Path) -> Tensor | None:
    """Which of the teacher's hidden channels this run's own pruning has kept (D',); None where it isn't known."""
    path = run_dir / "prune" / KEPT
    if config.distill.init_from or config.prune.source or not path.exists():
        return None
    kept_D: Tensor = open_tensors(path).get_tensor("hidden")
    return kept_D.long()


def cached_from(config: CompressConfig, run_dir: Path) -> dict[str, str]:
    """Fingerprints of what a cache of the teacher's word is made from."""
    teacher = learned_from(config, run_dir)
    return {
        "teacher": weights_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(teacher),
        "tokens": fingerprint_path(run_dir / "tokens" / "train"),
    }


def open_cache(config: CompressConfig, run_dir: Path, drawn: Ints) -> SignalCache:
    """The run's cache. Raises ArtifactError unless it is whole, of this teacher and text, and has what is `drawn`."""
    cache = SignalCache(run_dir / "cache")
    cache.check(cached_from(config, run_dir), drawn)
    return cache


def check_device(config: CompressConfig, stage: str) -> None:
    """Raise ConfigError for a device that isn't here, or whose attention can't do with sequences as long as these."""
    device = device_of(config.cluster.device)
    if device.type != "cpu":
        teacher = empty_model(teacher_of(config), torch.float32, config.teacher.trust_remote_code)
        set_attention(teacher, device, resolve_dtype(config.compute_dtype, device), config, stage)


def streams(
    config: CompressConfig, info: ModelInfo, beside: int = 0, copies: float | None = None, device: torch.device = CPU
) -> bool:
    """Whether scoring and pruning take the teacher a layer at a time: as score.stream says, else when they must.

    `beside`: bytes that the work at hand holds beside the weights. `copies` of both in the device's memory; None: one
    for each rank of this machine, or on the GPU that each has.
    """
    if config.score.stream is not None:
        return config.score.stream
    if copies is None:
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return copies * (whole_bytes(config, info, device) + beside) > MEMORY_SHARE * free_bytes(device)


def whole_bytes(config: CompressConfig, info: ModelInfo, device: torch.device = CPU) -> int:
    """Memory of a model's weights in the compute dtype of a device."""
    return num_parameters(info, info.shape) * resolve_dtype(config.compute_dtype, device).itemsize


def sequences_scored(config: CompressConfig) -> dict[str, int]:
    """How many calibration sequences the criteria are taken on, by the setting that says so."""
    found = {"score.num_sequences": config.score.num_sequences}
    if any(criterion.is_measured and not criterion.startswith("task") for criterion in config.score.depth):
        found["score.depth_sequences"] = config.score.depth_sequences
    return found


def check_calibration(config: CompressConfig, tokens: TokenSet) -> None:
    """Raise ConfigError when the calibration set has fewer sequences than the scores ask for."""
    for key, value in sequences_scored(config).items():
        if value > tokens.num_sequences:
            raise ConfigError(
                f"{key}={value}, but data.calibration gives only {tokens.num_sequences} sequences of "
                f"{tokens.sequence_length} tokens: {value * tokens.sequence_length:,} tokens are needed and "
                f"{tokens.num_sequences * tokens.sequence_length:,} are there; give more text or set "
                f"{key}={tokens.num_sequences}"
            )


def task_items(config: CompressConfig) -> list[Item]:
    """The items by which the depth criteria `task*` judge. Raises ConfigError for a file that has none or bad ones."""
    path = Path(resolve(config.score.task_path, Path(config.cache_dir).expanduser())).expanduser()
    return read_items(path, "score.task_path", config.score.task_items)


def cache_form(config: CompressConfig) -> Form:
    """How tokens are kept. Raises ConfigError for a k above the teacher's vocabulary."""
    settings, teacher = config.cache, teacher_of(config)
    vocab_size = read_model(teacher, config.teacher.trust_remote_code).shape.vocab_size
    if settings.kind is CacheKind.top_k and settings.k > vocab_size:
        raise ConfigError(f"cache.k={settings.k} must be within 1 and vocab_size={vocab_size} of the teacher {teacher}")
    size = settings.k if settings.kind is CacheKind.top_k else settings.num_samples
    return Form(settings.kind.value, size, vocab_size)


def export_folder(config: CompressConfig) -> str:
    """`export`, or `export-step-16` for a step asked for by number: that one may be made while training goes on."""
    return "export" if config.export.step is None else f"export-step-{config.export.step}"

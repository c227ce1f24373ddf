"""About how long the stages will take, from arithmetic and one product measured on this machine."""

# M, N, K: sizes of the measured product

from __future__ import annotations

import time
from pathlib import Path

import torch

from compress.architecture import (
    ModelInfo,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    with_sizes,
)
from compress.depth import removal_reach
from compress.devices import CPU, device_of, wait_for
from compress.embedded import resolve
from compress.families import Shape
from compress.folders import read_model
from compress.inputs import source_of
from compress.parallel import resolve_dtype
from compress.phases import num_tokens
from compress.settings import CompressConfig, Stage
from compress.sources import local_files
from compress.targets import given_sizes
from compress.training import asks_teacher

_ON_DEVICES = {Stage.score, Stage.search, Stage.correct, Stage.cache, Stage.distill, Stage.evaluate}
# Shares of one product's speed that whole passes reached on SmolLM2-135M, 2 cores: a forward and a training step.
FORWARD_EFFICIENCY, STEP_EFFICIENCY = 0.35, 0.22
TEXT_BYTES_PER_SECOND = 0.6e6
LAZY_SHARE = 0.3  # of the layers that are left, those that lazy greedy removal tries again after each one
OVERHEAD_SECONDS = 6.0  # imports, loading, saving


def flops_per_second(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Of one product as large as a small model's, or as keeps a GPU busy, which was not run here; measured now."""
    own = torch.Generator()  # a training's random numbers are its own
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (1024, 576, 1536)
    left_MK, right_KN = (torch.randn(*size, generator=own).to(device, dtype) for size in ((m, k), (k, n)))
    times = []
    for _ in range(6):
        wait_for(device)
        start = time.perf_counter()
        left_MK @ right_KN
        wait_for(device)
        times.append(time.perf_counter() - start)
    return 2 * m * k * n / sorted(times)[2]


def estimate_seconds(config: CompressConfig, stages: list[Stage]) -> dict[Stage, float]:
    """Seconds for each of the stages, to within a factor of about two: 2 FLOP a parameter and token, 6 to train."""
    cache = Path(config.cache_dir).expanduser()
    info = read_model(source_of(config), config.teacher.trust_remote_code)
    length, layers = config.data.sequence_length, info.shape.num_hidden_layers
    teacher = num_parameters(info, info.shape)
    sizes = {"num_hidden_layers": layers - len(config.prune.removed_layers or []), **given_sizes(config)}
    student = num_parameters(info, with_sizes(info.shape, sizes))
    student = min(student, int(config.prune.max_parameters or student), int((config.prune.max_bytes or 1e30) / 2))
    # A machine that only prepares or prunes may have none of the GPUs that are asked for.
    device = device_of(config.cluster.device) if set(stages) & _ON_DEVICES else CPU
    speed = flops_per_second(resolve_dtype(config.compute_dtype, device), device)
    on_cpu = speed
    if config.prune.compensate and device.type != "cpu":
        on_cpu = flops_per_second(resolve_dtype(config.compute_dtype))
    score: float = 2 * teacher * config.score.num_sequences * length
    measured = [criterion for criterion in config.score.depth if criterion.is_measured]
    if measured:
        reach = removal_reach(layers, config.prune.num_hidden_layers, config.score.max_removed_layers)
        passes = {"_greedy": 1 + reach * LAZY_SHARE, "_block": reach}
        trials = sum(next((n for end, n in passes.items() if kind.endswith(end)), 1) for kind in measured)
        score += trials * layers * teacher * config.score.depth_sequences * length
    compensate = 0.0
    if config.prune.compensate:  # products of float32 that need no efficiency taken off, at about a sixth of bfloat16's
        tokens = config.prune.compensate_sequences * length
        compensate = tokens * (2 * teacher / FORWARD_EFFICIENCY + 6 * 2 * layers * info.shape.intermediate_size**2)
    evaluated = len(config.data.validation) * (config.evaluate.max_tokens or 1e6)
    online = teacher if asks_teacher(config) else 0
    search = config.search
    distilled = search.num_distilled or search.num_candidates
    flops = {
        Stage.score: score / FORWARD_EFFICIENCY,
        Stage.search: search.num_candidates * (compensate + 2 * student * search.num_sequences * length)
        # Each later round has half of the candidates and brings them as far again, the teacher's pass being shared.
        + max(1, distilled.bit_length() / 2) * distilled * search.num_tokens * 6 * student / STEP_EFFICIENCY,
        Stage.prune: compensate,
        Stage.correct: float(config.correct.num_tokens or 0) * 6 * teacher / STEP_EFFICIENCY,
        Stage.cache: num_tokens(config) * 2 * teacher / FORWARD_EFFICIENCY,
        Stage.distill: num_tokens(config) * (2 * online + 6 * student) / STEP_EFFICIENCY,
        # The float32 softmax over the vocabulary takes as long again as the products.
        Stage.evaluate: 2 * evaluated * 2 * (teacher + 2 * student) / FORWARD_EFFICIENCY,
    }
    seconds = {
        stage: OVERHEAD_SECONDS + flops.get(stage, 0.0) / (on_cpu if stage is Stage.prune else speed)
        for stage in stages
    }
    if Stage.tokenize in seconds:
        seconds[Stage.tokenize] += sum(
            Path(file).stat().st_size
            for split in (config.data.train, config.data.calibration, config.data.validation)
            for source in split
            for file in local_files(str(Path(resolve(source.path, cache)).expanduser()))
            if Path(file).is_file()
        ) / TEXT_BYTES_PER_SECOND  # fmt: skip
    return seconds


def flops_per_token(
    teacher: ModelInfo, student: Shape, sequence_length: int, recompute: bool, teacher_runs: bool = True
) -> float:
    """Of the teacher's forward and the student's forward and backward, for a token of a full sequence."""
    asked = _forward(teacher, teacher.shape, sequence_length) if teacher_runs else 0.0
    return asked + (4 if recompute else 3) * _forward(teacher, student, sequence_length)


def _forward(info: ModelInfo, shape: Shape, sequence_length: int) -> float:
    """2 FLOP a parameter that multiplies the token, and two products over half of the sequence in each layer."""
    looked_up = 0 if shape.tied else num_embedding_parameters(info, shape) // 2
    attention = 2 * sequence_length * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    return 2.0 * (num_active_parameters(info, shape) - looked_up) + attention

"""Stage distill: retrain the pruned student against the teacher's logits, resumable at every committed step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress import checkpoint
from compress.artifacts import disk_errors, write_atomic
from compress.capture import check_models, listening, make_projections
from compress.errors import ConfigError, Interrupted, NumericalError
from compress.inputs import open_cache, start_of, teacher_of
from compress.models import check_same_tokenizer, check_vocabulary, decoder_layers, load_model
from compress.optimizer import LocalOptimizer
from compress.parallel import compile_layers, recompute_layers, resolve_dtype, shard, single_process_mesh
from compress.progress import about, track
from compress.schedules import learning_rate_factor
from compress.settings import CompressConfig, TeacherMode
from compress.step import StudentModule, TeacherSource, accumulate_gradients
from compress.teacher import CachedTeacher, Teacher
from compress.tokens import SequenceOrder, TokenSet
from compress.training import (
    micro_batches,
    optimizer_of,
    refuse_empty_windows,
    resume,
    source_weights,
    term_names,
    terms_at,
    training_state,
)

log = logging.getLogger(__name__)


def run(config: CompressConfig, run_dir: Path) -> None:
    """Train until distill.num_tokens, committing a checkpoint every distill.checkpoint_steps and on a signal.

    Raises ConfigError before any training for a student that doesn't fit the teacher or a step without loss tokens,
    NumericalError when the loss is not finite, Interrupted after SIGTERM, SIGINT or SIGUSR1 was answered by a save.
    """
    settings, trust = config.distill, config.teacher.trust_remote_code
    teacher_path = teacher_of(config)
    student_path = start_of(config, run_dir)
    data, order = training_order(config, run_dir)
    max_steps = num_steps(config)
    check_same_tokenizer(teacher_path, student_path, trust)
    check_vocabulary(teacher_path, student_path, trust)
    dtype = resolve_dtype(config.compute_dtype)
    torch.manual_seed(config.seed)
    with single_process_mesh() as mesh:
        terms = settings.objectives
        model = load_model(student_path, torch.float32, trust)
        teacher = _teacher(config, run_dir, order, dtype, model)
        if settings.recompute:
            recompute_layers(model)
        if settings.compile:
            compile_layers(model)
        projections = None
        if isinstance(teacher, Teacher):
            widths = model.config.hidden_size, teacher.model.config.hidden_size
            projections = make_projections(terms, *widths, config.seed)
        student = StudentModule(model, projections).train()
        shard(student, decoder_layers(model), mesh, dtype)
        optimizer = optimizer_of(student, settings)
        folder = run_dir / "distill" / "checkpoints"
        start = resume(folder, student, optimizer)
        if start:
            log.info("distill: resuming after step %d from step_%08d", start, start)
        metrics = run_dir / "distill" / "metrics.jsonl"
        _keep_metrics_before(metrics, start)
        _train(config, student, teacher, optimizer, data, order, range(start, max_steps), folder, metrics)


def _teacher(
    config: CompressConfig, run_dir: Path, order: SequenceOrder, dtype: torch.dtype, student: PreTrainedModel
) -> TeacherSource:
    """Who is distilled from. Of a cached teacher no weights are read."""
    terms = config.distill.objectives
    if config.teacher.mode is TeacherMode.cached:
        cache = open_cache(config, run_dir, order)
        if student.config.vocab_size < cache.form.vocab_size:
            raise ConfigError(
                f"the student's vocab_size={student.config.vocab_size} is less than the {cache.form.vocab_size} of the "
                "cached teacher, whose padding may have been drawn; set teacher.mode=online"
            )
        return CachedTeacher(cache)
    model = load_model(teacher_of(config), dtype, config.teacher.trust_remote_code)
    check_models(terms, student, model)
    if config.distill.compile:
        compile_layers(model)
    return Teacher(model, listening(terms, to_teacher=True))


def _train(
    config: CompressConfig,
    student: nn.Module,
    teacher: TeacherSource,
    optimizer: LocalOptimizer,
    data: TokenSet,
    order: SequenceOrder,
    step_range: range,
    folder: Path,
    metrics: Path,
) -> None:
    settings = config.distill
    tokens_per_step = settings.global_batch_size * data.sequence_length

    def save(step: int) -> None:
        checkpoint.save(
            folder,
            step,
            training_state(student, optimizer),
            {"tokens": step * tokens_per_step},
            settings.keep_checkpoints,
        )

    committed = step_range.start
    with _stop_signals() as stop:
        for step in track(step_range, "distill", unit="tok", amount=lambda _: tokens_per_step):
            began = time.perf_counter()
            indices = order.indices(step * settings.global_batch_size, (step + 1) * settings.global_batch_size)
            window = micro_batches(data, indices, settings.micro_batch_size)
            terms = terms_at(settings, step / max(1, step_range.stop - 1))
            found = accumulate_gradients(student, teacher, window, terms)
            loss = found.loss
            factor = learning_rate_factor(
                step,
                step_range.stop,
                settings.warmup_steps,
                settings.min_learning_rate_ratio,
                settings.learning_rate_curve,
                settings.decay_share,
            )
            norm = math.nan
            if math.isfinite(loss):
                norm, rate = optimizer.step(factor, settings.max_gradient_norm)
            if not math.isfinite(norm):
                raise NumericalError(
                    f"distill step {step + 1}: loss {loss}, gradient norm {norm} on training sequences "
                    f"{indices.tolist()}; nothing was updated, and step {committed} is kept. Lower "
                    f"distill.learning_rate={settings.learning_rate} or raise distill.warmup_steps="
                    f"{settings.warmup_steps}; if it is step 1, look at the teacher's and the student's weights"
                )
            if (step + 1) % settings.log_steps == 0 or step + 1 == step_range.stop:
                seconds = time.perf_counter() - began
                _append(metrics, {
                    "step": step + 1, "tokens": (step + 1) * tokens_per_step, "loss_tokens": found.num_tokens,
                    "loss": loss,
                    "terms": dict(zip(term_names(terms), found.terms, strict=True)),
                    "gradient_norm": norm, "learning_rate": rate, "seconds": seconds,
                    "tokens_per_second": tokens_per_step / seconds,
                })  # fmt: skip
            done = step + 1 == step_range.stop
            if done or stop.name or (step + 1) % settings.checkpoint_steps == 0:
                save(step + 1)
                committed = step + 1
            if stop.name and not done:
                raise Interrupted(
                    f"{stop.name}: step {step + 1} of {step_range.stop} is saved; the same command goes on"
                )


def progress_line(config: CompressConfig, run_dir: Path) -> str:
    """How far training is, for `stage=status`: step, loss, and time left at the last steps' pace."""
    metrics = run_dir / "distill" / "metrics.jsonl"
    rows = _logged(metrics)
    if not rows:
        return "no step yet"
    pace = sum(row["seconds"] for row in rows[-10:]) / len(rows[-10:])
    left = (num_steps(config) - rows[-1]["step"]) * pace
    saved = checkpoint.steps(run_dir / "distill" / "checkpoints")
    return (
        f"step {rows[-1]['step']} of {num_steps(config)}, loss {rows[-1]['loss']:.4f}, about {about(left)} left; "
        f"kept steps: {', '.join(map(str, saved)) or 'none'}"
    )


def num_steps(config: CompressConfig) -> int:
    """Whole optimizer steps within distill.num_tokens, packed tokens with padding counted."""
    return int(config.distill.num_tokens) // (config.distill.global_batch_size * config.data.sequence_length)


def training_order(config: CompressConfig, run_dir: Path) -> tuple[TokenSet, SequenceOrder]:
    """The training tokens and the order in which they are seen. Raises ConfigError for a step without loss tokens."""
    data = TokenSet.open(run_dir / "tokens" / "train")
    max_steps, batch = num_steps(config), config.distill.global_batch_size
    order = SequenceOrder(data.source_sizes, source_weights(config), max_steps * batch, seed=config.seed)
    refuse_empty_windows(data, order, max_steps, batch, "distill")
    return data, order


def _keep_metrics_before(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a kill took back, so that the file has each step once."""
    if metrics.exists():
        write_atomic(metrics, "".join(f"{json.dumps(row)}\n" for row in _logged(metrics) if row["step"] <= step))


def _logged(metrics: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; what a kill or a full disk left of a line isn't one."""
    rows = []
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "seconds", "loss"} <= row.keys():
                rows.append(row)
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


@dataclasses.dataclass
class _Stop:
    name: str = ""


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGTERM (scancel, time limit), SIGUSR1 (Slurm's early warning) and SIGINT into a wish read after a step."""
    stop = _Stop()

    def note(number: int, frame: object) -> None:
        if stop.name:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name
        log.warning("%s: finishing this step, then saving", stop.name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Stage distill: retrain the pruned student against the teacher's logits, resumable at every committed step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from compress import checkpoint, training_log
from compress.errors import ConfigError, Interrupted, NumericalError
from compress.inputs import start_of, teacher_of
from compress.models import check_same_tokenizer, decoder_layers, load_model
from compress.optimizer import LocalOptimizer
from compress.parallel import compile_layers, recompute_layers, resolve_dtype, shard, single_process_mesh
from compress.phases import Phase, Progress, num_steps, phases_of
from compress.progress import track
from compress.schedules import learning_rate_factor
from compress.settings import CompressConfig
from compress.step import StudentModule, accumulate_gradients
from compress.teacher import Teacher
from compress.tokens import Ints, TokenSet
from compress.training import (
    check_training_data,
    micro_batches,
    optimizer_of,
    phase_data,
    phase_orders,
    resume,
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
    data = TokenSet.open(run_dir / "tokens" / "train")
    check_training_data(config, run_dir)
    check_same_tokenizer(teacher_path, student_path, trust)
    dtype = resolve_dtype(config.compute_dtype)
    torch.manual_seed(config.seed)
    with single_process_mesh() as mesh:
        teacher = Teacher(load_model(teacher_path, dtype, trust))
        model = load_model(student_path, torch.float32, trust)
        if model.config.vocab_size != teacher.model.config.vocab_size:
            raise ConfigError(
                f"vocab_size of student {student_path} is {model.config.vocab_size}, of teacher {teacher_path} "
                f"{teacher.model.config.vocab_size}: logits are compared id by id; give both the same vocabulary rows"
            )
        if settings.recompute:
            recompute_layers(model)
        if settings.compile:
            compile_layers(teacher.model)
            compile_layers(model)
        student = StudentModule(model).train()
        shard(student, decoder_layers(model), mesh, dtype)
        optimizer = optimizer_of(student, settings)
        folder = run_dir / "distill" / "checkpoints"
        progress = Progress.of(resume(folder, student, optimizer))
        if progress.step:
            log.info("distill: resuming after step %d from step_%08d", progress.step, progress.step)
        metrics = run_dir / "distill" / "metrics.jsonl"
        training_log.keep_up_to(metrics, progress.step)
        _train(config, student, teacher, optimizer, data, progress, folder, metrics)


def _train(
    config: CompressConfig,
    student: nn.Module,
    teacher: Teacher,
    optimizer: LocalOptimizer,
    data: TokenSet,
    progress: Progress,
    folder: Path,
    metrics: Path,
) -> None:
    settings = config.distill

    def save(phase: Phase) -> None:
        checkpoint.save(
            folder,
            progress.step,
            training_state(student, optimizer),
            {"tokens": phase.tokens_after(progress.step), **progress.facts()},
            settings.keep_checkpoints,
        )

    committed, planned = progress.step, num_steps(config, progress.shortened)
    with _stop_signals() as stop:
        steps = _steps(config, data, optimizer, progress)
        for step in track(steps, "distill", planned - progress.step, "tok", lambda step: step.phase.tokens_per_step):
            began = time.perf_counter()
            phase, within = step.phase, progress.step - step.phase.first_step
            window = micro_batches(step.data, step.indices, settings.micro_batch_size)
            terms = terms_at(settings, within / max(1, phase.num_steps - 1))
            found = accumulate_gradients(student, teacher, window, terms)
            loss = found.loss
            factor = learning_rate_factor(
                within,
                phase.num_steps,
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
                    f"distill step {progress.step + 1}: loss {loss}, gradient norm {norm} on training sequences "
                    f"{step.indices.tolist()}; nothing was updated, and step {committed} is kept. Lower "
                    f"distill.learning_rate={phase.learning_rate} or raise distill.warmup_steps="
                    f"{settings.warmup_steps}; if it is step 1, look at the teacher's and the student's weights"
                )
            progress.step += 1
            last = num_steps(config, progress.shortened)
            done = progress.step == last
            if progress.step % settings.log_steps == 0 or progress.step == phase.end:
                seconds = time.perf_counter() - began
                training_log.append(metrics, {
                    "step": progress.step, "tokens": phase.tokens_after(progress.step),
                    "loss_tokens": found.num_tokens, "loss": loss,
                    "terms": dict(zip(term_names(terms), found.terms, strict=True)),
                    "gradient_norm": norm, "learning_rate": rate, "seconds": seconds,
                    "tokens_per_second": phase.tokens_per_step / seconds,
                })  # fmt: skip
            if done or stop.name or progress.step % settings.checkpoint_steps == 0:
                save(phase)
                committed = progress.step
            if stop.name and not done:
                raise Interrupted(f"{stop.name}: step {progress.step} of {last} is saved; the same command goes on")


@dataclasses.dataclass
class _Step:
    phase: Phase
    data: TokenSet
    indices: Ints  # of its sequences in data


def _steps(config: CompressConfig, data: TokenSet, optimizer: LocalOptimizer, progress: Progress) -> Iterator[_Step]:
    """The steps that are left, phase by phase; progress says after each how far training is and how far phases go."""
    for number in range(len(phases_of(config))):
        phase = phases_of(config, progress.shortened)[number]
        if progress.step >= phase.end:
            continue
        optimizer.set_learning_rates(phase.learning_rate, phase.muon_learning_rate)
        order = phase_orders(config, data, phases_of(config, progress.shortened)[: number + 1])[number]
        pieces = phase_data(data, phase, order)
        while progress.step < phase.end:
            draw = (progress.step - phase.first_step) * phase.global_batch_size
            yield _Step(phase, pieces, order.indices(draw, draw + phase.global_batch_size))
            phase = phases_of(config, progress.shortened)[number]  # an early stop may have changed its end


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

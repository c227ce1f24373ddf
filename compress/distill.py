"""Stage distill: retrain the pruned student against the teacher's logits, resumable at every committed step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from compress import checkpoint, training_log
from compress.allocator import kept_memory
from compress.capture import check_models, listening, make_projections
from compress.devices import device_of, random_states, set_attention, set_random_states
from compress.errors import Interrupted, NumericalError
from compress.estimate import flops_per_second, flops_per_token
from compress.folders import read_model
from compress.inputs import check_device, kept_channels, learned_from, open_cache, start_of
from compress.lease import check_lease
from compress.models import check_same_tokenizer, check_vocabulary, decoder_layers, logits_of
from compress.moving_average import MovingAverage
from compress.objectives.chunked import DenseSignal
from compress.optimizer import LocalOptimizer
from compress.parallel import (
    Ranks,
    agreed_dtype,
    compile_layers,
    device_mesh,
    free_bytes,
    recompute_layers,
    shard,
    shard_frozen,
)
from compress.phases import Phase, Progress, num_steps, phases_of
from compress.plan import gathers_once
from compress.progress import track
from compress.recovery import FORECAST_SHARE, forecast
from compress.routing import Balance, warn_of_dead
from compress.schedules import learning_rate_factor
from compress.settings import CompressConfig, TeacherMode
from compress.signals import check_student
from compress.step import StudentModule, TeacherSource, accumulate_gradients
from compress.streaming import streamed_model
from compress.teacher import (
    CachedTeacher,
    NoTeacher,
    OncePerBatch,
    PreviousSelf,
    RememberedTeacher,
    Teacher,
    overlapping,
)
from compress.tokens import Ints, TokenBatch, TokenSet
from compress.training import (
    asks_teacher,
    balance_of,
    check_training_data,
    drawn_sequences,
    micro_batches,
    optimizer_of,
    phase_data,
    phase_orders,
    resume,
    shortened_to,
    term_names,
    terms_at,
    training_state,
)
from compress.validation import mean_kl, own_share, validate, validation_batches

log = logging.getLogger(__name__)


def preflight(config: CompressConfig) -> None:
    """Raise ConfigError for a device that isn't here, or whose attention can't do with sequences as long as these."""
    check_device(config, "distill")


def run(config: CompressConfig, run_dir: Path) -> None:
    """Train phase after phase, or until recovery levels off; commit every distill.checkpoint_steps and on a signal.

    Raises ConfigError before any training for a student that doesn't fit the teacher or a step without loss tokens,
    NumericalError when the loss is not finite, Interrupted after SIGTERM, SIGINT or SIGUSR1 was answered by a save.
    """
    run_together([(config, run_dir)])


def run_together(members: Sequence[tuple[CompressConfig, Path]]) -> None:
    """`run` for several students that differ in shape alone, step by step, so that the teacher says everything once.

    One that is behind the others, after a kill, catches up first. Raises as `run`; a student that fails ends them all.
    """
    shared: Teacher | None = None
    cluster = members[0][0].cluster
    device = device_of(cluster.device)
    layout = device_mesh(cluster.shard_ranks, device)
    with kept_memory(), layout as (ranks, mesh), _stop_signals() as stop, contextlib.ExitStack() as stack:
        trainings: list[_Training] = []
        for config, run_dir in members:
            parts, progress = _prepare(config, run_dir, ranks, mesh, device, shared)
            if len(members) > 1 and isinstance(parts.teacher, Teacher):
                shared = parts.teacher = shared or OncePerBatch(parts.teacher)
            settings = config.distill
            folder = run_dir / "distill" / "checkpoints"
            writer = checkpoint.Writer(
                folder, settings.keep_checkpoints, settings.async_checkpoint, progress.step, ranks
            )
            steps = _train(parts, progress, stack.enter_context(writer), stop)
            trainings.append(_Training(progress, steps, random_states()))
        while trainings:
            behind = min(one.progress.step for one in trainings)
            left, interrupted = [], None
            for one in trainings:
                try:
                    if one.progress.step > behind or one.advance():
                        left.append(one)
                except Interrupted as error:
                    interrupted = error
            if interrupted is not None:
                for one in left:  # these have done theirs: one more, and it is saved
                    with contextlib.suppress(Interrupted):
                        one.advance()
                raise interrupted
            if isinstance(shared, OncePerBatch):
                shared.forget()
            trainings = left


@dataclasses.dataclass
class _Training:
    """One of those that go on step by step; its random numbers (dropout) are those that it would draw alone."""

    progress: Progress
    steps: Iterator[int]
    random: dict[str, Tensor]

    def advance(self) -> bool:
        """A step more; False where there was none left."""
        set_random_states(self.random)
        try:
            return next(self.steps, None) is not None
        finally:
            self.random = random_states()


def _prepare(
    config: CompressConfig, run_dir: Path, ranks: Ranks, mesh: DeviceMesh, device: torch.device, shared: Teacher | None
) -> tuple[_Parts, Progress]:
    """Everything that a training works with, as far as it has come."""
    settings, trust = config.distill, config.teacher.trust_remote_code
    teacher_path = learned_from(config, run_dir)
    student_path = start_of(config, run_dir)
    data = TokenSet.open(run_dir / "tokens" / "train")
    check_training_data(config, run_dir)
    sets = validation_batches(config, run_dir) if settings.validate_steps else {}
    sets = {name: [batch.to(device) for batch in batches] for name, batches in sets.items()}
    check_same_tokenizer(teacher_path, student_path, trust)
    check_vocabulary(teacher_path, student_path, trust)
    dtype = agreed_dtype(config.compute_dtype, ranks, device)
    whole_window = _whole_window(config, teacher_path, student_path, ranks, device)
    torch.manual_seed(config.seed + ranks.rank)  # what dropout draws
    model, fill = streamed_model(student_path, torch.float32, trust, device)
    set_attention(model, device, dtype, config)
    teacher = _teacher(config, run_dir, dtype, model, shared, mesh, device)
    judge: Teacher | RememberedTeacher | None = teacher if isinstance(teacher, Teacher) else None
    if sets and judge is None:  # asked now, and its layers let go
        batches = itertools.chain.from_iterable(own_share(batches, ranks) for batches in sets.values())
        asked = _frozen(config, teacher_path, dtype, mesh, device, compiled=False)
        judge = RememberedTeacher(Teacher(asked), batches)
    if settings.recompute:
        recompute_layers(model)
    if settings.compile:
        compile_layers(model)
    projections = None
    if isinstance(teacher, Teacher):
        widths = model.config.hidden_size, teacher.model.config.hidden_size
        projections = make_projections(settings.objectives, *widths, config.seed, kept_channels(config, run_dir))
    student = StudentModule(model, projections, settings.compile).train()
    balance = balance_of(student, settings)
    shard(student, decoder_layers(model), mesh, dtype, fill)
    register_fsdp_forward_method(student, "figures")
    average = MovingAverage(student, settings.ema_decay) if settings.ema_decay is not None else None
    optimizer = optimizer_of(student, settings)
    previous = teacher if isinstance(teacher, PreviousSelf) else None
    progress = Progress.of(resume(run_dir / "distill" / "checkpoints", student, optimizer, average, previous, balance))
    if progress.step:
        log.info("distill: resuming after step %d from step_%08d", progress.step, progress.step)
    metrics = run_dir / "distill" / "metrics.jsonl"
    if ranks.is_main:
        training_log.keep_up_to(metrics, progress.step)
    work = _work(config, teacher_path, student_path, dtype, device)
    parts = _Parts(
        config, ranks, device, student, teacher, whole_window, optimizer, average, balance, data, sets, judge, work,
        metrics,
    )  # fmt: skip
    return parts, progress


def _teacher(
    config: CompressConfig, run_dir: Path, dtype: torch.dtype, student: PreTrainedModel, shared: Teacher | None,
    mesh: DeviceMesh, device: torch.device,
) -> TeacherSource:  # fmt: skip
    """Who is distilled from. A teacher's weights are read only when it is asked at every step, and once for all."""
    terms = config.distill.objectives
    if shared is not None:
        check_models(terms, student, shared.model)
        return shared
    if config.teacher.mode is TeacherMode.cached:
        cache = open_cache(config, run_dir, drawn_sequences(config, run_dir))
        check_student(student.config.vocab_size, cache.form.vocab_size)
        return CachedTeacher(cache)
    if config.teacher.mode is TeacherMode.previous_self:
        return PreviousSelf()
    if not asks_teacher(config):
        return NoTeacher()
    model = _frozen(config, learned_from(config, run_dir), dtype, mesh, device, config.distill.compile)
    check_models(terms, student, model)
    return Teacher(model, listening(terms, to_teacher=True))


def _whole_window(config: CompressConfig, teacher: Path, student: Path, ranks: Ranks, device: torch.device) -> bool:
    """`plan.gathers_once`, by what is free now on the rank that has least."""
    trust, free, on_cpu = config.teacher.trust_remote_code, free_bytes(device), device.type == "cpu"
    if on_cpu:
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shape = read_model(student, trust).shape
    once = not ranks.any(not gathers_once(config, read_model(teacher, trust), shape, ranks.size, free, on_cpu))
    if once and ranks.size > 1:
        log.info("distill: the teacher answers all micro-batches of a step at once, gathered once for them")
    return once


def _frozen(
    config: CompressConfig, folder: Path, dtype: torch.dtype, mesh: DeviceMesh, device: torch.device, compiled: bool
) -> PreTrainedModel:
    """A teacher, of which each rank holds its part."""
    model, fill = streamed_model(folder, dtype, config.teacher.trust_remote_code, device)
    set_attention(model, device, dtype, config)
    if compiled:
        compile_layers(model)
    shard_frozen(model, mesh, fill)
    return model


@dataclasses.dataclass
class _Parts:
    """What a training works with."""

    config: CompressConfig
    ranks: Ranks
    device: torch.device
    student: StudentModule
    teacher: TeacherSource
    whole_window: bool  # it answers all of a step's micro-batches first
    optimizer: LocalOptimizer
    average: MovingAverage | None
    balance: Balance | None
    data: TokenSet
    sets: dict[str, list[TokenBatch]]  # to validate on, by name
    judge: Teacher | RememberedTeacher | None  # who knows what the teacher says of them; None without sets
    work: Callable[[int], float]  # FLOP of a token in a sequence of that length, over the peak in a second
    metrics: Path

    def log(self, row: training_log.Row) -> None:
        """A row of metrics.jsonl, by the first rank alone."""
        if self.ranks.is_main:
            check_lease(self.metrics.parent)
            training_log.append(self.metrics, row)

    @property
    def previous(self) -> PreviousSelf | None:
        return self.teacher if isinstance(self.teacher, PreviousSelf) else None


def _work(
    config: CompressConfig, teacher: Path, student: Path, dtype: torch.dtype, device: torch.device
) -> Callable[[int], float]:
    """The seconds that a token of a sequence of some length would take at cluster.peak_flops, or at the speed of a
    plain product here."""
    trust, recompute = config.teacher.trust_remote_code, config.distill.recompute
    peak = config.cluster.peak_flops or flops_per_second(dtype, device)
    info, shape = read_model(teacher, trust), read_model(student, trust).shape
    asked = asks_teacher(config)
    return lambda length: flops_per_token(info, shape, length, recompute, asked) / peak


def _train(parts: _Parts, progress: Progress, writer: checkpoint.Writer, stop: _Stop) -> Iterator[int]:
    """The steps that are left, each done when its number (from 1) is given."""
    config, settings, optimizer = parts.config, parts.config.distill, parts.optimizer
    planned = num_steps(config, progress.shortened) - progress.step
    steps = _steps(config, parts.data, optimizer, progress)
    idle_LE = torch.zeros(())  # steps without a token, of each expert of a mixture
    for step in track(steps, "distill", planned, "tok", lambda step: step.phase.tokens_per_step):
        writer.check()
        phase, within = step.phase, progress.step - step.phase.first_step
        began, head_before = time.perf_counter(), parts.student.head_seconds
        dealt = micro_batches(step.data, step.indices, settings.micro_batch_size, parts.ranks)
        window = [batch.to(parts.device) for batch in dealt]
        terms = terms_at(settings, within, phase.num_steps)
        said: list[Tensor] = []
        if parts.previous is not None:
            parts.previous.begin(window, step.num_repeated)
        keep = None if parts.previous is None else said
        found = accumulate_gradients(
            parts.student, parts.teacher, window, terms, parts.ranks, keep, parts.whole_window, parts.balance
        )
        if parts.previous is not None:
            parts.previous.remember(window, said, parts.student.head_now(said[0].dtype))
        loss = found.loss
        factor = learning_rate_factor(
            within,
            phase.num_steps,
            settings.warmup_steps,
            settings.min_learning_rate_ratio,
            settings.learning_rate_curve,
            settings.decay_share,
        )
        norm, updating = math.nan, time.perf_counter()
        writer.wait_for_copy()
        if math.isfinite(loss):
            norm, rate = optimizer.step(factor, settings.max_gradient_norm)
        if not math.isfinite(norm):
            writer.wait()
            banned = _refuse_teacher(parts.teacher, window, step.indices, settings.micro_batch_size)
            raise NumericalError(
                f"distill step {progress.step + 1}: loss {loss}, gradient norm {norm} on training sequences "
                f"{step.indices.tolist()}; nothing was updated, and step {writer.committed} is kept. Lower "
                f"distill.learning_rate={phase.learning_rate} or raise distill.warmup_steps="
                f"{settings.warmup_steps}; if it is step 1, look at the teacher's and the student's weights{banned}"
            )
        progress.step += 1
        if found.experts is not None:
            idle_LE = warn_of_dead(idle_LE, found.experts.counts_LE)
        if parts.average is not None:
            parts.average.update(progress.step)
        if progress.step % settings.log_steps == 0 or progress.step == phase.end:
            ended = time.perf_counter()
            parts.log({
                "step": progress.step, "tokens": phase.tokens_after(progress.step),
                "loss_tokens": found.num_tokens, "loss": loss,
                "terms": dict(zip(term_names(terms), found.terms, strict=True)),
                "gradient_norm": norm, "learning_rate": rate,
                **({} if found.experts is None else {"experts": found.experts.figures()}),
                **training_log.speed(
                    ended - began, phase, parts.work, teacher=found.teacher_seconds,
                    head=parts.student.head_seconds - head_before, optimizer=ended - updating,
                ),
            })  # fmt: skip
        if settings.validate_steps and (progress.step % settings.validate_steps == 0 or progress.step == phase.end):
            _validate(parts, phase, progress)
        last = num_steps(config, progress.shortened)
        if parts.ranks.any(bool(stop.name)):  # the signal reaches them in different steps
            stop.name = stop.name or "a signal to another rank"
        if progress.step == last or stop.name or progress.step % settings.checkpoint_steps == 0:
            state = training_state(parts.student, optimizer, parts.average, parts.previous, parts.balance)
            facts = {"tokens": phase.tokens_after(progress.step), **progress.facts()}
            writer.save(progress.step, state, facts, progress.figures() if settings.keep_best else None)
        if stop.name:  # after the last step too: the stages that follow would run into the kill
            writer.wait()
            raise Interrupted(f"{stop.name}: step {progress.step} of {last} is saved; the same command goes on")
        yield progress.step


def _refuse_teacher(teacher: TeacherSource, window: Sequence[TokenBatch], indices: Ints, size: int) -> str:
    """Raise NumericalError where it is the teacher whose logits aren't finite, naming sequence and token.

    Returns a remark for a teacher that bans tokens, by logits of -inf, which are sound for some objectives alone.
    """
    banned = 0
    for number, batch in enumerate(window if isinstance(teacher, Teacher) else ()):
        signal = teacher.signal(batch)
        assert isinstance(signal, DenseSignal)
        rows, tokens = batch.loss_mask.nonzero(as_tuple=True)
        for place, hidden_E in enumerate(signal.hidden_NE):
            logits_1V = logits_of(hidden_E[None], signal.head)
            banned = max(banned, int((logits_1V == -math.inf).sum()))
            if bool((logits_1V.isnan() | (logits_1V == math.inf)).any()):
                raise NumericalError(
                    f"the teacher's logits are not finite at token {int(tokens[place])} of training sequence "
                    f"{int(indices[number * size + int(rows[place])])}; nothing was updated. Look at the teacher's "
                    "weights, or set compute_dtype=float32"
                )
    if not banned:
        return ""
    return f"; and the teacher bans {banned} tokens (logits of -inf), where forward_kl is finite and reverse_kl isn't"


def _validate(parts: _Parts, phase: Phase, progress: Progress) -> None:
    """Measure what would be exported, foretell the phase's end, and stop the phase where recovery has levelled off."""
    settings, began, tokens = parts.config.distill, time.perf_counter(), phase.tokens_after(progress.step)
    with parts.average.in_place() if parts.average is not None else contextlib.nullcontext():
        assert parts.judge is not None
        figures = validate(parts.student, parts.judge, parts.sets, parts.ranks)
    kl = mean_kl(figures)
    if not math.isfinite(kl):
        raise NumericalError(
            f"distill step {progress.step}: the KL to the teacher is {kl} on the validation sets {', '.join(figures)}; "
            "the steps saved before are kept. Look at the teacher's weights, or set compute_dtype=float32"
        )
    progress.history.append((progress.step, tokens, kl))
    end = phase.tokens_after(phase.end)
    early = tokens - phase.tokens_before < FORECAST_SHARE * (end - phase.tokens_before)
    foretold = None if early else forecast(progress.curve(phase, settings.warmup_steps), end)
    parts.log({
        "step": progress.step, "tokens": tokens, "validation": figures, "kl_to_teacher": kl,
        "forecast": None if foretold is None else {"kl_to_teacher": foretold, "tokens": end},
        "seconds": time.perf_counter() - began,
    })  # fmt: skip
    log.info("distill: step %d, validation KL to the teacher %.4f%s", progress.step, kl,
             "" if foretold is None else f", {foretold:.4f} foretold after {end:,} tokens")  # fmt: skip
    steps = shortened_to(settings, phase, progress)
    if steps is not None:
        progress.shortened[phase.number] = steps
        parts.log({"step": progress.step, "seconds": 0.0, "stop": {"phase": phase.number, "steps": steps}})
        log.info(
            "distill: KL fell slower than distill.stop_slope=%g nats per million tokens: phase %d ends after step %d "
            "instead of %d", settings.stop_slope, phase.number, phase.first_step + steps, phase.end,
        )  # fmt: skip


@dataclasses.dataclass
class _Step:
    phase: Phase
    data: TokenSet
    indices: Ints  # of its sequences in data
    num_repeated: int = 0  # the first so many were the step before's last


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
            within, batch = progress.step - phase.first_step, phase.global_batch_size
            if config.teacher.mode is TeacherMode.previous_self:
                repeated, fresh = overlapping(within, phase.draws_per_step)
                yield _Step(phase, pieces, order.indices(repeated.start, fresh.stop), len(repeated))
            else:
                yield _Step(phase, pieces, order.indices(within * batch, (within + 1) * batch))
            phase = phases_of(config, progress.shortened)[number]  # an early stop may have changed its end


@dataclasses.dataclass
class _Stop:
    name: str = ""


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGTERM (scancel, time limit), SIGUSR1 (Slurm's early warning) and SIGINT into a wish read after a step."""
    stop = _Stop()

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop.name == "SIGINT":  # a second Ctrl-C means now
            raise KeyboardInterrupt
        if stop.name:  # Slurm and torchrun both send what a job is sent
            return
        stop.name = signal.Signals(number).name
        log.warning("%s: finishing this step, then saving", stop.name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            # Asked to end, it must get there: what is sent once more by Slurm or torchrun would kill it on its way.
            ending = bool(stop.name) and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else handler)

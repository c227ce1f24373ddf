"""What the distill stage and the search's short distillations share: the data's order, the optimizer, the state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import checkpoint
from compress.errors import ConfigError
from compress.models import output_head
from compress.moving_average import MovingAverage
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import OPTIONS, Term
from compress.optimizer import LocalOptimizer
from compress.parallel import ALONE, Ranks
from compress.phases import Phase, Progress, phases_of
from compress.recovery import has_levelled, steps_after_stop
from compress.routing import Balance
from compress.schedules import between, progress_after
from compress.settings import CompressConfig, Curve, DistillConfig, Optimizer, TeacherMode
from compress.step import StudentModule
from compress.teacher import PREVIOUS, PreviousSelf
from compress.tokens import Ints, SequenceOrder, TokenBatch, TokenSet


def source_weights(config: CompressConfig) -> list[float] | None:
    weights = [source.weight for source in config.data.train]
    return None if any(w is None for w in weights) else [w for w in weights if w is not None]


def phase_orders(config: CompressConfig, data: TokenSet, phases: Sequence[Phase]) -> list[SequenceOrder]:
    """The order of each phase, each going on where the one before ended: no sequence comes twice in an epoch."""
    found: list[SequenceOrder] = []
    for phase in phases:
        draws = phase.num_steps * phase.draws_per_step
        before = found[-1] if found else None
        found.append(SequenceOrder(data.source_sizes, phase.weights, draws, config.seed, before, phase.pieces))
    return found


def phase_data(data: TokenSet, phase: Phase, order: SequenceOrder) -> TokenSet:
    """The training tokens in the phase's sequence length. Raises ConfigError for a step without loss tokens."""
    found = data.cut(phase.sequence_length)
    what = "distill" if phase.number == 1 else f"distill phase {phase.number}"
    refuse_empty_windows(found, order, phase.num_steps, phase.draws_per_step, what)
    return found


def check_training_data(config: CompressConfig, run_dir: Path) -> None:
    """Raise ConfigError where a step of any phase would have no loss token."""
    data, phases = TokenSet.open(run_dir / "tokens" / "train"), phases_of(config)
    for phase, order in zip(phases, phase_orders(config, data, phases), strict=True):
        phase_data(data, phase, order)


def drawn_sequences(config: CompressConfig, run_dir: Path) -> Ints:
    """The training sequences that any phase draws, each once, in the order of the first draws."""
    data = TokenSet.open(run_dir / "tokens" / "train")
    orders = phase_orders(config, data, phases_of(config))
    drawn: Ints = np.concatenate([order.distinct() for order in orders])
    return drawn[np.sort(np.unique(drawn, return_index=True)[1])]


def shortened_to(settings: DistillConfig, phase: Phase, progress: Progress) -> int | None:
    """The steps that the phase is left with where its recovery has just levelled off; None where it goes on.

    A wsd schedule has its decay still to come, as long as its share; any other ends here.
    """
    done, threshold = progress.step - phase.first_step, settings.stop_slope
    if threshold is None or phase.number in progress.shortened or done == phase.num_steps:
        return None
    if not has_levelled(progress.curve(phase, settings.warmup_steps), settings.stop_validations, threshold):
        return None
    if settings.learning_rate_curve is not Curve.wsd:
        return done
    steps = steps_after_stop(done, settings.warmup_steps, settings.decay_share)
    return steps if steps < phase.num_steps else None  # else the decay has begun


def refuse_empty_windows(data: TokenSet, order: SequenceOrder, max_steps: int, per_step: int, what: str) -> None:
    """Every step of the whole run must have a loss token: known from the index before the first forward."""
    per_draw = data.loss_tokens[order.indices(0, max_steps * per_step)]
    empty = np.flatnonzero(per_draw.reshape(max_steps, per_step).sum(1) == 0)
    if len(empty):
        raise ConfigError(
            f"{what} step {empty[0] + 1} of {max_steps} would have no loss token ({len(empty)} such): every "
            f"token of its {per_step} new sequences is masked. Raise the global batch size, distill.global_batch_size "
            "or the phase's own, or unmask text (data.loss_on=all)"
        )


def asks_teacher(config: CompressConfig) -> bool:
    """Whether a teacher's forward runs in training: by itself the text is enough for objectives of labels alone."""
    labels_only = all(OBJECTIVES[term.objective].labels_only for term in config.distill.objectives)
    return config.teacher.mode is TeacherMode.online and not labels_only


def terms_at(settings: DistillConfig, step: int = 0, max_steps: int = 1) -> list[Term]:
    """The loss's terms at the step numbered from 0 of a phase, with the weights and temperatures of then.

    wsd stays and falls when the learning rate does, whose warm-up isn't part of it; so a stop that starts the decay of
    the one starts the other's.
    """
    found = []
    for term in settings.objectives:
        warmup = settings.warmup_steps if term.curve is Curve.wsd else 0
        progress = progress_after(warmup, step, max_steps)
        options = {name: getattr(term, name) for name in OPTIONS if getattr(term, name) is not None}
        weight, temperature = (
            between(start, end, term.curve, progress, settings.decay_share)
            for start, end in ((term.weight, term.weight_end), (term.temperature, term.temperature_end))
        )
        found.append(Term(str(term.objective), weight, temperature, term.squared, **options))
    return found


def term_names(terms: Sequence[Term]) -> list[str]:
    """Their objectives, numbered where one comes twice."""
    names = [term.objective for term in terms]
    return [name if names.count(name) == 1 else f"{name}_{names[:n].count(name) + 1}" for n, name in enumerate(names)]


def micro_batches(data: TokenSet, indices: np.ndarray, size: int, ranks: Ranks = ALONE) -> Iterator[TokenBatch]:
    """A step's sequences, `size` at a time; with several ranks this one's share of them."""
    return (data.batch(indices[i : i + size]) for i in ranks.mine(range(0, len(indices), size)))


def optimizer_of(student: nn.Module, settings: DistillConfig) -> LocalOptimizer:
    return LocalOptimizer(
        student.named_parameters(),
        muon=settings.optimizer is Optimizer.muon,
        learning_rate=settings.learning_rate,
        muon_learning_rate=settings.muon_learning_rate,
        betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def balance_of(student: StudentModule, settings: DistillConfig) -> Balance | None:
    """The balance loss, where it is asked for. Raises ConfigError for a student without routers as transformers has
    them."""
    if not settings.balance_loss:
        return None
    if not student.routers:
        raise ConfigError(
            f"distill.balance_loss={settings.balance_loss} needs routers whose choices can be counted, and the student "
            f"(model_type={student.model.config.model_type}) has none; set distill.balance_loss=0"
        )
    return Balance(settings.balance_loss, student.routers)


def training_state(
    student: nn.Module,
    optimizer: LocalOptimizer,
    average: MovingAverage | None = None,
    previous: PreviousSelf | None = None,
    balance: Balance | None = None,
) -> dict[str, Tensor]:
    """Everything that a training goes on from, beside its facts; tensors of the training itself, to be loaded into."""
    return {
        **(previous.state() if previous else {}),
        **(balance.state() if balance else {}),
        **{f"model/{name}": p for name, p in student.named_parameters()},
        **{f"optimizer/{key}": value for key, value in optimizer.state().items()},
        **{f"average/{name}": value for name, value in (average.state() if average else {}).items()},
    }


def resume(
    folder: Path,
    student: StudentModule,
    optimizer: LocalOptimizer,
    average: MovingAverage | None = None,
    previous: PreviousSelf | None = None,
    balance: Balance | None = None,
) -> dict[str, Any]:
    """Load the newest whole checkpoint in place, random numbers too; returns its facts (none without one)."""
    found = checkpoint.newest(folder)
    if found is None:
        return {}
    path, facts = found
    if previous is not None:
        device = next(student.parameters()).device
        previous.restore(checkpoint.empties(path, PREVIOUS, device), output_head(student.model))
    checkpoint.load(path, training_state(student, optimizer, average, previous, balance), restore_rng=True)
    return facts


def load_trained(path: Path, model: PreTrainedModel, averaged: bool = False, alone: bool = False) -> None:
    """The weights of a checkpoint of `training_state`, or their moving average, into the plain model that the student
    was made from. `alone`: on one of several ranks."""
    part = "average" if averaged else "model"
    state = {f"{part}/model.{name}": p.data for name, p in model.named_parameters()}
    checkpoint.load(path, state, alone=alone)

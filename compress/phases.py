"""The phases of a training run: which steps are whose, what each is trained by, what a checkpoint says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.settings import CompressConfig, PhaseConfig, TeacherMode


@dataclass(frozen=True)
class Phase:
    """Steps first_step, ..., end - 1, numbered from 0 through the whole run, and what they are trained by."""

    number: int  # from 1
    first_step: int
    num_steps: int
    tokens_before: int  # of the phases before, padding counted
    sequence_length: int
    pieces: int  # that a packed row is cut into
    global_batch_size: int
    draws_per_step: int  # sequences that weren't in the step before; half of the batch when a model teaches itself
    learning_rate: float
    muon_learning_rate: float
    weights: list[float] | None

    @property
    def end(self) -> int:
        return self.first_step + self.num_steps

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def tokens_after(self, step: int) -> int:
        """Tokens of the run when `step` of its steps are done, the last of them in this phase."""
        return self.tokens_before + (step - self.first_step) * self.tokens_per_step


@dataclass
class Progress:
    """How far training is, beside its tensors: the facts of a checkpoint."""

    step: int = 0
    shortened: dict[int, int] = field(default_factory=dict)  # steps of the phases that were stopped early, by number
    history: list[tuple[int, int, float]] = field(default_factory=list)  # (step, tokens, KL) of each validation

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Progress:
        """From what a checkpoint's marker says; empty before the first one."""
        shortened = {int(number): int(steps) for number, steps in facts.get("shortened", {}).items()}
        history = [(int(step), int(tokens), float(kl)) for step, tokens, kl in facts.get("history", ())]
        return cls(int(facts.get("step", 0)), shortened, history)

    def facts(self) -> dict[str, Any]:
        shortened = {str(number): steps for number, steps in self.shortened.items()}
        return {"shortened": shortened, "history": [list(point) for point in self.history]}

    def figures(self) -> dict[int, float]:
        """Validation KL by step."""
        return {step: kl for step, _, kl in self.history}

    def curve(self, phase: Phase, warmup_steps: int) -> list[tuple[float, float]]:
        """(tokens, KL) of the validations in this phase after its warm-up."""
        begin = phase.first_step + warmup_steps
        return [(float(tokens), kl) for step, tokens, kl in self.history if begin < step <= phase.end]


def phases_of(config: CompressConfig, shortened: Mapping[int, int] | None = None) -> list[Phase]:
    """Every phase with its place in the run; `shortened`: the steps of those that were stopped early."""
    found: list[Phase] = []
    step = tokens = 0
    for number, one in enumerate(phase_settings(config), start=1):
        length, batch = one["sequence_length"], one["global_batch_size"]
        planned = int(one.pop("num_tokens")) // (batch * length)
        steps = (shortened or {}).get(number, planned)
        pieces = config.data.sequence_length // length
        draws = batch // 2 if config.teacher.mode is TeacherMode.previous_self else batch
        found.append(Phase(number, step, steps, tokens, pieces=pieces, draws_per_step=draws, **one))
        step, tokens = found[-1].end, found[-1].tokens_after(found[-1].end)
    return found


def phase_settings(config: CompressConfig) -> list[dict[str, Any]]:
    """What each phase is trained by, with nothing left open; equal lists train equally."""
    distill = config.distill
    weights = [source.weight for source in config.data.train]
    result = []
    for phase in distill.phases or [PhaseConfig()]:
        rate = distill.learning_rate if phase.learning_rate is None else phase.learning_rate
        result.append({
            "num_tokens": distill.num_tokens if phase.num_tokens is None else phase.num_tokens,
            "sequence_length": phase.sequence_length or config.data.sequence_length,
            "global_batch_size": phase.global_batch_size or distill.global_batch_size,
            "learning_rate": rate,
            "muon_learning_rate": distill.muon_learning_rate * (rate / distill.learning_rate),
            "weights": phase.weights or (None if any(w is None for w in weights) else weights),
        })  # fmt: skip
    return result


def num_steps(config: CompressConfig, shortened: Mapping[int, int] | None = None) -> int:
    """Whole optimizer steps of all phases."""
    return phases_of(config, shortened)[-1].end


def num_tokens(config: CompressConfig) -> float:
    """Tokens that the phases are given, padding counted."""
    return float(sum(one["num_tokens"] for one in phase_settings(config)))

"""Validation in training: KL to the teacher, loss and top-1 on a part of each validation set; it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from compress.errors import ConfigError
from compress.parallel import ALONE, Ranks
from compress.settings import CompressConfig, set_name
from compress.step import StudentModule
from compress.teacher import RememberedTeacher, Teacher
from compress.tokens import TokenBatch, TokenSet

Figures = dict[str, dict[str, float]]


def validation_batches(config: CompressConfig, run_dir: Path) -> dict[str, list[TokenBatch]]:
    """Of each set sequences spread over it, distill.validate_tokens at most, in micro-batches.

    Raises ConfigError for a part without loss tokens.
    """
    found = {}
    for source in config.data.validation:
        name, settings = set_name(source), config.distill
        tokens = TokenSet.open(run_dir / "tokens" / "validation" / name)
        count = min(tokens.num_sequences, max(1, int(settings.validate_tokens) // tokens.sequence_length))
        found[name] = [tokens.batch(group) for group in tokens.spread(count, settings.micro_batch_size)]
        if not any(bool(batch.loss_mask.any()) for batch in found[name]):
            raise ConfigError(
                f"distill.validate_tokens={settings.validate_tokens:g}: none of the {count} sequences of validation "
                f"set {name} holds a loss token; raise it, or set data.loss_on=all (now {config.data.loss_on})"
            )
    return found


def own_share(batches: Sequence[TokenBatch], ranks: Ranks) -> list[TokenBatch]:
    """The batches that are dealt to this rank. Where it is short of one that others have, the first of all again: ranks
    that share a model go through it together."""
    most = -(-len(batches) // ranks.size)
    return [*ranks.mine(batches), batches[0]][:most]


@torch.no_grad()
def sums_of(
    student: StudentModule,
    teacher: Teacher | RememberedTeacher,
    batches: Sequence[TokenBatch],
    ranks: Ranks = ALONE,
    progress: Callable[[Sequence[TokenBatch]], Iterable[TokenBatch]] = iter,
) -> Tensor:
    """(batches, 4) in float64: KL to the teacher and loss (nats), tokens that both rank first, and loss tokens, summed.

    Every rank takes its `own_share`, by `progress`; all return the same. Weights, random numbers and the mode of the
    student are as before.
    """
    mode = student.training
    with torch.random.fork_rng(devices=[]):
        student.eval()
        try:
            rows = []
            for batch in progress(own_share(batches, ranks)):
                tokens = batch.loss_mask.sum()[None].double().cpu()
                rows.append(torch.cat([student.figures(batch, teacher.signal(batch)), tokens]))
        finally:
            student.train(mode)
            _reshard(student)
    counted = len(list(ranks.mine(batches)))
    return ranks.in_order(torch.stack(rows)[:counted])


def validate(
    student: StudentModule,
    teacher: Teacher | RememberedTeacher,
    sets: Mapping[str, Sequence[TokenBatch]],
    ranks: Ranks = ALONE,
) -> Figures:
    """For each set kl_to_teacher and loss (nats per token), and top1_agreement (share of tokens); see `sums_of`."""
    result = {}
    for name, batches in sets.items():
        total = sums_of(student, teacher, batches, ranks).sum(0)
        kl, loss, same = (total[:-1] / total[-1]).tolist()
        result[name] = {"kl_to_teacher": kl, "loss": loss, "top1_agreement": same}
    return result


def mean_kl(figures: Figures) -> float:
    """Over the sets, each counting alike."""
    return sum(one["kl_to_teacher"] for one in figures.values()) / len(figures)


def _reshard(student: nn.Module) -> None:
    """Without a backward the root keeps its gathered weights, in the compute dtype; the sharded ones are the state."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

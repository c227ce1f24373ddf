"""A loss is a sum of terms: an objective, its weight and temperature at this step, and the objective's own options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One summand of the loss, as it stands at one step; an option that its objective doesn't use is ignored."""

    objective: str
    weight: float = 1.0
    temperature: float = 1.0  # both distributions are softmax(logits / temperature)
    squared: bool = False  # times temperature**2, which keeps the gradient's size when temperatures are compared
    k: int = 8  # bild, top_k_kl: how many of the largest logits
    beta: float = 0.5  # jensen_shannon: the teacher's share of the mixture
    skew: float = 0.1  # skew_kl, skew_reverse_kl: the other distribution's share
    head_mass: float = 0.5  # adaptive_kl: probability of the teacher's head
    lower_quantile: float = 0.0  # dac_kl: of the teacher's probabilities, what is kept
    upper_quantile: float = 1.0
    smoothing: float = 0.5  # label_smoothing: the teacher's share of the target
    max_temperature: float = 3.0  # dynamic_kl: of a token that the teacher is sure of, as a multiple of temperature
    # hidden_*, minilm_*: [student, teacher] pairs of layers, from 0, negative from the end; None: the last of each
    layers: Sequence[Sequence[int]] | None = None

    @property
    def factor(self) -> float:
        return self.weight * (self.temperature**2 if self.squared else 1.0)


OPTIONS = tuple(f.name for f in fields(Term))[4:]


@dataclass(frozen=True)
class VocabularyShard:
    """The ids start, start + 1, ... that this rank of a tensor-parallel group has the logits of, of `size` in all."""

    group: dist.ProcessGroup
    start: int
    size: int


class Rows:
    """R loss tokens over the vocabulary, at one temperature, in float32 or better; what is asked for is kept.

    What an objective says of a whole row it asks here, so that V may be a rank's shard of the vocabulary: then every
    rank of the group asks the same, and sums, largest tokens and single ids are those of the whole.

    Args:
        student_RV: logits / temperature.
        teacher_RV: the teacher's, or None where only labels are.
        labels_R: the next token's id.
        paired_R: whether the row after is the next token of the same document.
        shard: None for a whole vocabulary.
    """

    def __init__(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor | None,
        labels_R: Tensor,
        paired_R: Tensor,
        shard: VocabularyShard | None = None,
    ) -> None:
        self.student_RV = student_RV
        self._teacher_RV = teacher_RV
        self.labels_R = labels_R
        self.paired_R = paired_R
        self.shard = shard

    @property
    def vocab_size(self) -> int:
        return self.student_RV.shape[-1] if self.shard is None else self.shard.size

    def total(self, values_RV: Tensor) -> Tensor:
        """Sum of each row (R,), over the whole vocabulary."""
        return self._reduced(values_RV.sum(-1), dist.ReduceOp.SUM)

    def log_softmax(self, logits_RV: Tensor) -> Tensor:
        """Over the whole vocabulary: a maximum and a sum of each row are exchanged."""
        if self.shard is None:
            return torch.log_softmax(logits_RV, -1)
        largest_R1 = self._reduced(logits_RV.amax(-1), dist.ReduceOp.MAX)[:, None]
        shifted_RV = logits_RV - largest_R1
        return shifted_RV - self.total(shifted_RV.exp()).log()[:, None]

    def through_softmax(self, slope_RV: Tensor) -> Tensor:
        """d loss / d logits from d loss / d q."""
        return self.q_RV * (slope_RV - self.total(self.q_RV * slope_RV)[:, None])

    def take(self, values_RV: Tensor, ids_RK: Tensor) -> Tensor:
        """Values at ids of the whole vocabulary (R, K)."""
        if self.shard is None:
            return values_RV.gather(-1, ids_RK)
        local_RK, here_RK = self._local(ids_RK)
        return self._reduced(values_RV.gather(-1, local_RK).masked_fill(~here_RK, 0), dist.ReduceOp.SUM)

    def add_(self, values_RV: Tensor, ids_RK: Tensor, added_RK: Tensor) -> Tensor:
        """values_RV with added_RK added at ids of the whole vocabulary, in place."""
        if self.shard is None:
            return values_RV.scatter_add_(-1, ids_RK, added_RK)
        local_RK, here_RK = self._local(ids_RK)
        return values_RV.scatter_add_(-1, local_RK, added_RK.masked_fill(~here_RK, 0))

    def put_(self, values_RV: Tensor, ids_RK: Tensor, put_RK: Tensor) -> Tensor:
        """values_RV with put_RK in the places of ids of the whole vocabulary, in place."""
        if self.shard is None:
            return values_RV.scatter_(-1, ids_RK, put_RK)
        taken_RV = self.add_(torch.zeros_like(values_RV), ids_RK, torch.ones_like(put_RK))
        return self.add_(values_RV.masked_fill_(taken_RV > 0, 0), ids_RK, put_RK)

    def largest(self, values_RV: Tensor, k: int) -> Tensor:
        """Ids (R, K) of the k largest, descending; ties, which bfloat16 weights make, by id, so that a run can be
        repeated. Raises AssertionError for more than there are; config checks k against the vocabulary."""
        assert k <= self.vocab_size
        found_RK, ids_RK = values_RV.topk(min(k, values_RV.shape[-1]), -1)
        if self.shard is not None:
            if found_RK.shape[1] < k:  # of a small shard
                missing = len(found_RK), k - found_RK.shape[1]
                found_RK = torch.cat([found_RK, found_RK.new_full(missing, -torch.inf)], -1)
                ids_RK = torch.cat([ids_RK, ids_RK.new_full(missing, self.shard.size)], -1)
            found_RK, ids_RK = self._gathered(found_RK), self._gathered(ids_RK + self.shard.start)
        by_id_RK = ids_RK.argsort(-1)
        by_value_RK = found_RK.gather(-1, by_id_RK).argsort(dim=-1, descending=True, stable=True)
        return ids_RK.gather(-1, by_id_RK.gather(-1, by_value_RK))[:, :k]

    def _local(self, ids_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as places of this shard, any where they aren't in it, and whether they are."""
        assert self.shard is not None
        places_RK = ids_RK - self.shard.start
        here_RK = (places_RK >= 0) & (places_RK < self.student_RV.shape[-1])
        return places_RK.masked_fill(~here_RK, 0), here_RK

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.shard is not None:
            values = values.contiguous()
            dist.all_reduce(values, how, group=self.shard.group)
        return values

    def _gathered(self, values_RK: Tensor) -> Tensor:
        """Of all ranks, side by side."""
        assert self.shard is not None
        everyones = [torch.empty_like(values_RK) for _ in range(self.shard.group.size())]
        dist.all_gather(everyones, values_RK.contiguous(), group=self.shard.group)
        return torch.cat(everyones, -1)

    @property
    def teacher_RV(self) -> Tensor:
        assert self._teacher_RV is not None, "an objective without a teacher's logits asks for them"
        return self._teacher_RV

    @cached_property
    def log_q_RV(self) -> Tensor:
        return self.log_softmax(self.student_RV)

    @cached_property
    def q_RV(self) -> Tensor:
        return self.log_q_RV.exp()

    @cached_property
    def log_p_RV(self) -> Tensor:
        return self.log_softmax(self.teacher_RV)

    @cached_property
    def p_RV(self) -> Tensor:
        return self.log_p_RV.exp()


@dataclass(frozen=True)
class SparseRows:
    """R loss tokens of which the teacher is known at K ids each, by a cache.

    probabilities_RK are its own at a top-k, and an unbiased estimate, counts over draws, at a sample; unused places
    hold id 0 and probability 0. entropy_R is the teacher's, in nats, over the whole vocabulary.
    """

    log_q_RV: Tensor
    ids_RK: Tensor
    probabilities_RK: Tensor
    entropy_R: Tensor


def times_log_ratio(weight: Tensor, log_one: Tensor, log_other: Tensor) -> Tensor:
    """weight * (log_one - log_other), 0 where weight is: 0 log 0 counts for nothing, whatever stands beside it; what is
    not a number stays so."""
    return torch.where(weight == 0, 0, weight * (log_one - log_other))

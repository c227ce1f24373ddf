"""Objectives on ranks that share the vocabulary: values and gradients are those of one rank that has all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed import on_ranks
from torch import Tensor

from compress.models import OutputHead
from compress.objectives.chunked import DenseSignal, Targets, chunked_loss
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Term, VocabularyShard

SHARED = [name for name, known in OBJECTIVES.items() if known.function is not None and not known.whole_vocabulary]
TOKENS, VOCABULARY = 13, 32


def _terms(name: str) -> list[Term]:
    """k is more than a rank of four has; half a temperature beside a whole one."""
    return [Term(name, temperature=2.0, k=11), Term(name, weight=0.5, k=3)]


def _loss(
    tensors: list[Tensor], rows: slice, terms: list[Term], cap: float | None, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    student_ND, head_VD, teacher_NE, teacher_VE, bias_V = (one.clone() for one in tensors)
    student_ND.requires_grad_()
    weight_VD, bias_V = head_VD[rows].clone().requires_grad_(), bias_V[rows].clone().requires_grad_()
    labels_N = torch.arange(TOKENS) * 5 % VOCABULARY
    targets = Targets(labels_N, torch.arange(TOKENS) % 4 != 3)
    head = OutputHead(weight_VD, cap, bias_V, 0.7)
    signal = DenseSignal(teacher_NE, OutputHead(teacher_VE[rows]))
    scales = [0.3, 0.2]
    loss, sums_K = chunked_loss(student_ND, head, signal, targets, terms, scales, chunk_tokens=5, shard=shard)
    loss.backward()
    return loss.detach(), sums_K, [x.grad for x in (student_ND, weight_VD, bias_V) if x.grad is not None]


def _case(banned: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (TOKENS, 7), (VOCABULARY, 7), (TOKENS, 5), (VOCABULARY, 5), (VOCABULARY,)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[1][20:24] = tensors[1][4:8]  # ties, some across shards
    tensors[3][9] = tensors[3][30]
    if banned:  # some ids, all of them of one rank's shard
        tensors[2][:, 0], tensors[3][:, 0] = 1.0, 0.0
        tensors[3][24:, 0] = -torch.inf
    return tensors


def _as_one(ranks: int) -> None:
    share = VOCABULARY // ranks
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    for name in SHARED:
        for cap, banned in ((None, False), (2.0, False), *([(None, True)] if name == "forward_kl" else [])):
            tensors, terms = _case(banned), _terms(name)
            shard = VocabularyShard(dist.group.WORLD, rows.start, VOCABULARY)  # type: ignore[arg-type]
            loss, sums_K, (grad_ND, grad_VD, grad_V) = _loss(tensors, rows, terms, cap, shard)
            dist.all_reduce(grad_ND)
            whole, whole_K, (whole_ND, whole_VD, whole_V) = _loss(tensors, slice(None), terms, cap, None)
            pairs = [(loss, whole), (sums_K, whole_K), (grad_ND, whole_ND), (grad_VD, whole_VD[rows])]
            for ours, theirs in [*pairs, (grad_V, whole_V[rows])]:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, msg=lambda text: f"{name}: {text}")  # noqa: B023
            assert whole != 0


def test_every_objective_of_two_ranks_is_that_of_one() -> None:
    assert len(SHARED) >= 12
    on_ranks(2, _as_one, 2)


def test_every_objective_of_four_ranks_is_that_of_one() -> None:
    on_ranks(4, _as_one, 4)

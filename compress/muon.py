"""Muon over row shards: each matrix is orthogonalised whole by one rank, everything else is elementwise and local."""

# R rows and C columns of a matrix, S rows of this rank's shard

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

MOMENTUM, STEPS, COEFFICIENTS, EPSILON = 0.95, 5, (3.4445, -4.7750, 2.0315), 1e-7  # torch.optim.Muon's


class Muon(torch.optim.Optimizer):
    """What torch.optim.Muon (kellerjordan.github.io/posts/muon) does with whole matrices, bit for bit, on shards.

    Momentum lies with the parameter's shard, so that a checkpoint of it loads under any number of ranks. A step sends
    each matrix's update to its owner in bfloat16, the dtype of the iteration, and takes the result back: 4 bytes an
    element in all. Owners take turns in order of size.

    Args:
        shards: what this rank holds of each matrix, (S, C) float32.
        wholes: the matrices that they are of, (R, C): the same tensors, or DTensors split by rows.

    Raises ValueError for a matrix that isn't split by rows.
    """

    def __init__(self, shards: Sequence[Tensor], wholes: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(shards, {"lr": lr, "weight_decay": weight_decay})
        self._group = group_of(wholes)
        self._rows = [_rows(whole, self._group) for whole in wholes]
        self._order = sorted(range(len(wholes)), key=lambda n: (-wholes[n].numel(), n))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        ranks = _size(self._group)
        trained = [n for n in self._order if group["params"][n].grad is not None]
        for start in range(0, len(trained), ranks):
            numbers = trained[start : start + ranks]
            shards = [group["params"][n] for n in numbers]
            updates = [self._with_momentum(shard) for shard in shards]
            for number, shard, update in zip(numbers, shards, self._orthogonal(numbers, updates), strict=True):
                shard.mul_(1 - group["lr"] * group["weight_decay"])
                wide = max(1, sum(self._rows[number]) / shard.shape[1])
                shard.add_(update, alpha=-group["lr"] * math.sqrt(wide))

    def _with_momentum(self, shard_SC: Tensor) -> Tensor:
        assert shard_SC.grad is not None
        state = self.state[shard_SC]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(shard_SC)
        momentum_SC: Tensor = state["momentum_buffer"].lerp_(shard_SC.grad, 1 - MOMENTUM)
        return shard_SC.grad.lerp(momentum_SC, MOMENTUM).bfloat16()

    def _orthogonal(self, numbers: Sequence[int], shards: Sequence[Tensor]) -> list[Tensor]:
        """The shards of as many matrices as there are ranks, at most, each orthogonalised as a whole by its owner."""
        if self._group is None:
            return [orthogonal(shard) for shard in shards]
        rank = dist.get_rank(self._group)
        own = self._rows[numbers[rank]] if rank < len(numbers) else [0]
        columns = shards[rank].shape[1] if rank < len(numbers) else 0
        sent = [shard.numel() for shard in shards] + [0] * (_size(self._group) - len(shards))
        got = [rows * columns for rows in own] if columns else [0] * len(sent)
        whole = shards[0].new_empty(sum(got))
        dist.all_to_all_single(whole, torch.cat([shard.flatten() for shard in shards]), got, sent, group=self._group)
        if columns:
            whole = orthogonal(whole.view(-1, columns)).flatten()
        back = shards[0].new_empty(sum(sent))
        dist.all_to_all_single(back, whole, sent, got, group=self._group)
        return [part.view_as(shard) for part, shard in zip(back.split(sent), shards, strict=False)]


def orthogonal(matrix_RC: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, in bfloat16: Newton-Schulz iterations whose singular values end near 1."""
    first, second, third = COEFFICIENTS
    wide = matrix_RC.shape[0] <= matrix_RC.shape[1]
    x = matrix_RC.bfloat16() if wide else matrix_RC.bfloat16().T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x if wide else x.T


def _rows(whole: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """How many rows each rank holds: torch's chunks, the last of them smaller or empty."""
    ranks = _size(group)
    size = -(-len(whole) // ranks)
    return [max(0, min(size, len(whole) - rank * size)) for rank in range(ranks)]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_of(parameters: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that parameters are split over by their first dimension; None where every rank has them whole."""
    for whole in parameters:
        split = [n for n, one in enumerate(whole.placements) if one.is_shard()] if isinstance(whole, DTensor) else []
        if not isinstance(whole, DTensor) or not split:
            continue
        if len(split) > 1 or whole.placements[split[0]] != Shard(0):
            raise ValueError(f"parameters must be split by rows, over one dimension of ranks, not {whole.placements}")
        group: dist.ProcessGroup = whole.device_mesh.get_group(split[0])
        return group if _size(group) > 1 else None
    return None

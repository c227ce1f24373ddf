"""What activations are reduced to while they are at hand: numbers per unit and sequence, and angles between states.

Here in blocks that stay in a CPU's cache; the same to the last bits of float32 by the compiled kernels of `kernels.py`.
"""

# B sequences, T tokens, N tokens of a batch, D hidden, X units

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 17  # of a CPU's blocks: half a megabyte in float32
_buffers: dict[tuple[torch.dtype, int], Tensor] = {}


@dataclass(frozen=True)
class Reductions:
    """One way of doing it.

    aggregate: (values (B, T, X), which tokens are real (B, T) or None for all, aggregation) -> (B, X) in float32 or
        better: mean |s|, sqrt(sum s^2) or population variance over each sequence's real tokens, of which every
        sequence must have one.
    angles: (states (N, D), states (N, D)) -> sum over tokens of 1 - cosine, in float32.
    """

    aggregate: Callable[[Tensor, Tensor | None, str], Tensor]
    angles: Callable[[Tensor, Tensor], float]


def aggregate_sequence(values_BTX: Tensor, valid_BT: Tensor | None, aggregation: str) -> Tensor:
    """`Reductions.aggregate` in blocks."""
    dtype = torch.promote_types(values_BTX.dtype, torch.float32)
    result_BX = torch.empty(values_BTX.shape[0], values_BTX.shape[2], dtype=dtype, device=values_BTX.device)
    for sequence, values_TX in enumerate(values_BTX):
        real_TX = values_TX if valid_BT is None else values_TX[valid_BT[sequence]]
        result_BX[sequence] = _aggregate(real_TX, aggregation, dtype)
    return result_BX


def _aggregate(values_TX: Tensor, aggregation: str, dtype: torch.dtype) -> Tensor:
    if aggregation == "mean":
        return _column_sums(values_TX, torch.Tensor.abs_, dtype) / len(values_TX)
    if aggregation == "l2":
        return _column_sums(values_TX, torch.Tensor.square_, dtype).sqrt()
    mean_X = _column_sums(values_TX, lambda block: block, dtype) / len(values_TX)
    return _column_sums(values_TX, lambda block: block.sub_(mean_X).square_(), dtype) / len(values_TX)


def _column_sums(values_TX: Tensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension of what `change` makes of it."""
    sums_X = values_TX.new_zeros(values_TX.shape[1], dtype=dtype)
    for block in _blocks(values_TX, dtype):
        sums_X += change(block).sum(0)
    return sums_X


def _blocks(values_NX: Tensor, dtype: torch.dtype, buffer: int = 0) -> Iterator[Tensor]:
    """Copies of consecutive rows in `dtype`, to be overwritten: on a CPU as large as its cache and in the same place,
    so that memory is read once and none is taken; elsewhere the whole."""
    if values_NX.device.type != "cpu":
        yield values_NX.to(dtype, copy=True)
        return
    rows = max(1, _BLOCK_ELEMENTS // values_NX.shape[1])
    place = _buffers.setdefault((dtype, buffer), torch.empty(0, dtype=dtype))
    if place.numel() < rows * values_NX.shape[1]:
        place = _buffers[dtype, buffer] = torch.empty(rows * values_NX.shape[1], dtype=dtype)
    for part in values_NX.split(rows):
        yield place[: part.numel()].view(part.shape).copy_(part)


def angles(before_ND: Tensor, after_ND: Tensor) -> float:
    """`Reductions.angles` in blocks."""
    total = 0.0
    pairs = zip(_blocks(before_ND, torch.float32), _blocks(after_ND, torch.float32, 1), strict=True)
    for one, other in pairs:
        lengths_N = torch.linalg.vector_norm(one, dim=-1), torch.linalg.vector_norm(other, dim=-1)
        total += angle_sum(*lengths_N, torch.linalg.vector_norm(one.sub_(other), dim=-1)).item()
    return total


def angle_sum(one_N: Tensor, other_N: Tensor, between_N: Tensor) -> Tensor:
    """Sum of 1 - cosine from the lengths of two vectors and of their difference.

    By (|a - b|^2 - (|a| - |b|)^2) / 2|a||b|, since 1 - a.b / |a||b| is a small difference of two large numbers: a layer
    that hardly turns the stream would have its fifth digit from rounding.
    """
    one_N, other_N, between_N = one_N.double(), other_N.double(), between_N.double()
    numerator_N = between_N.square() - (one_N - other_N).square()
    return (numerator_N / (2 * one_N * other_N).clamp_min(1e-8)).sum()


BLOCKED = Reductions(aggregate_sequence, angles)


class Running:
    """Mean and sum of squared deviations over sequences, merged batch by batch (Chan et al.); float64, a few kB."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_X: Tensor = torch.zeros((), dtype=torch.float64)
        self.deviation_X: Tensor = torch.zeros((), dtype=torch.float64)

    def merge(self, count: int, mean_X: Tensor, deviation_X: Tensor) -> None:
        total = self.count + count
        shift_X = mean_X - self.mean_X
        self.deviation_X = self.deviation_X + deviation_X + shift_X.square() * (self.count * count / total)
        self.mean_X = self.mean_X + shift_X * (count / total)
        self.count = total

    def result(self, aggregation: str) -> Tensor:
        """Over the values of all sequences, which are never negative, so that mean |s| is their mean."""
        if aggregation == "mean":
            return self.mean_X
        if aggregation == "l2":
            return (self.deviation_X + self.count * self.mean_X.square()).sqrt()
        return self.deviation_X / self.count


def column_norms(weight_DX: Tensor) -> Tensor:
    """In float64, some rows at a time: whole copies would be the largest thing in a small model's memory."""
    squares_X = torch.zeros(weight_DX.shape[1], dtype=torch.float64)
    for rows_RX in weight_DX.split(64):
        squares_X += rows_RX.double().square().sum(0).cpu()
    return squares_X.sqrt_()

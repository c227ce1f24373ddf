"""An exponential moving average of the weights, in float32 on local shards: what an export takes instead of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compress.optimizer import local_part, split_like


class MovingAverage:
    """average = d * average + (1 - d) * weights after every step, with d = min(decay, (1 + steps) / (10 + steps)).

    The lower d of the first steps lets the average forget the untrained weights, also in a short run.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(student.named_parameters())
        self._weights = [local_part(p.detach()) for p in self.parameters.values()]
        self._average = [weight.clone() for weight in self._weights]

    def update(self, steps: int) -> None:
        """After the optimizer's step that made it `steps` in all."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """By parameter name, split over the ranks as the parameter is; a checkpoint is loaded into these in place."""
        return {
            name: split_like(average, parameter)
            for (name, parameter), average in zip(self.parameters.items(), self._average, strict=True)
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The student has the average for its weights inside of the block, and its own bits again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

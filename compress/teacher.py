"""Where the teacher's word comes from: its own forward, or a recording of it."""

# N loss tokens of a micro-batch, E teacher hidden

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.artifacts import fingerprint, open_tensors, save_tensors
from compress.models import output_head
from compress.objectives.chunked import DenseSignal, SparseSignal
from compress.signals import SignalCache
from compress.step import trunk
from compress.tokens import TokenBatch


class Teacher:
    """The frozen model that is distilled from; not an nn.Module, so that it is in nobody's parameters or state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def answers(self, batch: TokenBatch) -> bool:
        return True

    @torch.no_grad()
    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The trunk's forward without the head; the head runs chunk by chunk inside the objective."""
        return DenseSignal(trunk(self.model, batch)[batch.loss_mask], output_head(self.model))


class RecordedTeacher(Teacher):
    """A teacher whose signals are kept in files, so that several students on the same micro-batches share one pass."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """What `Teacher.signal` says, from the file of this very micro-batch where there is one."""
        batch_key = fingerprint([getattr(batch, name).tolist() for name in ("input_ids", "position_ids", "loss_mask")])
        path = self.folder / f"{batch_key}.safetensors"
        if not path.exists():
            save_tensors(path, {"hidden": super().signal(batch).hidden_NE})
        return DenseSignal(open_tensors(path).get_tensor("hidden"), output_head(self.model))


class CachedTeacher:
    """A teacher of which only a cache is there; its weights are never loaded."""

    def __init__(self, cache: SignalCache) -> None:
        self.cache = cache

    def answers(self, batch: TokenBatch) -> bool:
        return True

    def signal(self, batch: TokenBatch) -> SparseSignal:
        """Raises ArtifactError for a sequence that the cache doesn't hold."""
        return self.cache.read(batch)

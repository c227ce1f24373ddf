"""Where the teacher's word comes from: its own forward, or a recording of it."""

# N loss tokens of a micro-batch, E teacher hidden

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.artifacts import fingerprint, open_tensors, save_tensors
from compress.capture import Listening, recording
from compress.models import output_head
from compress.objectives.chunked import DenseSignal
from compress.step import trunk
from compress.tokens import TokenBatch


class Teacher:
    """The frozen model that is distilled from; not an nn.Module, so that it is in nobody's parameters or state.

    Its signals carry what `listening` asks for of its inside.
    """

    def __init__(self, model: PreTrainedModel, listening: Listening | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.listening = listening or Listening()

    def answers(self, batch: TokenBatch) -> bool:
        return True

    @torch.no_grad()
    def signal(self, batch: TokenBatch) -> DenseSignal:
        """The trunk's forward without the head; the head runs chunk by chunk inside the objective."""
        with recording(self.model, self.listening, batch.loss_mask) as recorded:
            hidden_NE = trunk(self.model, batch)[batch.loss_mask]
        return DenseSignal(hidden_NE, output_head(self.model), recorded if self.listening else None)


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

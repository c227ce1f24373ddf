"""The distillation step: one module that owns the student's trunk, head and loss, and the loop over micro-batches.

Under FSDP2 parameters exist in full only inside the wrapped module's forward, so everything that touches them is in it.
"""

# B sequences, T tokens, N loss tokens of a micro-batch, D student hidden, E teacher hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from compress.artifacts import fingerprint, open_tensors, save_tensors
from compress.families import family_of_config
from compress.models import OutputHead, output_head
from compress.objectives import distillation_loss
from compress.tokens import TokenBatch


@dataclass
class TeacherSignal:
    """What the teacher says about a micro-batch's N loss tokens: hidden states to be put through its own head.

    Handing over hidden states instead of logits is V / E times less memory and loses nothing.
    """

    hidden_NE: Tensor
    head: OutputHead


def trunk(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Final hidden states (B, T, D), after the last norm, of packed documents, each as if it were alone.

    transformers isolates documents only with restarting positions, no attention mask and no cache; the families whose
    code forgets the positions are given the masks.
    """
    output = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=packed_masks(model, batch.position_ids),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def packed_masks(model: PreTrainedModel, position_ids_BT: Tensor) -> dict[str, Any] | None:
    """The attention masks of packed documents, by kind of layer; None where the family makes them from the positions.

    Without them documents leak into each other silently: tests/test_slicing.py, packed = each document alone.
    """
    if not family_of_config(model.config).needs_packed_masks:
        return None
    shape = (*position_ids_BT.shape, 1)  # only its dtype, device and first two sizes are looked at
    arguments: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty(shape, dtype=model.dtype, device=position_ids_BT.device),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids_BT,
    }
    return {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }


class Teacher:
    """The frozen model that is distilled from; not an nn.Module, so that it is in nobody's parameters or state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def signal(self, batch: TokenBatch) -> TeacherSignal:
        """The trunk's forward without the head; the head runs chunk by chunk inside the objective."""
        return TeacherSignal(trunk(self.model, batch)[batch.loss_mask], output_head(self.model))


class RecordedTeacher(Teacher):
    """A teacher whose signals are kept in files, so that several students on the same micro-batches share one pass."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder

    def signal(self, batch: TokenBatch) -> TeacherSignal:
        """What `Teacher.signal` says, from the file of this very micro-batch where there is one."""
        batch_key = fingerprint([getattr(batch, name).tolist() for name in ("input_ids", "position_ids", "loss_mask")])
        path = self.folder / f"{batch_key}.safetensors"
        if not path.exists():
            save_tensors(path, {"hidden": super().signal(batch).hidden_NE})
        return TeacherSignal(open_tensors(path).get_tensor("hidden"), output_head(self.model))


def divergence(model: PreTrainedModel, batch: TokenBatch, signal: TeacherSignal, temperature: float = 1.0) -> Tensor:
    """KL(teacher || model) in nats, summed over the micro-batch's loss tokens."""
    head = output_head(model)
    return distillation_loss(
        trunk(model, batch)[batch.loss_mask],
        head.weight_VD,
        signal.hidden_NE,
        signal.head.weight_VD,
        temperature=temperature,
        student_softcap=head.softcap,
        teacher_softcap=signal.head.softcap,
    )


class StudentModule(nn.Module):
    """Trunk, head and objective in one forward, to be wrapped by `parallel.shard`."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: TokenBatch, signal: TeacherSignal) -> Tensor:
        return divergence(self.model, batch, signal, self.temperature)


def accumulate_gradients(
    student: nn.Module, teacher: Teacher, micro_batches: Iterable[TokenBatch]
) -> tuple[float, int]:
    """Forward and backward over one global batch; returns (loss in nats per token, loss tokens).

    The loss is (sum over all loss tokens) / (count of all loss tokens of the window), counted before the first
    backward: the gradient is the same for every split into micro-batches. A micro-batch without loss tokens adds
    nothing; a window without any is the caller's to refuse.
    """
    window = list(micro_batches)
    count = sum(int(batch.loss_mask.sum()) for batch in window)
    total = 0.0
    for index, batch in enumerate(window):
        last = index == len(window) - 1
        if hasattr(student, "set_requires_gradient_sync"):  # FSDP2: reduce once, after the last micro-batch
            student.set_requires_gradient_sync(last)  # type: ignore[operator]
            student.set_reshard_after_backward(last)  # type: ignore[operator]
        loss = student(batch, teacher.signal(batch))
        (loss / count).backward()
        total += loss.item()
    return total / count, count

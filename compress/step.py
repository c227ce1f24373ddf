"""The distillation step: one module that owns the student's trunk, head and loss, and the loop over micro-batches.

Under FSDP2 parameters exist in full only inside the wrapped module's forward, so everything that touches them is in it.
"""

# B sequences, T tokens, N loss tokens of a micro-batch, D student hidden, E teacher hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.objectives import distillation_loss
from compress.tokens import TokenBatch


@dataclass
class TeacherSignal:
    """What the teacher says about a micro-batch's N loss tokens: hidden states to be put through its own head.

    Handing over hidden states instead of logits is V / E times less memory and loses nothing.
    """

    hidden_NE: Tensor
    head_VE: Tensor


def trunk(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Final hidden states (B, T, D), after the last norm, of packed documents, each as if it were alone.

    transformers isolates documents only with restarting positions, no attention mask and no cache.
    """
    output = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


class Teacher:
    """The frozen model that is distilled from; not an nn.Module, so that it is in nobody's parameters or state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def signal(self, batch: TokenBatch) -> TeacherSignal:
        """The trunk's forward without the head; the head runs chunk by chunk inside the objective."""
        return TeacherSignal(trunk(self.model, batch)[batch.loss_mask], self.model.lm_head.weight)


class StudentModule(nn.Module):
    """Trunk, head and objective in one forward, to be wrapped by `parallel.shard`."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: TokenBatch, signal: TeacherSignal) -> Tensor:
        """KL(teacher || student) in nats, summed over the micro-batch's loss tokens."""
        hidden_ND = trunk(self.model, batch)[batch.loss_mask]
        head_VD = self.model.lm_head.weight
        return distillation_loss(hidden_ND, head_VD, signal.hidden_NE, signal.head_VE, temperature=self.temperature)


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

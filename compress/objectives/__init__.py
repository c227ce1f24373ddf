"""What the student is trained towards: objectives as terms of a sum, on logits in chunks or on hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.models import OutputHead
from compress.objectives.chunked import DenseSignal, Targets, chunked_loss
from compress.objectives.terms import Term


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | OutputHead,
    teacher_hidden: Tensor,
    teacher_head: Tensor | OutputHead,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL(teacher || student) in nats, summed over the N tokens given; not multiplied by temperature**2.

    Forward KL on logits is Minitron's whole retraining loss (arXiv 2407.14679, section 4.1, practice 5);
    `chunked.chunked_loss` takes any sum of objectives.

    Args:
        student_hidden: (N, D) final hidden states at the loss tokens only, after the last norm.
        student_head: (V, D) output head, or an `OutputHead` with bias, scale and soft cap.
        teacher_hidden, teacher_head: (N, E) and (V, E); no gradient is formed for them.
        temperature: both distributions are softmax(logits / temperature).
        chunk_tokens: tokens per matrix product; None: as many as 192 MiB of logits hold.

    Returns:
        a scalar in float32 (float64 for float64 inputs). With N = 0 it is 0 and its gradients are zeros.
    """
    heads = [h if isinstance(h, OutputHead) else OutputHead(h) for h in (student_head, teacher_head)]
    none_N = torch.zeros(len(student_hidden), dtype=torch.int64, device=student_hidden.device)
    signal, term = DenseSignal(teacher_hidden, heads[1]), Term("forward_kl", temperature=temperature)
    targets = Targets(none_N, none_N.bool())
    return chunked_loss(student_hidden, heads[0], signal, targets, [term], chunk_tokens=chunk_tokens)[0]

"""What a student says against its teacher at the same tokens, from hidden states, in pieces of bounded memory."""

# N loss tokens, C of a chunk, D student hidden, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from compress.models import OutputHead, logits_of
from compress.objectives.chunked import DenseSignal
from compress.objectives.terms import times_log_ratio

CHUNK_TOKENS = 256


def compare(hidden_ND: Tensor, head: OutputHead, signal: DenseSignal, labels_N: Tensor) -> Tensor:
    """(3,), float64: KL(teacher || student) in nats, the student's loss in nats, the tokens at which both rank the same
    first; each summed over the N tokens. Softmax in float32."""
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in (slice(start, start + CHUNK_TOKENS) for start in range(0, len(labels_N), CHUNK_TOKENS)):
        log_p_CV = torch.log_softmax(logits_of(signal.hidden_NE[chunk], signal.head).float(), -1)
        log_q_CV = torch.log_softmax(logits_of(hidden_ND[chunk], head).float(), -1)
        sums += compare_chunk(log_p_CV.exp(), log_p_CV, log_q_CV, labels_N[chunk])
    return sums


def compare_chunk(p_CV: Tensor, log_p_CV: Tensor, log_q_CV: Tensor, labels_C: Tensor) -> Tensor:
    """What `compare` says, of a chunk whose log-probabilities are there."""
    kl = times_log_ratio(p_CV, log_p_CV, log_q_CV).sum(dtype=torch.float64)
    loss = -log_q_CV.gather(1, labels_C[:, None]).sum(dtype=torch.float64)
    return torch.stack([kl, loss, (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum()]).cpu()

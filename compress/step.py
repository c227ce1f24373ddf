"""The distillation step: one module that owns the student's trunk, head and loss, and the loop over micro-batches.

Under FSDP2 parameters exist in full only inside the wrapped module's forward, so everything that touches them is in it.
"""

# B sequences, T tokens, N loss tokens of a micro-batch, D student hidden, E teacher hidden, K terms

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from compress.capture import listening, recording
from compress.comparison import compare
from compress.families import family_of_config
from compress.models import OutputHead, output_head, without_padding
from compress.objectives import distillation_loss
from compress.objectives.chunked import DenseSignal, Signal, SparseSignal, Targets, chunked_loss
from compress.objectives.hidden import Inside
from compress.objectives.table import OBJECTIVES, needs_hidden_states
from compress.objectives.terms import Term
from compress.parallel import ALONE, Ranks, gathered_once
from compress.routing import Balance, ExpertLoad, hearing, in_float32, tally
from compress.tokens import TokenBatch


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


class TeacherSource(Protocol):
    """Who says what the student is trained towards."""

    def answers(self, batch: TokenBatch) -> bool:
        """Whether there is a signal for this micro-batch; known without computing it."""
        ...

    def signal(self, batch: TokenBatch) -> Signal:
        """What the teacher says at the micro-batch's loss tokens; None where it doesn't answer."""
        ...


def divergence(model: PreTrainedModel, batch: TokenBatch, signal: DenseSignal) -> Tensor:
    """KL(teacher || model) in nats, summed over the micro-batch's loss tokens."""
    hidden_ND = trunk(model, batch)[batch.loss_mask]
    student, teacher = without_padding(output_head(model), signal.head)
    return distillation_loss(hidden_ND, student, signal.hidden_NE, teacher)


def targets_of(batch: TokenBatch, pairs: bool = False) -> Targets:
    """The next tokens at the loss tokens of a micro-batch and, where asked for, which of them are neighbours."""
    mask_BT = batch.loss_mask
    labels_N = batch.input_ids.roll(-1, 1)[mask_BT]
    return Targets(labels_N, _paired(mask_BT)[mask_BT] if pairs else torch.zeros_like(labels_N, dtype=torch.bool))


def _paired(mask_BT: Tensor) -> Tensor:
    """True at t when t + 1 is a loss token too: of the same document, since t's own target is t + 1."""
    paired_BT = torch.zeros_like(mask_BT)
    paired_BT[:, :-1] = mask_BT[:, :-1] & mask_BT[:, 1:]
    return paired_BT


class StudentModule(nn.Module):
    """Trunk, head and objectives in one forward, to be wrapped by `parallel.shard`.

    compiled: the objective's kernel too, where there is one; layers are compiled by `parallel.compile_layers`.
    """

    def __init__(
        self, model: PreTrainedModel, projections: nn.ParameterDict | None = None, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model, self.compiled = model, compiled
        self.projections = nn.ParameterDict() if projections is None else projections  # trained, never exported
        self.head_seconds = 0.0  # spent in heads and objectives since the module was made
        self.routers = in_float32(model)
        self.tallies: list[Tensor] = []  # of each forward in training, what `tally` says; none of a dense model

    def forward(
        self,
        batch: TokenBatch,
        signal: Signal,
        terms: Sequence[Term],
        scales: Sequence[float],
        balance: Balance | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the scaled sum to differentiate, each term's own sum (K,), the final hidden states (N, D), detached)."""
        wanted = listening(terms, to_teacher=False)
        with recording(self.model, wanted, batch.loss_mask) as recorded, hearing(self.routers) as heard:
            hidden_ND = trunk(self.model, batch)[batch.loss_mask]
        valid_N = batch.valid_mask.flatten()
        if self.routers:
            self.tallies.append(tally(heard, valid_N))
        of_logits = [n for n, term in enumerate(terms) if not needs_hidden_states([term])]
        if of_logits:
            chosen = [terms[n] for n in of_logits], [scales[n] for n in of_logits]
            loss, sums = self._of_logits(batch, hidden_ND, signal, *chosen)
        else:  # the final states go into the loss all the same: every unit of FSDP2 must meet its backward
            loss, sums = 0 * hidden_ND.sum(dtype=torch.float32), hidden_ND.new_zeros(0, dtype=torch.float32)
        if balance is not None:
            loss = loss + balance.loss(heard, valid_N)
        if len(of_logits) == len(terms):
            return loss, sums, hidden_ND.detach()
        assert isinstance(signal, DenseSignal)
        assert signal.recorded is not None, "the teacher was not asked to listen"
        inside = Inside(recorded, signal.recorded, self.projections, batch.position_ids, batch.loss_mask)
        found = dict(zip(of_logits, sums, strict=True))
        for number, (term, scale) in enumerate(zip(terms, scales, strict=True)):
            function = OBJECTIVES[term.objective].inside
            if function is not None:
                value = function(inside, term)
                loss, found[number] = loss + scale * value, value.detach()
        return loss, torch.stack([found[number] for number in range(len(terms))]), hidden_ND.detach()

    def _of_logits(
        self, batch: TokenBatch, hidden_ND: Tensor, signal: Signal, terms: Sequence[Term], scales: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        targets = targets_of(batch, pairs=any(OBJECTIVES[term.objective].pairs for term in terms))
        head = output_head(self.model)
        if isinstance(signal, DenseSignal):
            head, theirs = without_padding(head, signal.head)
            signal = replace(signal, head=theirs)
        elif isinstance(signal, SparseSignal) and signal.vocab_size is not None:
            head = head.rows(min(len(head.weight_VD), signal.vocab_size))
        began = time.perf_counter()
        result = chunked_loss(hidden_ND, head, signal, targets, terms, scales, compiled=self.compiled)
        self.head_seconds += time.perf_counter() - began
        return result

    @torch.no_grad()
    def head_now(self, dtype: torch.dtype) -> OutputHead:
        """A copy of the output head in the dtype of the forward, whole on every rank, all of which call it."""
        head = output_head(self.model)

        def copied(tensor: Tensor) -> Tensor:
            return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype, copy=True)

        bias_V = None if head.bias_V is None else copied(head.bias_V)
        return OutputHead(copied(head.weight_VD), head.softcap, bias_V, head.scale)

    def figures(self, batch: TokenBatch, signal: DenseSignal) -> Tensor:
        """What `comparison.compare` says of a micro-batch; without gradients. For FSDP2 a forward of its own."""
        hidden_ND = trunk(self.model, batch)[batch.loss_mask]
        head, theirs = without_padding(output_head(self.model), signal.head)
        return compare(hidden_ND, head, replace(signal, head=theirs), targets_of(batch).labels_N)


@dataclass(frozen=True)
class StepLoss:
    """What one global batch said: the loss, each term's mean in its own unit, the loss tokens of all ranks.

    teacher_seconds: of this rank, waiting for the teacher's signals. experts: of a mixture.
    """

    loss: float
    terms: tuple[float, ...]
    num_tokens: int
    teacher_seconds: float = 0.0
    experts: ExpertLoad | None = None


def accumulate_gradients(
    student: StudentModule,
    teacher: TeacherSource,
    micro_batches: Iterable[TokenBatch],
    terms: Sequence[Term],
    ranks: Ranks = ALONE,
    keep: list[Tensor] | None = None,
    whole_window: bool = False,
    balance: Balance | None = None,
) -> StepLoss:
    """Forward and backward over one global batch, of which every rank is given its own micro-batches.

    A term's loss is (its sum over all its tokens) / (how many there are) over the whole window of all ranks, counted
    before the first backward: the gradient is the same for every split into micro-batches, accumulation and ranks.
    A micro-batch without loss tokens adds nothing, but takes part in every collective; so every rank must bring
    equally many. A window without any loss token is the caller's to refuse.

    Args:
        terms: with the weights and temperatures of this step.
        keep: the final hidden states (N, D) of each micro-batch are appended to it, for `teacher.PreviousSelf`.
        whole_window: the teacher answers everything before the student begins: a sharded one is gathered once for all
            of it, at the price of having all of it and as many final hidden states (N, E).
        balance: of a mixture, a further term; it keeps this batch's loads for the next one.
    """
    window = list(micro_batches)
    counts_K, num_tokens, num_valid = _counts(window, teacher, terms, ranks)
    student.tallies.clear()
    if balance is not None:
        balance.begin(num_valid, ranks.size)
    # FSDP2 averages gradients over the ranks, and the loss is a sum over them.
    scales = [t.factor * ranks.size / count if count else 0.0 for t, count in zip(terms, counts_K, strict=True)]
    sums_K = torch.zeros(len(terms), dtype=torch.float64)
    asked = time.perf_counter()
    signals: list[Signal] | None = None
    if whole_window:
        with gathered_once(getattr(teacher, "model", None)):  # of a source that runs one
            signals = [teacher.signal(batch) for batch in window]
    teacher_seconds = time.perf_counter() - asked
    for index, batch in enumerate(window):
        last = index == len(window) - 1
        if hasattr(student, "set_requires_gradient_sync"):  # FSDP2: reduce once, after the last micro-batch
            student.set_requires_gradient_sync(last)  # type: ignore[operator]
            student.set_reshard_after_backward(last)  # type: ignore[operator]
        began = time.perf_counter()
        signal = teacher.signal(batch) if signals is None else signals[index]
        teacher_seconds += time.perf_counter() - began
        said = [number for number, term in enumerate(terms) if signal is not None or _labels_only(term)]
        loss, sums, hidden_ND = student(batch, signal, [terms[n] for n in said], [scales[n] for n in said], balance)
        loss.backward()
        sums_K = sums_K.index_add(0, torch.tensor(said, dtype=torch.int64), sums.to("cpu", torch.float64))
        if keep is not None:
            keep.append(hidden_ND)
    sums_K, *routed = ranks.sums([sums_K, *([torch.stack(student.tallies).sum(0)] if student.tallies else [])])
    means = [total / count if count else 0.0 for total, count in zip(sums_K.tolist(), counts_K, strict=True)]
    loss = sum(term.factor * mean for term, mean in zip(terms, means, strict=True))
    experts = ExpertLoad(routed[0][0], routed[0][1], num_valid) if routed else None
    if balance is not None and experts is not None:
        loss += balance.weight * experts.balance_loss
        balance.counts_LE.copy_(experts.counts_LE)
    return StepLoss(loss, tuple(means), num_tokens, teacher_seconds, experts)


def _labels_only(term: Term) -> bool:
    return OBJECTIVES[term.objective].labels_only


def _counts(
    window: list[TokenBatch], teacher: TeacherSource, terms: Sequence[Term], ranks: Ranks
) -> tuple[list[float], int, int]:
    """Of every rank's window: over how many loss tokens, or pairs of them, each term is a mean, which are those that it
    says something about; all loss tokens; and all tokens that aren't padding."""
    counts_K, num_tokens, num_valid = torch.zeros(len(terms), dtype=torch.float64), 0, 0
    of_pairs = [OBJECTIVES[term.objective].pairs for term in terms]
    for batch in window:
        tokens, answered = int(batch.loss_mask.sum()), teacher.answers(batch)
        pairs = int(_paired(batch.loss_mask).sum()) if any(of_pairs) else 0
        num_tokens += tokens
        num_valid += int(batch.valid_mask.sum())
        for number, term in enumerate(terms):
            if answered or _labels_only(term):
                counts_K[number] += pairs if of_pairs[number] else tokens
    counts_K, totals = ranks.sums([counts_K, torch.tensor([num_tokens, num_valid])])
    return counts_K.tolist(), int(totals[0]), int(totals[1])

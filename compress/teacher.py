"""Where the teacher's word comes from: its own forward, a recording of it, or the student of the step before."""

# N loss tokens, E teacher hidden, D student hidden, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.artifacts import fingerprint, open_tensors, save_tensors
from compress.capture import Listening, recording
from compress.models import OutputHead, output_head
from compress.objectives.chunked import DenseSignal, SparseSignal
from compress.parallel import ALONE, Ranks
from compress.signals import SignalCache, keys_of
from compress.step import trunk
from compress.tokens import TokenBatch

PREVIOUS = "previous/"  # how its tensors' names begin in checkpoints


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


class RememberedTeacher:
    """What a teacher says of some micro-batches, asked once: its last hidden states and its head stay, the rest may go.

    For validation where training asks nobody, or a cache.
    """

    def __init__(self, teacher: Teacher, batches: Iterable[TokenBatch]) -> None:
        self._said = {_key_of(batch): teacher.signal(batch) for batch in batches}

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """Raises KeyError for a batch that it wasn't asked about."""
        return self._said[_key_of(batch)]


class NoTeacher:
    """Nobody: for a loss of labels alone."""

    def answers(self, batch: TokenBatch) -> bool:
        return False

    def signal(self, batch: TokenBatch) -> None:
        return None


class OncePerBatch(Teacher):
    """A teacher that several students ask about the same micro-batches, one step at a time: it runs once for all."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.model, teacher.listening)
        self._said: dict[str, DenseSignal] = {}  # of the newest global batch

    def signal(self, batch: TokenBatch) -> DenseSignal:
        key = _key_of(batch)
        if key not in self._said:
            self._said[key] = super().signal(batch)
        return self._said[key]

    def forget(self) -> None:
        """What it said so far is not asked for again."""
        self._said = {}


class RecordedTeacher(Teacher):
    """A teacher whose signals are kept in files, so that several students on the same micro-batches share one pass.

    Of ranks that share the model each asks at the same time, and has a folder of its own.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, ranks: Ranks = ALONE) -> None:
        super().__init__(model)
        self.folder, self.ranks = folder, ranks

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """What `Teacher.signal` says, from the file of this very micro-batch where there is one."""
        path = self.folder / f"{_key_of(batch)}.safetensors"
        if self.ranks.any(not path.exists()):
            save_tensors(path, {"hidden": super().signal(batch).hidden_NE.cpu()})
        hidden_NE = open_tensors(path).get_tensor("hidden").to(batch.input_ids.device)
        return DenseSignal(hidden_NE, output_head(self.model))


def _key_of(batch: TokenBatch) -> str:
    return fingerprint([key.hex() for key in keys_of(batch)])


class PreviousSelf:
    """What the student itself said of a mini-batch at the step before, before that step's update: no teacher is loaded.

    A global batch is the sequences of the step before and then as many fresh ones (`overlapping`), DLB's sampler (Shen
    et al., CVPR 2022), the base of DynSDPB (arXiv 2411.16991). Its word is kept as the fresh half's final hidden states
    and that step's head, V / D times less than logits. Both belong to the checkpoint: `state`.
    """

    def __init__(self, hidden_ND: Tensor | None = None, head: OutputHead | None = None) -> None:
        self._hidden_ND, self._head = hidden_ND, head
        self._rows: dict[int, slice] = {}  # id of a repeated micro-batch -> its rows of _hidden_ND

    def begin(self, window: Sequence[TokenBatch], num_repeated: int) -> None:
        """A global batch starts: its first num_repeated sequences are the last one's fresh ones, in their order.

        No micro-batch may hold both kinds.
        """
        self._rows, seen, start = {}, 0, 0
        for batch in window:
            seen += len(batch.input_ids)
            if seen <= num_repeated:
                stop = start + int(batch.loss_mask.sum())
                self._rows[id(batch)] = slice(start, stop)
                start = stop
        assert start == (0 if self._hidden_ND is None else len(self._hidden_ND)) or num_repeated == 0

    def answers(self, batch: TokenBatch) -> bool:
        return id(batch) in self._rows

    def signal(self, batch: TokenBatch) -> DenseSignal | None:
        rows = self._rows.get(id(batch))
        if rows is None:
            return None
        assert self._hidden_ND is not None
        assert self._head is not None
        return DenseSignal(self._hidden_ND[rows], self._head)

    def remember(self, window: Sequence[TokenBatch], hidden: Sequence[Tensor], head: OutputHead) -> None:
        """Keep what the student said of the fresh micro-batches (`accumulate_gradients`' keep), and its head.

        To be called before the optimizer's step, with a copy of the head in the dtype of the forward.
        """
        fresh = [said for batch, said in zip(window, hidden, strict=True) if not self.answers(batch)]
        self._hidden_ND, self._head = torch.cat(fresh), head

    def restore(self, state: dict[str, Tensor], head: OutputHead) -> None:
        """Go on from a checkpoint's `state`; `head`: the student's, for what isn't a tensor."""
        if state:
            bias_V = state.get(f"{PREVIOUS}bias")
            self._hidden_ND = state[f"{PREVIOUS}hidden"]
            self._head = OutputHead(state[f"{PREVIOUS}weight"], head.softcap, bias_V, head.scale)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; empty before the first step."""
        if self._hidden_ND is None or self._head is None:
            return {}
        bias = {} if self._head.bias_V is None else {f"{PREVIOUS}bias": self._head.bias_V}
        return {f"{PREVIOUS}hidden": self._hidden_ND, f"{PREVIOUS}weight": self._head.weight_VD, **bias}


def overlapping(step: int, num_fresh: int) -> tuple[range, range]:
    """Draws that the step numbered from 0 repeats, and those it sees for the first time."""
    before = max(0, step - 1) * num_fresh
    return range(before, step * num_fresh), range(step * num_fresh, (step + 1) * num_fresh)


class CachedTeacher:
    """A teacher of which only a cache is there; its weights are never loaded."""

    def __init__(self, cache: SignalCache) -> None:
        self.cache = cache

    def answers(self, batch: TokenBatch) -> bool:
        return True

    def signal(self, batch: TokenBatch) -> SparseSignal:
        """Raises ArtifactError for a sequence that the cache doesn't hold."""
        return self.cache.read(batch)

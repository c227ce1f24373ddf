"""Documents into rows of fixed length, each document isolated: what is lost, cut and padded, and nothing else."""

# S sequences, T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.tokens import Rows

OPEN_ROWS = 64  # rows that whole documents may still go into; more finds little more room and takes longer


@dataclass
class _Row:
    documents: list[tuple[Sequence[int], Sequence[bool] | bool]] = field(default_factory=list)
    used: int = 0

    def add(self, ids: Sequence[int], loss: Sequence[bool] | bool) -> None:
        self.documents.append((ids, loss))
        self.used += len(ids)


class Packer:
    """Rows of `sequence_length` tokens in the order they were begun; the same documents give the same rows."""

    def __init__(self, sequence_length: int, pad_id: int) -> None:
        self.sequence_length, self.pad_id = sequence_length, pad_id
        self._rows: list[_Row] = []
        self._text: _Row | None = None  # where the next text begins
        self._open: list[_Row] = []  # where whole documents may go

    def add_text(self, ids: Sequence[int]) -> None:
        """Append a text, every token of it a target. What is over at a row's end goes on, as a document of its own,
        at the start of the next row; only the last row is padded."""
        at = 0
        while at < len(ids):
            if self._text is None or self._text.used == self.sequence_length:
                self._text = self._begin()
            piece = ids[at : at + self.sequence_length - self._text.used]
            self._text.add(piece, True)
            at += len(piece)

    def add_whole(self, ids: Sequence[int], loss: Sequence[bool]) -> None:
        """Place a document that must stay in one piece in the open row that it fills best, or in a new one.

        The caller has cut it to sequence_length.
        """
        assert 0 < len(ids) == len(loss) <= self.sequence_length
        fitting = [row for row in self._open if row.used + len(ids) <= self.sequence_length]
        if fitting:
            row = max(fitting, key=lambda row: row.used)  # the first of equals, so the result is deterministic
        else:
            row = self._begin()
            self._open.append(row)
        row.add(ids, loss)
        if row.used == self.sequence_length:
            self._open.remove(row)
        elif len(self._open) > OPEN_ROWS:
            self._open.remove(max(self._open, key=lambda row: row.used))

    def _begin(self) -> _Row:
        self._rows.append(_Row())
        return self._rows[-1]

    def rows(self) -> Rows:
        """Everything added so far, padded to full rows; the padding is a document of its own without targets."""
        shape = (len(self._rows), self.sequence_length)
        tokens = np.full(shape, self.pad_id, dtype=np.int32)
        starts, loss = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
        for index, row in enumerate(self._rows):
            at = 0
            for ids, targets in row.documents:
                tokens[index, at : at + len(ids)] = ids
                loss[index, at : at + len(ids)] = targets
                starts[index, at] = 1
                at += len(ids)
            if at < self.sequence_length:
                starts[index, at] = 1
        lengths = np.array([row.used for row in self._rows], dtype=np.int32)
        return Rows(tokens, starts, loss, lengths)

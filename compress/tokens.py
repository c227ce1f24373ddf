"""Packed token sequences on disk, batches of them, and the order in which a training run sees them.

One source of one split is a folder of `shard-00000.safetensors`, ... and an `index.json` that is written last. Tensors
of a shard, for its S sequences of T tokens:

    tokens       int32 [S, T]
    starts       uint8 [S, T]  1 where a document, or the padding at the end of a row, begins; [:, 0] is always 1
    loss         uint8 [S, T]  1 where this token may be a target
    lengths      int32 [S]     real tokens of the row; what follows is padding
    loss_tokens  int32 [S]     how many tokens of the row are targets, as `TokenBatch.loss_mask` counts them
"""

# B sequences of a batch, S sequences of a shard, T tokens

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.artifacts import FORMAT_VERSION, open_tensors, read_json, save_tensors, write_json
from compress.errors import ArtifactError, ConfigError

INDEX = "index.json"
Ints = npt.NDArray[np.int64]
_TENSORS = {"tokens": 2, "starts": 2, "loss": 2, "lengths": 1, "loss_tokens": 1}  # dimensions


@dataclass
class TokenBatch:
    """Packed sequences, ready for a model that isolates documents by restarting positions.

    position_ids restart at 0 with each document and with the padding. loss_mask is True at t when token t + 1 is a
    counted target and of the same document: a document's first token is never one, and the last column is False.
    valid_mask is True at real tokens.
    """

    input_ids: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T]
    loss_mask: Tensor  # bool [B, T]
    valid_mask: Tensor  # bool [B, T]

    def to(self, device: torch.device) -> TokenBatch:
        """The same on a device."""
        return TokenBatch(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, start: int, stop: int) -> TokenBatch:
        """The sequences start, ..., stop - 1 alone."""
        return TokenBatch(*(tensor[start:stop] for tensor in vars(self).values()))


@dataclass
class Rows:
    """The arrays of a shard, without loss_tokens; dtypes and shapes as the module says."""

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.uint8]
    loss: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int32]


def target_mask(rows: Rows) -> npt.NDArray[np.bool_]:
    """[S, T], True at tokens that are counted as targets: of a document's tokens all but its first can be."""
    real = np.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
    return (rows.loss != 0) & (rows.starts == 0) & real


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def write_shard(path: Path, rows: Rows, facts: dict[str, Any]) -> None:
    """Write one shard atomically, with JSON `facts` in its header; the same rows and facts give the same bytes."""
    assert rows.starts[:, :1].all(), "a row begins with a document"
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(rows).items()}
    tensors["loss_tokens"] = torch.from_numpy(target_mask(rows).sum(1, dtype=np.int32))
    # One entry, because safetensors writes several in another order each time.
    save_tensors(path, tensors, {"facts": json.dumps(facts, sort_keys=True)})


def shard_facts(path: Path) -> dict[str, Any]:
    """What write_shard was given. Raises ArtifactError for a missing, truncated or foreign file."""
    try:
        facts: dict[str, Any] = json.loads((open_tensors(path).metadata() or {})["facts"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not a shard of tokens; delete it and run the tokenize stage again") from error
    return facts


def write_index(folder: Path, sequence_length: int, vocab_size: int, files: Sequence[str]) -> None:
    """Describe the shards `files` of `folder` in its index.json, the mark that the source is complete."""
    shards = []
    for file in files:
        handle = open_tensors(folder / file)
        lengths, targets = handle.get_tensor("lengths"), handle.get_tensor("loss_tokens")
        shards.append({"sequences": len(lengths), "tokens": int(lengths.sum()), "loss_tokens": int(targets.sum())})
    totals = {key: sum(shard[key] for shard in shards) for key in ("sequences", "tokens", "loss_tokens")}
    form = {"format_version": FORMAT_VERSION, "sequence_length": sequence_length, "vocab_size": vocab_size}
    named = [{"file": file, **facts} for file, facts in zip(files, shards, strict=True)]
    write_json(folder / INDEX, {**form, **totals, "shards": named})


class TokenSet:
    """The sequences of one or several source folders under one global index: source by source, shard by shard.

    Shards are memory-mapped and read row by row. Raises ArtifactError where a folder lacks its index, a shard is
    missing, truncated or not what the index says, or the sources differ in sequence length or vocabulary.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if not folders:
            raise ArtifactError("no token folders given; run the tokenize stage first")
        self.source_names = [folder.name for folder in folders]
        self.source_sizes: list[int] = []
        self.num_tokens = 0
        self._paths: list[Path] = []
        self._handles: dict[int, Any] = {}
        sizes: list[int] = []
        targets: list[npt.NDArray[np.int32]] = []
        forms: list[tuple[int, int]] = []
        for folder in folders:
            index = _read_index(folder / INDEX)
            forms.append((index["sequence_length"], index["vocab_size"]))
            if forms[-1] != forms[0]:
                raise ArtifactError(
                    f"{folder} has (sequence_length, vocab_size) = {forms[-1]}, {folders[0]} has {forms[0]}; "
                    "tokenize all sources with one setting and one tokenizer"
                )
            for shard in index["shards"]:
                path = folder / shard["file"]
                targets.append(_checked_targets(path, shard, index["sequence_length"]))
                self._paths.append(path)
                sizes.append(shard["sequences"])
            self.source_sizes.append(index["sequences"])
            self.num_tokens += index["tokens"]
        self.sequence_length, self.vocab_size = forms[0]
        self.num_sequences = sum(sizes)
        self.loss_tokens: Ints = np.concatenate(targets, dtype=np.int64)  # of each sequence
        self.num_shards = len(sizes)
        self._ends = np.cumsum(sizes)
        self._pieces = 1

    @classmethod
    def open(cls, folder: Path) -> TokenSet:
        """The sources that are the subfolders of `folder`, sorted by name; or `folder` itself where it is one."""
        if (folder / INDEX).is_file():
            return cls([folder])
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is missing; run the tokenize stage first")
        sources = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not sources:
            raise ArtifactError(f"{folder} holds no token folders; run the tokenize stage first")
        return cls(sources)

    def cut(self, length: int) -> TokenSet:
        """The same rows, each in pieces of `length` tokens that are sequences of their own, number `row * pieces + n`.

        A piece begins with a document, as a row does: positions restart, and no target reaches over the cut. Every
        row's marks are read once, for loss_tokens.
        """
        assert self._pieces == 1
        assert self.sequence_length % length == 0, (self.sequence_length, length)
        if length == self.sequence_length:
            return self
        result, pieces = copy.copy(self), self.sequence_length // length
        result._pieces, result.sequence_length = pieces, length
        result.num_sequences = self.num_sequences * pieces
        result.source_sizes = [size * pieces for size in self.source_sizes]
        targets = [target_mask(_cut(rows, pieces)).sum(1, dtype=np.int64) for rows in self.shards()]
        result.loss_tokens = np.concatenate(targets)
        return result

    def batch(self, indices: Sequence[int] | Ints) -> TokenBatch:
        """The sequences with these global indices, in their order."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= self.num_sequences:
            raise IndexError(f"sequence indices {wanted.tolist()} must be one or more of 0 to {self.num_sequences - 1}")
        parts: dict[str, list[Tensor]] = {"tokens": [], "starts": [], "loss": [], "lengths": []}
        rows, number = np.divmod(wanted, self._pieces)  # the row, and which piece of it
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard, position, piece in zip(shards.tolist(), rows.tolist(), number.tolist(), strict=True):
            row = position - (int(self._ends[shard - 1]) if shard else 0)
            begin = piece * self.sequence_length
            handle = self._handle(shard)
            for name, found in parts.items():
                part = handle.get_slice(name)
                if _TENSORS[name] == 2:
                    found.append(part[row : row + 1, begin : begin + self.sequence_length])
                else:
                    found.append((part[row : row + 1] - begin).clamp(0, self.sequence_length))
        tokens, starts, loss, lengths = (torch.cat(found) for found in parts.values())
        at = torch.arange(self.sequence_length).expand(len(wanted), -1)
        begins = starts.bool()
        document_start = torch.where(begins, at, 0).cummax(dim=1).values
        valid = at < lengths[:, None]
        loss_mask = torch.zeros_like(valid)
        loss_mask[:, :-1] = (loss.bool() & ~begins & valid)[:, 1:]
        return TokenBatch(tokens.long(), at - document_start, loss_mask, valid)

    def spread(self, num_sequences: int, micro_batch_size: int) -> list[list[int]]:
        """Indices of that many sequences, evenly over the whole set so that a part stands for it, in micro-batches."""
        chosen = [index * self.num_sequences // num_sequences for index in range(num_sequences)]
        return [chosen[start : start + micro_batch_size] for start in range(0, num_sequences, micro_batch_size)]

    def shards(self) -> Iterator[Rows]:
        """Each shard's arrays, one shard in memory at a time; of uncut rows."""
        for path in self._paths:
            handle = open_tensors(path)
            yield Rows(*(handle.get_tensor(name).numpy() for name in ("tokens", "starts", "loss", "lengths")))

    def _handle(self, shard: int) -> Any:
        if shard not in self._handles:
            if len(self._handles) >= 256:  # a mapping each: stay far from the kernel's limit
                self._handles.pop(next(iter(self._handles)))
            self._handles[shard] = open_tensors(self._paths[shard])
        return self._handles[shard]


def _cut(rows: Rows, pieces: int) -> Rows:
    """Each row as `pieces` rows, with lengths within each."""
    length = rows.tokens.shape[1] // pieces
    starts = rows.starts.copy().reshape(-1, length)
    starts[:, 0] = 1
    lengths = (rows.lengths[:, None] - np.arange(pieces, dtype=np.int32) * length).clip(0, length).reshape(-1)
    return Rows(rows.tokens.reshape(-1, length), starts, rows.loss.reshape(-1, length), lengths)


def _read_index(path: Path) -> Any:
    index = read_json(path)
    needed = {"format_version", "sequence_length", "vocab_size", "sequences", "tokens", "loss_tokens", "shards"}
    if not isinstance(index, dict) or not needed <= index.keys() or not index["shards"]:
        raise ArtifactError(
            f"{path} is not an index of token shards; delete its folder and run the tokenize stage again"
        )
    if index["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {index['format_version']}, this release reads {FORMAT_VERSION}; tokenize again"
        )
    return index


def _checked_targets(path: Path, shard: dict[str, Any], sequence_length: int) -> npt.NDArray[np.int32]:
    """loss_tokens of a shard, after its header was compared with what the index says of it."""
    handle = open_tensors(path)
    shape = [shard["sequences"], sequence_length]
    there = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 (not a dict)
    wanted = {name: shape[:dimensions] for name, dimensions in _TENSORS.items()}
    if there != wanted:
        raise ArtifactError(f"{path} holds {there}, its index.json says {wanted}; delete it and run tokenize again")
    targets: npt.NDArray[np.int32] = handle.get_tensor("loss_tokens").numpy()
    if int(targets.sum()) != shard["loss_tokens"]:
        raise ArtifactError(
            f"{path} has {int(targets.sum())} loss tokens, its index.json says {shard['loss_tokens']}; "
            "delete it and run tokenize again"
        )
    return targets


class SequenceOrder:
    """Which sequence the n-th draw of a training run is; the same for every batch size, rank count and resumption.

    With weights, draw n takes its source by where the n-th multiple of the golden ratio falls: after any number of
    draws each source has had its share to within a few sequences. Without weights everything is one source. Each
    source is seen in a new seeded permutation per epoch. A longer run begins with the draws of a shorter one. All of it
    is 64-bit integer arithmetic, so no numpy release or machine changes the order.

    source_sizes: rows of each source, in the order of the global index. after: the order that this one goes on from,
    with other weights or pieces: nothing that it dealt comes again in the same epoch. pieces: of every row (`cut`);
    those of a row are dealt one after the other, and draws count pieces. Raises ConfigError where a source that should
    be drawn from has no sequences.
    """

    def __init__(
        self,
        source_sizes: Sequence[int],
        weights: Sequence[float] | None,
        num_sequences_total: int,
        seed: int,
        after: SequenceOrder | None = None,
        pieces: int = 1,
    ) -> None:
        sizes = np.asarray(source_sizes, dtype=np.int64)
        assert weights is None or len(weights) == len(sizes), "one weight a source"
        if weights is None:
            sizes, weights = sizes.sum(keepdims=True), [1.0]
        empty = np.flatnonzero((sizes == 0) & (np.asarray(weights) > 0))
        if len(empty):
            raise ConfigError(
                f"training source {empty[0]} has no sequences to draw (sizes {list(source_sizes)}); give it text, or "
                "take it out of data.train"
            )
        self.num_sequences_total = num_sequences_total
        self._pieces = pieces
        self._num_rows = -(-num_sequences_total // pieces)
        self._begin: int = after._begin + after._num_rows if after else 0  # rows dealt before
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes  # global index of each source's first sequence
        self._seed = int(mix(np.array([seed], dtype=np.int64).view(np.uint64))[0])
        total, running, edges = sum(weights), 0.0, []
        for weight in list(weights)[:-1]:
            running += weight
            edges.append(min(int(running / total * 2**64), 2**64 - 1))
        self._edges = np.array(edges, dtype=np.uint64)
        self._permutations: dict[tuple[int, int], Ints] = {}
        counts = [self._counts(begin, begin + _BLOCK) for begin in range(0, self._num_rows, _BLOCK)]
        dealt = after._dealt() if after else np.zeros(len(sizes), dtype=np.int64)
        assert len(dealt) == len(sizes), "weights throughout, or not at all"
        self._before = np.cumsum([dealt, *counts], axis=0)  # rows of each source before each block

    def indices(self, start: int, stop: int) -> Ints:
        """Global sequence indices of draws start, ..., stop - 1."""
        assert 0 <= start <= stop <= self.num_sequences_total, (start, stop, self.num_sequences_total)
        first = start // self._pieces
        rows = self._rows(first, -(-stop // self._pieces))
        pieces: Ints = (rows[:, None] * self._pieces + np.arange(self._pieces)).reshape(-1)
        return pieces[start - first * self._pieces :][: stop - start]

    def _rows(self, start: int, stop: int) -> Ints:
        result = np.empty(stop - start, dtype=np.int64)
        block = start // _BLOCK
        sources = self._sources(block * _BLOCK, stop)
        for source, size in enumerate(self._sizes.tolist()):
            draws = np.flatnonzero(sources == source)  # within the block, so the k-th has rank before + k
            skipped = int(np.searchsorted(draws, start - block * _BLOCK))
            ranks = self._before[block, source] + np.arange(skipped, len(draws))
            places = draws[skipped:] - (start - block * _BLOCK)
            if len(ranks) == 0:
                continue
            epochs = ranks // size
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                low, high = np.searchsorted(epochs, [epoch, epoch + 1])
                drawn = self._permutation(source, epoch)[ranks[low:high] % size]
                result[places[low:high]] = self._first[source] + drawn
        return result

    def distinct(self) -> Ints:
        """Every sequence that is drawn at all, once, in the order of the first draws."""
        drawn = self.indices(0, self.num_sequences_total)
        return drawn[np.sort(np.unique(drawn, return_index=True)[1])]

    def _sources(self, start: int, stop: int) -> Ints:
        draws = np.arange(self._begin + start, self._begin + stop, dtype=np.uint64)
        points = draws * _GOLDEN + np.uint64(self._seed)  # wraps: the fraction
        return np.searchsorted(self._edges, points, side="right")

    def _counts(self, start: int, stop: int) -> Ints:
        return np.bincount(self._sources(start, stop), minlength=len(self._sizes))

    def _dealt(self) -> Ints:
        """Rows of each source up to the last draw, a row of which only some pieces were dealt included."""
        block = self._num_rows // _BLOCK
        result: Ints = self._before[block] + self._counts(block * _BLOCK, self._num_rows)
        return result

    def _permutation(self, source: int, epoch: int) -> Ints:
        key = (source, epoch)
        if key not in self._permutations:
            for old in [k for k in self._permutations if k[0] == source and k[1] < epoch - 1]:
                del self._permutations[old]
            key_hash = self._seed
            for part in (source, epoch):
                key_hash = int(mix(np.array([(key_hash + part) % 2**64], dtype=np.uint64))[0])
            counter = np.arange(self._sizes[source], dtype=np.uint64) + np.uint64(key_hash)
            # The mix is a bijection, so no two sort keys are equal and the order is total.
            self._permutations[key] = np.argsort(mix(counter))
        return self._permutations[key]


_BLOCK = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's step and finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit integers that looks random."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""How much of a validation set the training text contains, by token 13-grams within documents (as in GPT-3, app. C)."""

# S sequences of a shard, T tokens, M n-grams

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.progress import track
from compress.tokens import Ints, Rows, TokenSet, mix

NGRAM = 13
# An n-gram in more than this share of a set's documents is their form (a chat template's system text), not content.
COMMON_SHARE = 0.1
COMMON_MIN_DOCUMENTS = 20
_BLOCK_TOKENS = 1 << 21
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)  # odd, so that no token is lost modulo 2**64
_FILTER_BITS = 24

Hashes = npt.NDArray[np.uint64]


@dataclass
class Overlap:
    """Counts of one validation set: distinct n-grams, and packed documents long enough to hold one."""

    ngrams: int
    ngrams_in_training: int
    documents: int
    documents_in_training: int  # with at least one n-gram that training has
    common_ngrams: int  # left out of all of the above

    @property
    def ngram_share(self) -> float:
        return self.ngrams_in_training / max(self.ngrams, 1)

    @property
    def document_share(self) -> float:
        return self.documents_in_training / max(self.documents, 1)


def ngram_hashes(rows: Rows, n: int = NGRAM) -> tuple[Hashes, Ints]:
    """A 64-bit hash of each run of n real tokens that lies within one document, and that document's number in `rows`.

    With 10**9 training and 10**6 validation n-grams a false hit has a chance of 5e-5.
    """
    if rows.tokens.shape[1] < n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    mixed = mix(rows.tokens.astype(np.uint64))
    windows = rows.tokens.shape[1] - n + 1
    hashed = np.zeros((len(mixed), windows), dtype=np.uint64)
    for offset in range(n):
        hashed = hashed * _MULTIPLIER + mixed[:, offset : offset + windows]
    documents = np.cumsum(rows.starts, dtype=np.int64).reshape(rows.starts.shape) - 1
    inside = documents[:, :windows] == documents[:, n - 1 :]
    inside &= np.arange(n - 1, rows.tokens.shape[1]) < rows.lengths[:, None]
    return hashed[inside], documents[:, :windows][inside]


def measure_overlap(train: TokenSet, validation: Mapping[str, TokenSet]) -> dict[str, Overlap]:
    """Stream the training shards once against the n-grams of every validation set."""
    sets, common = {}, {}
    for name, token_set in validation.items():
        sets[name], common[name] = _without_common(*_all_ngrams(token_set))
    wanted = np.unique(np.concatenate([hashes for hashes, _ in sets.values()]))
    hit = _found(train, wanted)
    results = {}
    for name, (hashes, documents) in sets.items():
        in_training = hit[np.searchsorted(wanted, hashes)]
        results[name] = Overlap(
            ngrams=len(np.unique(hashes)),
            ngrams_in_training=len(np.unique(hashes[in_training])),
            documents=len(np.unique(documents)),
            documents_in_training=len(np.unique(documents[in_training])),
            common_ngrams=common[name],
        )
    return results


def _found(train: TokenSet, wanted: Hashes) -> npt.NDArray[np.bool_]:
    """For each of the sorted distinct hashes, whether the training text has it."""
    hit = np.zeros(len(wanted), dtype=np.bool_)
    shift = np.uint64(64 - _FILTER_BITS)
    maybe = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)  # most training n-grams stop at this one look-up
    maybe[wanted >> shift] = True
    for rows in track(train.shards(), "overlap with validation", total=train.num_shards, unit="shards"):
        for block in _blocks(rows):
            hashes = ngram_hashes(block)[0]
            hashes = hashes[maybe[hashes >> shift]]
            places = np.minimum(np.searchsorted(wanted, hashes), max(len(wanted) - 1, 0))
            hit[places[wanted[places] == hashes]] = True
    return hit


def _all_ngrams(token_set: TokenSet) -> tuple[Hashes, Ints]:
    hashes, documents, before = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for rows in token_set.shards():
        for block in _blocks(rows):
            found, numbers = ngram_hashes(block)
            hashes.append(found)
            documents.append(numbers + before)
            before += int(block.starts.sum())
    return np.concatenate(hashes), np.concatenate(documents)


def _without_common(hashes: Hashes, documents: Ints) -> tuple[tuple[Hashes, Ints], int]:
    """Leave out n-grams that are in more than COMMON_SHARE of the documents; also returns how many distinct ones."""
    total = len(np.unique(documents))
    if total < COMMON_MIN_DOCUMENTS:
        return (hashes, documents), 0
    order = np.lexsort((documents, hashes))
    by_hash, by_document = hashes[order], documents[order]
    new = np.ones(len(order), dtype=np.bool_)  # the first of each (n-gram, document)
    new[1:] = (by_hash[1:] != by_hash[:-1]) | (by_document[1:] != by_document[:-1])
    distinct, counts = np.unique(by_hash[new], return_counts=True)
    common = distinct[counts > COMMON_SHARE * total]
    keep = ~np.isin(hashes, common)
    return (hashes[keep], documents[keep]), len(common)


def _blocks(rows: Rows) -> Iterator[Rows]:
    """Rows a few at a time: the hashes take several times the memory of the tokens."""
    step = max(1, _BLOCK_TOKENS // rows.tokens.shape[1])
    for start in range(0, len(rows.tokens), step):
        yield Rows(*(array[start : start + step] for array in vars(rows).values()))

"""What a teacher says of a loss token, in a few bytes: drawing it, packing it, and finding it again by content.

Two kinds. `sample` (RS-KD, arXiv 2503.16870): n ids drawn with replacement from softmax(logits), kept as distinct ids
and counts. counts / n is an unbiased estimate of the probabilities, and so is the gradient of a loss that is linear in
them. `top_k`: the k largest probabilities and their ids; what is left is the objective's one bucket.

A cache is a folder of `shard-00000.safetensors`, ... and an `index.json` that is written last. Tensors of a shard:

    keys     uint8 [S, 16]  hash of each sequence's tokens, positions and loss mask: `keys_of`
    indices  int64 [S]      which of the training sequences it is
    ends     int64 [S]      where its record ends
    records  uint8 [...]    one after the other

A record of N loss tokens, each part of whole bytes, lowest bit first:

    entropy        float32 [N]        of the teacher, in nats
    another        bit [N, n - 1]     sample: whether a draw, in the order of ids, has another id than the one before
                                      it. Counts of n draws in fewer bits there are none: 2**(n - 1) ways to add up
    probabilities  float32 [N, k]     top_k
    ids            b bits each        of a token the distinct ones, ascending; b is what the vocabulary needs
"""

# N loss tokens, C tokens of a chunk, R rows of a block, V vocabulary, E teacher hidden, K ids of a token, S sequences,
# B blocks of the vocabulary, W ids of one of them

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.artifacts import MANIFEST, fingerprint_path, open_tensors, read_json, save_tensors, write_json
from compress.errors import ArtifactError, ConfigError
from compress.models import OutputHead, logits_of
from compress.objectives.chunked import SparseSignal, tokens_per_chunk
from compress.objectives.forward_kl import block_rows
from compress.tokens import INDEX, TokenBatch

FORMAT_VERSION = 1
AGAIN = "delete the folder and run stage=cache again"
_KEY_BYTES = 16
_BLOCKS = 8  # of the elementwise blocks of forward KL: several results at a time
_WIDTH = 256  # ids whose weights are added up before anything is drawn
_OPEN = 256  # shards mapped at a time: stay far from the kernel's limit
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """How a token is kept. kind: "sample" or "top_k"; size: the draws, or the k."""

    kind: str
    size: int
    vocab_size: int

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def max_bytes(self) -> int:
        """Of a token, when no two draws are the same: entropy, counts or probabilities, ids."""
        beside = 8 * 4 * self.size if self.kind == "top_k" else self.size - 1
        return 4 + -(-(beside + self.size * self.id_bits) // 8)


@dataclass(frozen=True)
class Said:
    """What a teacher says of N tokens.

    ids_NK ascend: a sample's n draws, repeats among them, or the k largest. probabilities_NK is (N, 0) of a sample.
    entropy_N, in nats, is not finite where a logit is NaN or infinite; a logit of -inf alone is a banned token's.
    """

    ids_NK: Tensor
    probabilities_NK: Tensor
    entropy_N: Tensor


def keys_of(batch: TokenBatch) -> list[bytes]:
    """16 bytes a sequence: of what the teacher is given and where it is asked, whatever the batch around it."""
    columns = (batch.input_ids, batch.position_ids, batch.loss_mask)
    rows = [column.cpu().numpy().astype("<i8") for column in columns]
    contents = [b"".join(row.tobytes() for row in one) for one in zip(*rows, strict=True)]
    return [hashlib.sha256(content).digest()[:_KEY_BYTES] for content in contents]


# -- drawing


@torch.no_grad()
def say(hidden_NE: Tensor, head: OutputHead, form: Form, seed: int, key: bytes) -> Said:
    """What a teacher with these final hidden states says, its head run chunk by chunk.

    A sample depends on seed and key alone, so not on the batch, the order or the rank in which a sequence is met.
    """
    draws = form.size if form.kind == "sample" else 0
    uniforms_Nn = torch.from_numpy(_uniforms(seed, key, len(hidden_NE) * draws)).view(len(hidden_NE), draws)
    uniforms_Nn = uniforms_Nn.to(hidden_NE.device)
    size = tokens_per_chunk(form.vocab_size, hidden_NE.element_size())
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(hidden_NE), size):
        logits_CV = logits_of(hidden_NE[start : start + size], head)
        rows = _BLOCKS * block_rows(logits_CV)
        for row in range(0, len(logits_CV), rows):
            at = slice(start + row, min(start + row + rows, start + len(logits_CV)))
            found.append(_say_block(logits_CV[row : row + rows], form, uniforms_Nn[at]))
    if not found:
        none = torch.zeros(0, form.size)
        return Said(none.long(), none[:, : form.size - draws], none[:, 0])
    return Said(*(torch.cat(part).cpu() for part in zip(*found, strict=True)))


def _say_block(logits_RV: Tensor, form: Form, uniforms_Rn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    shifted_RV = logits_RV.to(dtype) - logits_RV.amax(-1, keepdim=True)
    count, vocabulary = shifted_RV.shape
    weights_RBW = shifted_RV.new_empty(count, -(-vocabulary // _WIDTH), _WIDTH)
    weights_RV, beyond = weights_RBW.view(count, -1).tensor_split([vocabulary], 1)
    torch.exp(shifted_RV, out=weights_RV)
    beyond.zero_()
    sum_R = weights_RV.sum(-1)
    # Of a banned token the weight is 0 and the logit -inf: any finite number in its place keeps 0 * inf out.
    shifted_RV.clamp_(min=torch.finfo(dtype).min)
    entropy_R = sum_R.log() - torch.linalg.vecdot(weights_RV, shifted_RV) / sum_R
    if form.kind == "sample":
        ids_Rn = draw(weights_RBW, uniforms_Rn).sort(-1).values
        return ids_Rn, weights_RV[:, :0], entropy_R
    ids_RK = shifted_RV.topk(form.size, -1).indices.sort(-1).values
    return ids_RK, weights_RV.gather(-1, ids_RK) / sum_R[:, None], entropy_R


def draw(weights_RBW: Tensor, uniforms_Rn: Tensor) -> Tensor:
    """Ids (R, n), each drawn in proportion to its weight by one of the uniform numbers, from the cumulative sum.

    Sums of blocks first, in float64, then inside of the block that was hit: a running sum over a whole vocabulary would
    cost more and, in float32, lose the tail. An id of weight 0 is never drawn.
    """
    sums_RB = weights_RBW.sum(-1).double().cumsum(-1)
    target_Rn = _below(uniforms_Rn * sums_RB[:, -1:], sums_RB[:, -1:])
    block_Rn = torch.searchsorted(sums_RB, target_Rn, right=True).clamp_(max=sums_RB.shape[1] - 1)
    before_Rn = torch.where(block_Rn > 0, sums_RB.gather(1, (block_Rn - 1).clamp_(min=0)), 0)
    rows_R1 = torch.arange(len(weights_RBW), device=weights_RBW.device)[:, None]
    inside_RnW = weights_RBW[rows_R1, block_Rn].double().cumsum(-1)
    rest_Rn1 = _below((target_Rn - before_Rn)[..., None], inside_RnW[..., -1:])
    place_Rn = torch.searchsorted(inside_RnW, rest_Rn1, right=True)[..., 0].clamp_(max=_WIDTH - 1)
    return block_Rn * _WIDTH + place_Rn


def _below(values: Tensor, bound: Tensor) -> Tensor:
    """Rounding must not carry a draw past the last weight that isn't 0."""
    return torch.minimum(values, torch.nextafter(bound, torch.zeros_like(bound)))


def _uniforms(seed: int, key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Numbers within 0 and 1, of seed and key alone; the raw stream is the same in every numpy release."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + key).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


# -- packing


def pack(said: Said, form: Form) -> bytes:
    ids_NK: Ints = said.ids_NK.numpy()
    parts = [said.entropy_N.numpy().astype("<f4").tobytes()]
    if form.kind == "sample":
        another = ids_NK[:, 1:] != ids_NK[:, :-1]
        parts.append(np.packbits(another, bitorder="little").tobytes())
        ids = ids_NK[_first(another)]
    else:
        parts.append(said.probabilities_NK.numpy().astype("<f4").tobytes())
        ids = ids_NK.ravel()
    bits = ((ids[:, None] >> np.arange(form.id_bits)) & 1).astype(np.uint8)
    return b"".join([*parts, np.packbits(bits, bitorder="little").tobytes()])


def unpack(record: Bytes, num_tokens: int, form: Form) -> Said:
    """ids_NK and probabilities_NK as `terms.SparseRows` wants them, counts / n of a sample; unused places are 0."""
    entropy_N = record[: 4 * num_tokens].view("<f4")
    record, rows = record[4 * num_tokens :], np.arange(num_tokens)[:, None]
    if form.kind == "top_k":
        count = num_tokens * form.size
        ids = _unpack_ids(record[4 * count :], count, form.id_bits).reshape(num_tokens, form.size)
        probabilities = record[: 4 * count].view("<f4").reshape(ids.shape)
    else:
        size = num_tokens * (form.size - 1)
        length = -(-size // 8)
        another = np.unpackbits(record[:length], count=size, bitorder="little").reshape(num_tokens, form.size - 1)
        first = _first(another.astype(bool))
        slot = first.cumsum(1) - 1  # of each draw, among its token's distinct ids
        counts = np.bincount((rows * form.size + slot).ravel(), minlength=num_tokens * form.size)
        probabilities = (counts.reshape(num_tokens, form.size) / form.size).astype(np.float32)
        ids = np.zeros((num_tokens, form.size), dtype=np.int64)
        ids[probabilities > 0] = _unpack_ids(record[length:], int(first.sum()), form.id_bits)
    return Said(*(torch.from_numpy(np.array(part)) for part in (ids, probabilities, entropy_N)))


def _first(another: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return np.concatenate([np.ones((len(another), 1), dtype=bool), another], axis=1)


def _unpack_ids(packed: Bytes, count: int, id_bits: int) -> Ints:
    bits = np.unpackbits(packed, count=count * id_bits, bitorder="little").reshape(count, id_bits)
    return bits @ (1 << np.arange(id_bits, dtype=np.int64))


# -- files


def write_shard(
    path: Path, keys: Sequence[bytes], indices: Ints, records: Sequence[bytes], facts: dict[str, Any]
) -> None:
    """One shard, atomically, with JSON `facts` in its header; the same content gives the same bytes."""
    tensors = {
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES).copy()),
        "indices": torch.from_numpy(np.ascontiguousarray(indices)),
        "ends": torch.from_numpy(np.cumsum([len(record) for record in records])),
        "records": torch.from_numpy(np.frombuffer(b"".join(records), dtype=np.uint8).copy()),
    }
    save_tensors(path, tensors, {"facts": json.dumps(facts, sort_keys=True)})


def shard_facts(path: Path) -> dict[str, Any] | None:
    """What write_shard was given; None where there is no whole shard."""
    try:
        facts: dict[str, Any] = json.loads((open_tensors(path).metadata() or {})["facts"])
    except (ArtifactError, KeyError, json.JSONDecodeError):
        return None
    return facts


def write_index(folder: Path, form: Form, made_from: dict[str, str], files: Sequence[str]) -> None:
    """The mark that the cache is whole. made_from: fingerprints of teacher, tokenizer and tokens."""
    shards = [{"file": file, "fingerprint": fingerprint_path(folder / file)} for file in files]
    facts = {"format_version": FORMAT_VERSION, **asdict(form), "made_from": made_from}
    write_json(folder / INDEX, {**facts, "shards": shards})


def check_student(vocab_size: int, cached: int) -> None:
    """Raise ConfigError for a student that lacks rows which a sample may have been drawn from."""
    if vocab_size < cached:
        raise ConfigError(
            f"the student's vocab_size={vocab_size} is less than the {cached} of the cached teacher, whose padding may "
            "have been drawn; set teacher.mode=online"
        )


class SignalCache:
    """A cache to be read, in any order, by any number of readers.

    Raises ArtifactError for an index of another format, and for a shard that isn't as it was written: cut short,
    changed (of more than 4 MiB in one of 64 blocks), or gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder / INDEX)
        self.form = Form(index["kind"], index["size"], index["vocab_size"])
        self.made_from: dict[str, str] = index["made_from"]
        self._paths = [folder / shard["file"] for shard in index["shards"]]
        self._handles: dict[int, Any] = {}
        keys, indices, self._ends = [], [], []
        for path, shard in zip(self._paths, index["shards"], strict=True):
            if not path.is_file() or fingerprint_path(path) != shard["fingerprint"]:
                state = "is cut short or changed since it was written" if path.is_file() else "is missing"
                raise ArtifactError(
                    f"{path} {state}; delete it and {folder / MANIFEST}, and run stage=cache again, which makes what "
                    "is missing"
                )
            handle = open_tensors(path)
            keys.append(handle.get_tensor("keys").numpy())
            indices.append(handle.get_tensor("indices").numpy())
            self._ends.append(handle.get_tensor("ends").numpy())
        self.indices: Ints = np.concatenate(indices)
        found = np.concatenate(keys).view(f"S{_KEY_BYTES}").ravel()
        self._order = np.argsort(found, kind="stable")
        self._keys = found[self._order]
        self._first = np.cumsum([0, *map(len, indices)])

    def check(self, made_from: dict[str, str], indices: Ints) -> None:
        """Raise ArtifactError where it was made from another teacher, tokenizer or text, or lacks a sequence."""
        for what, value in made_from.items():
            if self.made_from.get(what) != value:
                raise ArtifactError(
                    f"{self.folder} is a cache of {_WORDS[what]} (fingerprint {str(self.made_from.get(what))[:12]}, "
                    f"here it is {value[:12]}); give those that it was made from, or {AGAIN}"
                )
        missing = np.setdiff1d(indices, self.indices)
        if len(missing):
            raise ArtifactError(
                f"{self.folder} lacks {len(missing)} of the {len(indices)} sequences that training will draw, such as "
                f"number {missing[0]}; it was made for less text, another seed or other weights of data.train: {AGAIN}"
            )

    def read(self, batch: TokenBatch) -> SparseSignal:
        """What was said of the micro-batch's loss tokens, in their order. ArtifactError for a sequence it lacks."""
        counts = batch.loss_mask.sum(1).tolist()
        rows = [self._said(key, count) for key, count in zip(keys_of(batch), counts, strict=True)]
        ids_NK, probabilities_NK, entropy_N = (
            torch.cat([getattr(row, name) for row in rows]).to(batch.input_ids.device)
            for name in ("ids_NK", "probabilities_NK", "entropy_N")
        )
        return SparseSignal(self.form.kind, ids_NK, probabilities_NK, entropy_N, self.form.vocab_size)

    def _said(self, key: bytes, num_tokens: int) -> Said:
        place = int(np.searchsorted(self._keys, np.array(key, dtype=self._keys.dtype)))
        if place == len(self._keys) or self._keys[place] != np.array(key, dtype=self._keys.dtype):
            raise ArtifactError(
                f"{self.folder} holds nothing of a sequence that is trained on (key {key.hex()}): it is a cache of "
                f"other text; {AGAIN}"
            )
        number = int(self._order[place])
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        row = number - int(self._first[shard])
        ends = self._ends[shard]
        begin = int(ends[row - 1]) if row else 0
        return unpack(self._records(shard)[begin : int(ends[row])].numpy(), num_tokens, self.form)

    def _records(self, shard: int) -> Any:
        if shard not in self._handles:
            if len(self._handles) >= _OPEN:
                self._handles.pop(next(iter(self._handles)))
            self._handles[shard] = open_tensors(self._paths[shard]).get_slice("records")
        return self._handles[shard]


_WORDS = {"teacher": "another teacher", "tokenizer": "another tokenizer", "tokens": "other text"}


def _read_index(path: Path) -> Any:
    index = read_json(path, "run stage=cache")
    needed = {"format_version", "kind", "size", "vocab_size", "made_from", "shards"}
    if isinstance(index, dict) and index.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {index['format_version']}, this release reads {FORMAT_VERSION}; {AGAIN}"
        )
    if not isinstance(index, dict) or not needed <= index.keys() or not index["shards"]:
        raise ArtifactError(f"{path} is no index of a teacher's signals; {AGAIN}")
    return index

"""One part of a source into one token shard: what a worker of the tokenize stage does.

A shard is a function of its task: whoever makes it, whenever and beside whatever, its bytes are the same.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from compress.artifacts import fingerprint
from compress.conversations import check_chat_template, encode_conversation
from compress.errors import ArtifactError, ConfigError
from compress.models import load_tokenizer
from compress.packing import Packer
from compress.sources import Part
from compress.tokens import shard_facts, write_shard

log = logging.getLogger(__name__)
SHARD_VERSION = 1  # part of every shard's fingerprint; raise it when the same settings give other bytes
_BATCH_RECORDS = 256


@dataclass(frozen=True)
class Encoding:
    """What turns records into rows, the tokenizer aside."""

    sequence_length: int
    loss_on: str
    append_eos: bool
    text_key: str
    messages_key: str
    tools_key: str
    end_ids: tuple[int, ...]  # tokens that end an assistant's turn
    pad_id: int


@dataclass(frozen=True)
class Task:
    """One shard to make; picklable."""

    key: str  # of the source, such as data.train[0]
    part: Part
    encoding: Encoding
    teacher: Path
    trust_remote_code: bool
    path: Path
    fingerprint: str


@dataclass
class Counts:
    """What became of a shard's or source's records; kept in the shard's header, summed into the report."""

    records: int = 0
    documents: int = 0
    conversations: int = 0
    truncated: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # reason -> documents or turns

    def add(self, other: Counts) -> None:
        for name in ("records", "documents", "conversations", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.drop(other.dropped)

    def drop(self, reasons: Mapping[str, int]) -> None:
        for reason, number in reasons.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + number


@lru_cache(maxsize=2)
def cached_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The teacher's tokenizer, loaded once a process."""
    return load_tokenizer(folder, trust_remote_code)


def tokenizer_identity(tokenizer: Any) -> str:
    """A fingerprint of everything in a tokenizer that decides on ids."""
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return fingerprint([type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.eos_token_id])


def task_fingerprint(part: Part, encoding: Encoding, tokenizer: str) -> str:
    """Of everything that decides on a shard's bytes; `tokenizer` is its identity."""
    return fingerprint([SHARD_VERSION, part.identity, dataclasses.asdict(encoding), tokenizer])


def is_made(task: Task) -> bool:
    """Whether the shard is there, whole, and was made from the same part with the same settings."""
    if not task.path.exists():
        return False
    try:
        return shard_facts(task.path).get("fingerprint") == task.fingerprint
    except ArtifactError as error:
        log.warning("%s; making it again", error)
        return False


def encode_shard(task: Task) -> None:
    """Encode and pack one part of a source into its shard file."""
    encoding = task.encoding
    tokenizer = cached_tokenizer(task.teacher, task.trust_remote_code)
    packer = Packer(encoding.sequence_length, encoding.pad_id)
    counts = Counts(records=task.part.num_records)
    special = len(tokenizer("")["input_ids"])  # what the tokenizer adds to a text of no tokens
    records = enumerate(task.part.read(encoding.text_key))
    while batch := list(islice(records, _BATCH_RECORDS)):
        chats = [is_conversation(record, encoding, task.key, task.part, index) for index, record in batch]
        texts = [_text(record, task, index) for (index, record), chat in zip(batch, chats, strict=True) if not chat]
        encoded = iter(_encode_texts(tokenizer, [text for text in texts if text]))
        texts_iterator = iter(texts)
        for (_, record), chat in zip(batch, chats, strict=True):
            if chat:
                _add_conversation(packer, counts, tokenizer, record, encoding, task.key)
                continue
            text = next(texts_iterator)
            ids = next(encoded) if text else []
            if len(ids) <= (special if text else 0):
                counts.drop({"text of no tokens": 1})
                continue
            if encoding.append_eos and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
            packer.add_text(ids)
            counts.documents += 1
    facts = {"fingerprint": task.fingerprint, "counts": dataclasses.asdict(counts)}
    write_shard(task.path, packer.rows(), facts)


def is_conversation(record: Any, keys: Encoding, key: str, part: Part, index: int) -> bool:
    """Whether a record has messages; a record that has neither them nor text is a ConfigError."""
    if not isinstance(record, dict):
        raise ConfigError(
            f"{key}: {part.where(index)} is a {type(record).__name__}, but a record must be an object with "
            f"{keys.text_key!r} or {keys.messages_key!r}"
        )
    if record.get(keys.messages_key) is not None:
        return True
    if keys.text_key not in record and keys.messages_key not in record:
        raise ConfigError(
            f"{key}: {part.where(index)} has neither text_key={keys.text_key!r} nor "
            f"messages_key={keys.messages_key!r}; its keys are {', '.join(map(str, record)) or 'none'}. "
            "Set text_key= or messages_key= of this source"
        )
    return False


def _text(record: dict[str, Any], task: Task, index: int) -> str:
    text = record.get(task.encoding.text_key)
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            f"{task.key}: {task.part.where(index)} has a {type(text).__name__} under text_key="
            f"{task.encoding.text_key!r}, but it must be text; name the key that holds it"
        )
    # Half a surrogate pair, which JSON can spell, is no text that a tokenizer takes.
    return (text or "").encode("utf-8", "replace").decode()


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def _add_conversation(
    packer: Packer, counts: Counts, tokenizer: Any, record: dict[str, Any], encoding: Encoding, key: str
) -> None:
    check_chat_template(tokenizer, f"(needed by {key})")
    tools = record.get(encoding.tools_key)
    if isinstance(tools, str):  # how tables without nested columns keep them
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            counts.drop({"tools is not valid JSON": 1})
            return
    samples, dropped = encode_conversation(
        tokenizer, record[encoding.messages_key], tools, encoding.loss_on, encoding.end_ids
    )
    counts.drop(dropped)
    counts.conversations += bool(samples)
    for sample in samples:
        ids, loss = sample.ids[: encoding.sequence_length], sample.loss[: encoding.sequence_length]
        if not any(loss[1:]):
            counts.drop({"no target within sequence_length": 1})
            continue
        counts.truncated += len(ids) < len(sample.ids)
        counts.documents += 1
        packer.add_whole(ids, loss)

"""Stage tokenize: sources of text and conversations into packed token shards, with a report of what was lost.

Each shard is a function of one part of one source and of the settings in its fingerprint, so shards are made in any
order by any number of workers, and a run that was killed makes only what is missing.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifacts import disk_errors, read_json, write_atomic, write_json
from compress.conversations import check_chat_template
from compress.embedded import resolve
from compress.encoding import (
    Counts,
    Encoding,
    Task,
    cached_tokenizer,
    encode_shard,
    is_conversation,
    is_made,
    task_fingerprint,
    tokenizer_identity,
)  # fmt: skip
from compress.errors import ArtifactError, NumericalError
from compress.inputs import check_calibration, teacher_of
from compress.overlap import measure_overlap
from compress.progress import about, track
from compress.settings import CompressConfig, SourceConfig, Stage, set_name
from compress.sources import split_source
from compress.tokens import INDEX, Rows, TokenSet, shard_facts, shard_name, target_mask, write_index

log = logging.getLogger(__name__)
SPLITS = ("validation", "calibration", "train")  # the small ones first, so that what is wrong with them shows early
POOL_SECONDS = 20.0  # data.workers=0 starts processes when that saves more than they take to start


@dataclass
class Source:
    key: str
    split: str
    settings: SourceConfig
    folder: Path
    tasks: list[Task]


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write tokens/{train,calibration}/NN-NAME, tokens/validation/SET/00-SET, report.json and samples.txt.

    Raises ConfigError for a source that is missing, empty or lacks its keys and for conversations without a chat
    template, all before the first shard; ArtifactError for a malformed file; NumericalError for a source that leaves
    no token to learn from.
    """
    folder = run_dir / "tokens"
    cache_dir = Path(config.cache_dir).expanduser()
    trust = config.teacher.trust_remote_code
    teacher = teacher_of(config)
    cached_tokenizer.cache_clear()  # the folder may have changed since an earlier run in this process
    tokenizer = cached_tokenizer(teacher, trust)
    sources = _find_sources(config, teacher, tokenizer, folder, cache_dir)
    pending = []
    for source in sources:
        missing = [task for task in source.tasks if not is_made(task)]
        _remove_foreign(source, complete=not missing)
        pending += missing
    _remove_foreign_folders(folder, sources)
    made = sum(len(source.tasks) for source in sources) - len(pending)
    records = sum(task.part.num_records for task in pending)
    kept = f"; {made} shards are there already" if made else ""
    log.info("tokenize: %d sources, %d records in %d shards to make%s", len(sources), records, len(pending), kept)

    open_tasks = {source.key: sum(task.key == source.key for task in pending) for source in sources}
    by_key = {source.key: source for source in sources}
    report: dict[str, dict[str, Any]] = {s.key: _finish(s, tokenizer) for s in sources if not open_tasks[s.key]}
    calibration = {source.key for source in sources if source.split == "calibration"}
    encoded = _encode(pending, config.data.workers)
    for task in track(encoded, "tokenize", len(pending), "records", lambda task: task.part.num_records):
        open_tasks[task.key] -= 1
        if not open_tasks[task.key]:
            report[task.key] = _finish(by_key[task.key], tokenizer)
        if config.stage is Stage.all and task.key in calibration and not any(open_tasks[key] for key in calibration):
            check_calibration(config, TokenSet.open(folder / "calibration"))  # before the long part, the training text

    names = [set_name(source) for source in config.data.validation]
    sets = {name: TokenSet.open(folder / "validation" / name) for name in names}
    overlaps = measure_overlap(TokenSet.open(folder / "train"), sets)
    for name, overlap in overlaps.items():
        log.info(
            "tokenize: training has %.2f%% of validation set %s's 13-grams; %d of its %d documents share one",
            100 * overlap.ngram_share, name, overlap.documents_in_training, overlap.documents,
        )  # fmt: skip
    _write_samples(folder / "samples.txt", sources, report, tokenizer)
    facts = {
        split: [report[source.key] for source in sources if source.split == split]
        for split in ("train", "calibration", "validation")
    }
    shares = {
        name: {**vars(o), "ngram_share": o.ngram_share, "document_share": o.document_share}
        for name, o in overlaps.items()
    }
    write_json(folder / "report.json", {**facts, "overlap": shares})


def _find_sources(config: CompressConfig, teacher: Path, tokenizer: Any, folder: Path, cache_dir: Path) -> list[Source]:
    """Every source with its shards' tasks; its first record is read, so that a wrong key shows before any work."""
    data, end_ids = config.data, _end_ids(teacher, tokenizer)
    identity = tokenizer_identity(tokenizer)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    found = []
    for split in SPLITS:
        all_settings: list[SourceConfig] = getattr(data, split)
        width = max(2, len(str(len(all_settings) - 1)))  # so that sorting by name keeps the order
        for number, settings in enumerate(all_settings):
            key = f"data.{split}[{number}]"
            name = re.sub(r"[^\w.-]+", "_", set_name(settings)) or "source"
            parts = split_source(
                key,
                resolve(settings.path, cache_dir),
                data.records_per_shard,
                cache_dir=cache_dir,
                subset=settings.subset,
                split=settings.split,
                max_records=settings.max_records,
            )
            encoding = Encoding(
                sequence_length=data.sequence_length,
                loss_on=str(data.loss_on),
                append_eos=data.append_eos,
                text_key=settings.text_key,
                messages_key=settings.messages_key,
                tools_key=settings.tools_key,
                end_ids=end_ids,
                pad_id=pad_id,
            )
            first = next(iter(parts[0].read(settings.text_key)))
            if is_conversation(first, encoding, key, parts[0], 0):
                check_chat_template(tokenizer, config.teacher.path)
            if split == "validation":
                target = folder / split / set_name(settings) / f"00-{name}"
            else:
                target = folder / split / f"{number:0{width}d}-{name}"
            trust = config.teacher.trust_remote_code
            tasks = [
                Task(
                    key,
                    part,
                    encoding,
                    teacher,
                    trust,
                    target / shard_name(i),
                    task_fingerprint(part, encoding, identity),
                )
                for i, part in enumerate(parts)
            ]
            found.append(Source(key, split, settings, target, tasks))
    return found


def _end_ids(teacher: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids at which generation stops: the tokenizer's eos and those of generation_config.json."""
    ends = {tokenizer.eos_token_id} - {None}
    if (teacher / "generation_config.json").is_file():
        eos = read_json(teacher / "generation_config.json").get("eos_token_id")
        ends |= set(eos if isinstance(eos, list) else [eos]) - {None}
    return tuple(sorted(ends))


def _remove_foreign(source: Source, complete: bool) -> None:
    """Take out of a source's folder what an earlier run left there: other shards, a killed writer's temporary files,
    and the index that says all shards are there, unless they are."""
    wanted = {task.path.name for task in source.tasks} | ({INDEX} if complete else set())
    for path in source.folder.glob("*") if source.folder.is_dir() else []:
        if path.name not in wanted and path.is_file():
            path.unlink()


def _remove_foreign_folders(folder: Path, sources: list[Source]) -> None:
    wanted = {parent for source in sources for parent in (source.folder, *source.folder.parents)}
    for path in [p for split in SPLITS for p in (*folder.glob(f"{split}/*"), *folder.glob(f"{split}/*/*"))]:
        if path.is_dir() and path not in wanted:
            log.info("tokenize: removing %s, which the settings no longer name", path)
            shutil.rmtree(path, ignore_errors=True)


def _encode(tasks: list[Task], workers: int) -> Iterator[Task]:
    """Make the shards, yielding each task as it is done: here, or in processes where that is worth their start."""
    tasks = list(tasks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(tasks))
    if workers == 0 and tasks:  # the first shard tells how long the rest takes; the tokenizer has threads of its own
        first, began = tasks.pop(0), time.monotonic()
        encode_shard(first)
        seconds = (time.monotonic() - began) / first.part.num_records * sum(task.part.num_records for task in tasks)
        yield first
        count = count if seconds * (1 - 1 / count) > POOL_SECONDS else 1
        if seconds > POOL_SECONDS:
            log.info("tokenize: about %s of work left, on %d processes", about(seconds), count)
    if count <= 1 or len(tasks) <= 1:
        for task in tasks:
            encode_shard(task)
            yield task
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads' locks, held or not
    with ProcessPoolExecutor(count, context, initializer=_start_worker) as pool:
        futures = {pool.submit(encode_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures.pop(future)
        except BrokenProcessPool as error:
            raise ArtifactError(
                f"a tokenize worker was killed, most likely for lack of memory: lower data.workers={count} or "
                f"data.records_per_shard={max(t.part.num_records for t in tasks)}; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _finish(source: Source, tokenizer: Any) -> dict[str, Any]:
    """Write the index of a source whose shards are all made; returns its part of the report.

    Raises NumericalError when it has no token to learn from.
    """
    counts = Counts()
    for task in source.tasks:
        counts.add(Counts(**shard_facts(task.path)["counts"]))
    length = source.tasks[0].encoding.sequence_length
    with disk_errors(source.folder):
        write_index(source.folder, length, len(tokenizer), [task.path.name for task in source.tasks])
    tokens = TokenSet([source.folder])
    targets, places = int(tokens.loss_tokens.sum()), tokens.num_sequences * length
    if targets == 0:
        (source.folder / INDEX).unlink()
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.dropped.items())) or "nothing dropped"
        raise NumericalError(
            f"{source.key}.path={source.settings.path}: no token to learn from in {source.split}: {counts.records} "
            f"records gave {counts.documents} documents and {tokens.num_tokens} tokens ({reasons}). Give it text of "
            f"two tokens or more, or set data.loss_on=all (now {source.tasks[0].encoding.loss_on})"
        )
    return {
        "name": set_name(source.settings), "path": source.settings.path, "folder": source.folder.name,
        **dataclasses.asdict(counts), "sequences": tokens.num_sequences, "tokens": tokens.num_tokens,
        "loss_tokens": targets, "padding_share": 1 - tokens.num_tokens / places,
    }  # fmt: skip


def _write_samples(path: Path, sources: list[Source], report: dict[str, dict[str, Any]], tokenizer: Any) -> None:
    """The first documents of each source, decoded, with what is no target in brackets; logs two conversations."""
    sections, logged = [], 0
    for source in sorted(sources, key=lambda source: source.split != "train"):
        rows = next(TokenSet([source.folder]).shards())
        shown = [_marked_text(tokenizer, rows, number) for number in range(2)]
        sections.append(f"== {source.key} {source.settings.path}\n\n" + "\n\n".join(filter(None, shown)))
        if report[source.key]["conversations"] and logged < 2:
            for text in filter(None, shown):
                log.info("tokenize: %s, targets outside of ⟦⟧:\n%s", source.key, text)
                logged += 1
    write_atomic(path, "\n\n".join(sections) + "\n")


def _marked_text(tokenizer: Any, rows: Rows, number: int, max_tokens: int = 400) -> str:
    """Document `number` of the first rows; empty where there are fewer."""
    row, begins = np.nonzero(rows.starts[:64] * (np.arange(rows.starts.shape[1]) < rows.lengths[:64, None]))
    if number >= len(row):
        return ""
    at, start = int(row[number]), int(begins[number])
    later = np.flatnonzero(rows.starts[at, start + 1 :])
    stop = min(start + 1 + int(later[0]) if len(later) else rows.starts.shape[1], int(rows.lengths[at]))
    shown = min(stop, start + max_tokens)
    ids, targets = rows.tokens[at, start:shown], target_mask(rows)[at, start:shown]
    edges = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
    text = ""
    for begin, end in pairwise(edges):
        piece = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        text += piece if targets[begin] else f"⟦{piece}⟧"
    return text + (f" ... ({stop - shown} more tokens)" if shown < stop else "")

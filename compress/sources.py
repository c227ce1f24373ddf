"""Records of text or conversations from files, globs, folders and hub data sets, cut into parts that a worker can read.

A .jsonl file has a record a line, a .json file a list of records (or lines), a .parquet file a record a row; a .txt
file is one document, cut at the next blank line after each 64 KiB so that a book is still many records. Folders and
hub ids are read by `datasets`. Data is never code: none of these runs anything that comes with it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import mmap
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from compress.artifacts import fingerprint, fingerprint_path
from compress.errors import ArtifactError, ConfigError

_TEXT_PIECE_BYTES = 65536
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class Segment:
    """Consecutive records of one file: byte ranges (jsonl, txt), row numbers (parquet), or the records (json list)."""

    path: str
    bounds: npt.NDArray[np.int64]  # n + 1 boundaries of n records
    items: tuple[Any, ...] | None = None  # of a json list, which can't be read from the middle

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def cut(self, start: int, stop: int) -> Segment:
        return Segment(self.path, self.bounds[start : stop + 1], self.items and self.items[start:stop])

    def read(self, text_key: str) -> Iterator[Any]:
        """Each record; a .txt piece comes as {text_key: piece}. Raises ArtifactError for a malformed or damaged one."""
        if self.items is not None:
            yield from self.items
        elif self.path.endswith(".parquet"):
            yield from self._rows()
        else:
            with open(self.path, "rb") as handle:
                for index, (start, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
                    handle.seek(start)
                    text = self._decode(handle.read(stop - start), index)
                    yield {text_key: text} if self.path.endswith(".txt") else self._parse(text, index)

    def where(self, index: int) -> str:
        """The place of a record, for messages."""
        at = int(self.bounds[index])
        if self.items is not None or self.path.endswith(".parquet"):
            return f"{self.path} record {at + 1}"
        with open(self.path, "rb") as handle:
            line = sum(block.count(b"\n") for block in _blocks(handle, at)) + 1
        return f"{self.path} line {line}"

    def _decode(self, raw: bytes, index: int) -> str:
        try:
            return raw.decode("utf-8-sig" if self.bounds[index] == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.where(index)}: not UTF-8 ({error}); convert the file to UTF-8") from error

    def _parse(self, text: str, index: int) -> Any:
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ArtifactError(
                f"{self.where(index)}: not valid JSON ({error}): {text.strip()[:60]!r}; mend or delete the line"
            ) from error

    def _rows(self) -> Iterator[Any]:
        first, last = int(self.bounds[0]), int(self.bounds[-1])
        with _parquet(self.path) as file:
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row < last and row + size > first:
                    start = max(first - row, 0)
                    rows = file.read_row_group(group).slice(start, min(last - row, size) - start)
                    yield from map(_arrow_record, rows.to_pylist())
                row += size


@dataclass(frozen=True)
class Part:
    """A picklable run of one source's records. `identity` changes when the data or the cut does."""

    num_records: int
    identity: str
    segments: list[Segment] = field(default_factory=list)
    dataset: Any = None  # a slice of a datasets.Dataset, which pickles as a reference to its files

    def read(self, text_key: str) -> Iterator[Any]:
        for segment in self.segments:
            yield from segment.read(text_key)
        if self.dataset is not None:
            yield from map(_arrow_record, self.dataset)

    def where(self, index: int) -> str:
        for segment in self.segments:
            if index < len(segment):
                return segment.where(index)
            index -= len(segment)
        return f"record {index + 1} of this part"


def _arrow_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it was before Arrow gave every nested object all the keys that any record has, as nulls."""

    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    return {key: without_nulls(value) for key, value in record.items()}


def split_source(
    key: str,
    path: str,
    records_per_part: int,
    *,
    cache_dir: Path,
    subset: str | None = None,
    split: str = "train",
    max_records: int | None = None,
) -> list[Part]:
    """Find a source's records and cut them into parts of `records_per_part`; scans files, parses only .json lists.

    `key` (such as "data.train[0]") is for messages. Raises ConfigError for a source that is missing, empty or of an
    unknown kind, ArtifactError for a file that can't be read.
    """
    if max_records is not None and max_records < 1:
        raise ConfigError(f"{key}.max_records={max_records} must be at least 1, or null for all")
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    files = source_files(key, path)
    if files is None:
        return _dataset_parts(key, path, records_per_part, cache_dir, subset, split, max_records)
    parts: list[Part] = []
    held: list[Segment] = []
    identities: list[Any] = []

    def close() -> None:
        parts.append(Part(sum(map(len, held)), fingerprint(identities), held[:]))
        held.clear()
        identities.clear()

    left = max_records
    for file in files:
        content = fingerprint_path(Path(file))
        segment = _scan(file, left)
        if len(segment) == 0:
            raise ConfigError(f"{key}.path: {file} is empty, there is no record in it; give it text or leave it out")
        left = None if left is None else left - len(segment)
        at = 0
        while at < len(segment):
            held.append(segment.cut(at, at + records_per_part - sum(map(len, held))))
            identities.append([content, *held[-1].bounds[[0, -1]].tolist()])
            at += len(held[-1])
            if sum(map(len, held)) == records_per_part:
                close()
        if left == 0:
            break
    if held:
        close()
    return parts


def local_files(path: str) -> list[str]:
    """The file, the folder, or the sorted files of a glob; empty for what isn't here. A file's own name comes first,
    so that one with brackets in it is no glob."""
    if Path(path).exists():
        return [path]
    return sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())


def source_files(key: str, path: str) -> list[str] | None:
    """The sorted files behind a path or glob; none where it is for `datasets`. Raises ConfigError for what is missing
    or of an unknown kind."""
    suffixes = ", ".join(_SUFFIXES)
    if Path(path).is_file():
        if not path.endswith(_SUFFIXES):
            raise ConfigError(
                f"{key}.path={path}: files must be {suffixes}; rename or convert it (compressed: unpack it)"
            )
        return [path]
    if Path(path).is_dir():
        return None
    if glob.has_magic(path):
        found = local_files(path)
        if not found:
            raise ConfigError(f"{key}.path={path} matches no file; relative paths start at {Path.cwd()}")
        foreign = [file for file in found if not file.endswith(_SUFFIXES)]
        if foreign:
            raise ConfigError(f"{key}.path={path} matches {foreign[0]}, but files must be {suffixes}")
        return found
    if path.endswith(_SUFFIXES) or path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError(f"{key}.path={path}: no such file or folder; relative paths start at {Path.cwd()}")
    return None


def _scan(file: str, limit: int | None) -> Segment:
    """The bounds of a file's first `limit` records."""
    if file.endswith(".parquet"):
        with _parquet(file) as parquet:
            rows = parquet.metadata.num_rows
        return Segment(file, np.arange((rows if limit is None else min(rows, limit)) + 1))
    if file.endswith(".txt"):
        return Segment(file, _text_bounds(file, limit))
    if file.endswith(".json"):
        with open(file, "rb") as handle:
            is_list = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        if is_list:
            try:
                items = json.loads(Path(file).read_bytes())[:limit]
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ArtifactError(f"{file}: not valid JSON ({error}); mend it, or fetch or make it again") from error
            return Segment(file, np.arange(len(items) + 1), tuple(items))
    starts, position = array("q"), 0
    with open(file, "rb") as handle:
        for line in handle:
            if not line.isspace():
                if len(starts) == limit:
                    break
                starts.append(position)
            position += len(line)
    return Segment(file, np.array([*starts, position], dtype=np.int64) if starts else np.zeros(1, dtype=np.int64))


def _text_bounds(file: str, limit: int | None) -> npt.NDArray[np.int64]:
    bounds = [0]
    size = Path(file).stat().st_size
    if size == 0:
        return np.array(bounds)
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while bounds[-1] < size and len(bounds) - 1 != limit:
            blank = _BLANK_LINE.search(text, min(bounds[-1] + _TEXT_PIECE_BYTES, size))
            bounds.append(blank.end() if blank else size)
        if not text[bounds[-2] : bounds[-1]].strip():  # what is left after the last cut is no document
            bounds.pop()
    return np.array(bounds)


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise ArtifactError(f"{path} is not a complete parquet file ({error}); fetch or make it again") from error


def _blocks(handle: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (block := handle.read(min(size, 1 << 20))):
        size -= len(block)
        yield block


def _dataset_parts(
    key: str, path: str, records_per_part: int, cache_dir: Path, subset: str | None, split: str, max_records: int | None
) -> list[Part]:
    """Parts of what `datasets` makes of a folder (of data files, or saved by save_to_disk) or a hub id."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(path)
            dataset = found[split] if isinstance(found, dict) else found
        else:
            dataset = datasets.load_dataset(path, name=subset, split=split, cache_dir=str(cache_dir / "datasets"))
    except Exception as error:  # its own classes, Arrow's, the hub's, KeyError: all mean that it can't be read
        cause = error.__cause__ or error
        raise ArtifactError(
            f"{key}.path={path} can't be read by datasets with subset={subset}, split={split} ({type(cause).__name__}: "
            f"{(str(cause).strip().splitlines() or [''])[0][:200]}). Check the names; for a hub id check the "
            "network, or give the path of local files"
        ) from error
    total = len(dataset) if max_records is None else min(len(dataset), max_records)
    if total == 0:
        raise ConfigError(f"{key}.path={path}, split={split} is empty, there is no record in it; give it text")
    parts = []
    for start in range(0, total, records_per_part):
        stop = min(start + records_per_part, total)
        identity = fingerprint([dataset._fingerprint, start, stop])
        parts.append(Part(stop - start, identity, dataset=dataset.select(range(start, stop))))
    return parts

"""The run folder: atomic writes and fingerprints.

Nothing here is ever half-written under its final name: files and folders are built beside their place and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.errors import ArtifactError

MANIFEST = "manifest.json"
STARTED = "started.json"
ERROR = "error.json"
FORMAT_VERSION = 1
guards: list[Callable[[Path], None]] = []  # `lease` has one
_SAMPLE_BYTES = 65536
_SAMPLES = 64


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an ArtifactError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        # The safetensors writer reports a full disk as its own error with errno unset, hence the text.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtifactError(
                f"{path}: the disk is full ({error.strerror}); nothing was replaced. "
                "Free space or set run_dir= / cache_dir= to another disk, then run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ArtifactError(f"{path}: cannot be written ({error.strerror}); choose another run_dir=") from error
        if error.errno is None:
            raise
        raise ArtifactError(
            f"{path}: cannot be made a folder or file ({error.strerror}: {error.filename}); choose another "
            "run_dir= or cache_dir=, or move what is in the way"
        ) from error


def check_guards(path: Path) -> None:
    """Before something is put into this place: any of `guards` may raise."""
    for guard in guards:
        guard(path)


def _put(temporary: Path, path: Path) -> None:
    check_guards(path)
    os.replace(temporary, path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; each path has one writer at a time, who holds its lock."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: a reader, or the run after a kill, sees the old file or the new one."""
    payload = data.encode() if isinstance(data, str) else data
    temporary = temporary_of(path, writer_number())
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            temporary.write_bytes(payload)
            _fsync(temporary)
            _put(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def remedy_for(path: Path) -> str:
    """What to do about a damaged file or folder: a stage's own is made again, any other is the user's."""
    folder = next((f for f in (path, *path.parents[:2]) if (f / MANIFEST).is_file()), None)
    if folder is None:
        return "fetch or make it again"
    return f"delete {folder} and run its stage again, which makes the ones after it again too"


def read_json(path: Path, remedy: str | None = None) -> Any:
    """The content of a JSON file; ArtifactError, ending in `remedy`, when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; {remedy or remedy_for(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); {remedy or remedy_for(path)}") from error


def writer_number() -> int:
    """This process's own, on all nodes: process ids are not."""
    return _drawn_by(os.getpid())


@functools.cache
def _drawn_by(_process: int) -> int:
    return secrets.randbits(62)


def temporary_of(path: Path, writer: int) -> Path:
    """The sibling that a process builds before it becomes `path`."""
    return path.with_name(f".{path.name}.tmp-{writer}")


@contextlib.contextmanager
def building_folder(path: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `path` on success and is removed on any error.

    An existing `path` is replaced only at the end. What a killed process left behind is removed by the next call.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary = temporary_of(path, writer_number())
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            old = path.with_name(f".{path.name}.tmp-old")
            check_guards(path)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            _fsync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file atomically."""
    _save(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file to the disk, with the permissions of the umask (the library alone writes 0600).

    Raises OSError for what the system refuses.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except Exception as error:
        # safetensors wraps the operating system's error in its own class; keep the one a caller can act on.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        if "File too large" in str(error) or "os error 27" in str(error):
            raise OSError(errno.EFBIG, "File too large") from error
        raise
    open_permissions(path)
    _fsync(path)


def save_rows(path: Path, name: str, dtype: str, shape: Sequence[int], blocks: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file of one tensor from consecutive blocks of its rows, which need not be there at once.

    `dtype` as safetensors names it, such as BF16. The library writes whole tensors only; the format is a length, a
    header in json and the bytes.
    """

    def write(temporary: Path) -> None:
        size = 0
        with open(temporary, "wb") as file:
            for block in blocks:
                if not size:
                    total = math.prod(shape) * block.element_size()
                    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, total]}
                    header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
                    header += b" " * (-len(header) % 8)
                    file.write(len(header).to_bytes(8, "little") + header)
                size += file.write(block.contiguous().view(torch.uint8).numpy().data)
        _fsync(temporary)
        assert size == total, f"{size} bytes of {total}"

    _save(path, write)


def _save(path: Path, write: Callable[[Path], None]) -> None:
    temporary = temporary_of(path, writer_number())
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            write(temporary)
            _put(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def free_disk_bytes(folder: Path) -> int:
    """Of the disk that a folder lies on, or will when it is made."""
    return shutil.disk_usage(existing(folder)).free


def open_permissions(path: Path) -> None:
    """Give a file, or every file of a folder, the permissions of the umask: safetensors writes 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def replace_contents(building: Path, target: Path) -> None:
    """Move what is in `building` into the stage folder `target` in place of its old contents, config.json last.

    What the pipeline keeps there (manifest, started, error, dot files) stays. A run killed here leaves a stage without
    its manifest, which the next run makes again.
    """
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        check_guards(target)
        for old in target.iterdir():
            if old.name in (MANIFEST, STARTED, ERROR) or old.name.startswith("."):
                continue
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        for new in sorted(building.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(new, target / new.name)
        shutil.rmtree(building)


def open_tensors(path: Path) -> Any:
    """A lazy safetensors reader; a missing, truncated or foreign file is an ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the folder is incomplete, {remedy_for(path)}")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        if "os error 12" in str(error) or "annot allocate memory" in str(error):
            raise ArtifactError(f"{path}: no memory left to map it ({error}); free some, or lower threads=") from error
        raise ArtifactError(f"{path} is not a complete safetensors file ({error}); {remedy_for(path)}") from error


def fingerprint(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def content_files(folder: Path) -> list[Path]:
    """In order; not .cache, .git or editors' files, which are no part of a model or a text."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def fingerprint_path(path: Path) -> str:
    """A content fingerprint of a file or folder: names, sizes, and up to 64 blocks of 64 KiB spread over each file.

    Files of up to 4 MiB are read whole. A 140 GB checkpoint takes milliseconds a shard instead of minutes; what is
    given up is noticing an edit inside a large file that keeps its size and misses every block.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; check the path, or fetch or make it again")
    digest = hashlib.sha256()
    for file in content_files(path) if path.is_dir() else [path]:
        relative = file.relative_to(path).as_posix() if path.is_dir() else ""
        size = file.stat().st_size
        digest.update(f"{relative}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _SAMPLE_BYTES * _SAMPLES:
                digest.update(handle.read())
            else:
                for index in range(_SAMPLES):
                    handle.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                    digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def link(path: Path, target: Path) -> None:
    """A relative link to a folder of the same run, unless there is something already."""
    if target.exists() and not path.exists():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another rank was first
                path.symlink_to(os.path.relpath(target, path.parent))

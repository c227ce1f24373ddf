"""Who writes a stage's folder: a lock of the kernel's, and a lease that a later try of the same job takes over.

Slurm may declare a job dead, and start it again elsewhere, while a node that it can't reach still runs the first try.
The lock alone would refuse the second one for as long as the first lives, or, where the file system has let it go, keep
neither from writing. So each try signs the lease; the one before finds another name there at its next commit and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from compress.artifacts import disk_errors, guards, write_json
from compress.errors import ArtifactError

log = logging.getLogger(__name__)
_signed: dict[Path, tuple[str, TextIO]] = {}  # what this process wrote into a lease, and its open lock


class TakenOver(ArtifactError):
    """A later try of the same job writes now; this process must not write anything more."""


@contextlib.contextmanager
def run_lock(run_dir: Path, stage: str) -> Iterator[None]:
    """Hold one stage folder of a run for writing. A second process gets an ArtifactError that names the holder.

    The lock goes with the process however that dies, so a killed run blocks nobody. It is per stage, so that a kept
    step can be exported and evaluated while training goes on. A later try of the same Slurm job, or chain of jobs,
    takes over from a holder that is still alive.
    """
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / f".{stage}.lock").open("a+")
    path = _path(run_dir / stage)
    chain, number = _this_try()
    job = os.environ.get("SLURM_JOB_ID")
    process = f"process {os.getpid()}" + (f" of Slurm job {job}" if job else "") + f" since {time.ctime()}"
    try:
        before = _read(path)
        same = bool(chain) and before.get("chain") == chain
        if same and before.get("try", []) > number:
            raise ArtifactError(
                f"{run_dir / stage} is being written by a later try of this job ({before.get('process')}); this one "
                "has nothing more to do"
            )
        if not _locked(lock):
            if not (same and before.get("try", []) < number):
                raise ArtifactError(
                    f"{run_dir / stage} is being written by {before.get('process', 'another process')}; wait for it, "
                    "or give this run another name= or run_dir="
                )
            log.warning("%s: taking over from %s, an earlier try of this job", stage, before["process"])
        name = secrets.token_hex(8)
        write_json(path, {"name": name, "chain": chain, "try": number, "process": process})
        _signed[path] = name, lock
        yield
    finally:
        _signed.pop(path, None)
        lock.close()


def check_lease(folder: Path) -> None:
    """Raise TakenOver where this process held the stage folder, or one that the path is in, and a later try has taken
    it; called before whatever is put into its place (`artifacts`)."""
    place = folder.absolute()
    for path in (_path(one) for one in (place, *place.parents)):
        if path not in _signed:
            continue
        name, lock = _signed[path]
        found = _read(path)
        if found.get("name") != name:
            by = found.get("process")
            raise TakenOver(f"{folder} is now written by {by}, a later try; nothing more is written here")
        _locked(lock)  # what the try before has let go by now


guards.append(check_lease)


def _path(folder: Path) -> Path:
    return (folder.parent / f".{folder.name}.lease").absolute()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_try() -> tuple[str, list[int]]:
    """The chain of tries that this process belongs to, by launch/stage.sbatch, and its place there; none: ""."""
    chain, _, places = os.environ.get("COMPRESS_TRY", "").partition(":")
    numbers = [int(place) for place in places.split(".") if place.isdigit()]
    return (chain, numbers) if numbers else ("", [])

"""Training checkpoints: torch's distributed checkpoint in its safetensors storage, so that nothing is ever unpickled.

A checkpoint is a folder `step_00000016` with the shards and `complete.json`, its commit marker, which holds the facts
(step, tokens) and a digest of every file. The folder is built under a temporary name and renamed when it is whole;
one whose digest doesn't fit is passed over for the one before, with a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from compress.artifacts import (
    building_folder,
    fingerprint_path,
    read_json,
    temporary_of,
    write_json,
    write_tensors,
    writer_number,
)
from compress.devices import random_states, set_random_states
from compress.errors import ArtifactError
from compress.lease import check_lease
from compress.optimizer import local_part
from compress.parallel import ALONE, Ranks, launched

log = logging.getLogger(__name__)
MARKER = "complete.json"
AT_ONCE_BYTES = 1 << 20  # a tensor below is copied within save(): nothing to gain, and a mixture's loads change early


def save(
    folder: Path,
    step: int,
    state: dict[str, Tensor],
    facts: dict[str, Any],
    keep: int,
    figures: Mapping[int, float] | None = None,
    ranks: Ranks = ALONE,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Commit `state` as step `step`, then remove all but the newest `keep` checkpoints.

    figures: of steps, such as their validation KL; of those that have one the lowest is kept too. Several ranks call it
    together, over a `group` of their own where it runs in a thread: each writes what it holds, the first one commits.
    Raises ArtifactError on a full disk, TakenOver where a later try writes; the checkpoints before are untouched then.
    """
    final = folder / f"step_{step:08d}"
    if ranks.is_main:
        check_lease(folder.parent)  # before the writing; what puts it into its place asks again
    with building_folder(final) if ranks.is_main else contextlib.nullcontext():
        number = torch.tensor([writer_number()])
        if ranks.size > 1:  # from now on the folder is there
            dist.broadcast(number, 0, group=group)
        temporary = temporary_of(final, int(number))
        writer = _Files(str(temporary), save_distributed=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # One rank has nobody to talk to, and may be in a thread beside training, which does.
                everything = {**_random(ranks.rank), **state}
                dcp.save(everything, storage_writer=writer, no_dist=ranks.size == 1, process_group=group)
        except dcp.CheckpointException as error:  # carries what each rank raised; one rank is enough to say why
            raise next(iter(error.failures.values()))[0] from error
        if ranks.is_main:
            write_json(temporary / MARKER, {"step": step, "facts": facts, "digest": _digest(temporary)})
    if ranks.is_main:
        _remove_old(folder, step, keep, figures or {})
    if ranks.size > 1:  # nobody goes on, or ends, before it is committed
        dist.all_reduce(torch.zeros(()), group=group)  # a barrier would take a GPU where there is one
    return final


def rng_key(rank: int, device_type: str = "cpu") -> str:
    """Under which name a rank's random numbers are kept."""
    return f"rng/{device_type}" + (f"/{rank}" if rank else "")


def _random(rank: int) -> dict[str, Tensor]:
    """This rank's random numbers of now, by those names."""
    return {rng_key(rank, device_type): state for device_type, state in random_states().items()}


def _remove_old(folder: Path, step: int, keep: int, figures: Mapping[int, float]) -> None:
    there = steps(folder)
    for later in (known for known in there if known > step):  # a resume passed over them: damaged, or taken back
        shutil.rmtree(folder / f"step_{later:08d}")
    there = [known for known in there if known <= step]
    measured = [known for known in there if known in figures]
    best = min(measured, key=lambda known: (figures[known], known)) if measured else None
    for old in there[:-keep]:
        if old != best:
            shutil.rmtree(folder / f"step_{old:08d}")


class _Files(HuggingFaceStorageWriter):
    """torch's writer, but for how a file is written: from the tensors' own memory.

    torch's puts the whole file together in new memory first and holds Python's lock meanwhile, so that training beside
    it stands still: 3 s for 1.2 GB where writing takes 1 (benchmarks/checkpoint.py).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, Any]] = {}
        for item in plan.items:
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor)
            assert item.tensor_data is not None
            tensors[item.index.fqn] = found.detach().cpu().contiguous()
            places[item.index.fqn] = {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets}
        if tensors:
            said = {
                CUSTOM_METADATA_KEY: json.dumps(places),
                DCP_VERSION_KEY: str(HF_DCP_VERSION),
                FORMAT_KEY: FORMAT_VALUE,
            }
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"  # as torch's
            write_tensors(Path(self.path) / name, tensors, said)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])  # nobody asks: without consolidation no file says which one a tensor is in
        return done


class Writer:
    """Commits checkpoints one after the other; `asynchronous` in a thread, from a copy, while training goes on.

    The copy too is made in a thread, beside the next step's forward and backward, which change nothing large; before
    the optimizer does, wait_for_copy() is called. At most one checkpoint is in flight. Why it failed is raised by the
    next check(), save() or wait(); leaving the block waits. Several ranks make it together.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, committed: int = 0, ranks: Ranks = ALONE) -> None:
        self.folder, self.keep, self.committed, self.ranks = folder, keep, committed, ranks
        # What a thread says to the other ranks must not mix with what training says.
        self._group = dist.new_group(backend="gloo") if asynchronous and ranks.size > 1 else None
        self._threads = ThreadPoolExecutor(1, "checkpoint", _behind_training) if asynchronous else None
        self._copiers = ThreadPoolExecutor(1, "copy")
        self._copy: dict[str, Tensor] = {}
        self._copying: Future[None] | None = None
        self._writing: Future[None] | None = None

    @torch.no_grad()
    def save(
        self, step: int, state: dict[str, Tensor], facts: dict[str, Any], figures: Mapping[int, float] | None = None
    ) -> None:
        """What of `state` is below AT_ONCE_BYTES may change as soon as this returns, the rest after wait_for_copy().

        Raises ArtifactError on a full disk, of this or the last one.
        """
        self.wait()
        if self._threads is None:
            self._save(step, state, facts, figures)
            return
        everything = {**_random(self.ranks.rank), **state}
        self._copy = {name: self._copy[name] for name in everything if name in self._copy}
        large = {name: tensor for name, tensor in everything.items() if local_part(tensor).nbytes >= AT_ONCE_BYTES}
        self._take({name: tensor for name, tensor in everything.items() if name not in large})
        self._copying = self._copiers.submit(self._take, large)
        self._writing = self._threads.submit(self._save_copy, self._copying, list(everything), step, facts, figures)

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Into the memory of the last copy, which was written: memory from the system costs more than the copying."""
        for name, tensor in tensors.items():
            self._copy[name] = _copied(tensor, self._copy.get(name))

    def wait_for_copy(self) -> None:
        """Until what the last save() was given may change. Raises what made the copying fail."""
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def _save_copy(
        self,
        copying: Future[None],
        names: Sequence[str],
        step: int,
        facts: dict[str, Any],
        figures: Mapping[int, float] | None,
    ) -> None:
        copying.result()
        self._save(step, {name: self._copy[name] for name in names}, facts, figures)

    def _save(
        self, step: int, state: dict[str, Tensor], facts: dict[str, Any], figures: Mapping[int, float] | None
    ) -> None:
        save(self.folder, step, state, facts, self.keep, figures, self.ranks, self._group)
        self.committed = step

    def check(self) -> None:
        """Raise what made a finished write fail; returns at once while one is in flight."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is in flight. Raises what made it fail."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        try:
            self.wait()
        except ArtifactError as error:
            if kind is None:
                raise
            log.warning("the checkpoint in flight was not committed: %s", error)  # what ended training is raised
        finally:
            self._copiers.shutdown()
            if self._threads is not None:
                self._threads.shutdown()


@torch.no_grad()
def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """In the memory of the host, where a GPU has none to spare."""
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        return tensor.to("cpu", copy=True)
    local_part(into).copy_(local_part(tensor))  # DTensor's own copy_ thinks longer of a small one than it copies
    return into


def _behind_training() -> None:
    """A thread of its own takes the processor when training leaves it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def steps(folder: Path) -> list[int]:
    """The steps that have a commit marker, ascending; their digests are not read here."""
    return sorted(int(marker.parent.name.removeprefix("step_")) for marker in folder.glob(f"step_*/{MARKER}"))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, facts) of the newest whole checkpoint; None when there is none.

    Raises ArtifactError when checkpoints exist and none is whole.
    """
    there = steps(folder)
    for candidate in reversed(there):
        path = folder / f"step_{candidate:08d}"
        facts = _facts(path)
        if facts is not None:
            return path, facts
    if there:
        raise ArtifactError(
            f"{folder}: none of the checkpoints {there} is whole; delete the folder to train from the start"
        )
    return None


def _facts(path: Path) -> dict[str, Any] | None:
    """What the marker says; None, with a warning, when a file isn't as it was committed."""
    try:
        marker = read_json(path / MARKER)
        if marker["digest"] == _digest(path):
            return {"step": marker["step"], **marker["facts"]}
        reason = "a file has other bytes than when it was committed"
    except (ArtifactError, KeyError, TypeError) as error:
        reason = str(error)
    log.warning("%s is damaged (%s); passing over it", path, reason)
    return None


@contextlib.contextmanager
def held(folder: Path, into: Path, step: int | None = None) -> Iterator[tuple[Path, dict[str, Any]] | None]:
    """(folder, facts) of the newest whole checkpoint, or of `step`, while the block lasts; None where there is none.

    Its files are hard-linked as `into` first, so that training may go on and remove the step meanwhile. Raises
    ArtifactError when the step isn't kept, or nothing is whole.
    """
    there = steps(folder)
    if step is not None and step not in there:
        raise ArtifactError(
            f"{folder}: step {step} is not kept; there are {there or 'none'}; see distill.keep_checkpoints"
        )
    for candidate in [step] if step is not None else reversed(there):
        shutil.rmtree(into, ignore_errors=True)
        try:
            with contextlib.suppress(FileNotFoundError, shutil.Error):  # removed between being listed and linked
                shutil.copytree(folder / f"step_{candidate:08d}", into, copy_function=_link)
            facts = _facts(into)
            if facts is not None:
                yield into, facts
                return
        finally:
            shutil.rmtree(into, ignore_errors=True)
    if there:
        problem = f"no checkpoint of {there} is whole" if step is None else f"step {step} is damaged or was removed"
        raise ArtifactError(
            f"{folder}: {problem}; there are now {steps(folder) or 'none'}: give export.step= one of them, or train "
            "again"
        )
    yield None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def load(path: Path, state: dict[str, Tensor], restore_rng: bool = False, alone: bool = False) -> None:
    """Fill `state` in place from the checkpoint, each rank reading only what it holds, whatever layout wrote it.

    `state` may hold a part of what was saved (the model alone, for an export). All ranks call it together, or one
    `alone`.
    """
    known = _known(path) if restore_rng else {}
    # Those that aren't there are new: another number of ranks wrote it, or other devices.
    random = {kind: now for kind, now in random_states().items() if rng_key(launched().rank, kind) in known}
    wanted = {**state, **{rng_key(launched().rank, kind): now for kind, now in random.items()}}
    alone = alone or not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ArtifactError(
            f"{path} does not hold this model ({cause}): it was trained from another student. Give this run another "
            "name=, or delete the folder of checkpoints to train from the start"
        ) from error
    set_random_states(random)


def empties(path: Path, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that the checkpoint has under `prefix`, to be filled by `load`."""
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in _known(path).items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _known(path: Path) -> dict[str, Any]:
    """What a checkpoint says of each of its tensors, by name."""
    known: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return known


def _digest(folder: Path) -> dict[str, str]:
    return {file.name: fingerprint_path(file) for file in sorted(folder.iterdir()) if file.name != MARKER}

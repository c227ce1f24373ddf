"""What a node must have for a run: a check each, a line each (`doctor.py` asks them on every node).

Software, GPUs, network, models and text, the run folder, disk, memory, the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from compress.agreement import code_files
from compress.architecture import num_parameters
from compress.artifacts import disk_errors, existing, fingerprint, free_disk_bytes
from compress.devices import CPU
from compress.embedded import resolve
from compress.errors import ConfigError
from compress.folders import read_model
from compress.inputs import streams, teacher_of, whole_bytes
from compress.manifests import versions
from compress.models import check_usable
from compress.parallel import check_interface, free_bytes
from compress.plan import CPU_HEADROOM, HEADROOM, needs
from compress.progress import about
from compress.settings import CompressConfig, Device, Stage
from compress.sources import source_files
from compress.stages import chosen_stages

MIN_FILES = 1000  # that may still be made: a run makes hundreds
SKEW_SECONDS = 1.0  # between nodes, and of one node's clock against itself, that is worth a word
CLOCK_REMEDY = "let chrony or ntpd keep the time"


class Verdict(StrEnum):
    ok = "pass"
    warn = "warn"
    fail = "fail"


@dataclasses.dataclass(frozen=True)
class Line:
    """What a check found and, where it isn't as it should be, what to do."""

    verdict: Verdict
    text: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one node's checks look at."""

    config: CompressConfig
    run_dir: Path
    ranks_here: int
    ranks: int
    began: tuple[float, float] = dataclasses.field(default_factory=lambda: (time.time(), time.monotonic()))

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """That are asked about: all of the run, or those up to `until`."""
        return chosen_stages(dataclasses.replace(self.config, stage=Stage.all))

    @functools.cached_property
    def needs(self) -> tuple[tuple[str, int], dict[str, int]] | None:
        """Memory of a rank and disk of the run, by stage=plan's reckoning; None where it can't tell yet."""
        config, pruned = self.config, self.run_dir / "prune"
        if not config.distill.init_from and (pruned / "config.json").is_file():
            config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, init_from=str(pruned)))
        with contextlib.suppress(ConfigError):
            return needs(config, self.ranks)
        return None


Check = Callable[[Subject], Line]
_UNTOLD = "what training needs can't be told before its student is chosen"


def _software(subject: Subject) -> Line:
    names = " ".join(f"{name} {found}" for name, found in versions().items())
    code = fingerprint(code_files())[:12]  # a revision's, whether or not git is there
    return Line(Verdict.ok, f"Python {platform.python_version()}, {names}; code {code}")


def _accelerator(subject: Subject) -> Line:
    driver = Path("/proc/driver/nvidia/version")
    said = driver.read_text() if driver.exists() else ""
    found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", said)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return accelerator(devices, subject.config.cluster.gpus_per_node, subject.ranks_here, found[1] if found else None)


def accelerator(devices: int, wanted: int, ranks_here: int, driver: str | None) -> Line:
    """GPUs that torch finds, against what cluster.gpus_per_node says; `driver`: NVIDIA's, where it is loaded."""
    if devices < wanted:
        why = f"driver {driver}, torch built for CUDA {torch.version.cuda}" if driver else "no NVIDIA driver is loaded"
        return Line(Verdict.fail, f"cluster.gpus_per_node={wanted}, and torch finds {devices} here ({why}); ask for "
                    f"them (COMPRESS_SBATCH=--gpus-per-node={wanted} in launch/env.sh), leave this node out, or set "
                    "cluster.gpus_per_node=0")  # fmt: skip
    if not devices:
        return Line(Verdict.ok, "no GPU, gloo on CPU")
    text = f"{devices} GPUs, driver {driver}; each rank takes one"
    return Line(Verdict.warn if ranks_here > devices else Verdict.ok, f"{text}; {ranks_here} ranks here")


def _nccl(subject: Subject) -> Line:
    """With a GPU not run here."""
    if not torch.cuda.is_available():
        return Line(Verdict.ok, "not needed without a GPU")
    return Line(Verdict.ok, ".".join(map(str, torch.cuda.nccl.version())))


def _transformer_engine(subject: Subject) -> Line:
    return Line(Verdict.ok, f"{_installed('transformer-engine')}; this version doesn't use it")


def _attention(subject: Subject) -> Line:
    """With a GPU not run here."""
    if not torch.cuda.is_available():
        return Line(Verdict.ok, "torch's own on CPU; flash-attn and FlexAttention are for GPUs")
    flex = importlib.util.find_spec("triton") is not None
    return Line(Verdict.ok, attention(_installed("flash-attn"), torch.backends.cuda.flash_sdp_enabled(), flex))


def attention(flash_attn: str, in_torch: bool, flex: bool) -> str:
    """Which kernels for packed documents are there, by name."""
    kinds = {f"flash-attn {flash_attn}": flash_attn != "not installed", "torch's flash kernel": in_torch,
             "FlexAttention": flex}  # fmt: skip
    return (
        ", ".join(name for name, there in kinds.items() if there) or "dense masks alone, which long sequences pay for"
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _network(subject: Subject) -> Line:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        check_interface(variable)
    asked = os.environ.get("GLOO_SOCKET_IFNAME") or "the one of this host's name"
    return Line(Verdict.ok, f"gloo takes {asked} of {', '.join(name for _, name in socket.if_nameindex())}")


def _models(subject: Subject) -> Line:
    config, trust = subject.config, subject.config.teacher.trust_remote_code
    elsewhere = [Path(path).expanduser() for path in (config.prune.source, config.distill.init_from) if path]
    teacher, *others = [read_model(folder, trust) for folder in (teacher_of(config), *elsewhere)]
    for info in (teacher, *others):
        check_usable(info.folder, trust)
    size = num_parameters(teacher, teacher.shape)
    return Line(Verdict.ok, f"{teacher.folder} is whole: {size:,} parameters" +
                "".join(f"; so is {info.folder}" for info in others))  # fmt: skip


def _text(subject: Subject) -> Line:
    config, size, count, foreign = subject.config, 0, 0, 0
    for split in ("train", "calibration", "validation"):
        for number, source in enumerate(getattr(config.data, split)):
            key = f"data.{split}[{number}]"
            files = source_files(key, str(Path(resolve(source.path, Path(config.cache_dir).expanduser())).expanduser()))
            foreign += files is None
            for file in files or ():
                with open(file, "rb") as handle:
                    if not handle.read(1):
                        raise ConfigError(f"{key}.path: {file} is empty; give it text or leave it out")
                size, count = size + Path(file).stat().st_size, count + 1
    others = f"; {foreign} sources that datasets will read were not looked at" if foreign else ""
    return Line(Verdict.ok, f"{count} files, {size / 1e6:,.1f} MB, can be read{others}")


def _run_folder(subject: Subject) -> Line:
    there = existing(subject.run_dir)
    with disk_errors(subject.run_dir), tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
        file.write(os.urandom(4096))
        file.flush()
        os.fsync(file.fileno())
    return Line(Verdict.ok, f"{there} can be written")


def _disk(subject: Subject) -> Line:
    free = free_disk_bytes(subject.run_dir)
    if Stage.distill not in subject.stages:
        return Line(Verdict.ok, f"{_gb(free)} free")
    if subject.needs is None:
        return Line(Verdict.warn, f"{_gb(free)} free; {_UNTOLD}")
    held = sum(file.stat().st_size for file in subject.run_dir.rglob("*") if file.is_file())
    left = max(0, sum(subject.needs[1].values()) - held)
    text = f"{_gb(free)} free, {_gb(left)} still needed ({_gb(held)} are there)"
    if free >= left:
        return Line(Verdict.ok, text)
    largest = max(subject.needs[1].items(), key=lambda part: part[1])
    return Line(Verdict.fail, f"{text}, most of it for {largest[0]} ({_gb(largest[1])}); free some, set run_dir= to "
                "another disk, or lower distill.keep_checkpoints")  # fmt: skip


def _files(subject: Subject) -> Line:
    there = existing(subject.run_dir)
    found = os.statvfs(there)
    if not found.f_files:
        return Line(Verdict.ok, "this file system doesn't count them")
    if found.f_favail < MIN_FILES:
        return Line(Verdict.fail, f"only {found.f_favail:,} more can be made on the disk of {there}, a run makes "
                    f"hundreds; delete some, or set run_dir= to another disk")  # fmt: skip
    return Line(Verdict.ok, f"{found.f_favail:.2g} more can be made")


def _memory(subject: Subject) -> Line:
    on_gpus = torch.cuda.is_available() and subject.config.cluster.device is not Device.cpu
    return memory(subject, torch.device("cuda") if on_gpus else CPU)


def memory(subject: Subject, device: torch.device) -> Line:
    """What ranks need against what is free: of the node's memory for all that are here, of a GPU's for one. What a GPU
    says of itself was not asked here."""
    config, there = subject.config, free_bytes(device)
    copies, share, who = subject.ranks_here, CPU_HEADROOM, f"{subject.ranks_here} ranks here need"
    fewer = "fewer ranks on each node, or "
    if device.type != "cpu":
        copies, share, who, fewer = 1, HEADROOM, "the GPUs need", ""
    if Stage.distill in subject.stages:
        if subject.needs is None:
            return Line(Verdict.warn, f"{_gb(there)} free; {_UNTOLD}")
        (moment, each), usable = subject.needs[0], int(there * share)
        remedy = f"more nodes, {fewer}distill.recompute=true, or distill.micro_batch_size=1"
    else:
        info = read_model(teacher_of(config), config.teacher.trust_remote_code)
        if streams(config, info, device=device):
            return Line(Verdict.ok, f"{_gb(there)} free; the teacher is taken a layer at a time")
        (moment, each), usable = ("the teacher", whole_bytes(config, info, device)), there
        remedy = f"{fewer}score.stream=true"
    text = f"{who} {_gb(each)} each at {moment}; {_gb(there)} are free"
    if copies * each > usable:
        return Line(Verdict.fail, f"{text}, of which {_gb(usable)} can be used; {remedy}")
    return Line(Verdict.ok, text)


def _clock(subject: Subject) -> Line:
    """Has it been set while we looked, or since the run wrote what is in its folder?"""
    wall, steady = subject.began
    stepped = (time.time() - wall) - (time.monotonic() - steady)
    if abs(stepped) > SKEW_SECONDS:
        return Line(Verdict.warn, f"was set by {stepped:+.1f} s within the last seconds; {CLOCK_REMEDY}")
    patterns = ("*/manifest.json", "*/started.json", "*/metrics.jsonl", "*/checkpoints/*/complete.json")
    made = [(file.stat().st_mtime, file) for pattern in patterns for file in subject.run_dir.glob(pattern)]
    newest, file = max(made, default=(0.0, subject.run_dir))
    ahead = newest - time.time()
    if ahead > SKEW_SECONDS:
        return Line(Verdict.warn, f"{file} is {about(ahead)} in the future: this clock was set back, or the file "
                    f"server's is ahead; {CLOCK_REMEDY}")  # fmt: skip
    return Line(Verdict.ok, "runs evenly")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


CHECKS: dict[str, Check] = {
    "software": _software,
    "GPUs": _accelerator,
    "NCCL": _nccl,
    "Transformer Engine": _transformer_engine,
    "attention": _attention,
    "network": _network,
    "models": _models,
    "text": _text,
    "run folder": _run_folder,
    "disk": _disk,
    "files": _files,
    "memory": _memory,
    "clock": _clock,
}

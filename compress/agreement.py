"""Whether all ranks were started alike: the same code, versions, settings and files, and one run folder.

Nodes that differ in any of it would train replicas apart without an error, or wait for each other for ever.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.artifacts import content_files, fingerprint, fingerprint_path
from compress.config import conf_dir
from compress.errors import ConfigError
from compress.inputs import teacher_of
from compress.manifests import plain_settings, versions
from compress.parallel import Ranks
from compress.settings import CompressConfig

_PATIENCE = 30  # seconds that a file may take to be seen from another node


def check_agreement(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    """Raise ConfigError, on every rank, naming what a rank has otherwise than the first one, and which rank."""
    if ranks.size == 1:
        return
    for check in CHECKS.values():
        check(config, run_dir, ranks)


def code_files() -> dict[str, str]:
    """Fingerprints of what this program consists of, by name."""
    return {
        f"{folder.name}/{path.relative_to(folder)}": fingerprint_path(path)
        for folder in (Path(__file__).parent, conf_dir())
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".yaml")
    }


def _code(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    remedy = "install the same version on every node, or give all one PYTHONPATH"
    _compare_files(code_files(), f"code of compress, in {Path(__file__).parent}", ranks, remedy)


def _versions(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    names = {
        f"version of {name}": found for name, found in [("Python", platform.python_version()), *versions().items()]
    }
    _compare(names, ranks, "use one environment, or image, on every node", tell=True)


def _settings(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    _compare(_leaves(plain_settings(config)), ranks, "start every rank by the same command", tell=True)


def _models(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    folders = {"teacher.path": str(teacher_of(config)), "distill.init_from": config.distill.init_from,
               "prune.source": config.prune.source}  # fmt: skip
    for key, folder in folders.items():
        if folder:  # alike on every rank: settings come before
            place = Path(folder).expanduser()
            files = {str(path.relative_to(place)): fingerprint_path(path) for path in content_files(place)}
            _compare_files(files, f"{key}={folder}", ranks, "let every node read the same folder")


def _leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def _compare_files(files: Mapping[str, str], what: str, ranks: Ranks, remedy: str) -> None:
    """Fingerprints by name, of which ranks may have others, or more."""
    rows = torch.tensor([[_number(name), _number(found)] for name, found in files.items()], dtype=torch.float64)
    counts = [int(found) for [found] in ranks.gather([torch.tensor(len(files))])]
    padded = torch.zeros(max(counts), 2, dtype=torch.float64)
    padded[: len(files)] = rows.view(-1, 2)
    names = {_number(name): name for name in files}
    first, *others = ({(a, b) for a, b in found.tolist() if a} for [found] in ranks.gather([padded]))
    for rank, found in enumerate(others, start=1):
        different = sorted({number for number, _ in first ^ found})
        if different:
            known = sorted(names[number] for number in different if number in names)
            said = f" ({', '.join(known[:3])}{', ...' if len(different) > 3 else ''})" if known else ""
            raise ConfigError(f"rank {rank} of {ranks.size} has another {what} than rank 0{said}; {remedy}")


def _number(value: Any) -> float:
    """That float64 holds."""
    return float(int(fingerprint(value)[:12], 16))


def _compare(facts: Mapping[str, Any], ranks: Ranks, remedy: str, *, tell: bool = False) -> None:
    """Facts of the same names on every rank. tell: a person can read them."""
    digests = torch.tensor([_number(value) for value in facts.values()], dtype=torch.float64)
    first, *others = (found for [found] in ranks.gather([digests]))
    for rank, found in enumerate(others, start=1):
        different = [name for name, same in zip(facts, (found == first).tolist(), strict=True) if not same]
        if different:
            own = f" (here, on rank {ranks.rank}: {facts[different[0]]})" if tell else ""
            raise ConfigError(
                f"rank {rank} of {ranks.size} has another {' and '.join(different[:3])} than rank 0{own}; {remedy}"
            )


def _shared(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    """The first rank leaves a file in the run folder, which all others must see."""
    name = f".seen-by-all-{ranks.agree(os.urandom(8).hex())}"
    there = run_dir / name
    if ranks.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        there.touch()
    try:
        ranks.any(False)  # it is written
        until = time.monotonic() + _PATIENCE
        while not there.exists() and time.monotonic() < until:
            time.sleep(0.2)
        lacks = torch.zeros(ranks.size)
        lacks[ranks.rank] = not there.exists()
        [missing] = ranks.sums([lacks])
    finally:
        if ranks.is_main:
            there.unlink(missing_ok=True)
    blind = missing.nonzero().flatten().tolist()
    if blind:
        raise ConfigError(
            f"run_dir={run_dir} is not the same folder for rank {blind[0]} of {ranks.size}: it doesn't see what rank 0 "
            "writes there. Give one on a file system that all nodes share, by its absolute path"
        )


# What all ranks must have alike, in words; each is called by all of them together.
CHECKS: dict[str, Callable[[CompressConfig, Path, Ranks], None]] = {
    "code": _code,
    "versions": _versions,
    "settings": _settings,
    "models' files": _models,
    "shared folder": _shared,
}

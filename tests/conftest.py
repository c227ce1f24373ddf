"""One cache with the embedded tiny teacher, one finished run to copy from; runs in this process or in their own."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

# Tiny models gain nothing from a second thread and lose much on a busy machine; and bits are only promised for one
# thread count.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
# Eight steps of 512 tokens in float32: every stage in about two seconds, and the same bits wherever it runs.
FAST = (
    "recipe=tiny",
    "compute_dtype=float32",
    "threads=1",
    "data.workers=1",
    "data.sequence_length=64",
    "distill.num_tokens=4096",
    "distill.checkpoint_steps=2",
    "evaluate.max_tokens=1024",
    "evaluate.generate_tokens=2",
)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="libfaketime isn't there (Debian's package libfaketime)")
Run = Callable[..., None]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds embedded:tiny and its text."""
    from compress.embedded import resolve

    folder = tmp_path_factory.mktemp("cache")
    resolve("embedded:tiny", folder)
    return folder


@pytest.fixture(scope="session")
def teacher_source(cache: Path) -> Path:
    return cache / "tiny" / "teacher"


@pytest.fixture
def teacher(teacher_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher's folder, to be spoilt."""
    return Path(shutil.copytree(teacher_source, tmp_path / "teacher"))


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl without what a clock said."""
    return {key: value for key, value in row.items() if key != "mfu" and "second" not in key}


def _run(cache: Path, run_dir: Path, overrides: tuple[str, ...]) -> None:
    from compress.config import load_config
    from compress.pipeline import run

    run(load_config(*FAST, f"run_dir={run_dir}", f"cache_dir={cache}", *overrides))


@pytest.fixture
def run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*settings): a tiny run in this process, in tmp_path/run unless run_dir= is among the settings."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: _run(cache, tmp_path / "run", overrides)


@pytest.fixture(scope="session")
def finished_source(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of all stages, shared: look, don't touch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _run(cache, folder, ())
    return folder


@pytest.fixture
def finished(finished_source: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in tmp_path/run, where `run` and `command` go on with it."""
    return Path(shutil.copytree(finished_source, tmp_path / "run"))


def arguments(cache: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "compress", *FAST, f"run_dir={run_dir}", f"cache_dir={cache}", *overrides]


def environment() -> dict[str, str]:
    """Of a process that finds this checkout from any folder, with one thread and a terminal wide enough to read."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "250",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """command(*arguments): `python -m compress` as a process of its own, in tmp_path."""

    def start(*overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "compress", *overrides],
            cwd=tmp_path, env={**environment(), **environ}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return start


@pytest.fixture
def spawn(cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """spawn(*settings): the same tiny run as `run`, left running; killed at the test's end."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            arguments(cache, tmp_path / "run", *overrides),
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """SIGTERM as the number-th step of any training begins, counted from 1; the list has an entry a step."""
    from compress import distill

    steps: list[int] = []
    right = distill.accumulate_gradients

    def stepping(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == number:
            signal.raise_signal(signal.SIGTERM)
        return right(*arguments, **options)

    monkeypatch.setattr(distill, "accumulate_gradients", stepping)
    return steps


@contextmanager
def full_disk_after(size: int) -> Iterator[None]:
    """No file of this process may grow past `size` bytes: the kernel's EFBIG stands for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)

"""What the benchmarks share. Only the standard library at import, since peers' environments lack this project."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.settings import CompressConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def default_cache() -> Path:
    """The project's cache folder: $COMPRESS_CACHE, else ~/.cache/compress."""
    return Path(os.environ.get("COMPRESS_CACHE", "~/.cache/compress")).expanduser()


def peer_python(cache: Path, name: str, packages: Sequence[str]) -> str:
    """The interpreter of a peer's own environment, made when it isn't there (a few hundred MB, minutes)."""
    folder = cache / "benchmarks" / name
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"making {folder} with {', '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        done.touch()
    return str(python)


def write_result(path: Path, value: Any) -> None:
    """Replace a result file in one step, so that a killed benchmark leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def revision() -> str:
    """The checkout's commit, with `-dirty` when files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores and load: a figure without its machine says little."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    return {"processor": model, "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "revision": revision()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class TurnTaker:
    """A process that stands still before each of its steps until it is given a turn; its own side is `Turns`.

    Raises SystemExit with the end of its log when it fails.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        their_turn, self._turn = os.pipe()
        self._over, their_over = os.pipe()
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(environment or {}), "TURNS": f"{their_turn} {their_over}"},
                stdout=file, stderr=file, pass_fds=(their_turn, their_over),
            )  # fmt: skip
        for end in (their_turn, their_over):
            os.close(end)
        self._wait()

    def _wait(self) -> None:
        if not os.read(self._over, 1):
            code = self._process.wait()
            raise SystemExit(f"{self._log.stem} failed ({code}):\n{self._log.read_text(errors='replace')[-4000:]}")

    def step(self) -> float:
        """Give it a turn; the seconds until it stands still again."""
        began = time.perf_counter()
        os.write(self._turn, b".")
        self._wait()
        return time.perf_counter() - began

    def end(self) -> None:
        """There is no other turn: a process that counts its steps ends by itself."""
        os.close(self._turn)
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Turns:
    """In a process that a `TurnTaker` started; alone, every turn is there at once."""

    def __init__(self) -> None:
        self._ends = [int(end) for end in os.environ.get("TURNS", "").split()]

    def wait(self) -> None:
        """What went before is over; until the next turn."""
        if self._ends:
            turn, over = self._ends
            os.write(over, b".")
            os.read(turn, 1)


def pipeline_arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """What every script that runs the pipeline takes: settings for all its runs, their folder, the result file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings for all")
    parser.add_argument("--runs", type=lambda p: Path(p).resolve(), default=ROOT / "runs" / "benchmarks" / name)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


def log_plainly() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def lock_memory() -> None:
    """Keep in memory what this process touches from now on, where it may (root): some virtual machines, the one these
    figures were taken on among them, page out what nobody touched for seconds (DAMON), and a process that waits for its
    turn pays for that in its next step. On fault, so that nothing is touched earlier for it."""
    ctypes.CDLL(None).mlockall(1 | 2 | 4)  # MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT


def anonymous_bytes() -> int:
    """RssAnon of this process: mapped checkpoint files aren't in it, they are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class PeakMemory:
    """`with PeakMemory(seconds) as peak:` samples anonymous memory; `peak.bytes` is the most that was seen."""

    def __init__(self, every_seconds: float) -> None:
        self._every, self._done = every_seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> PeakMemory:
        self.bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def start_as_the_makefile_does() -> None:
    """Start this process anew with huge pages for large tensors, which the C library reads at start only."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def fingerprint_of(config: CompressConfig, stage: str = "evaluate") -> str:
    """What the pipeline will write into the stage's manifest: settings, input files, and every stage before it."""
    from compress.pipeline import expectations
    from compress.settings import Stage

    found: str = expectations(config)[Stage(stage)]["fingerprint"]
    return found


def share_stages(config: CompressConfig, source: Path, stages: Sequence[str] = ("tokens", "score")) -> list[str]:
    """Hard-link finished stage folders of another run that this run would make just so; returns their names.

    Whether it would is what the manifests say. The pipeline replaces files and never writes into one, so a link can't
    carry a change from one run to another.
    """
    shared = []
    for folder in stages:
        manifest, target = source / folder / "manifest.json", Path(config.run_dir) / folder
        stage = "tokenize" if folder == "tokens" else folder
        if target.exists() or not manifest.exists():
            continue
        if json.loads(manifest.read_text())["fingerprint"] != fingerprint_of(config, stage):
            continue
        partial = target.with_name(f".{folder}.linking")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source / folder, partial, copy_function=os.link)
        partial.rename(target)
        shared.append(folder)
    return shared


def run_row(
    name: str, settings: Sequence[str], previous: dict[str, Any] | None, sources: Sequence[Path],
    stages: Sequence[str] = ("tokens", "score"), measure: Callable[[CompressConfig], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:  # fmt: skip
    """Run every stage by these settings; (what every row says of it, what evaluate, or `measure` instead, measured).

    When `previous` is of the settings and inputs of now, nothing runs, and it comes back with None. `sources`: run
    folders whose finished `stages` are shared. Checkpoints, 1.2 GB each, are let go.
    """
    from compress.config import load_config
    from compress.pipeline import run
    from compress.settings import Stage

    config = load_config(*settings)
    fingerprint = fingerprint_of(config)
    if previous is not None and previous["fingerprint"] == fingerprint:
        print(f"{name}: done before", flush=True)
        return previous, None
    for source in sources:
        share_stages(config, source, stages)
    print(name, flush=True)
    run(config if measure is None else dataclasses.replace(config, until=Stage.export))
    run_dir = Path(config.run_dir)
    found = measure(config) if measure is not None else json.loads((run_dir / "evaluate" / "metrics.json").read_text())
    metrics: dict[str, Any] = found
    shutil.rmtree(run_dir / "distill" / "checkpoints")
    facts = {
        "fingerprint": fingerprint,
        "revision": revision(),
        "parameters": metrics["distilled"]["parameters"],
        "num_tokens": int(config.distill.num_tokens),
        "distill_seconds": stage_seconds(run_dir, "distill"),
    }
    return facts, metrics


def stage_seconds(run_dir: Path, stage: str) -> float:
    seconds: float = json.loads((run_dir / stage / "manifest.json").read_text())["seconds"]
    return seconds


def load_rows(path: Path) -> dict[str, Any]:
    """The finished rows of a result file by name; none when there is no file yet."""
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    return rows

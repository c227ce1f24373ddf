"""Real gloo ranks, each a process of its own, for tests."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import environment


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _rank(rank: int, function: Callable[..., None], size: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call function(*arguments) on every rank of a group of `size` processes; raises what the first one raised."""
    mp.spawn(_rank, (function, size, free_port(), arguments), nprocs=size)


def torchrun(size: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node SIZE -m compress ...` as users start it."""
    return subprocess.run(
        _launched(size, arguments),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def torchrun_until(done: Callable[[], Any], size: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`torchrun`, under way and `done` with something; what it says goes into the log, in whose folder it works."""
    with log.open("wb") as file:
        started = subprocess.Popen(
            _launched(size, arguments), cwd=log.parent, env=environment(), stdout=file, stderr=file
        )
    until = time.monotonic() + 150
    while not done():
        assert time.monotonic() < until, log.read_text()[-3000:]
        assert started.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    return started


def ranks_of(launcher: int) -> list[int]:
    """The launcher's processes by rank."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", (place / "status").read_text())[1])  # type: ignore[index]
            variables = (place / "environ").read_bytes().split(b"\0")
        except (OSError, TypeError):
            continue
        ranks = [int(one[5:]) for one in variables if one.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(place.name)
    return [found[rank] for rank in sorted(found)]


def _launched(size: int, arguments: tuple[str, ...]) -> list[str]:
    port = f"--master-port={free_port()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", port]
    return [*launcher, "-m", "compress", *arguments]

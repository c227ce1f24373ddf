"""Real gloo ranks, each a process of its own, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
    port = f"--master-port={free_port()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", port]
    return subprocess.run(
        [*launcher, "-m", "compress", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip

"""Memory that a training step frees stays with the process until training is over."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is set is glibc's")

# Page faults of a step that allocates what those before freed; and RssAnon in the block and after it.
SCRIPT = """
import resource, sys
import torch
from pathlib import Path
from compress.allocator import kept_memory

def step():
    return sum(float(torch.ones(size, dtype=torch.uint8)[-1]) for size in (5_000_000, 40_000_000, 100_000_000))

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def faults():
    for _ in range(8):  # glibc's aligned blocks find their places within a few
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with kept_memory():
    inside, held = faults(), resident()
after = resident()
with kept_memory():  # a second time, after what the first one left
    again = faults()
print(outside, inside, again, held, after)
"""


def figures(**environment: str) -> list[int]:
    clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, check=True, timeout=120
    )
    return [int(word) for word in done.stdout.split()]


def test_a_step_reuses_what_the_one_before_freed_and_the_end_gives_it_back() -> None:
    outside, inside, again, held, after = figures()
    assert outside > 20_000, "without it every step takes its pages anew: 140 MB of 4 KiB"
    assert inside < 500
    assert again < 500, "a second training keeps its memory too"
    assert held - after > 90e6, "the end hands the pages back"


def test_settings_of_the_user_stay() -> None:
    outside, inside, *_ = figures(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=4194304")
    assert inside > outside // 2

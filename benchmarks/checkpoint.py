"""What a checkpoint costs training: asynchronous, synchronous and none, in turns in one process.

    python -m benchmarks.checkpoint              # from the repository's root; about 8 minutes, 8 GB of memory and disk

A student of 100 M parameters (1.3 GB of float32 weights and AdamW's moments) against a teacher of 135 M, by the code of
the distill stage. Each turn saves once and makes `--steps` steps of 2x512 tokens, longer than a write takes here, and
ends when the checkpoint is committed. blocked: the time for which Writer holds up training, in save() with the state's
gathering and in wait_for_copy() before the optimizer's step; against a copy of the same tensors into memory that was
just written. slow-down: of a turn against one without a checkpoint.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from benchmarks.common import RESULTS, machine, spread, write_result
from benchmarks.plan import config_of
from compress.checkpoint import Writer
from compress.objectives.terms import Term
from compress.parallel import resolve_dtype, shard, single_process_mesh
from compress.settings import DistillConfig
from compress.step import StudentModule, accumulate_gradients
from compress.teacher import Teacher
from compress.tokens import TokenBatch
from compress.training import optimizer_of, training_state

TEACHER, STUDENT, VOCABULARY = (576, 1536, 30, 9, 3), (576, 1024, 26, 9, 3), 49152
BATCH, LENGTH = 2, 512
MODES = ("none", "synchronous", "asynchronous")


class Training:
    """The student under the distill stage's code, a process alone."""

    def __init__(self, mesh: DeviceMesh) -> None:
        dtype = resolve_dtype("auto")
        self.teacher = Teacher(AutoModelForCausalLM.from_config(config_of(TEACHER, VOCABULARY), dtype=dtype))
        model = AutoModelForCausalLM.from_config(config_of(STUDENT, VOCABULARY), dtype=torch.float32)
        self.module = StudentModule(model).train()
        shard(self.module, model.model.layers, mesh, dtype)
        self.optimizer = optimizer_of(self.module, DistillConfig(learning_rate=1e-4))

    def state(self) -> dict[str, Tensor]:
        return training_state(self.module, self.optimizer)

    def step(self, writer: Writer | None = None) -> float:
        """Seconds that it stood still for the writer's copy."""
        every_BT = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        loss_mask_BT = every_BT.clone()
        loss_mask_BT[:, -1] = False
        ids_BT, positions_BT = torch.randint(VOCABULARY, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, -1)
        batch = TokenBatch(ids_BT, positions_BT, loss_mask_BT, every_BT)
        accumulate_gradients(self.module, self.teacher, [batch], [Term("forward_kl")])
        began = time.perf_counter()
        if writer is not None:
            writer.wait_for_copy()
        held = time.perf_counter() - began
        self.optimizer.step(1.0, 1.0)
        return held


def copy_seconds(state: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> float:
    """Of the second of two copies, which is warm."""
    for _ in range(2):
        began = time.perf_counter()
        for key, tensor in state.items():
            into[key].copy_(tensor)
    return time.perf_counter() - began


def turn_seconds(training: Training, writer: Writer | None, number: int, steps: int) -> tuple[float, float]:
    """(of a save, the steps and the commit; of which training stood still)."""
    began = time.perf_counter()
    if writer is not None:
        writer.save(number, training.state(), {})
    held = time.perf_counter() - began
    for _ in range(steps):
        held += training.step(writer)
    if writer is not None:
        writer.wait()
    return time.perf_counter() - began, held


def measured(turns: int, steps: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    copying: list[float] = []
    blocked: list[float] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, single_process_mesh() as mesh:
        training, number = Training(mesh), 0
        training.step()
        writers = {mode: Writer(Path(name) / mode, 1, mode == "asynchronous") for mode in MODES[1:]}
        copy = {key: tensor.detach().clone() for key, tensor in training.state().items()}
        for turn in range(turns + 1):  # the first takes memory, and isn't counted
            for mode in random.Random(turn).sample(MODES, len(MODES)):
                copied = copy_seconds(training.state(), copy)
                number += 1
                took, held = turn_seconds(training, writers.get(mode), number, steps)
                print(f"turn {turn} {mode}: {took:.2f} s, save {held:.2f} s, a copy {copied:.2f} s", flush=True)
                shutil.rmtree(Path(name) / mode, ignore_errors=True)
                if turn:
                    seconds[mode].append(took)
                    copying.append(copied)
                    if mode == "asynchronous":
                        blocked.append(held)
        size = sum(tensor.numel() * tensor.element_size() for tensor in copy.values())
    return {"state_bytes": size, **figures(seconds, copying, blocked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of training; a GPU's leave the processor free")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    row = measured(options.turns, options.steps)
    row |= {"threads": options.threads, "steps": options.steps, "turns": options.turns}
    write_result(options.output, {"machine": machine(), "checkpoint": row})
    print(
        f"blocked {row['blocked_over_copy']:.2f}x a copy; slows down {row['slow_down_over_synchronous']:.2f}x as much "
        "as a synchronous one"
    )
    print(f"written: {options.output}")


def figures(seconds: dict[str, list[float]], copying: list[float], blocked: list[float]) -> dict[str, Any]:
    """From the seconds of each turn by mode, of each warm copy, and of each asynchronous save."""
    slower = {
        mode: [mine - plain for mine, plain in zip(seconds[mode], seconds["none"], strict=True)] for mode in MODES[1:]
    }
    medians = {mode: statistics.median(found) for mode, found in slower.items()}
    return {
        "seconds": {mode: spread(found) for mode, found in seconds.items()},
        "copy_seconds": spread(copying), "blocked_seconds": spread(blocked),
        "blocked_over_copy": statistics.median(blocked) / statistics.median(copying),
        "slower_seconds": {mode: spread(found) for mode, found in slower.items()},
        "slow_down_over_synchronous": medians["asynchronous"] / medians["synchronous"],
    }  # fmt: skip


if __name__ == "__main__":
    main()

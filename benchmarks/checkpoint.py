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
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine, spread, write_result
from benchmarks.plan import config_of

TEACHER, STUDENT, VOCABULARY = (576, 1536, 30, 9, 3), (576, 1024, 26, 9, 3), 49152
BATCH, LENGTH = 2, 512
MODES = ("none", "synchronous", "asynchronous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of training; a GPU's leave the processor free")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    from compress.checkpoint import Writer
    from compress.objectives.terms import Term
    from compress.parallel import resolve_dtype, shard, single_process_mesh
    from compress.settings import DistillConfig
    from compress.step import StudentModule, accumulate_gradients
    from compress.teacher import Teacher
    from compress.tokens import TokenBatch
    from compress.training import optimizer_of, training_state

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = resolve_dtype("auto")
    every_BT = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    loss_mask_BT = every_BT.clone()
    loss_mask_BT[:, -1] = False
    positions_BT = torch.arange(LENGTH).expand(BATCH, -1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, single_process_mesh() as mesh:
        teacher = Teacher(AutoModelForCausalLM.from_config(config_of(TEACHER, VOCABULARY), dtype=dtype))
        model = AutoModelForCausalLM.from_config(config_of(STUDENT, VOCABULARY), dtype=torch.float32)
        module = StudentModule(model).train()
        shard(module, model.model.layers, mesh, dtype)
        optimizer = optimizer_of(module, DistillConfig(learning_rate=1e-4))

        def step(writer: Writer | None = None) -> float:
            """Seconds that it stood still for the writer's copy."""
            ids_BT = torch.randint(VOCABULARY, (BATCH, LENGTH))
            batch = TokenBatch(ids_BT, positions_BT, loss_mask_BT, every_BT)
            accumulate_gradients(module, teacher, [batch], [Term("forward_kl")])
            began = time.perf_counter()
            if writer is not None:
                writer.wait_for_copy()
            held = time.perf_counter() - began
            optimizer.step(1.0, 1.0)
            return held

        def state() -> dict[str, torch.Tensor]:
            return training_state(module, optimizer, None, None, None)

        step()
        writers = {mode: Writer(Path(name) / mode, 1, mode == "asynchronous") for mode in MODES[1:]}
        number = 0
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        blocked: list[float] = []
        copying: list[float] = []
        warm = {key: tensor.detach().clone() for key, tensor in state().items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in warm.values())
        for turn in range(options.turns + 1):  # the first takes memory, and isn't counted
            for mode in random.Random(turn).sample(MODES, len(MODES)):
                now = state()
                for _ in range(2):  # the second is warm
                    began = time.perf_counter()
                    for key, tensor in now.items():
                        warm[key].copy_(tensor)
                    copied = time.perf_counter() - began
                number += 1
                began = time.perf_counter()
                if mode in writers:
                    writers[mode].save(number, state(), {})
                held = time.perf_counter() - began
                for _ in range(options.steps):
                    held += step(writers.get(mode))
                if mode in writers:
                    writers[mode].wait()
                took = time.perf_counter() - began
                if turn:
                    seconds[mode].append(took)
                    copying.append(copied)
                    if mode == "asynchronous":
                        blocked.append(held)
                print(f"turn {turn} {mode}: {took:.2f} s, save {held:.2f} s, a copy {copied:.2f} s", flush=True)
                shutil.rmtree(Path(name) / mode, ignore_errors=True)
    row = {"state_bytes": size, "threads": options.threads, "steps": options.steps, "turns": options.turns}
    row |= figures(seconds, copying, blocked)
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

"""The output head with forward KL: time and memory of this project's, of full logits, and of TRL 1.16's kernel.

    python -m benchmarks.head                       # from the repository's root, on an idle machine; about 3 min
    python -m benchmarks.head --rounds 2

512 loss tokens, hidden 256, vocabulary 128,256, float32, one thread: forward, and backward to hidden states and head.
Each contender runs in a process of its own per round (TRL in an environment of its own, made at the first run), in
turns with a rotating order; its figure is the median of three passes after one that warms up. Memory is the peak of
RssAnon above what the inputs take. The losses and the gradients' norms must agree to 1e-4, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    ROOT,
    PeakMemory,
    anonymous_bytes,
    default_cache,
    machine,
    peer_python,
    spread,
    write_result,
)
from benchmarks.trainers import TRL_PACKAGES

CONTENDERS = ("ours", "naive", "trl")
TOKENS, HIDDEN, VOCABULARY = 512, 256, 128_256
PASSES = 3
TOLERANCE = 1e-4


def _ours(student: Any, head: Any, teacher: Any, teacher_head: Any) -> Any:
    from compress import distillation_loss

    return distillation_loss(student, head, teacher, teacher_head) / TOKENS


def _naive(student: Any, head: Any, teacher: Any, teacher_head: Any) -> Any:
    import torch.nn.functional as F

    log_q, log_p = F.log_softmax(student @ head.T, -1), F.log_softmax(teacher @ teacher_head.T, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _trl(student: Any, head: Any, teacher: Any, teacher_head: Any) -> Any:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _entropy = ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, 0.0)
    return per_token.sum() / TOKENS


LOSSES: dict[str, Callable[..., Any]] = {"ours": _ours, "naive": _naive, "trl": _trl}


def work(name: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    student, head, teacher, teacher_head = (
        torch.randn(rows, HIDDEN, generator=generator) / 8 for rows in (TOKENS, VOCABULARY, TOKENS, VOCABULARY)
    )
    student.requires_grad_()
    head.requires_grad_()
    # What is imported on first use isn't the loss's memory.
    LOSSES[name](student[:2], head[:9], teacher[:2], teacher_head[:9]).backward()
    student.grad = head.grad = None
    baseline = anonymous_bytes()
    seconds = []
    with PeakMemory(0.002) as peak:
        for _ in range(1 + PASSES):
            began = time.perf_counter()
            loss = LOSSES[name](student, head, teacher, teacher_head)
            loss.backward()
            seconds.append(time.perf_counter() - began)
            norms = [float(x.grad.norm()) for x in (student, head) if x.grad is not None]
            student.grad = head.grad = None
    return {
        "seconds": statistics.median(seconds[1:]),
        "extra_bytes": peak.bytes - baseline,
        "loss": loss.item(),
        "gradient_norms": norms,
    }


def run_worker(python: str, name: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-m", "benchmarks.head", "--worker", name]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def disagreement(rounds: list[dict[str, Any]]) -> float:
    """The largest relative difference of a loss or a gradient's norm from ours in the same round."""
    worst = 0.0
    for found in rounds:
        ours = [found["ours"]["loss"], *found["ours"]["gradient_norms"]]
        for result in found.values():
            theirs = [result["loss"], *result["gradient_norms"]]
            worst = max([worst, *(abs(a / b - 1) for a, b in zip(theirs, ours, strict=True))])
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "head.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker)))
        return
    pythons = dict.fromkeys(CONTENDERS, sys.executable)
    pythons["trl"] = peer_python(default_cache(), "trl-1.16.0", TRL_PACKAGES)
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        order = CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]
        rounds.append({name: run_worker(pythons[name], name) for name in order})
        print(f"round {number + 1} of {options.rounds}", flush=True)
    worst = disagreement(rounds)
    if worst > TOLERANCE:
        raise SystemExit(f"losses or gradients differ by {worst:.1e}: they did not compute the same thing")
    time_over = {
        name: spread([found["ours"]["seconds"] / found[name]["seconds"] for found in rounds]) for name in CONTENDERS[1:]
    }
    memory = {name: statistics.median(found[name]["extra_bytes"] for found in rounds) for name in CONTENDERS}
    write_result(options.output, {
        "machine": machine(), "tokens": TOKENS, "hidden": HIDDEN, "vocabulary": VOCABULARY, "rounds": rounds,
        "time_over": time_over, "extra_bytes": memory,
    })  # fmt: skip
    for name in CONTENDERS:
        seconds = statistics.median(found[name]["seconds"] for found in rounds)
        ratio = f", ours {time_over[name]['median']:.2f}x its time" if name != "ours" else ""
        print(f"{name}: {seconds:.2f} s, {memory[name] / 2**20:.0f} MiB extra{ratio}")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

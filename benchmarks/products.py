"""How much of a distillation step is its own matrix products: their time alone over the step's.

    python -m benchmarks.products                   # from the repository's root, on an idle machine; about 4 min
    python -m benchmarks.products --eager

The step is that of `benchmarks.distill_step` (SmolLM2-135M teacher, its first 20 layers as student, 4x512 tokens, bf16,
2 threads, distill.compile=true). Its products are every linear layer of the teacher forward, of the student forward and
backward (to the input and to the weight), both heads, and attention's two products, each (M, K, N) as often as a step
has it, into preallocated bfloat16 outputs. Steps and products take turns in one process; the median of the rounds'
ratios counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    default_cache,
    machine,
    spread,
    start_as_the_makefile_does,
    write_result,
)
from benchmarks.distill_step import make_step, prepare
from benchmarks.trainers import LENGTH, SEQUENCES, rows_of, teacher_of


def products(config: Any, layers: int, backward: bool) -> Counter[tuple[str, int, int, int]]:
    """(kind, M, K, N) -> how often a step has it; kinds: forward x W^T, to the input dy W, to the weight dy^T x."""
    tokens, hidden, head_dim = SEQUENCES * LENGTH, config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = [(hidden, heads), (hidden, groups), (hidden, groups), (heads, hidden),
              (hidden, config.intermediate_size), (hidden, config.intermediate_size),
              (config.intermediate_size, hidden)] * layers  # fmt: skip
    linear.append((hidden, config.vocab_size))
    found: Counter[tuple[str, int, int, int]] = Counter()
    kinds = ("forward", "input", "weight") if backward else ("forward",)
    for size, out in linear:
        count = SEQUENCES * (LENGTH - 1) if out == config.vocab_size else tokens
        for kind in kinds:
            found[kind, count, size, out] += 1
    # Q K^T and P V; the backward has two products for each.
    found["attention", SEQUENCES * config.num_attention_heads, LENGTH, head_dim] += 2 * layers * (3 if backward else 1)
    return found


def make_products(counts: Counter[tuple[str, int, int, int]]) -> Callable[[], None]:
    import torch

    def make(*size: int) -> Any:
        return torch.randn(*size).to(torch.bfloat16)

    work: list[tuple[Callable[..., Any], tuple[Any, Any], Any, int]] = []
    for (kind, m, k, n), count in counts.items():
        if kind == "forward":
            work.append((torch.mm, (make(m, k), make(n, k).T), make(m, n), count))
        elif kind == "input":
            work.append((torch.mm, (make(m, n), make(n, k)), make(m, k), count))
        elif kind == "weight":
            work.append((torch.mm, (make(m, n).T, make(m, k)), make(n, k), count))
        else:
            work.append((torch.bmm, (make(m, k, n), make(m, k, n).transpose(1, 2)), make(m, k, k), count))

    def run() -> None:
        for function, factors, out, count in work:
            for _ in range(count):
                function(*factors, out=out)

    return run


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="without distill.compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "products.json")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    start_as_the_makefile_does()
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(2)
    cache = default_cache()
    work = cache / "benchmarks" / "distill_step"
    prepare(work, cache, (options.rounds + 2) * SEQUENCES)
    teacher, student = AutoConfig.from_pretrained(teacher_of(work)), AutoConfig.from_pretrained(work / "student")
    counts = products(teacher, teacher.num_hidden_layers, backward=False)
    counts += products(student, student.num_hidden_layers, backward=True)
    seconds: dict[str, list[float]] = {"step": [], "products": []}
    with contextlib.ExitStack() as stack:
        train, rows = make_step(work, not options.eager, stack), iter(rows_of(work, options.rounds + 2))

        def step() -> None:
            train(next(rows))

        alone = make_products(counts)
        for _ in range(2):
            step()
            alone()
        for _ in range(options.rounds):
            seconds["step"].append(timed(step))
            seconds["products"].append(timed(alone))
    ratio = spread([ours / whole for ours, whole in zip(seconds["products"], seconds["step"], strict=True)])
    linear_flop = sum(2 * m * k * n * count for (kind, m, k, n), count in counts.items() if kind != "attention")
    write_result(options.output, {
        "machine": machine(), "compiled": not options.eager, "seconds": seconds, "ratio": ratio,
        "linear_flop": linear_flop,
    })  # fmt: skip
    print(
        f"products {statistics.median(seconds['products']):.2f} s of a step of "
        f"{statistics.median(seconds['step']):.2f} s: {ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"
    )
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

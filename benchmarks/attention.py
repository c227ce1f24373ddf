"""Blocked attention against torch's own on this CPU: forward and backward of one layer of SmolLM2-135M.

    python -m benchmarks.attention                  # from the repository's root, on an idle machine; 1 min

4 sequences of 512 tokens, 9 query heads over 3 key-value heads of size 64, bfloat16, 2 threads; whole sequences, and
documents with masks. Both take turns in one process; a ratio is the median over the rounds of (torch's seconds / ours),
its range the quartiles. The error is the relative L2 distance of all gradients together from float64's. On a CPU with
AMX `distill.compile=true` leaves torch's in place (`compress.attention.blocks_are_faster`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, machine, write_result
from compress.attention import blocked_attention, blocks_are_faster

B, T, H, G, D = 4, 512, 9, 3, 64
SCALE = D**-0.5


def _torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)  # as transformers does
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2).contiguous()


def _ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return blocked_attention(q, k, v, mask, SCALE)


def measure(rounds: int, documents: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(B, T, heads, D, generator=random).bfloat16().transpose(1, 2).requires_grad_() for heads in (H, G, G)
    ]
    grad = torch.randn(B, T, H, D, generator=random).bfloat16()
    mask = None
    if documents > 1:
        document = torch.randint(0, documents, (B, T), generator=random).sort(-1).values
        mask = (document[:, :, None] == document[:, None, :])[:, None] & torch.ones(T, T).tril().bool()
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ways: dict[str, Callable[..., Tensor]] = {"torch": _torchs, "ours": _ours}
    exact = torch.autograd.grad(ways["torch"](*doubles, mask), doubles, grad.double())
    seconds: dict[str, dict[str, list[float]]] = {way: {"forward": [], "backward": []} for way in ways}
    error = {}
    for number in range(rounds + 2):
        for name in sorted(ways, reverse=bool(number % 2)):
            began = time.perf_counter()
            out = ways[name](*inputs, mask)
            between = time.perf_counter()
            found = torch.autograd.grad(out, inputs, grad)
            ended = time.perf_counter()
            if number >= 2:
                seconds[name]["forward"].append(between - began)
                seconds[name]["backward"].append(ended - between)
            off = sum(((a.double() - b) ** 2).sum().item() for a, b in zip(found, exact, strict=True))
            error[name] = (off / sum((b**2).sum().item() for b in exact)) ** 0.5
    summary: dict[str, Any] = {"gradient_error": error}
    for part in ("forward", "backward"):
        pairs = zip(seconds["torch"][part], seconds["ours"][part], strict=True)
        low, ratio, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4, method="inclusive")
        milliseconds = {way: 1e3 * statistics.median(seconds[way][part]) for way in ways}
        summary[part] = {"milliseconds": milliseconds, "ratio": ratio, "low": low, "high": high}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    options = parser.parse_args()
    torch.set_num_threads(2)
    before = machine()
    cases = {name: measure(options.rounds, documents) for name, documents in (("whole", 1), ("documents", 4))}
    for name, case in cases.items():
        for part in ("forward", "backward"):
            row = case[part]
            took = row["milliseconds"]
            print(
                f"{name}, {part}: torch {took['torch']:.1f} ms, ours {took['ours']:.1f} ms, "
                f"{row['ratio']:.2f}x ({row['low']:.2f}..{row['high']:.2f})"
            )
        print(f"{name}, gradients' error: torch {case['gradient_error']['torch']:.2%}, "
              f"ours {case['gradient_error']['ours']:.2%}")  # fmt: skip
    write_result(options.output, {"machine": before, "used_here": blocks_are_faster(), "cases": cases})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

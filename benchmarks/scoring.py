"""What scoring costs: the pass with every width axis and block influence over a plain forward of the same batches.

    python -m benchmarks.scoring                 # from the repository's root; about 3 min on two cores, idle please
    python -m benchmarks.scoring --sequences 8 --rounds 3

SmolLM2-135M in bfloat16, 512-token sequences of random ids (the time doesn't depend on which). Rounds of the plain
trunk and of the scoring pass alternate in one process, and the median of the rounds' ratios counts. Peak memory is the
highest anonymous memory (RssAnon) of processes of their own, sampled; the median of five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    ROOT,
    PeakMemory,
    default_cache,
    machine,
    spread,
    start_as_the_makefile_does,
    write_result,
)

PROCESSES = 5
# Contender -> criteria and score.compile.
CRITERIA: dict[str, tuple[list[str], bool]] = {
    "scoring, compiled": (["activation:l2/mean"], True),
    "scoring": (["activation:l2/mean"], False),
    "scoring, weighted l2/l2, compiled": (["weighted_activation:l2/l2"], True),
}


def prepare(sequences: int, size: int) -> tuple[Any, list[Any]]:
    import torch

    from compress.embedded import resolve
    from compress.models import load_model
    from compress.tokens import TokenBatch

    model = load_model(resolve("embedded:smollm2-135m-instruct", default_cache()), torch.bfloat16)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(sequences // size):
        ids = torch.randint(0, 49152, (size, 512), generator=generator)
        yes = torch.ones_like(ids, dtype=torch.bool)
        batches.append(TokenBatch(ids, torch.arange(512).expand(size, -1), yes, yes))
    return model, batches


def run(what: str, model: Any, batches: list[Any]) -> None:
    import torch

    from compress.importance import estimate_importance
    from compress.step import trunk

    if what == "plain":
        with torch.no_grad():
            for batch in batches:
                trunk(model, batch)
    else:
        criteria, compiled = CRITERIA[what]
        estimate_importance(model, batches, criteria, compile=compiled)


def peak_above(what: str, sequences: int, size: int) -> int:
    """The most anonymous memory in bytes that the process has during one pass."""
    model, batches = prepare(sequences, size)
    run(what, model, batches[:1])
    with PeakMemory(0.002) as peak:
        run(what, model, batches)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "scoring.json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    start_as_the_makefile_does()
    if options.peak:
        print(json.dumps(peak_above(options.peak, options.sequences, options.batch)))
        return
    model, batches = prepare(options.sequences, options.batch)
    contenders = ["plain", *CRITERIA]
    for what in contenders:
        run(what, model, batches[:1])
    seconds: dict[str, list[float]] = {what: [] for what in contenders}
    for number in range(options.rounds):
        for what in contenders if number % 2 else contenders[::-1]:
            began = time.perf_counter()
            run(what, model, batches)
            seconds[what].append(time.perf_counter() - began)
        print(f"round {number + 1} of {options.rounds}", flush=True)
    ratios = {
        what: spread([ours / plain for ours, plain in zip(seconds[what], seconds["plain"], strict=True)])
        for what in CRITERIA
    }
    peaks: dict[str, float] = {}
    for what in contenders:
        command = [sys.executable, "-m", "benchmarks.scoring", "--peak", what, "--sequences", str(options.sequences)]
        command += ["--batch", str(options.batch)]
        found = []
        for _ in range(PROCESSES):  # what malloc gives back, and when, differs from process to process
            result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found.append(int(result.stdout.strip().splitlines()[-1]))
        peaks[what] = statistics.median(found)
    memory = {what: peaks[what] / peaks["plain"] for what in CRITERIA}
    facts = {"seconds": seconds, "ratios": ratios, "peak_bytes": peaks, "memory": memory}
    write_result(options.output, {"machine": machine(), "tokens": options.sequences * 512, **facts})
    for what in CRITERIA:
        ratio = ratios[what]
        print(
            f"{what}: {ratio['median']:.3f}x the time of a plain forward ({ratio['min']:.3f}..{ratio['max']:.3f}, "
            f"plain {statistics.median(seconds['plain']):.1f} s), {memory[what]:.3f}x its memory"
        )
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

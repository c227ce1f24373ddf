"""What scoring costs: the pass with every width axis and block influence over a plain forward of the same batches.

    python -m benchmarks.scoring                 # from the repository's root; about 3 min on two cores, idle please
    python -m benchmarks.scoring --sequences 8 --rounds 3

SmolLM2-135M in bfloat16, 512-token sequences of random ids (the time doesn't depend on which). Rounds of the plain
trunk and of the scoring pass alternate in one process, and the median of the rounds' ratios counts. Peak memory is the
highest anonymous memory (RssAnon) of processes of their own, sampled; the median of five. The scores themselves are
compared with the paper's formulas in float64 by NumPy, on what the model's own modules give and get.
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


def by_numpy(model: Any, batches: list[Any]) -> dict[str, Any]:
    """The formulas of arXiv 2407.14679, section 2.2, with (batch = L2, sequence = mean), in float64 by NumPy."""
    import numpy as np

    from compress.step import trunk

    layers, config = model.model.layers, model.config
    squares: dict[tuple[int, str], Any] = {}
    inputs: dict[int, Any] = {}
    angle, count = np.zeros(len(layers)), 0

    def array(tensor: Any) -> Any:
        return tensor.detach().double().numpy()

    def listen(number: int, name: str, of_output: bool) -> Any:
        def hook(_module: Any, arguments: Any, output: Any) -> None:
            mean_BX = np.abs(array(output if of_output else arguments[0])).mean(1)
            squares[number, name] = squares.get((number, name), 0) + (mean_BX**2).sum(0)

        return hook

    def enter(number: int) -> Any:
        return lambda _module, arguments, keywords: inputs.__setitem__(
            number, array(arguments[0] if arguments else keywords["hidden_states"])
        )

    def leave(number: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            one, other = inputs.pop(number), array(output[0] if isinstance(output, tuple) else output)
            lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
            angle[number] += (1 - (one * other).sum(-1) / lengths).sum()

        return hook

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.input_layernorm.register_forward_hook(listen(number, "norm", True)))
        handles.append(layer.post_attention_layernorm.register_forward_hook(listen(number, "mlp norm", True)))
        handles.append(layer.mlp.down_proj.register_forward_hook(listen(number, "mlp", False)))
        handles.append(layer.self_attn.o_proj.register_forward_hook(listen(number, "attention", False)))
        handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave(number)))
    for batch in batches:
        trunk(model, batch)
        count += batch.input_ids.numel()
    for handle in handles:
        handle.remove()

    def stacked(name: str) -> Any:
        return np.sqrt(np.stack([squares[number, name] for number in range(len(layers))]))

    heads = np.sqrt((stacked("attention").reshape(len(layers), config.num_attention_heads, -1) ** 2).sum(-1))
    groups = heads.reshape(len(layers), config.num_key_value_heads, -1)
    return {
        "hidden": stacked("norm").sum(0) + stacked("mlp norm").sum(0),
        "intermediate": stacked("mlp"),
        "query_heads": heads,
        "key_value_heads": np.sqrt((groups**2).sum(-1)),
        "block influence": angle / count,
    }


def compare_with_numpy(model: Any, batches: list[Any]) -> dict[str, dict[str, float]]:
    """For both ways of reducing, the largest relative difference of any score of each axis."""
    import numpy as np
    import torch

    from compress.importance import estimate_importance

    with torch.no_grad():
        expected = by_numpy(model, batches)
    found = {}
    for name, compiled in (("blocked", False), ("compiled", True)):
        importance = estimate_importance(model, batches, ["activation:l2/mean"], compile=compiled)
        scores = {**importance.width(), "block influence": importance.block_influence_L}
        found[name] = {
            axis: float(np.abs(scores[axis].double().numpy() / expected[axis] - 1).max()) for axis in expected
        }
    return found


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
    differences = compare_with_numpy(model, batches[:1])
    facts = {
        "relative_difference_to_numpy": differences,
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": peaks,
        "memory": memory,
    }
    write_result(options.output, {"machine": machine(), "tokens": options.sequences * 512, **facts})
    for what in CRITERIA:
        ratio = ratios[what]
        print(
            f"{what}: {ratio['median']:.3f}x the time of a plain forward ({ratio['min']:.3f}..{ratio['max']:.3f}, "
            f"plain {statistics.median(seconds['plain']):.1f} s), {memory[what]:.3f}x its memory"
        )
    for what, axes in differences.items():
        worst = max(axes, key=axes.__getitem__)
        print(f"scores, {what}: within {axes[worst]:.1e} of NumPy's, the furthest {worst}")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

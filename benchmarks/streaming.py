"""Scoring and pruning a model whose weights are four times the memory that the process may take.

    python -m benchmarks.streaming                # from the repository's root; a minute or two, 2 GB of disk
    python -m benchmarks.streaming --layers 64    # any depth: memory doesn't grow with it

A Llama of random weights is written shard by shard (1.1 GB by default, its embedding larger than four layers). A child
process imports everything, notes its anonymous memory (RssAnon: mapped checkpoint files don't count, they are the page
cache's), limits its data segment (RLIMIT_DATA, which counts mapped shards too) to that plus a quarter of the weights,
and runs the real stages score and prune with the contract; a thread samples RssAnon meanwhile. (Compensation is left
out: its moments are intermediate^2, whatever the depth.) What is asked: the run finishes, and the peak above the
baseline is at most two layers of the checkpoint plus two batches of activations, each B x T x (hidden + 2 x
intermediate) in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, PeakMemory, anonymous_bytes, machine, write_result

HIDDEN, INTERMEDIATE, HEADS, GROUPS, VOCABULARY = 1024, 4096, 16, 8, 65536
SEQUENCES, LENGTH, BATCH = 16, 256, 2


def write_model(folder: Path, layers: int) -> int:
    """A Hugging Face folder with one shard a layer and the tiny tokenizer; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from compress.architecture import shape_of, tensor_shapes
    from compress.embedded import resolve
    from compress.families import FAMILIES

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    shards: dict[str, dict[str, Any]] = {}
    for name, size in tensor_shapes(FAMILIES["llama"].rows(config), shape_of(config)).items():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = size
    weight_map, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for shard, sizes in shards.items():
        tensors = {}
        for name, size in sizes.items():
            noise = torch.randn(size, generator=generator) / (size[-1] ** 0.5 if len(size) == 2 else 1)
            tensors[name] = (noise if len(size) == 2 else 1 + noise / 8).to(torch.bfloat16)
            total += tensors[name].numel() * 2
            weight_map[name] = f"model-{shard}.safetensors"
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tiny = Path(resolve("embedded:tiny", folder.parent / "cache"))
    for file in [*tiny.glob("tokenizer*"), *tiny.glob("*.jinja")]:
        (folder / file.name).write_bytes(file.read_bytes())
    return total


def child(folder: Path, allowed: int) -> None:
    """Run the stages under the limit and print the figures as one line of JSON."""
    import torch

    torch.set_num_threads(1)
    from compress import pipeline
    from compress.config import load_config

    settings = [
        f"teacher.path={folder / 'teacher'}", f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}",
        "data.train=[{path: 'embedded:tiny-train'}]", "data.calibration=[{path: 'embedded:tiny-calibration'}]",
        "data.validation=[{path: 'embedded:tiny-validation'}]", f"data.sequence_length={LENGTH}", "data.workers=1",
        "compute_dtype=bfloat16", "threads=1", f"score.num_sequences={SEQUENCES}", f"score.micro_batch_size={BATCH}",
        "prune.hidden_size=768", "prune.intermediate_size=3072", "distill.num_tokens=1e6",
    ]  # fmt: skip
    # What libraries import on first use belongs to the baseline: the same stages on the tiny model.
    tiny = ["recipe=tiny", f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'tiny'}", "threads=1", "data.workers=1"]
    for stage in ("tokenize", "score", "prune"):
        pipeline.run(load_config(*tiny, f"stage={stage}", "score.stream=true", "compute_dtype=bfloat16"))
    pipeline.run(load_config(*settings, "stage=tokenize"))
    baseline = anonymous_bytes()
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, resource.RLIM_INFINITY))
    began, seconds, peaks = time.monotonic(), {}, {}
    for stage in ("score", "prune"):
        with PeakMemory(0.005) as peak:
            pipeline.run(load_config(*settings, f"stage={stage}"))
        seconds[stage], peaks[stage] = time.monotonic() - began, peak.bytes
    contract = json.loads((folder / "run" / "prune" / "report.json").read_text())["contract"]
    figures = {"baseline_bytes": baseline, "peak_bytes": max(peaks.values()), "peaks": peaks, "seconds": seconds,
               "logits_difference": contract["logits_difference"]}  # fmt: skip
    print("FIGURES " + json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--allowed", type=float, default=0.25, help="share of the weights that may be taken")
    parser.add_argument("--output", type=Path, default=RESULTS / "streaming.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), int(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = write_model(folder / "teacher", options.layers)
        allowed = int(weights * options.allowed)
        command = [
            sys.executable,
            "-m",
            "benchmarks.streaming",
            "--child",
            str(folder),
            str(allowed),
        ]
        # One arena: memory that is freed goes back instead of staying with a thread's own.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("FIGURES ")]
    if result.returncode or not lines:
        raise SystemExit(f"the run did not finish (exit {result.returncode})")
    found = json.loads(lines[0].removeprefix("FIGURES "))
    layer = 2 * (HIDDEN * (2 * HIDDEN + 2 * HIDDEN * GROUPS // HEADS) + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)
    batch = 4 * BATCH * LENGTH * (HIDDEN + 2 * INTERMEDIATE)
    above, bound = found["peak_bytes"] - found["baseline_bytes"], 2 * layer + 2 * batch
    figures = {
        "weights_bytes": weights, "allowed_bytes": allowed, "layer_bytes": layer, "batch_bytes": batch,
        "above_baseline_bytes": above, "bound_bytes": bound, "share_of_bound": above / bound, **found,
    }  # fmt: skip
    write_result(options.output, {"machine": machine(), "layers": options.layers, **figures})
    print(
        f"{weights / 1e6:,.0f} MB of weights, {allowed / 1e6:,.0f} MB allowed: finished in "
        f"{found['seconds']['prune']:.0f} s; {above / 1e6:,.0f} MB above the baseline, {above / bound:.2f} of two "
        f"layers and two batches ({bound / 1e6:,.0f} MB)\nwritten: {options.output}"
    )


if __name__ == "__main__":
    main()

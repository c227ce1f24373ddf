"""How fast a checkpoint is cut: slicing 5 GB of shards against copying the same files.

    python -m benchmarks.slicing                 # from the repository's root; a few minutes, 15 GB of disk
    python -m benchmarks.slicing --gigabytes 1

A Llama of random bfloat16 weights in shards of 1 GB is written once; then copying all shards (shutil.copyfile, fsync)
and slicing to three quarters of the width (hidden and intermediate, so that every matrix is gathered along both sides)
alternate. Speed is bytes read a second: the copy reads and writes all of them, slicing reads all and writes what is
kept. The page cache is warm for both. Peak anonymous memory is sampled in the process that slices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    PeakMemory,
    anonymous_bytes,
    machine,
    spread,
    start_as_the_makefile_does,
    write_result,
)

HIDDEN, INTERMEDIATE, HEADS, GROUPS, VOCABULARY = 4096, 14336, 32, 8, 2048
SHARD_BYTES = 1_000_000_000


def write_model(folder: Path, total_bytes: float) -> int:
    """The folder, a layer's block of noise repeated; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from compress.architecture import shape_of, tensor_shapes
    from compress.families import FAMILIES

    def config(layers: int) -> Any:
        return LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, vocab_size=VOCABULARY, tie_word_embeddings=True,
        )  # fmt: skip

    one = 2 * (HIDDEN * (2 * HIDDEN + 2 * HIDDEN * GROUPS // HEADS) + 3 * HIDDEN * INTERMEDIATE)
    found = config(max(1, round(total_bytes / one)))
    found.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    total = used = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, size in tensor_shapes(FAMILIES["llama"].rows(found), shape_of(found)).items():
        tensor = torch.randn(size, dtype=torch.bfloat16)
        if used + tensor.nbytes > SHARD_BYTES and shard:
            flush()
            used = 0
        shard[name] = tensor
        used, total = used + tensor.nbytes, total + tensor.nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as handle:
            os.fsync(handle.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "slicing.json")
    options = parser.parse_args()
    start_as_the_makefile_does()
    from compress.architecture import with_sizes
    from compress.folders import read_model
    from compress.selftest import random_importance
    from compress.slicing import select, slice_checkpoint

    seconds: dict[str, list[float]] = {"copy": [], "slice": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total = write_model(folder / "teacher", options.gigabytes * 1e9)
        info = read_model(folder / "teacher")
        shape = with_sizes(info.shape, {"hidden_size": 3072, "intermediate_size": 10752})
        kept = select(random_importance(info.shape), shape)
        baseline = anonymous_bytes()
        with PeakMemory(0.01) as peak:
            for number in range(options.rounds):
                for what in ("copy", "slice") if number % 2 else ("slice", "copy"):
                    began = time.perf_counter()
                    if what == "copy":
                        copy(folder / "teacher", folder / "out")
                    else:
                        slice_checkpoint(info, folder / "out", kept, max_shard_bytes=SHARD_BYTES)
                    seconds[what].append(time.perf_counter() - began)
                    shutil.rmtree(folder / "out")
                took = seconds["slice"][-1], seconds["copy"][-1]
                print(f"round {number + 1} of {options.rounds}: {took[0]:.1f} s, {took[1]:.1f} s")
    ratios = spread([one / other for one, other in zip(seconds["copy"], seconds["slice"], strict=True)])
    facts = {"bytes": total, "seconds": seconds, "speed_over_copy": ratios, "shard_bytes": SHARD_BYTES,
             "above_baseline_bytes": peak.bytes - baseline}  # fmt: skip
    write_result(options.output, {"machine": machine(), **facts})
    print(
        f"slicing {total / 1e9:.1f} GB: {ratios['median']:.2f}x the speed of copying ({ratios['min']:.2f}.."
        f"{ratios['max']:.2f}; {total / 1e9 / statistics.median(seconds['slice']):.2f} GB/s), "
        f"{(peak.bytes - baseline) / SHARD_BYTES:.2f} shards of anonymous memory\nwritten: {options.output}"
    )


if __name__ == "__main__":
    main()

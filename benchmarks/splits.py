"""The gradient of the same eight sequences for every split into micro-batches, accumulation and ranks.

    python -m benchmarks.splits                     # from the repository's root; under a minute

A small Llama with ragged loss masks, float32: micro-batch x accumulation x ranks = 8, on one and two gloo ranks under
FSDP2, once with masks as they are and once with nothing to learn on the first rank. The figure of a split is the
largest relative L2 difference of any tensor's gradient from that of all eight sequences at once. Peers, measured on the
same kind of batch: TRL 1.16's gradient is 1/ranks, ModelOpt 0.47's grows with accumulation (reference of the project).
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine, write_result

SEQUENCES, LENGTH, VOCABULARY = 8, 64, 509
OBJECTIVES = ("forward_kl", "bild", "cross_entropy", "span_relation")


def model_of(hidden: int, layers: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCABULARY, initializer_range=0.1, tie_word_embeddings=True,
        )
    )  # fmt: skip


def batch_of(masked: bool) -> Any:
    """Ragged: the sequences have between a fifth and all of their tokens in the loss."""
    import torch

    from compress.tokens import TokenBatch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    mask = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.linspace(0.2, 1, SEQUENCES)[:, None]
    mask[:, -1] = False
    if masked:
        mask[: SEQUENCES // 2] = False
    return TokenBatch(ids, torch.arange(LENGTH).expand_as(ids), mask, torch.ones_like(mask))


def work(rank: int, size: int, port: int, folder: str) -> None:
    """Every split that this many ranks can make; the first rank writes the gradients."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import init_device_mesh

    from compress.objectives.terms import Term
    from compress.parallel import Ranks, shard
    from compress.step import StudentModule, accumulate_gradients
    from compress.teacher import Teacher

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    terms = [Term(name, k=4) for name in OBJECTIVES]
    for masked in (False, True):
        whole, share = batch_of(masked), SEQUENCES // size
        for micro in (m for m in (1, 2, 4, 8) if m <= share):
            teacher, student = Teacher(model_of(96, 3, seed=1)), StudentModule(model_of(64, 2, seed=2))
            shard(student, student.model.model.layers, init_device_mesh("cpu", (size,)), torch.float32)
            parts = [whole.rows(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)]
            accumulate_gradients(student, teacher, parts, terms, Ranks(rank, size))
            gradients = {name: p.grad.full_tensor().clone() for name, p in student.named_parameters()}  # type: ignore[union-attr]
            if rank == 0:
                save_file(gradients, Path(folder) / f"{masked}-{micro}-{share // micro}-{size}.safetensors")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "splits.json")
    options = parser.parse_args()
    import torch.multiprocessing as mp
    from safetensors.torch import load_file

    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            mp.spawn(work, (size, port, folder), nprocs=size)
        for masked in (False, True):
            whole = load_file(Path(folder) / f"{masked}-8-1-1.safetensors")
            for path in sorted(Path(folder).glob(f"{masked}-*")):
                micro, accumulated, ranks = path.stem.split("-")[1:]
                split = load_file(path)
                worst = max(float((split[n] - whole[n]).norm() / whole[n].norm()) for n in whole)
                name = f"{micro} x {accumulated} x {ranks} rank{'s' if ranks != '1' else ''}"
                rows[name + (", the first half masked" if masked else "")] = worst
    write_result(options.output, {"machine": machine(), "objectives": OBJECTIVES, "relative_l2": rows})
    for name, worst in rows.items():
        print(f"{name}: {worst:.1e}")
    print(f"the largest: {max(rows.values()):.1e}; written: {options.output}")


if __name__ == "__main__":
    main()

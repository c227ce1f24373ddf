"""The plan's memory against what is: real training steps on this machine, and torch's FSDP2 tracker for 64 ranks.

    python -m benchmarks.plan                    # from the repository's root; about 12 minutes, 16 GB of memory
    python -m benchmarks.plan --only real        # or ranks, or tracker: the other rows of the result stay

real: three students whose states (float32 weights, gradients, AdamW's moments) take 1 to 5 GB, with a teacher of a
third more; three steps of 4x512 tokens by the code of the distill stage, each size in a process of its own. Measured is
the peak of anonymous memory above what the imports left, with a fixed mmap threshold: by default the C library keeps
freed memory for later, and `by default` shows how much more that is.

ranks: the same students and teachers, shared by four gloo ranks with a sequence of 512 tokens each; of the rank that
takes most.

tracker: the recipes Llama-3.1-8B to 4B by width and by depth, the step of the distill stage under fake tensors in a
fake process group of 64 ranks, watched by torch.distributed._tools.FSDPMemTracker: nothing is allocated, nothing is
sent. The tracker doesn't count the moments and the teacher's shard, which nothing touches in a forward and a backward;
they are taken out of the plan's figure too. `--length` is the micro-batch's one sequence; activations are recomputed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, PeakMemory, anonymous_bytes, machine, write_result

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VOCABULARY = 32768
# teacher and student, in the order of NAMES
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "80 M": ((512, 2048, 20, 8, 4), (512, 1536, 16, 8, 4)),
    "160 M": ((768, 3072, 20, 12, 6), (768, 2048, 16, 12, 6)),
    "320 M": ((1024, 4096, 24, 16, 8), (1024, 2816, 20, 16, 8)),
}
PARTS = ("teacher", "student")
LENGTH, STEPS = 512, 3
BATCHES = {"real": 4, "ranks": 1}  # sequences of a micro-batch, one a step and rank
SHARING = 4
RANKS = 64
LLAMA_8B = (4096, 14336, 32, 32, 8)
STUDENTS = {"llama31_8b_to_4b_width": (3072, 9216, 32, 32, 8), "llama31_8b_to_4b_depth": (4096, 14336, 16, 32, 8)}


def config_of(sizes: tuple[int, ...], vocabulary: int) -> Any:
    from transformers import LlamaConfig

    heads = LLAMA_8B[3] if sizes[3] == LLAMA_8B[3] else sizes[3]
    named: dict[str, Any] = dict(zip(NAMES, sizes, strict=True))
    return LlamaConfig(
        **named, vocab_size=vocabulary, tie_word_embeddings=False,
        head_dim=128 if sizes[3] == 32 else sizes[0] // heads,
    )  # fmt: skip


def info_of(config: Any) -> Any:
    from compress.architecture import ModelInfo, shape_of
    from compress.families import family_of

    plain = {**config.to_dict(), "model_type": "llama"}
    return ModelInfo(Path("made"), plain, family_of(plain, "made"), shape_of(config), {})


def planned(teacher: Any, sizes: tuple[int, ...], layout: Any) -> dict[str, int]:
    from compress.memory import step_memory

    student = replace(teacher.shape, **dict(zip(NAMES, sizes, strict=True)))
    found = step_memory(teacher, student, layout)
    moment = max(found, key=lambda name: sum(found[name].values()))
    return {"moment": moment, **found[moment]}  # type: ignore[dict-item]


# ---- real steps, in a worker's process ---------------------------------------------------------------------------


def save_models(name: str, folder: Path) -> None:
    """Teacher and student of a size, as `streamed_model` reads them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    for sizes, part, dtype in zip(SIZES[name], PARTS, (torch.bfloat16, torch.float32), strict=True):
        AutoModelForCausalLM.from_config(config_of(sizes, VOCABULARY), dtype=dtype).save_pretrained(folder / part)


def trained(name: str, folder: Path, batch_size: int) -> dict[str, Any] | None:
    """What training takes of this rank, or of the rank that takes most; None on the others than the first."""
    import torch
    from transformers import AutoModelForCausalLM

    from compress.memory import Layout
    from compress.models import decoder_layers
    from compress.objectives.terms import Term
    from compress.parallel import device_mesh, shard, shard_frozen
    from compress.settings import DistillConfig
    from compress.step import StudentModule, accumulate_gradients
    from compress.streaming import streamed_model
    from compress.teacher import Teacher
    from compress.tokens import TokenBatch
    from compress.training import optimizer_of

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of((64, 128, 1, 8, 4), 128))  # imports the family
    teacher_sizes, student_sizes = SIZES[name]
    baseline = anonymous_bytes()
    with PeakMemory(0.005) as peak, device_mesh(None) as (ranks, mesh):
        frozen, fill = streamed_model(folder / PARTS[0], torch.bfloat16)
        shard_frozen(frozen, mesh, fill)
        teacher = Teacher(frozen)
        model, fill = streamed_model(folder / PARTS[1], torch.float32)
        module = StudentModule(model).train()
        shard(module, decoder_layers(model), mesh, torch.bfloat16, fill)
        optimizer = optimizer_of(module, DistillConfig(learning_rate=1e-4))
        every_BT = torch.ones(batch_size, LENGTH, dtype=torch.bool)
        loss_mask_BT = every_BT.clone()
        loss_mask_BT[:, -1] = False
        half = LENGTH // 2  # two documents
        positions_BT = torch.cat([torch.arange(half), torch.arange(LENGTH - half)]).expand(batch_size, -1)
        for _ in range(STEPS):
            ids_BT = torch.randint(VOCABULARY, (batch_size, LENGTH))
            batch = TokenBatch(ids_BT, positions_BT, loss_mask_BT, every_BT)
            accumulate_gradients(module, teacher, [batch], [Term("forward_kl")], ranks)
            optimizer.step(1.0, 1.0)
        count = sum(p.numel() for p in model.parameters())
        most = [int(found) for [found] in ranks.gather([torch.tensor(peak.bytes - baseline)])]
    if not ranks.is_main:
        return None
    layout = Layout(ranks.size, batch_size, LENGTH, on_cpu=True, gloo=True)
    parts = planned(info_of(config_of(teacher_sizes, VOCABULARY)), student_sizes, layout)
    return {"num_parameters": count, "measured_bytes": max(most), "each_rank_bytes": most, "parts": parts}


# ---- the tracker, in a worker's process --------------------------------------------------------------------------


def tracked(name: str, length: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    from compress.memory import Layout
    from compress.models import output_head
    from compress.objectives.chunked import DenseSignal
    from compress.objectives.terms import Term
    from compress.parallel import recompute_layers, shard
    from compress.step import StudentModule, trunk
    from compress.tokens import TokenBatch

    class SharedTeacher(nn.Module):
        """The teacher's trunk as one unit of FSDP2, which gathers its parameters inside a forward only."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: TokenBatch) -> Tensor:
            return trunk(self.model, batch)[batch.loss_mask]

    FakeTensor.item = lambda _self: 1.0  # type: ignore[method-assign,assignment]  # the gradient of the loss, whose value says nothing of sizes
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = AutoModelForCausalLM.from_config(config_of(LLAMA_8B, 128256), dtype=torch.bfloat16)
        student = AutoModelForCausalLM.from_config(config_of(STUDENTS[name], 128256), dtype=torch.float32)
        shared = SharedTeacher(teacher.eval().requires_grad_(False))
        for layer in teacher.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(shared, mesh=mesh)
        module = StudentModule(student).train()
        recompute_layers(student)
        shard(module, student.model.layers, mesh, torch.bfloat16)
        # A boolean mask would make sizes depend on data: the same places as numbers.
        places: Any = (torch.zeros(length - 1, dtype=torch.long), torch.arange(length - 1))
        ids_BT = torch.zeros(1, length, dtype=torch.long)
        batch = TokenBatch(ids_BT, torch.arange(length)[None], places, torch.ones(1, length, dtype=torch.bool))
        tracker = FSDPMemTracker(module)
        tracker.track_external(shared)
        with tracker:
            with torch.no_grad():
                signal = DenseSignal(shared(batch), output_head(teacher))
            module(batch, signal, [Term("forward_kl")], [1.0])[0].backward()
        [peak] = [snapshot for device, snapshot in tracker.get_tracker_snapshot("peak").items() if device.type == "cpu"]
    total = next(size for kind, size in peak.items() if str(kind).endswith("Total"))
    parts = planned(
        info_of(config_of(LLAMA_8B, 128256)), STUDENTS[name], Layout(RANKS, 1, length, recompute=True, on_cpu=True)
    )
    for unseen in ("student: the optimizer's moments", "teacher: weights"):
        parts.pop(unseen, None)
    return {"length": length, "measured_bytes": int(total), "parts": parts}


def worker(command: list[str], tunables: str) -> dict[str, Any]:
    environment = {**os.environ, "GLIBC_TUNABLES": tunables, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{command} failed:\n{result.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("real", "ranks", "tracker"))
    parser.add_argument("--length", type=int, default=4096, help="tokens of the tracker's sequence")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, name = options.worker
        tracker = kind == "tracker"
        found = tracked(name, options.length) if tracker else trained(name, options.folder, BATCHES[kind])
        if found is not None:
            print(json.dumps(found))
        return
    rows: dict[str, dict[str, Any]] = {}
    jobs = [(kind, name) for kind in ("real", "ranks") for name in SIZES] + [("tracker", name) for name in STUDENTS]
    for kind, name in jobs:
        if options.only not in (None, kind):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if kind != "tracker":
                save_models(name, Path(folder))
            command = ["-m", "benchmarks.plan", "--worker", kind, name, "--length", str(options.length)]
            if kind == "ranks":
                command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SHARING}", *command]
            command = [sys.executable, *command, "--folder", folder]
            row = worker(command, "glibc.malloc.mmap_threshold=1048576")
            if kind == "real":
                row["by_default_bytes"] = worker(command, "glibc.malloc.hugetlb=1")["measured_bytes"]
        row["planned_bytes"] = sum(size for part, size in row["parts"].items() if part != "moment")
        row["ratio"] = row["planned_bytes"] / row["measured_bytes"]
        row["machine"] = machine()
        rows[f"{kind}: {name}"] = row
        sizes = f"planned {row['planned_bytes'] / 2**30:.2f} GiB, measured {row['measured_bytes'] / 2**30:.2f} GiB"
        print(f"{kind}: {name}: {sizes}, {row['ratio']:.3f} ({row['parts']['moment']})", flush=True)
    before = json.loads(options.output.read_text())["rows"] if options.only and options.output.exists() else {}
    write_result(options.output, {"rows": {**before, **rows}})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

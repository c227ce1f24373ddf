"""What gloo ranks really send each other in training, every collective of it, against `compress.communication`.

    python -m benchmarks.collectives             # from the repository's root; about 5 minutes, 3 GB

Runs the distill stage of the embedded teacher under torchrun, at 2 and 4 ranks in several layouts, and watches
torch's own c10d operators, of which none can be left out. The bytes of all gathers, reduce-scatters and all-reduces of
tensors have to be those of the model that stage=plan uses, and none may be larger than a unit of FSDP2: a layer, or
what is outside of the layers, with the output head. What else is sent, such as sums of losses, is shown by its largest.

Then one whole step of each 8B recipe as one of 64 ranks in a fake process group, on fake tensors, which have sizes and
no data: the teacher's forward, two micro-batches, the optimizer. A minute each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.common import RESULTS, ROOT, machine, write_result
from benchmarks.plan import LLAMA_8B, NAMES, RANKS, STUDENTS, config_of, info_of

STEPS, BATCH, LENGTH = 3, 32, 64
SETTINGS = [
    "recipe=tiny", f"data.sequence_length={LENGTH}", f"distill.num_tokens={STEPS * BATCH * LENGTH}",
    f"distill.global_batch_size={BATCH}", "distill.micro_batch_size=4", "threads=1", "distill.checkpoint_steps=99",
    "compute_dtype=bfloat16", "teacher.whole_window=false",
]  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "2 ranks": (2, ()),
    "4 ranks": (4, ()),
    "2 copies of 2 ranks": (4, ("cluster.shard_ranks=2",)),
    "4 copies": (4, ("cluster.shard_ranks=1",)),
    "2 ranks, the teacher first": (2, ("teacher.whole_window=true",)),
    "2 ranks, recomputed": (2, ("distill.recompute=true",)),
}
NUMBERS = 64  # bytes of a few numbers, such as the gradient's norm
KINDS = {
    "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Every c10d operator of this thread inside the block: (kind, ranks, bytes of the whole) of those of tensors, and
    the largest of each other one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace == "c10d":
            flat = tree_flatten((args, kwargs or {}))[0]
            size = max((one.nbytes for one in flat if isinstance(one, Tensor)), default=0)
            if name in KINDS and size > NUMBERS:
                objects = [one for one in flat if isinstance(one, torch.ScriptObject)]
                [group] = [one for one in objects if str(one._type()).endswith(".ProcessGroup")]
                self.seen.append((KINDS[name], dist.ProcessGroup.unbox(group).size(), size))
            else:
                self.others[name] = max(self.others[name], size)
        return func(*args, **(kwargs or {}))


def work(output: Path, settings: list[str]) -> None:
    """A rank's process: the stage as `python -m compress` runs it, watched."""
    from compress.config import load_config
    from compress.pipeline import run

    with Recorder() as recorder:
        run(load_config(*settings))
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps({"seen": recorder.seen, "others": recorder.others}))


def recorded(num_ranks: int, settings: list[str], folder: Path) -> dict[str, Any]:
    """What the first of `num_ranks` ranks sent in the whole stage. Raises SystemExit with what a failed one said."""
    output = folder / "seen.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [*launcher, "-m", "benchmarks.collectives", "--worker", str(output), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{settings} on {num_ranks} ranks failed:\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def modelled(num_ranks: int, settings: list[str]) -> tuple[list[Any], int]:
    """(the collectives of a step by the plan's model, bytes of a micro-batch's logits)."""
    from compress.config import load_config
    from compress.plan import make_plan

    made = make_plan(load_config(*settings), num_ranks=num_ranks)
    tokens = made.layout.micro_batch_size * made.layout.sequence_length
    return made.collectives, tokens * made.student.vocab_size * made.layout.compute_bytes


def row_of(num_ranks: int, settings: list[str], folder: Path, num_steps: int = STEPS) -> dict[str, Any]:
    """Seen and modelled bytes of the whole stage by kind and group, and the largest of each."""
    seen, (model, logits) = recorded(num_ranks, settings, folder), modelled(num_ranks, settings)
    rows = _compared(model, seen["seen"], num_steps)
    return {"collectives": rows, "largest_of_others": seen["others"], "logits_bytes": logits}


def _compared(model: list[Any], seen: list[tuple[str, int, int]], num_steps: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    kinds = {(str(one.kind), one.num_ranks) for one in model} | {(kind, size) for kind, size, _ in seen}
    for kind, size in sorted(kinds):
        ours = [one for one in model if (str(one.kind), one.num_ranks) == (kind, size)]
        theirs = [count for other, ranks, count in seen if (other, ranks) == (kind, size)]
        rows[f"{kind} over {size}"] = {
            "bytes": sum(theirs), "modelled_bytes": num_steps * sum(one.num_bytes for one in ours),
            "count": len(theirs), "largest_bytes": max(theirs, default=0),
            "largest_modelled_bytes": max((one.largest for one in ours), default=0),
        }  # fmt: skip
    return rows


class _Places(tuple[Tensor, ...]):
    """Which tokens have a loss, as places: a mask would make sizes depend on data."""

    def sum(self) -> Tensor:
        return torch.tensor(len(self[0]))


def faked(recipe: str, length: int = 4096, micro_batches: int = 2) -> dict[str, Any]:
    """One step of an 8B recipe on 64 ranks, without memory: what is sent, and what the model says of it. Needs a
    process of its own."""
    from dataclasses import replace

    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    from compress.communication import step_collectives
    from compress.memory import Layout
    from compress.models import decoder_layers
    from compress.objectives.terms import Term
    from compress.parallel import recompute_layers, shard, shard_frozen
    from compress.settings import DistillConfig
    from compress.step import StudentModule, accumulate_gradients
    from compress.teacher import Teacher
    from compress.tokens import TokenBatch
    from compress.training import optimizer_of

    # What is computed has no value here: losses, norms and counts say nothing of sizes.
    values: dict[str, Any] = {"item": 1.0, "__int__": 1, "__float__": 1.0, "__bool__": True}
    for name, value in values.items():
        setattr(FakeTensor, name, lambda _self, value=value: value)
    FakeTensor.tolist = lambda self: [1.0] * self.numel()  # type: ignore[method-assign,assignment]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    vocabulary = 128256
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen = AutoModelForCausalLM.from_config(config_of(LLAMA_8B, vocabulary), dtype=torch.bfloat16)
        student = AutoModelForCausalLM.from_config(config_of(STUDENTS[recipe], vocabulary), dtype=torch.float32)
        shard_frozen(frozen, mesh)
        module = StudentModule(student).train()
        recompute_layers(student)
        shard(module, decoder_layers(student), mesh, torch.bfloat16)
        optimizer = optimizer_of(module, DistillConfig(learning_rate=1e-4))
        places: Any = _Places((torch.zeros(length - 1, dtype=torch.long), torch.arange(length - 1)))
        ids_BT = torch.zeros(1, length, dtype=torch.long)
        batch = TokenBatch(ids_BT, torch.arange(length)[None], places, torch.ones(1, length, dtype=torch.bool))
        with Recorder() as recorder:
            accumulate_gradients(module, Teacher(frozen), [batch] * micro_batches, [Term("forward_kl")])
            met = sum(parameter.grad is not None for parameter in module.parameters())
            optimizer.step(1.0, 1.0)
    teacher = info_of(config_of(LLAMA_8B, vocabulary))
    shape = replace(teacher.shape, **dict(zip(NAMES, STUDENTS[recipe], strict=True)))
    model = step_collectives(teacher, shape, Layout(RANKS, 1, length, recompute=True), micro_batches)
    return {
        "collectives": _compared(model, recorder.seen, 1), "largest_of_others": recorder.others,
        "logits_bytes": 2 * length * vocabulary,
        "parameters": len(list(module.parameters())), "parameters_with_gradient": met,
    }  # fmt: skip


def show(name: str, row: dict[str, Any]) -> None:
    print(name)
    for what, figures in row["collectives"].items():
        print(
            f"  {what}: {figures['bytes']:,} bytes in {figures['count']}, modelled {figures['modelled_bytes']:,}; the "
            f"largest {figures['largest_bytes']:,}, modelled {figures['largest_modelled_bytes']:,}"
        )
    others = max(row["largest_of_others"].values())
    print(f"  else at most {others:,}; logits of a micro-batch: {row['logits_bytes']:,}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--fake"]:
        print(json.dumps(faked(sys.argv[2])))
        return
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "collectives.json")
    options = parser.parse_args()
    from compress.config import load_config
    from compress.pipeline import run

    found = {}
    with tempfile.TemporaryDirectory() as name:
        upstream = Path(name) / "upstream"
        for stage in ("tokenize", "score", "prune"):
            run(load_config(*SETTINGS, f"run_dir={upstream}", f"stage={stage}"))
        for layout, (num_ranks, extra) in LAYOUTS.items():
            folder = Path(shutil.copytree(upstream, Path(name) / "run"))
            row = row_of(num_ranks, [*SETTINGS, *extra, f"run_dir={folder}", "stage=distill"], Path(name))
            shutil.rmtree(folder)
            found[layout] = row
            show(layout, row)
    for recipe in STUDENTS:
        command = [sys.executable, "-m", "benchmarks.collectives", "--fake", recipe]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found[f"{recipe}, {RANKS} ranks, fake"] = row = json.loads(done.stdout.splitlines()[-1])
        show(recipe, row)
    write_result(options.output, {"machine": machine(), "layouts": found})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

"""A distillation step: this project, a plain full-logits loop, TRL 1.16's GKDTrainer and ModelOpt 0.47's KDTrainer.

    python -m benchmarks.distill_step            # from the repository's root, on a machine with nothing else; 25 min
    python -m benchmarks.distill_step --steps 2 --row 2  # does it run

Teacher SmolLM2-135M-Instruct (bf16), student its first 20 layers (99.1 M parameters, fp32 master weights), 4 sequences
of 512 tokens a step, bf16 compute, forward KL at temperature 1, gradient clipping at 1, AdamW, 2 threads, glibc's huge
pages for every contender. A sequence is one document, since a plain loop has no other kind, and 511 of its tokens
carry loss for everybody. The contenders:

    ours    the code of the distill stage: StudentModule under `parallel.shard` at world size 1,
            `accumulate_gradients`, `LocalOptimizer`, within `allocator.kept_memory`; what the others gain when they
            keep their memory too: `--tunables` with the settings of that module
    plain   what one writes in an hour: autocast, full logits of both models, log_softmax and F.kl_div in float32,
            torch.optim.AdamW(fused=True), clip_grad_norm_
    trl     GKDTrainer off-policy (lmbda=0, beta=0), bf16=True, no gradient checkpointing, in an environment of its
            own under the cache folder, made at the first run
    modelopt  KDTrainer, logits alone at temperature 1, the same way

Each runs in a process of its own, three at a time, and they take turns of `--row` steps, in a rotating order, so that a
disturbance meets all of them. The first step of a turn isn't counted: memory that nothing touched for some seconds is
slow to come back on some virtual machines (`common.lock_memory`, which every contender calls; without it a pause of 8 s
costs a step of ours a tenth), and a training never stands still. With it, too, the ratios are in the result. Speeds are
medians over the counted steps, min and max beside them; a ratio is the median over the turns of (their seconds / ours),
its range the quartiles. Memory is the peak of RssAnon above what the imports left; `above` is what of it is beyond both
models' weights and AdamW's moments, which everybody needs. The first step's losses must agree to 2 %, or the contenders
did not do the same work and nothing is written. CPU seconds are only for orientation on a machine that others use:
`--threads 1` compares them without threads that wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    ROOT,
    TurnTaker,
    default_cache,
    lock_memory,
    machine,
    peer_python,
    spread,
    write_result,
)
from benchmarks.trainers import (
    BETAS,
    LEARNING_RATE,
    LENGTH,
    MODELOPT_PACKAGES,
    SEQUENCES,
    TRL_PACKAGES,
    Recorder,
    modelopt,
    rows_of,
    teacher_of,
    trl,
)

# `ours` with distill.compile=true, `eager` without it; plain and TRL as people run them.
CONTENDERS = ("ours", "trl", "modelopt", "eager", "plain")
PEERS = {"trl": ("trl-1.16.0", TRL_PACKAGES), "modelopt": ("modelopt-0.47.0", MODELOPT_PACKAGES)}
LAYERS = 20
LOSS_TOLERANCE = 0.02
SETTLE = 1  # steps of a turn that aren't counted
# The teacher's 134,515,008 parameters in bfloat16, and the student's 99,114,048 with two moments in float32.
ALLOCATED_BYTES = 2 * 134_515_008 + 12 * 99_114_048


# ---- in a worker's process --------------------------------------------------------------------------------------


def make_step(work: Path, compiled: bool, stack: contextlib.ExitStack) -> Callable[[Any], float]:
    """The distill stage's step on token ids (B, T), a document each; returns the loss. Until the stack is closed."""
    import torch

    from compress.allocator import kept_memory
    from compress.models import load_model
    from compress.objectives.terms import Term
    from compress.parallel import compile_layers, shard, single_process_mesh
    from compress.settings import DistillConfig
    from compress.step import StudentModule, accumulate_gradients
    from compress.teacher import Teacher
    from compress.tokens import TokenBatch
    from compress.training import optimizer_of

    stack.enter_context(kept_memory())
    mesh = stack.enter_context(single_process_mesh())
    teacher = Teacher(load_model(teacher_of(work), torch.bfloat16))
    model = load_model(work / "student", torch.float32)
    if compiled:
        compile_layers(teacher.model)
        compile_layers(model)
    student = StudentModule(model, compiled=compiled).train()
    shard(student, model.model.layers, mesh, torch.bfloat16)
    optimizer = optimizer_of(student, DistillConfig(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1]))

    def step(ids_BT: Any) -> float:
        loss_mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        loss_mask_BT[:, -1] = False
        positions_BT = torch.arange(LENGTH).expand_as(ids_BT)
        batch = TokenBatch(ids_BT, positions_BT, loss_mask_BT, torch.ones_like(loss_mask_BT))
        loss = accumulate_gradients(student, teacher, [batch], [Term("forward_kl")]).loss
        optimizer.step(1.0, 1.0)
        return loss

    return step


def _ours(work: Path, steps: int, compiled: bool = True) -> Recorder:
    import compress.training  # noqa: F401  # what the imports take isn't the step's

    rows = rows_of(work, steps)
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        step = make_step(work, compiled, stack)
        recorder.begin()
        for ids_BT in rows:
            recorder.losses.append(step(ids_BT))
            recorder.step()
    return recorder


def _plain(work: Path, steps: int) -> Recorder:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    rows = rows_of(work, steps)
    recorder = Recorder()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_of(work), dtype=torch.bfloat16).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=1e-8, weight_decay=0.0, fused=True
    )
    recorder.begin()
    for ids_BT in rows:
        with torch.no_grad():
            teacher_NV = teacher(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student_NV = student(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.kl_div(
            F.log_softmax(student_NV.float(), -1),
            F.log_softmax(teacher_NV.float(), -1),
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recorder.losses.append(loss.item())
        recorder.step()
    return recorder


WORKERS: dict[str, Callable[[Path, int], Recorder]] = {
    "ours": _ours,
    "eager": functools.partial(_ours, compiled=False),
    "plain": _plain,
    "trl": trl,
    "modelopt": modelopt,
}


def _worker(name: str, work: Path, warmup: int, steps: int) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    lock_memory()
    recorder = WORKERS[name](work, warmup + steps)
    write_result(work / f"{name}.json", recorder.result(warmup))


# ---- in the driver's process ------------------------------------------------------------------------------------


def prepare(work: Path, cache: Path, num_rows: int) -> None:
    """Teacher, student and token rows in `work`, made once."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.embedded import resolve

    teacher = resolve("embedded:smollm2-135m-instruct", cache)
    work.mkdir(parents=True, exist_ok=True)
    (work / "teacher.txt").write_text(teacher)
    if not (work / "student" / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        model.model.layers = model.model.layers[:LAYERS]
        model.config.num_hidden_layers = LAYERS
        model.save_pretrained(work / "student")
    tokens = work / "tokens.safetensors"
    if not tokens.exists() or len(load_file(tokens)["input_ids"]) < num_rows:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        stream: list[int] = []
        with open(resolve("embedded:boolq-train", cache)) as lines:
            for line in lines:
                stream += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
                if len(stream) >= num_rows * LENGTH:
                    break
        ids = torch.tensor(stream[: num_rows * LENGTH], dtype=torch.int32).reshape(num_rows, LENGTH)
        save_file({"input_ids": ids}, tokens)


def start(python: str, name: str, work: Path, options: argparse.Namespace) -> TurnTaker:
    """A contender's process."""
    (work / f"{name}.json").unlink(missing_ok=True)
    environment = {
        "GLIBC_TUNABLES": options.tunables,
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-m", "benchmarks.distill_step", "--worker", name, "--work", str(work)]
    command += ["--warmup", str(options.warmup), "--steps", str(options.steps)]
    return TurnTaker(command, work / f"{name}.log", environment)


def take_turns(workers: dict[str, TurnTaker], options: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    names = list(workers)
    turns = [options.warmup, *[options.row] * (options.steps // options.row)]
    for turn, steps in enumerate(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            for _ in range(steps):
                workers[name].step()
    for worker in workers.values():
        worker.end()
    return {name: json.loads((work / f"{name}.json").read_text()) for name in names}


def summarise(groups: list[dict[str, dict[str, Any]]], row: int, settle: int) -> dict[str, Any]:
    """`settle`: the first steps of each turn, which aren't counted."""
    tokens = SEQUENCES * LENGTH
    runs: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        for name, run in group.items():
            runs.setdefault(name, []).append(run)
    table = {
        name: {
            "tokens_per_second": spread([tokens / s for run in found for s in _counted(run["seconds"], row, settle)]),
            "cpu_seconds_per_step": statistics.median(
                [s for run in found for s in _counted(run["cpu_seconds"], row, settle)]
            ),
            "peak_rss_anon_bytes": max(run["peak_rss_anon_bytes"] for run in found),
            "above_allocated_bytes": max(run["peak_rss_anon_bytes"] for run in found) - ALLOCATED_BYTES,
            "first_loss": found[0]["first_loss"],
            "last_loss": found[0]["last_loss"],
        }
        for name, found in runs.items()
    }
    return {"contenders": table, "ratios": ratios(groups, row, settle), "ratios_of_all": ratios(groups, row, 0)}


def ratios(groups: list[dict[str, dict[str, Any]]], row: int, settle: int) -> dict[str, dict[str, float]]:
    turns: dict[str, list[float]] = {}
    for group in groups:
        ours = _by_turn(group["ours"]["seconds"], row, settle)
        for name in group.keys() - {"ours"}:
            theirs = _by_turn(group[name]["seconds"], row, settle)
            turns.setdefault(name, []).extend(one / other for one, other in zip(theirs, ours, strict=True))
    found = {}
    for name, ratio in turns.items():
        low, middle, high = statistics.quantiles(ratio, n=4, method="inclusive")
        found[f"ours/{name}"] = {"ratio": middle, "low": low, "high": high, "turns": len(ratio)}
    return found


def _by_turn(seconds: list[float], row: int, settle: int) -> list[float]:
    return [sum(seconds[first + settle : first + row]) for first in range(0, len(seconds), row)]


def _counted(seconds: list[float], row: int, settle: int) -> list[float]:
    return [one for number, one in enumerate(seconds) if number % row >= settle]


def check_same_loss(summary: dict[str, Any]) -> None:
    losses = {name: row["first_loss"] for name, row in summary["contenders"].items()}
    if max(losses.values()) > min(losses.values()) * (1 + LOSS_TOLERANCE):
        raise SystemExit(f"the first losses differ by more than {LOSS_TOLERANCE:.0%}: {losses}; not the same work")


def show(summary: dict[str, Any], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    result = Table(title=f"distillation step, {SEQUENCES}x{LENGTH} tokens, {threads} threads", title_justify="left")
    for column in ("", "tokens/s", "min..max", "CPU s a step", "peak memory, GB", "above", "first loss", "ours is"):
        result.add_column(column, justify="left" if not column else "right")
    for name, row in summary["contenders"].items():
        speed, ratio = row["tokens_per_second"], summary["ratios"].get(f"ours/{name}")
        result.add_row(
            name,
            f"{speed['median']:.0f}",
            f"{speed['min']:.0f}..{speed['max']:.0f}",
            f"{row['cpu_seconds_per_step']:.2f}",
            f"{row['peak_rss_anon_bytes'] / 1e9:.2f}",
            f"{row['above_allocated_bytes'] / 1e9:.2f}",
            f"{row['first_loss']:.4f}",
            f"{ratio['ratio']:.2f}x ({ratio['low']:.2f}..{ratio['high']:.2f})" if ratio else "",
        )
    Console(width=120).print(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each process")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each process")
    parser.add_argument("--row", type=int, default=4, help="steps of a turn, 2 or more, a divisor of --steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tunables", default="glibc.malloc.hugetlb=1", help="GLIBC_TUNABLES of every contender")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS[1:], default=list(CONTENDERS[1:]))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="teacher, text, TRL's environment")
    parser.add_argument("--output", type=Path, default=RESULTS / "distill_step.json")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker and (options.row <= SETTLE or options.steps % options.row):
        parser.error(
            f"--steps {options.steps} must be a multiple of --row {options.row}, which is {SETTLE + 1} or more"
        )
    if options.worker:
        _worker(options.worker, options.work, options.warmup, options.steps)
        return
    cache = options.cache.resolve()
    work = cache / "benchmarks" / "distill_step"
    prepare(work, cache, (options.warmup + options.steps) * SEQUENCES)
    before = machine()
    groups: list[dict[str, dict[str, Any]]] = []
    for first in range(0, len(options.contenders), 2):  # and ours: as many as memory has room for
        workers = {}
        for name in ["ours", *options.contenders[first : first + 2]]:
            python = peer_python(cache, *PEERS[name]) if name in PEERS else sys.executable
            workers[name] = start(python, name, work, options)
        groups.append(take_turns(workers, options, work))
        for name, run in groups[-1].items():
            print(f"{name}: {SEQUENCES * LENGTH / statistics.median(run['seconds']):.0f} tokens/s", flush=True)
    summary = summarise(groups, options.row, SETTLE)
    show(summary, options.threads)
    check_same_loss(summary)
    write_result(
        options.output,
        {
            "machine": before,
            "threads": options.threads,
            "tunables": options.tunables,
            "row": options.row,
            **summary,
            "groups": groups,
        },
    )
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

"""The cached teacher on SmolLM2-135M-Instruct: bytes per token, unbiasedness, and what reading it costs a step.

    python -m benchmarks.cache                                                          # about half an hour
    python -m benchmarks.cache --tokens 4096 --draws 20 --gradient-tokens 16 --rounds 2 # does it run

Storage: stage cache of the recipe smollm2_135m_to_100m (12 draws of the 49,152 ids a token), everything counted; and
the same records with ids of 17 bits, as a vocabulary of 128,256 needs.

Unbiasedness: the gradient of forward KL by draws of other seeds, on hidden states and head of the 20-layer student,
less the dense one, along 20 fixed directions: how many standard errors the mean is off, and the size of the error of
means over 1, 4, 16, ... draws, times the root of how many they are (constant, when it falls as 1 / sqrt).

Speed: one optimizer step of the 20-layer student on 4 sequences of 512 tokens, by the distill stage's own code, with
four teachers in turn, step by step in one process so that a disturbance meets all of them:

    cached    what the stage reads
    constant  the same signal, held in memory: the teacher's forward replaced by a constant
    hidden    final hidden states held in memory, put through the teacher's head as an online teacher's are
    online    the teacher's own forward
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    default_cache,
    log_plainly,
    machine,
    pipeline_arguments,
    spread,
    start_as_the_makefile_does,
    write_result,
)
from benchmarks.distill_step import prepare

if TYPE_CHECKING:
    import torch

    from compress.settings import CompressConfig
    from compress.tokens import TokenBatch

SEQUENCES, DIRECTIONS, LARGE_VOCABULARY = 4, 20, 128_256


def make_cache(config: CompressConfig) -> dict[str, Any]:
    """The stage's report, and the mean bytes of a token with ids of 17 bits."""
    import torch

    from compress import pipeline
    from compress.settings import Stage
    from compress.signals import Said, SignalCache, pack
    from compress.tokens import TokenSet

    for stage in (Stage.tokenize, Stage.cache):
        began = time.perf_counter()
        pipeline.run(dataclasses.replace(config, stage=stage))
    run_dir = Path(config.run_dir)
    report: dict[str, Any] = json.loads((run_dir / "cache" / "report.json").read_text())
    cache, data = SignalCache(run_dir / "cache"), TokenSet.open(run_dir / "tokens" / "train")
    form, size, count = dataclasses.replace(cache.form, vocab_size=LARGE_VOCABULARY), 0, 0
    for index in cache.indices[:16].tolist():
        signal = cache.read(data.batch([index]))
        counts = (signal.probabilities_NK * form.size).round().long()
        ids = torch.repeat_interleave(signal.ids_NK.flatten(), counts.flatten()).view(-1, form.size)
        size += len(pack(Said(ids, ids[:, :0].float(), signal.entropy_N), form))
        count += len(ids)
    return {**report, "seconds": time.perf_counter() - began, "record_bytes_per_token_of_17_bits": size / count}


def unbiasedness(config: CompressConfig, student: Path, num_tokens: int, draws: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from compress.inputs import teacher_of
    from compress.models import load_model, output_head
    from compress.objectives.chunked import DenseSignal, Signal, SparseSignal, Targets, chunked_loss
    from compress.objectives.terms import Term
    from compress.signals import Form, keys_of, pack, say, unpack
    from compress.step import trunk
    from compress.tokens import TokenSet
    from compress.training import drawn_sequences

    run_dir = Path(config.run_dir)
    data, drawn = TokenSet.open(run_dir / "tokens" / "train"), drawn_sequences(config, run_dir)
    batch = data.batch(drawn[:1])
    with torch.no_grad():
        hidden, heads = [], []
        for folder in (teacher_of(config), student):
            model = load_model(folder, torch.float32).eval().requires_grad_(False)
            hidden.append(trunk(model, batch)[batch.loss_mask][:num_tokens])
            head = output_head(model)
            heads.append(dataclasses.replace(head, weight_VD=head.weight_VD.detach().clone()))
    generator = torch.Generator().manual_seed(0)
    weight_VD = heads[1].weight_VD
    along = [
        [torch.randn(size, generator=generator) for size in (hidden[1].shape, len(weight_VD), weight_VD.shape[1])]
        for _ in range(DIRECTIONS)
    ]
    none_N = torch.zeros(len(hidden[1]), dtype=torch.int64)

    def projections(signal: Signal) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the gradient on hidden states and head along each direction, whose second part is of rank one; and of the
        hidden states' part every element."""
        hidden_ND = hidden[1].clone().requires_grad_()
        head = dataclasses.replace(heads[1], weight_VD=weight_VD.clone().requires_grad_())
        loss, _ = chunked_loss(hidden_ND, head, signal, Targets(none_N, none_N.bool()), [Term("forward_kl")])
        on_hidden, on_head = torch.autograd.grad(loss, [hidden_ND, head.weight_VD])
        found = [(on_hidden * one).sum() + left @ on_head @ right for one, left, right in along]
        return torch.stack(found).double(), on_hidden.flatten()

    form = Form("sample", config.cache.num_samples, len(heads[0].weight_VD))
    dense, dense_hidden = projections(DenseSignal(hidden[0], heads[0]))
    errors, hidden_errors = [], []
    for seed in range(draws):
        record = pack(say(hidden[0], heads[0], form, seed, keys_of(batch)[0]), form)
        said = unpack(np.frombuffer(record, dtype=np.uint8), len(hidden[0]), form)
        signal = SparseSignal(form.kind, said.ids_NK, said.probabilities_NK, said.entropy_N)
        projected, on_hidden = projections(signal)
        errors.append(projected - dense)
        hidden_errors.append(on_hidden - dense_hidden)
    error = torch.stack(errors)
    z = error.mean(0) / (error.std(0) / draws**0.5)
    sizes, one = {}, torch.stack(hidden_errors)
    many = 1
    while many * 4 <= draws:
        means = one[: draws // many * many].view(draws // many, many, -1).mean(1)
        sizes[many] = float(means.norm(dim=1).square().mean().sqrt()) * many**0.5
        many *= 4
    gradient = float(dense_hidden.norm())
    print(
        f"largest of {DIRECTIONS} deviations: {z.abs().max():.2f} standard errors; gradient {gradient:.4g}; error of a"
    )
    print(f"mean of M, times sqrt(M): {', '.join(f'M={many} {size:.4g}' for many, size in sizes.items())}")
    return {"tokens": num_tokens, "draws": draws, "standard_errors": z.tolist(), "largest": float(z.abs().max()),
            "error_times_root_of_draws": sizes, "gradient": gradient}  # fmt: skip


class Held:
    """A teacher that says what it was given, whatever it is asked."""

    def __init__(self, signal: Any) -> None:
        self._signal = signal

    def answers(self, batch: TokenBatch) -> bool:
        return True

    def signal(self, batch: TokenBatch) -> Any:
        return self._signal


def speed(config: CompressConfig, folder: Path, rounds: int, warmup: int) -> dict[str, Any]:
    import torch

    from compress.inputs import open_cache, teacher_of
    from compress.models import decoder_layers, load_model
    from compress.objectives.terms import Term
    from compress.parallel import resolve_dtype, shard, single_process_mesh
    from compress.step import StudentModule, accumulate_gradients
    from compress.teacher import CachedTeacher, Teacher
    from compress.tokens import TokenSet
    from compress.training import drawn_sequences, optimizer_of

    run_dir, dtype = Path(config.run_dir), resolve_dtype(config.compute_dtype)
    data, drawn = TokenSet.open(run_dir / "tokens" / "train"), drawn_sequences(config, run_dir)
    batches = [data.batch(drawn[n : n + SEQUENCES]) for n in range(0, len(drawn), SEQUENCES)]
    cached, online = CachedTeacher(open_cache(config, run_dir, drawn)), Teacher(load_model(teacher_of(config), dtype))
    seconds: dict[str, list[float]] = {name: [] for name in ("cached", "constant", "hidden", "online")}
    names = list(seconds)
    with single_process_mesh() as mesh:
        model = load_model(folder, torch.float32)
        student = StudentModule(model).train()
        shard(student, decoder_layers(model), mesh, dtype)
        optimizer = optimizer_of(student, config.distill)
        for number in range(warmup + rounds):
            batch = batches[number % len(batches)]
            teachers: dict[str, Any] = {"cached": cached, "constant": Held(cached.signal(batch)),
                        "hidden": Held(online.signal(batch)), "online": online}  # fmt: skip
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                began = time.perf_counter()
                accumulate_gradients(student, teachers[name], [batch], [Term("forward_kl")])
                optimizer.step(0.0, 1.0)  # at learning rate 0, so that every teacher meets the same student
                if number >= warmup:
                    seconds[name].append(time.perf_counter() - began)
    tokens = SEQUENCES * data.sequence_length
    found = {name: spread([tokens / one for one in all_]) for name, all_ in seconds.items()}
    found["cached/constant"] = spread([b / a for a, b in zip(seconds["cached"], seconds["constant"], strict=True)])
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    found["ratio of medians"] = {name: medians[name] / medians["cached"] for name in names}
    for name in names:
        print(f"{name}: {found[name]['median']:.0f} tokens/s ({found[name]['min']:.0f}..{found[name]['max']:.0f})")
    print(f"cached / constant: {found['ratio of medians']['constant']:.3f}")
    return found


def main() -> None:
    parser: argparse.ArgumentParser = pipeline_arguments(__doc__, "cache")
    parser.add_argument("--tokens", type=int, default=131072, help="that are cached")
    parser.add_argument("--gradient-tokens", type=int, default=64)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps with each teacher")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="teacher and text")
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    import torch

    from compress.config import load_config

    torch.set_num_threads(options.threads)
    cache = options.cache.resolve()
    work = cache / "benchmarks" / "distill_step"
    prepare(work, cache, SEQUENCES)
    config = load_config(
        "recipe=smollm2_135m_to_100m", f"run_dir={options.runs}", f"cache_dir={cache}", "teacher.mode=cached",
        f"distill.num_tokens={options.tokens}",
        f"distill.global_batch_size={SEQUENCES}", f"threads={options.threads}", *options.set,
    )  # fmt: skip
    before = machine()
    result = {"machine": before, "threads": options.threads, "storage": make_cache(config)}
    result["unbiasedness"] = unbiasedness(config, work / "student", options.gradient_tokens, options.draws)
    result["speed"] = speed(config, work / "student", options.rounds, options.warmup)
    write_result(options.output, result)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

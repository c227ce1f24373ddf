"""Stage search: the best shape within a budget, by measurement.

The best predicted shapes are cut and compared by their KL to the teacher; the best search.num_distilled of them are
distilled for a few tokens and compared again, the better half goes on to twice the tokens, and so on until one is left
(successive halving, Jamieson and Talwalkar, arXiv 1502.07943). All candidates see the same sequences, so one pass of
the teacher serves them all: its signals are kept on disk. Each figure is committed alone, so that a killed search goes
on where it was. Several ranks train and compare each candidate together, as they distill; the first one writes.
"""

# S sequences that candidates are compared on, C candidates, R resamples

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from compress import checkpoint
from compress.allocator import kept_memory
from compress.architecture import ModelInfo, num_parameters
from compress.artifacts import STARTED, building_folder, free_disk_bytes, open_permissions, read_json, write_json
from compress.candidates import SPEEDS, Entry, entries_of
from compress.devices import device_of, set_attention
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.families import PRUNABLE
from compress.folders import read_model
from compress.inputs import source_of, streams, teacher_of, whole_bytes
from compress.memory import MASTER_BYTES, MOMENT_BYTES
from compress.models import decoder_layers, load_model
from compress.parallel import (
    Ranks,
    agreed_dtype,
    available_bytes,
    check_layout,
    device_mesh,
    launched,
    resolve_dtype,
    shard,
    shard_frozen,
    shared_by,
)
from compress.progress import console, track
from compress.scores import Importance, rank_correlation
from compress.settings import CompressConfig, ComputeDtype, set_name
from compress.shapes import (
    check_fixed,
    extremes,
)
from compress.slicing import copy_companions, num_stored_bytes, select
from compress.step import StudentModule, accumulate_gradients
from compress.streaming import streamed_model
from compress.targets import SEARCH_REPORT, budget, cut, grid_of, importance_of
from compress.teacher import RecordedTeacher
from compress.tokens import SequenceOrder, TokenBatch, TokenSet
from compress.training import (
    load_trained,
    micro_batches,
    optimizer_of,
    refuse_empty_windows,
    resume,
    source_weights,
    terms_at,
    training_state,
)
from compress.validation import sums_of

log = logging.getLogger(__name__)
NUM_RESAMPLES = 2000


@dataclass
class Round:
    """What the candidates still in it say after `num_tokens` of training: KL of each sequence, in nats (C, S).

    Of one whose training diverged it is infinite.
    """

    num_tokens: int
    names: list[str]
    kl_CS: Tensor
    tokens_S: Tensor  # loss tokens

    @property
    def kl_C(self) -> Tensor:
        """Nats per token."""
        return self.kl_CS.sum(1) / self.tokens_S.sum()

    def order(self) -> list[str]:
        """Best first."""
        return [self.names[place] for place in self.kl_C.argsort(stable=True).tolist()]

    def win_shares(self, seed: int) -> list[float]:
        """In how many of NUM_RESAMPLES bootstrap resamples of the sequences each candidate is the best."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.tokens_S)
        draws_RS = torch.randint(count, (NUM_RESAMPLES, count), generator=generator)
        best_R = self.kl_CS[:, draws_RS].sum(-1).argmin(0)
        return (torch.bincount(best_R, minlength=len(self.names)) / NUM_RESAMPLES).tolist()


def preflight(config: CompressConfig) -> None:
    """Raise before any long work when the search can't be held in memory or on the disk. Reads no weights."""
    trust = config.teacher.trust_remote_code
    info, teacher = read_model(source_of(config), trust), read_model(teacher_of(config), trust)
    # Of it on this machine, where those ranks share one that train a candidate together.
    world = launched().size
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / check_layout(
        shared_by(config.cluster.shard_ranks, world), world
    )
    if streams(config, teacher, copies=copies):
        raise ConfigError(
            f"search.num_candidates={config.search.num_candidates} compares candidates with the whole teacher in "
            f"memory, {whole_bytes(config, teacher) / 1e9:.1f} GB of weights, and {available_bytes() / 1e9:.1f} GB are "
            "free; set search.num_candidates=0 to take the best predicted shape, or search on a larger machine"
        )
    grid = grid_of(config, info)
    check_fixed(info, grid)
    if not grid.limits:
        extremes(info, grid)
    run_dir = Path(config.run_dir).expanduser()
    has = sum(file.stat().st_size for file in (run_dir / "search").rglob("*") if file.is_file())
    needed = disk_bytes(config, info, teacher.shape.hidden_size) - has  # what a killed search left is gone on with
    free = free_disk_bytes(run_dir)
    if needed > free:
        raise ArtifactError(
            f"{run_dir / 'search'}: {config.search.num_candidates} candidates and the teacher's signals take up to "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower search.num_candidates="
            f"{config.search.num_candidates} or search.num_tokens={config.search.num_tokens:g}, or set run_dir= to a "
            "larger disk"
        )


def disk_bytes(config: CompressConfig, info: ModelInfo, teacher_hidden_size: int) -> int:
    """At most: the candidates' weights, a checkpoint for each that is trained and one more, what the teacher says."""
    search = config.search
    parameters = min(num_parameters(info, info.shape), config.prune.max_parameters or math.inf)
    rounds = _schedule(config, search.num_candidates)
    trained = rounds[1][1] if len(rounds) > 1 else 0
    signal_tokens = rounds[-1][0] + search.num_sequences * config.data.sequence_length
    itemsize = resolve_dtype(config.compute_dtype).itemsize
    stored = num_stored_bytes(info) / num_parameters(info, info.shape)
    weights = search.num_candidates * stored + (trained + 1 if trained else 0) * (MASTER_BYTES + MOMENT_BYTES)
    return int(parameters * weights + signal_tokens * teacher_hidden_size * itemsize)


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write search/report.json, whose winner is the shape that prune cuts; a trained winner in search/winner.

    Under torchrun every rank calls it.
    """
    device = device_of(config.cluster.device)
    with kept_memory(), device_mesh(shared_by(config.cluster.shard_ranks, launched().size), device) as (ranks, mesh):
        dtype = agreed_dtype(config.compute_dtype, ranks, device)
        agreed = replace(config, compute_dtype=ComputeDtype(str(dtype).removeprefix("torch.")))
        _run(agreed, run_dir, ranks, mesh, device, dtype)


def _run(
    config: CompressConfig, run_dir: Path, ranks: Ranks, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype
) -> None:
    trust = config.teacher.trust_remote_code
    info = read_model(source_of(config), trust)
    importance = importance_of(run_dir, info)
    folder = run_dir / "search"
    judge = _judge(config, run_dir)
    _check_order(config, run_dir)
    if ranks.is_main:  # measures speeds, where they are asked for; the others read them
        _drop_work_of_other_settings(config, folder)
        chosen = entries_of(config, info, importance, folder)
    ranks.wait()
    if not ranks.is_main:
        chosen = entries_of(config, info, importance, folder)
    entries = {entry.name: entry for entry in chosen}
    model, fill = streamed_model(teacher_of(config), dtype, trust, device)
    set_attention(model, device, dtype, config)
    shard_frozen(model, mesh, fill)
    # What one rank asks is for itself: files of its own, of a number of ranks.
    teacher = RecordedTeacher(model, folder / "teacher" / f"{ranks.rank}-of-{ranks.size}", ranks)
    contest = _Contest(config, run_dir, info, importance, teacher, judge, ranks, mesh, device, dtype)
    rounds: list[Round] = []
    names = list(entries)
    for num_tokens, count in _schedule(config, len(names)):
        names = names[:count]
        rounds.append(_round(contest, [entries[name] for name in names], num_tokens))
        _log_round(rounds[-1])
        names = rounds[-1].order()
    if not ranks.is_main:
        return
    winner = names[0]
    if num_tokens and not (folder / "winner").exists():  # it is built as a whole, and its checkpoint goes below
        _save_winner(config, info, folder, winner)
    report = _report(config, info, folder, entries, rounds, winner)
    write_json(folder / SEARCH_REPORT, report)
    for scratch in ("teacher", "training"):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    console.print(table(report))


def _drop_work_of_other_settings(config: CompressConfig, folder: Path) -> None:
    """Figures stand for the settings and the dtype that they were begun with; a failed search may go on with others."""
    dtype = str(resolve_dtype(config.compute_dtype))
    now = {"fingerprint": read_json(folder / STARTED)["fingerprint"], "compute_dtype": dtype}
    mark = folder / "figures" / "settings.json"
    if mark.exists() and read_json(mark) != now:
        for scratch in ("figures", "candidates", "teacher", "training", "winner"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
        (folder / SPEEDS).unlink(missing_ok=True)
    write_json(mark, now)


def _check_order(config: CompressConfig, run_dir: Path) -> None:
    """Raise ConfigError when a step of the longest short distillation would have no loss token."""
    data = TokenSet.open(run_dir / "tokens" / "train")
    stop = _schedule(config, config.search.num_candidates)[-1][0] // (
        config.distill.global_batch_size * data.sequence_length
    )
    refuse_empty_windows(data, _order(config, data, stop), stop, config.distill.global_batch_size, "search")


def _order(config: CompressConfig, data: TokenSet, num_steps: int) -> SequenceOrder:
    """Another order than distill's, so that a winner that is continued doesn't begin with what it has just seen."""
    total = num_steps * config.distill.global_batch_size
    return SequenceOrder(data.source_sizes, source_weights(config), total, seed=config.seed + 1)


def _schedule(config: CompressConfig, count: int) -> list[tuple[int, int]]:
    """(tokens of training so far, candidates) of each round, from `count` untrained ones to the last two or one.

    Of the untrained ones all are distilled, unless search.num_distilled says otherwise: what pruning costs at once says
    little of what training wins back (benchmarks/shapes.py). Of the trained ones the better half goes on.
    """
    rounds, tokens = [(0, count)], int(config.search.num_tokens)
    if tokens:
        count = min(count, config.search.num_distilled or count)
        rounds.append((tokens, count))
        while count > 2:
            count, tokens = math.ceil(count / 2), 2 * tokens
            rounds.append((tokens, count))
    return rounds


# -- a round


def _judge(config: CompressConfig, run_dir: Path) -> list[TokenBatch]:
    """The sequences that candidates are compared on, one a batch, so that each has a figure of its own."""
    name = config.search.judge or set_name(config.data.validation[0])
    tokens = TokenSet.open(run_dir / "tokens" / "validation" / name)
    count = min(tokens.num_sequences, config.search.num_sequences)
    batches = [tokens.batch(group) for group in tokens.spread(count, 1)]
    batches = [batch for batch in batches if bool(batch.loss_mask.any())]
    if not batches:
        raise ConfigError(
            f"search.judge={name}: none of the {count} sequences (search.num_sequences) holds a loss token; raise it, "
            f"name another set, or set data.loss_on=all (now {config.data.loss_on})"
        )
    return batches


@dataclass(frozen=True)
class _Contest:
    """What every candidate is cut from, trained on and compared by."""

    config: CompressConfig
    run_dir: Path
    info: ModelInfo
    importance: Importance
    teacher: RecordedTeacher
    judge: list[TokenBatch]
    ranks: Ranks
    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype


def _round(contest: _Contest, entries: Sequence[Entry], num_tokens: int) -> Round:
    """Bring each candidate to `num_tokens` of training and measure it; what was measured before is read."""
    ranks, judge, figures = contest.ranks, contest.judge, contest.run_dir / "search" / "figures"
    rows = []
    for number, entry in enumerate(entries, start=1):
        path = figures / f"{entry.name}-{num_tokens}-tokens.json"
        if not ranks.any(ranks.is_main and path.exists()):
            kl_S = _measured(contest, entry, num_tokens, f"candidate {number} of {len(entries)}, {entry.name}")
            finite = kl_S is not None and all(map(math.isfinite, kl_S))
            if not finite:
                log.warning("search: candidate %s is not finite after %d tokens and loses", entry.name, num_tokens)
            if ranks.is_main:
                write_json(path, {"kl": kl_S if finite else None})
        row = torch.zeros(len(judge), dtype=torch.float64)
        if ranks.is_main:
            row += torch.tensor(read_json(path)["kl"] or math.inf, dtype=torch.float64)
        rows += ranks.sums([row])
    if all(math.inf in row for row in rows):
        raise NumericalError(
            f"search: no candidate is finite after {num_tokens} tokens; lower distill.learning_rate="
            f"{contest.config.distill.learning_rate}, set compute_dtype=float32, or look at the teacher's weights"
        )
    counts = torch.tensor([int(batch.loss_mask.sum()) for batch in judge], dtype=torch.float64)
    return Round(num_tokens, [e.name for e in entries], torch.stack(rows), counts)


def _measured(contest: _Contest, entry: Entry, num_tokens: int, what: str) -> list[float] | None:
    """KL(teacher || candidate) of each of the judge's sequences after `num_tokens` of training, in nats.

    None when its loss or gradient stopped being finite.
    """
    student = _student(contest, entry)
    trained = _train(contest, student, entry.name, num_tokens, what)
    if trained is None:
        return None

    def progress(batches: Sequence[TokenBatch]) -> Iterator[TokenBatch]:
        return (batch.to(contest.device) for batch in track(batches, f"comparing {what}", unit="sequence"))

    kl_S: list[float] = sums_of(trained, contest.teacher, contest.judge, contest.ranks, progress)[:, 0].tolist()
    return kl_S


def _student(contest: _Contest, entry: Entry) -> Path:
    """The candidate's untrained Hugging Face folder, cut as prune would; made once, by the first rank."""
    config, run_dir = contest.config, contest.run_dir
    folder = run_dir / "search" / "candidates" / entry.name
    if contest.ranks.is_main and not folder.exists():
        width, depth = config.prune.width_criterion, config.prune.depth_criterion
        kept = select(contest.importance, entry.candidate.shape, width=width, depth=depth)
        spill = run_dir / ".search-spill"
        try:
            with building_folder(folder) as building:
                cut(config, run_dir, contest.info, contest.importance, kept, building, spill)
        finally:
            shutil.rmtree(spill, ignore_errors=True)
    contest.ranks.wait()
    return folder


def _train(contest: _Contest, student: Path, name: str, num_tokens: int, what: str) -> StudentModule | None:
    """The candidate after `num_tokens`, going on from its last round: warm-up, then a constant rate.

    None when its loss or gradient stopped being finite.
    """
    config, ranks, device = contest.config, contest.ranks, contest.device
    settings = config.distill
    torch.manual_seed(config.seed + ranks.rank)
    model, fill = streamed_model(student, torch.float32, config.teacher.trust_remote_code, device)
    set_attention(model, device, contest.dtype, config)
    module = StudentModule(model).train()
    shard(module, decoder_layers(model), contest.mesh, contest.dtype, fill)
    register_fsdp_forward_method(module, "figures")
    if not num_tokens:
        return module
    data = TokenSet.open(contest.run_dir / "tokens" / "train")
    batch_size, folder = settings.global_batch_size, contest.run_dir / "search" / "training" / name
    tokens_per_step = batch_size * data.sequence_length
    stop = num_tokens // tokens_per_step
    order, terms = _order(config, data, stop), terms_at(settings)
    optimizer = optimizer_of(module, settings)
    start = int(resume(folder, module, optimizer).get("step", 0))
    for step in track(range(start, stop), f"distilling {what}", unit="tok", amount=lambda _: tokens_per_step):
        indices = order.indices(step * batch_size, (step + 1) * batch_size)
        window = [batch.to(device) for batch in micro_batches(data, indices, settings.micro_batch_size, ranks)]
        loss = accumulate_gradients(module, contest.teacher, window, terms, ranks).loss
        factor = min(1.0, (step + 1) / (settings.warmup_steps + 1))
        if not math.isfinite(loss) or not math.isfinite(optimizer.step(factor, settings.max_gradient_norm)[0]):
            return None
    checkpoint.save(folder, stop, training_state(module, optimizer), {"tokens": num_tokens}, keep=1, ranks=ranks)
    return module


def _save_winner(config: CompressConfig, info: ModelInfo, folder: Path, name: str) -> None:
    """The trained winner as a Hugging Face folder, in float32, so that distill goes on from exactly these weights."""
    trust = config.teacher.trust_remote_code
    found = checkpoint.newest(folder / "training" / name)
    assert found is not None, name
    model = load_model(folder / "candidates" / name, torch.float32, trust)
    load_trained(found[0], model, alone=True)
    model.config.dtype = torch.float32
    with building_folder(folder / "winner") as building:
        model.save_pretrained(building)
        copy_companions(info.folder, building, trust)
        open_permissions(building)


# -- what it found


def _log_round(done: Round) -> None:
    order = done.order()
    kl = dict(zip(done.names, done.kl_C.tolist(), strict=True))
    log.info("after %d tokens: %s", done.num_tokens, ", ".join(f"{name} {kl[name]:.4f}" for name in order))


def _report(
    config: CompressConfig,
    info: ModelInfo,
    folder: Path,
    entries: Mapping[str, Entry],
    rounds: Sequence[Round],
    winner: str,
) -> dict[str, Any]:
    speeds = read_json(folder / SPEEDS) if (folder / SPEEDS).exists() else {}
    predicted = [entry.candidate.damage for entry in entries.values()]
    shape = entries[winner].candidate.shape
    return {
        "budget": budget(config),
        "judge": config.search.judge or set_name(config.data.validation[0]),
        "num_sequences": len(rounds[0].tokens_S),
        "num_judged_tokens": int(rounds[0].tokens_S.sum()),
        "candidates": [
            {
                "name": name,
                "sizes": {size: getattr(entry.candidate.shape, size) for size in PRUNABLE},
                "num_parameters": entry.candidate.num_parameters,
                "predicted_damage": entry.candidate.damage,
                "tokens_per_second": speeds.get(name),
            }
            for name, entry in entries.items()
        ],
        "rounds": [
            {
                "num_tokens": done.num_tokens,
                "kl": {n: v if math.isfinite(v) else None for n, v in zip(done.names, done.kl_C.tolist(), strict=True)},
                "win_share": dict(zip(done.names, done.win_shares(config.seed), strict=True)),
            }
            for done in rounds
        ],
        # How far each ranking foretold the next one, among those that are in both.
        "rank_correlation": {
            "prediction to untrained": float(rank_correlation(torch.tensor(predicted), rounds[0].kl_C)),
            **{
                f"{one.num_tokens} to {two.num_tokens} tokens": float(
                    rank_correlation(one.kl_C[[one.names.index(name) for name in two.names]], two.kl_C)
                )
                for one, two in itertools.pairwise(rounds)
            },
        },
        "winner": {"name": winner, "sizes": {size: getattr(shape, size) for size in PRUNABLE}},
    }


def table(report: Mapping[str, Any]) -> Table:
    """One row a candidate, one column a round: KL to the teacher, and how sure it is that this one is the best."""
    result = Table(
        title=f"search on {report['judge']}: KL to the teacher, nats/token (share of resamples that it wins)",
        title_justify="left",
    )
    for column in ("candidate", "parameters", "predicted", *(_tokens(r["num_tokens"]) for r in report["rounds"])):
        result.add_column(column, justify="left" if column == "candidate" else "right")
    last = {row["name"]: [r["kl"].get(row["name"]) for r in report["rounds"]] for row in report["candidates"]}

    def standing(row: Mapping[str, Any]) -> tuple[int, float]:
        figures = [kl for kl in last[row["name"]] if kl is not None]
        return -len(figures), figures[-1] if figures else math.inf

    for row in sorted(report["candidates"], key=standing):
        cells = []
        for kl, done in zip(last[row["name"]], report["rounds"], strict=True):
            cells.append("-" if kl is None else f"{kl:.4f} ({done['win_share'][row['name']]:.0%})")
        mark = " *" if row["name"] == report["winner"]["name"] else ""
        result.add_row(row["name"] + mark, f"{row['num_parameters']:,}", f"{row['predicted_damage']:.4f}", *cells)
    found = ", ".join(f"{name} {value:.2f}" for name, value in report["rank_correlation"].items())
    result.caption = f"rank correlation: {found}"
    return result


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "untrained"

"""Stage cache: ask the teacher once for every sequence that training will draw, and keep what it says in a few bytes.

A sequence that is drawn in several epochs is asked about once and gives the same sample each time: unbiased still, and
a fresh one for every epoch would cost a teacher's forward and the disk again. cache.num_samples is what lowers noise.
"""

# E teacher hidden, N loss tokens of a sequence

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from compress.artifacts import fingerprint, write_json
from compress.devices import device_of, set_attention
from compress.errors import NumericalError
from compress.inputs import cache_form, cached_from, check_device, learned_from, open_cache
from compress.models import output_head
from compress.parallel import resolve_dtype
from compress.progress import track
from compress.settings import CompressConfig
from compress.signals import Form, Said, keys_of, pack, say, shard_facts, write_index, write_shard
from compress.step import trunk
from compress.streaming import load_on
from compress.tokens import INDEX, Ints, TokenBatch, TokenSet, shard_name
from compress.training import check_training_data, drawn_sequences

log = logging.getLogger(__name__)
REPORT = "report.json"


def preflight(config: CompressConfig) -> None:
    """Raise ConfigError before any long work when the teacher has no k tokens to keep, or the device isn't here or
    can't do with such sequences. Reads no weights."""
    cache_form(config)
    check_device(config, "cache")


def check(config: CompressConfig, run_dir: Path) -> None:
    """Raise ArtifactError before any long work when the cache that is there can't serve the training."""
    open_cache(config, run_dir, drawn_sequences(config, run_dir))


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write cache/: shards, index.json, report.json. Whole shards of a killed run with these settings are kept.

    Raises ConfigError for a step without loss tokens or a k above the vocabulary, NumericalError, naming sequence and
    token, where the teacher's logits aren't finite.
    """
    form = cache_form(config)
    check_training_data(config, run_dir)
    data = TokenSet.open(run_dir / "tokens" / "train")
    folder, made_from = run_dir / "cache", cached_from(config, run_dir)
    device = device_of(config.cluster.device)
    dtype = resolve_dtype(config.compute_dtype, device)
    facts = {**asdict(form), **made_from, "seed": config.seed, "compute_dtype": str(dtype)}
    (folder / INDEX).unlink(missing_ok=True)  # until the shards that it will name are whole
    drawn = drawn_sequences(config, run_dir)
    parts = np.split(drawn, range(config.cache.sequences_per_shard, len(drawn), config.cache.sequences_per_shard))
    names = [shard_name(number) for number in range(len(parts))]
    made_by = [{**facts, "sequences": fingerprint(part.tolist())} for part in parts]
    todo = [n for n, name in enumerate(names) if (shard_facts(folder / name) or {}).get("made_by") != made_by[n]]
    if len(todo) < len(parts):
        log.info("cache: going on after %d of %d shards", len(parts) - len(todo), len(parts))
    model = None
    if todo:
        model = load_on(device, learned_from(config, run_dir), dtype, config.teacher.trust_remote_code)
        set_attention(model, device, dtype, config, "cache")
    size = config.cache.micro_batch_size
    work = [(n, parts[n][begin : begin + size]) for n in todo for begin in range(0, len(parts[n]), size)]
    steps = track(work, "cache", unit="tok", amount=lambda item: len(item[1]) * data.sequence_length)
    for number, group in itertools.groupby(steps, key=operator.itemgetter(0)):
        assert model is not None
        said = _asked(model, data, (indices for _, indices in group), form, config.seed)
        _write(folder / names[number], parts[number], said, form, made_by[number])
    for stale in set(folder.glob("shard-*.safetensors")) - {folder / name for name in names}:
        stale.unlink()
    write_index(folder, form, made_from, names)
    _report(folder, form, len(drawn), names)


@torch.no_grad()
def _asked(
    model: PreTrainedModel, data: TokenSet, work: Iterable[Ints], form: Form, seed: int
) -> Iterator[tuple[bytes, Said]]:
    """Key and signals of each sequence, a micro-batch of the trunk at a time."""
    head = output_head(model)
    for indices in work:
        batch = data.batch(indices).to(model.device)
        hidden_BTE = trunk(model, batch)
        for row, key in enumerate(keys_of(batch)):
            said = say(hidden_BTE[row][batch.loss_mask[row]], head, form, seed, key)
            _check_finite(said, batch, row, int(indices[row]))
            yield key, said


def _check_finite(said: Said, batch: TokenBatch, row: int, index: int) -> None:
    wrong = (~said.entropy_N.isfinite()).nonzero()
    if len(wrong):
        token = int(batch.loss_mask[row].nonzero()[wrong[0]])
        raise NumericalError(
            f"cache: the teacher's logits are not finite at token {token} of training sequence {index} ({len(wrong)} "
            "such in it); nothing of it was kept. Look at the teacher's weights, or set compute_dtype=float32"
        )


def _write(path: Path, indices: Ints, asked: Iterable[tuple[bytes, Said]], form: Form, made_by: dict[str, Any]) -> None:
    keys, records = [], []
    sums = dict.fromkeys(("loss_tokens", "entropy", "ids", "mass"), 0.0)
    for key, said in asked:
        keys.append(key)
        records.append(pack(said, form))
        sums["loss_tokens"] += len(said.entropy_N)
        sums["entropy"] += float(said.entropy_N.double().sum())
        sums["mass"] += float(said.probabilities_NK.double().sum())
        sums["ids"] += len(said.ids_NK) + int((said.ids_NK[:, 1:] != said.ids_NK[:, :-1]).sum())
    write_shard(path, keys, indices, records, {"made_by": made_by, "sums": sums})


def _report(folder: Path, form: Form, num_sequences: int, names: list[str]) -> None:
    shards = [(shard_facts(folder / name) or {})["sums"] for name in names]
    sums = {name: sum(shard[name] for shard in shards) for name in shards[0]}
    count = sums["loss_tokens"]
    size = sum((folder / name).stat().st_size for name in [*names, INDEX])
    report = {
        **asdict(form),
        "sequences": num_sequences,
        "loss_tokens": int(count),
        "bytes": size,
        "bytes_per_token": size / count,
        "mean_entropy": sums["entropy"] / count,
        "mean_distinct_ids": sums["ids"] / count,
    }
    if form.kind == "top_k":
        report["mean_mass"] = sums["mass"] / count
    write_json(folder / REPORT, report)
    held = f"{report['mean_mass']:.2%} of the mass" if form.kind == "top_k" else "unbiased"
    log.info("cache: %s of %d, %s loss tokens in %.1f MB: %.1f bytes a token, %.1f ids each, %s", form.kind, form.size,
             f"{int(count):,}", size / 1e6, report["bytes_per_token"], report["mean_distinct_ids"], held)  # fmt: skip

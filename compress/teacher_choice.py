"""teacher.mode=auto: whether asking the teacher at every step or once for a cache takes less time, measured here."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from compress.artifacts import free_disk_bytes
from compress.comparison import CHUNK_TOKENS
from compress.devices import device_of, set_attention, wait_for
from compress.errors import ConfigError
from compress.inputs import cache_form, teacher_of
from compress.models import logits_of, output_head
from compress.parallel import resolve_dtype
from compress.phases import phases_of
from compress.progress import about
from compress.rules import check
from compress.settings import CompressConfig, TeacherMode
from compress.signals import keys_of, say
from compress.step import trunk
from compress.streaming import load_on
from compress.tokens import TokenSet
from compress.training import asks_teacher, drawn_sequences

FILE = "teacher_mode.json"
_ROUNDS = 3  # of the micro-batch that is measured, of which the fastest counts


def choose(config: CompressConfig, run_dir: Path) -> dict[str, Any]:
    """{"mode": ..., "why": ..., and what was measured}; the run's training text must be tokenized."""
    cached = with_mode(config, TeacherMode.cached)
    if not asks_teacher(with_mode(config, TeacherMode.online)):
        return {"mode": "online", "why": "no objective asks a teacher, so none is loaded"}
    try:
        check(cached)
        form = cache_form(cached)
    except ConfigError as error:
        return {"mode": "online", "why": f"a cache can't serve it: {error}"}
    drawn = drawn_sequences(config, run_dir)
    draws = sum(phase.num_steps * phase.global_batch_size for phase in phases_of(config))
    facts: dict[str, Any] = {"draws": draws, "sequences": len(drawn)}
    if draws <= len(drawn):
        return {
            "mode": "online",
            "why": "every sequence is drawn once, so a cache would ask about each as often",
            **facts,
        }
    data = TokenSet.open(run_dir / "tokens" / "train")
    bytes_needed = int(data.loss_tokens[drawn].sum()) * form.max_bytes
    free = free_disk_bytes(run_dir)
    if bytes_needed > free:
        why = f"a cache may take {bytes_needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
        return {"mode": "online", "why": why, **facts}
    forward, head, draw = _measured(cached, data)
    online, once = seconds_of(draws, len(drawn), forward, head, draw)
    facts |= {"online_seconds": online, "cached_seconds": once}
    mode = "cached" if once < online else "online"
    why = f"the teacher would take about {about(online)} online and {about(once)} once for a cache"
    return {"mode": mode, "why": why, **facts}


def seconds_of(draws: int, sequences: int, forward: float, head: float, draw: float) -> tuple[float, float]:
    """What the teacher costs (online, cached): its trunk and head at every draw, or trunk and drawing, which has the
    head in it, once a sequence."""
    return draws * (forward + head), sequences * (forward + draw)


def with_mode(config: CompressConfig, mode: TeacherMode) -> CompressConfig:
    return replace(config, teacher=replace(config.teacher, mode=mode))


@torch.no_grad()
def _measured(config: CompressConfig, data: TokenSet) -> tuple[float, float, float]:
    """Seconds of a sequence in a micro-batch: the trunk, the head with its softmax, keeping what the head says."""
    device, form = device_of(config.cluster.device), cache_form(config)
    dtype = resolve_dtype(config.compute_dtype, device)
    model = load_on(device, teacher_of(config), dtype, config.teacher.trust_remote_code)
    set_attention(model, device, dtype, config)
    batch = data.batch(range(min(config.distill.micro_batch_size, data.num_sequences))).to(device)
    head, rounds = output_head(model), []
    for _ in range(_ROUNDS):
        times = [time.perf_counter()]
        hidden_BTE = trunk(model, batch)
        wait_for(device)
        times.append(time.perf_counter())
        for hidden_ND in hidden_BTE[batch.loss_mask].split(CHUNK_TOKENS):
            torch.log_softmax(logits_of(hidden_ND, head).float(), -1)
        wait_for(device)
        times.append(time.perf_counter())
        for row, key in enumerate(keys_of(batch)):
            say(hidden_BTE[row][batch.loss_mask[row]], head, form, config.seed, key)
        times.append(time.perf_counter())
        rounds.append([after - before for before, after in pairwise(times)])
    trunk_seconds, head_seconds, draw_seconds = (min(part) / len(batch.input_ids) for part in zip(*rounds, strict=True))
    return trunk_seconds, head_seconds, draw_seconds

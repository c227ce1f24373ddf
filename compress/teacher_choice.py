"""teacher.mode=auto: whether asking the teacher at every step or once for a cache takes less time, measured here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.artifacts import free_disk_bytes
from compress.cache import form_of
from compress.errors import ConfigError
from compress.inputs import teacher_of
from compress.models import load_model, output_head
from compress.parallel import resolve_dtype
from compress.phases import phases_of
from compress.progress import about
from compress.rules import check
from compress.settings import CompressConfig, TeacherMode
from compress.signals import keys_of, say
from compress.step import trunk
from compress.tokens import TokenSet
from compress.training import drawn_sequences

FILE = "teacher_mode.json"
_SEQUENCES = 4  # that are measured


def choose(config: CompressConfig, run_dir: Path) -> dict[str, Any]:
    """{"mode": ..., "why": ..., and what was measured}; the run's training text must be tokenized."""
    cached = with_mode(config, TeacherMode.cached)
    try:
        check(cached)
        form = form_of(cached)
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
    forward, draw = _measured(cached, data)
    online, once = seconds_of(draws, len(drawn), forward, draw)
    facts |= {"online_seconds": online, "cached_seconds": once}
    mode = "cached" if once < online else "online"
    why = f"the teacher would take about {about(online)} online and {about(once)} once for a cache"
    return {"mode": mode, "why": why, **facts}


def seconds_of(draws: int, sequences: int, forward: float, draw: float) -> tuple[float, float]:
    """What the teacher costs (online, cached): its forward at every draw, or forward and drawing once a sequence."""
    return draws * forward, sequences * (forward + draw)


def with_mode(config: CompressConfig, mode: TeacherMode) -> CompressConfig:
    return replace(config, teacher=replace(config.teacher, mode=mode))


@torch.no_grad()
def _measured(config: CompressConfig, data: TokenSet) -> tuple[float, float]:
    """Seconds of a sequence: (the trunk's forward, keeping what the head says), the second time each is done."""
    dtype, form = resolve_dtype(config.compute_dtype), form_of(config)
    model = load_model(teacher_of(config), dtype, config.teacher.trust_remote_code).eval()
    batch = data.batch(range(min(_SEQUENCES, data.num_sequences)))
    head, seconds = output_head(model), (0.0, 0.0)
    for _ in range(2):
        began = time.perf_counter()
        hidden_BTE = trunk(model, batch)
        between = time.perf_counter()
        for row, key in enumerate(keys_of(batch)):
            say(hidden_BTE[row][batch.loss_mask[row]], head, form, config.seed, key)
        count = len(batch.input_ids)
        seconds = (between - began) / count, (time.perf_counter() - between) / count
    return seconds

"""distill/metrics.jsonl: a row a logged step, rows of other kinds beside them; what `stage=status` says of it.

A row of a step has `loss`; one of a validation has `validation` instead, one of an early stop `stop`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import checkpoint
from compress.artifacts import disk_errors, write_atomic
from compress.phases import Phase, num_steps
from compress.progress import about
from compress.settings import CompressConfig

KINDS = ("loss", "validation", "stop")
Row = dict[str, Any]


def rows(metrics: Path) -> list[Row]:
    """Every row; what a kill or a full disk left of a line isn't one."""
    found = []
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "seconds"} <= row.keys() and any(kind in row for kind in KINDS):
                found.append(row)
    return found


def append(metrics: Path, row: Row) -> None:
    with disk_errors(metrics):
        metrics.parent.mkdir(parents=True, exist_ok=True)
        with metrics.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


def keep_up_to(metrics: Path, step: int) -> None:
    """Drop the rows of steps that a kill took back, so that the file has each step once."""
    if metrics.exists():
        write_atomic(metrics, "".join(f"{json.dumps(row)}\n" for row in rows(metrics) if row["step"] <= step))


def speed(seconds: float, phase: Phase, work: Callable[[int], float], **parts: float) -> Row:
    """The figures of a step that took `seconds`, of which the named parts took theirs and the student the rest.

    work: seconds of a token at the peak, by sequence length.
    """
    rest = seconds - sum(parts.values())
    return {
        "seconds": seconds,
        "tokens_per_second": phase.tokens_per_step / seconds,
        "mfu": work(phase.sequence_length) * phase.tokens_per_step / seconds,
        "share_of_seconds": {name: one / seconds for name, one in {**parts, "student": rest}.items()},
    }


def progress_line(config: CompressConfig, run_dir: Path) -> str:
    """How far training is, for `stage=status`: step, loss, and time left at the last steps' pace."""
    found = rows(run_dir / "distill" / "metrics.jsonl")
    steps = [row for row in found if "loss" in row]
    if not steps:
        return "no step yet"
    shortened = {row["stop"]["phase"]: row["stop"]["steps"] for row in found if "stop" in row}
    last, step = num_steps(config, shortened), steps[-1]["step"]
    pace = sum(row["seconds"] for row in steps[-10:]) / len(steps[-10:])
    saved = checkpoint.steps(run_dir / "distill" / "checkpoints")
    return (
        f"step {step} of {last}, loss {steps[-1]['loss']:.4f}, about {about((last - step) * pace)} left; "
        f"kept steps: {', '.join(map(str, saved)) or 'none'}"
        + _validated([row for row in found if "validation" in row])
    )


def _validated(found: list[Row]) -> str:
    if not found:
        return ""
    best, newest = min(found, key=lambda row: row["kl_to_teacher"]), found[-1]
    end = newest["forecast"]
    foretold = "" if end is None else f", {end['kl_to_teacher']:.4f} foretold after {end['tokens']:,} tokens"
    return (
        f"; KL to the teacher {newest['kl_to_teacher']:.4f} at step {newest['step']}, lowest "
        f"{best['kl_to_teacher']:.4f} at step {best['step']}{foretold}"
    )

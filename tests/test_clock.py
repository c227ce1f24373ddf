"""A wall clock that jumps by days while a model trains changes nothing but the times in the log (libfaketime)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FAKETIME, _run, arguments, environment, needs_faketime

from compress import checkpoint

STEPS = 32
SETTINGS = (f"distill.num_tokens={STEPS * 512}", "distill.keep_checkpoints=99", "until=export")
DAY = 86400


class Jumping:
    """A run as a process of its own whose wall clock stands where `jump` last put it; its monotonic clock is true."""

    def __init__(self, cache: Path, run_dir: Path, clock: Path, *settings: str) -> None:
        self.checkpoints, self.clock, self.log = run_dir / "distill" / "checkpoints", clock, clock.with_suffix(".log")
        self.jump("+0")
        faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
                 "FAKETIME_DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                arguments(cache, run_dir, *SETTINGS, *settings),
                cwd=run_dir.parent, env=environment() | faked, stdout=log, stderr=log,
            )  # fmt: skip

    def jump(self, offset: str) -> None:
        written = self.clock.with_suffix(".new")
        written.write_text(offset + "\n")
        written.rename(self.clock)

    def at_step(self, step: int, do: Callable[[], None]) -> None:
        """Call `do` while the process stands still, `step` or a few more being committed, and more to come."""
        until = time.monotonic() + 120
        while not [there for there in checkpoint.steps(self.checkpoints) if there >= step]:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.002)
        self.process.send_signal(signal.SIGSTOP)
        assert checkpoint.steps(self.checkpoints)[-1] < STEPS
        do()
        self.process.send_signal(signal.SIGCONT)

    def ended(self) -> str:
        """What it said, when it has ended."""
        self.process.wait(120)
        return self.log.read_text()


def days_of(text: str) -> list[str]:
    return re.findall(r"^\[(\d{4}-\d\d-\d\d) ", text, re.MULTILINE)


def day(offset: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(time.time() + offset * DAY))


@pytest.mark.slow
@needs_faketime
def test_a_clock_that_jumps_changes_neither_the_weights_nor_what_is_gone_on_from(
    finished: Path, cache: Path, tmp_path: Path
) -> None:
    for stage in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / stage)
    whole = Path(shutil.copytree(finished, tmp_path / "whole"))
    _run(cache, whole, SETTINGS)

    first = Jumping(cache, finished, tmp_path / "first")
    first.at_step(2, lambda: first.jump("-1d"))
    first.at_step(8, lambda: first.process.send_signal(signal.SIGTERM))
    said = first.ended()
    assert first.process.returncode == 75, said
    assert day(0) in days_of(said)
    assert days_of(said)[-1] == day(-1), "the clock did jump"
    kept = checkpoint.steps(first.checkpoints)
    for age, step in enumerate(kept):  # the earlier the step, the newer its files
        for file in (first.checkpoints / f"step_{step:08d}").iterdir():
            os.utime(file, (time.time() - age * DAY, time.time() - age * DAY))

    status = subprocess.run(
        arguments(cache, finished, *SETTINGS, "stage=status"),
        env=environment() | {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-1d"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = " ".join(re.sub("[│┃]", " ", status).split())
    assert re.search(rf"step {kept[-1]} of {STEPS}, loss \d\.\d+, about \d+ s left", words), status
    assert "begun" in words

    second = Jumping(cache, finished, tmp_path / "second")
    second.jump("+1d")
    second.at_step(kept[-1] + 4, lambda: second.jump("-1d"))
    said = second.ended()
    assert second.process.returncode == 0, said
    assert {day(1), day(-1)} <= set(days_of(said))
    assert f"resuming after step {kept[-1]}" in said
    assert " -" not in said.replace(" - ", ""), "no negative duration"

    for file in ("model.safetensors", "config.json"):
        assert (finished / "export" / file).read_bytes() == (whole / "export" / file).read_bytes()
    rows = [json.loads(line) for line in (finished / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 < row["seconds"] < 60 and row["tokens_per_second"] > 0 for row in rows)
    for stage in ("distill", "export"):
        assert 0 < json.loads((finished / stage / "manifest.json").read_text())["seconds"] < 120


def test_durations_are_taken_by_a_clock_that_does_not_jump() -> None:
    """Of the wall clock only points in time are asked: what a file says of when, how long ago something began, and
    what nodes' clocks say beside each other."""
    from conftest import REPOSITORY

    asked = {
        f"{file.stem}: {line.strip()}"
        for file in (REPOSITORY / "compress").rglob("*.py")
        for line in file.read_text().splitlines()
        if "time.time()" in line
    }
    assert {line.partition(":")[0] for line in asked} <= {"manifests", "pipeline", "doctor", "fitness", "parallel"}
    assert len([line for line in asked if line.startswith("manifests")]) == 1

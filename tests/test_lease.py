"""One writer at a time: a second process is refused, and a later try of the same job takes over from a living one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import environment

from compress import checkpoint
from compress.errors import ArtifactError
from compress.lease import TakenOver, check_lease, run_lock

Hold = Callable[..., "subprocess.Popen[str]"]

HOLDER = """
import sys
from pathlib import Path
from compress.lease import run_lock
with run_lock(Path(sys.argv[1]), "prune"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """A process that holds the stage prune, of the try that is given."""
    holders: list[subprocess.Popen[str]] = []

    def start(this_try: str = "") -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], env={**environment(), "COMPRESS_TRY": this_try},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        holders.append(holder)
        assert holder.stdout is not None
        holder.stdout.readline()
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_the_lock_keeps_a_second_process_out_and_dies_with_its_holder(tmp_path: Path, hold: Hold) -> None:
    holder = hold()
    with (
        pytest.raises(ArtifactError, match=rf"prune is being written by process {holder.pid} .*another name="),
        run_lock(tmp_path, "prune"),
    ):
        pass
    with run_lock(tmp_path, "export"):  # another stage of the same run is free
        pass
    holder.kill()
    holder.wait()
    with run_lock(tmp_path, "prune"):
        pass


@pytest.mark.parametrize("other", ["", "another:0.1", "job:0.0"])
def test_only_a_later_try_of_the_same_job_takes_over(
    other: str, tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold("job:0.0")
    monkeypatch.setenv("COMPRESS_TRY", other)
    with pytest.raises(ArtifactError, match="is being written by process"), run_lock(tmp_path, "prune"):
        pass


@pytest.mark.parametrize("later", ["job:0.1", "job:1.0", "job:0.10"])
def test_who_was_taken_over_from_commits_nothing_more(
    later: str, tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = tmp_path / "prune" / "checkpoints", {"weight": torch.ones(3)}
    monkeypatch.setenv("COMPRESS_TRY", "job:0.0")
    with run_lock(tmp_path, "prune"):
        checkpoint.save(folder, 1, state, {}, keep=2)
        taker = hold(later)
        with pytest.raises(TakenOver, match=f"is now written by process {taker.pid} .*a later try"):
            checkpoint.save(folder, 2, state, {}, keep=2)
        with pytest.raises(TakenOver):
            check_lease(tmp_path / "prune")
    assert checkpoint.steps(folder) == [1]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with pytest.raises(ArtifactError, match="by a later try of this job"), run_lock(tmp_path, "prune"):
        pass  # nor may the first one come back, while the later one is at it
    taker.kill()
    taker.wait()
    with pytest.raises(ArtifactError, match="by a later try of this job"), run_lock(tmp_path, "prune"):
        pass  # nor after that: the next try is not this one
    monkeypatch.delenv("COMPRESS_TRY")
    with run_lock(tmp_path, "prune"):  # but what a user starts by hand may
        check_lease(tmp_path / "prune")


def test_the_later_try_has_the_lock_as_soon_as_the_earlier_one_is_gone(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = hold("job:0.0")
    monkeypatch.setenv("COMPRESS_TRY", "job:0.1")
    with run_lock(tmp_path, "prune"):
        holder.kill()
        holder.wait()
        check_lease(tmp_path / "prune")  # as before each commit
        stranger = hold()
        assert "is being written by process" in stranger.communicate()[1]
        assert f"process {os.getpid()} " in (tmp_path / ".prune.lease").read_text()

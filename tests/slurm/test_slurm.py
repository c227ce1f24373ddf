"""launch/ on a real Slurm of three nodes: a run ends in the same weights, whatever happens to its jobs on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import PATHS, Cluster, missing, without_containers
from conftest import FAST, REPOSITORY
from safetensors.torch import load_file

from compress import checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm"),
]
STEPS = 24  # of training
PATH = f"{Path(sys.executable).parent}:{PATHS}"  # where `python` is this one
VARIABLES = {"PATH": PATH, "COMPRESS_GRACE": "60", "COMPRESS_DOCTOR": "0", "OMP_NUM_THREADS": "1"}
DOCTOR = {"COMPRESS_DOCTOR": "120"}  # within cluster.time, the grace taken off
SETTINGS = [
    *FAST, f"distill.num_tokens={STEPS * 8 * 64}", "distill.global_batch_size=8", "distill.micro_batch_size=2",
    "compute_dtype=float32", "distill.checkpoint_steps=2", "threads=1", "cluster.time=5",
    "cluster.jobs.distill.num_nodes=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged runs as a user of its own
    try:
        with Cluster(folder, 3) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(run_dir: Path, cache: Path, *settings: str, checkout: Path = REPOSITORY) -> list[str]:
    place = [f"run_dir={run_dir}", f"cache_dir={cache}"]
    return [str(checkout / "launch" / "pipeline.sh"), *SETTINGS, *place, *settings]


def submit(
    cluster: Cluster, run_dir: Path, cache: Path, *settings: str, checkout: Path = REPOSITORY, **variables: str
) -> dict[str, str]:
    """The job of each stage."""
    said = cluster.run(*command(run_dir, cache, *settings, checkout=checkout), **VARIABLES | variables)
    return dict(line.split() for line in said.splitlines())


def say(run_dir: Path) -> str:
    """The logs of a run's jobs."""
    return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted((run_dir / "logs").iterdir()))


def distilled(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run by pipeline.sh, every stage a job, training on two nodes."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    jobs = submit(cluster, run_dir, cache, **DOCTOR)
    assert list(jobs) == ["tokenize", "score", "prune", "distill", "export", "evaluate"]
    assert cluster.finished(jobs["evaluate"], 400) == "COMPLETED", say(run_dir)
    return run_dir


def upstream(undisturbed: Path, to: Path) -> Path:
    """A run folder in which training is next."""
    for stage in ("tokens", "score", "prune"):
        shutil.copytree(undisturbed / stage, to / stage)
    return to


def test_a_whole_run_over_two_nodes(undisturbed: Path) -> None:
    assert (undisturbed / "evaluate" / "metrics.json").exists()
    logs = [log.name for log in (undisturbed / "logs").iterdir() if log.name.startswith("compress-distill")]
    assert sum(name.endswith((".0.log", ".1.log")) for name in logs) == 2, "a log a node"
    [doctor] = (undisturbed / "logs").glob("compress-*.0.doctor.log")  # of the only stage on several nodes
    said = doctor.read_text()
    assert re.search(r"pass  shared folder +all ranks: the same for all", said), said
    assert not re.search(r"^\d+: (fail|warn)", said, re.MULTILINE), said


def wait_for_step(cluster: Cluster, run_dir: Path, job: str) -> None:
    folder = run_dir / "distill" / "checkpoints"

    def committed() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), say(run_dir)
        return bool(checkpoint.steps(folder))

    cluster.wait(committed, 120, "committed step")


def assert_same_weights(run_dir: Path, undisturbed: Path) -> None:
    expected = distilled(undisturbed)
    assert (found := distilled(run_dir)).keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def _last_node(cluster: Cluster, job: str) -> str:
    return cluster.run("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split()[-1]


def disturb(kind: str, cluster: Cluster, job: str) -> None:
    if kind == "time limit":  # what Slurm sends before it
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    elif kind == "power":
        cluster.power_off(_last_node(cluster, job))
    elif kind == "preemption":
        settings = ["--partition=high", "--nodes=3", "--exclusive", "--time=1", "--wrap=sleep 1", "--output=/dev/null"]
        cluster.run("sbatch", *settings)


@pytest.mark.parametrize("kind", ["time limit", "preemption", "power"])
def test_a_disturbed_training_ends_in_the_same_weights(
    kind: str, cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    """The checkout that it was submitted from is another one by then, which can't even be imported."""
    run_dir, checkout = upstream(undisturbed, tmp_path / "run"), tmp_path / "checkout"
    for part in ("compress", "conf", "launch"):
        shutil.copytree(REPOSITORY / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    doctor = DOCTOR if kind == "time limit" else {}  # whose signal goes to the step after it
    jobs = submit(cluster, run_dir, cache, "until=export", checkout=checkout, **doctor)
    for changed in (checkout / "compress" / "__init__.py", checkout / "launch" / "stage.sbatch"):
        changed.write_text("raise SystemExit('the checkout is another one')")
    wait_for_step(cluster, run_dir, jobs["distill"])
    node = _last_node(cluster, jobs["distill"])
    disturb(kind, cluster, jobs["distill"])
    cluster.wait(lambda: cluster.facts(jobs["distill"])["Restarts"] != "0", 120, "requeue")
    if kind == "power":
        cluster.power_on(node)
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    assert_same_weights(run_dir, undisturbed)


def test_slurm_says_in_time_that_the_time_is_up(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    """Of a training that would take hours and commits only when it is told to: the limit is real, and so its signal."""
    run_dir = upstream(undisturbed, tmp_path / "run")
    settings = ("until=distill", "distill.num_tokens=1e8", "distill.checkpoint_steps=100000",
                "cluster.jobs.distill.time=3")  # fmt: skip
    job = submit(cluster, run_dir, cache, *settings, COMPRESS_GRACE="20")["distill"]
    cluster.wait(lambda: cluster.facts(job)["Restarts"] != "0", 240, "requeue")
    steps = checkpoint.steps(run_dir / "distill" / "checkpoints")
    assert len(steps) == 1, say(run_dir)
    log = (run_dir / "logs" / f"compress-distill-{job}.log").read_text()
    assert re.search(r"^try 0: ended with .* 0 tries in a row without a new commit", log, re.MULTILINE), log
    cluster.run("scancel", job)
    cluster.finished(job, 60)


@pytest.mark.skipif(bool(without_containers()), reason=without_containers() or "containers")
def test_every_step_is_in_the_container(cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    """Of a stand-in for pyxis (container.c), where of /tmp only the run folder and COMPRESS_MOUNTS are to be seen."""
    run_dir = upstream(undisturbed, tmp_path / "run")
    mounts = f"{cache}:{cache}"
    variables = {"COMPRESS_CONTAINER": "/images/compress.sqsh", "COMPRESS_MOUNTS": mounts}
    jobs = submit(cluster, run_dir, cache, "until=export", **variables)
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    steps = (run_dir / "container.txt").read_text().splitlines()
    assert steps == 3 * [f"/images/compress.sqsh 1 {run_dir}:{run_dir},{mounts}"], "two nodes train, one exports"
    assert_same_weights(run_dir, undisturbed)


def test_a_try_that_slurm_lost_sight_of_is_fenced_off(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    """The network of its only node is cut while it trains; it stands still, and wakes when the next try is at work."""
    run_dir = upstream(undisturbed, tmp_path / "run")
    on_one_node = ("cluster.jobs.distill.num_nodes=1", "cluster.jobs.distill.ranks_per_node=2")
    jobs = submit(cluster, run_dir, cache, "until=export", *on_one_node)
    job = jobs["distill"]
    wait_for_step(cluster, run_dir, job)
    node, stale = _last_node(cluster, job), cluster.processes(job)
    assert len(stale) == 2
    for process in stale:
        os.kill(process, signal.SIGSTOP)
    cluster.cut(node)
    try:
        cluster.wait(lambda: cluster.facts(job)["Restarts"] != "0", 120, "requeue")
        lease = run_dir / ".distill.lease"
        cluster.wait(lambda: json.loads(lease.read_text())["try"] == [0, 1], 120, "second writer")
        assert set(stale) <= set(cluster.processes(job)), "the first try is still there"
        for process in stale:
            os.kill(process, signal.SIGCONT)
        cluster.wait(lambda: not set(stale) & set(cluster.processes(job)), 60, "end of the first try")
    finally:
        cluster.heal(node)
    logs = "".join(log.read_text() for log in (run_dir / "logs").glob(f"*-{job}.0.*"))
    assert "a later try; nothing more is written here" in logs, logs
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    assert_same_weights(run_dir, undisturbed)
    rows = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


def test_a_requeue_in_the_middle_of_a_checkpoint_costs_only_that_checkpoint(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = upstream(undisturbed, tmp_path / "run")
    jobs = submit(cluster, run_dir, cache, "until=export", "distill.checkpoint_steps=1")
    job, folder = jobs["distill"], run_dir / "distill" / "checkpoints"
    wait_for_step(cluster, run_dir, job)
    until, [first] = time.monotonic() + 60, cluster.processes(job, rank=0)
    while True:  # stopped between the first and the last file of a checkpoint
        assert time.monotonic() < until
        if list(folder.glob(".step_*.tmp-*")):
            os.kill(first, signal.SIGSTOP)
            if left := list(folder.glob(".step_*.tmp-*")):
                break
            os.kill(first, signal.SIGCONT)
    before = checkpoint.steps(folder)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.facts(job)["Restarts"] != "0", 120, "requeue")
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    assert int(left[0].name.split("_")[1].split(".")[0]) == before[-1] + 1
    assert not left[0].exists()
    assert_same_weights(run_dir, undisturbed)


def test_a_node_that_is_not_fit_is_left_out(cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    """A file of the run's text is not to be had there, as where a file system isn't mounted."""
    run_dir, text = upstream(undisturbed, tmp_path / "run"), str(cache / "tiny" / "train.jsonl")
    cluster.on_node("n1", "mount", "--bind", "/dev/null", text)
    try:
        jobs = submit(cluster, run_dir, cache, "until=export", **DOCTOR)
        job = jobs["distill"]
        cluster.wait(lambda: cluster.facts(job)["Restarts"] != "0", 120, "requeue")
    finally:
        cluster.on_node("n1", "mount", "--bind", shutil.copy(text, tmp_path / "whole.jsonl"), text)
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    assert (cluster.facts(job)["ExcNodeList"], cluster.facts(job)["NodeList"]) == ("n1", "n[2-3]")
    log = (run_dir / "logs" / f"compress-distill-{job}.log").read_text()
    assert re.search(
        r"^try 0: unfit n1: the doctor says .*n1 \(rank \d\): text: .*train\.jsonl: no such file", log, re.MULTILINE
    )
    assert not (run_dir / "logs" / f"compress-distill-{job}.0.0.log").exists(), "training wasn't tried with it"
    assert_same_weights(run_dir, undisturbed)


def test_a_chain_of_submissions_ends_in_the_same_weights_where_requeue_is_not_allowed(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = upstream(undisturbed, tmp_path / "run")
    said = cluster.run(*command(run_dir, cache, "until=export", "cluster.jobs.distill.submissions=3"), **VARIABLES)
    chain = [line.split()[1] for line in said.splitlines() if line.startswith("distill ")]
    export = said.split()[-1]
    assert len(chain) == 3
    wait_for_step(cluster, run_dir, chain[0])
    cluster.run("scancel", "--batch", "--signal=USR1", chain[0])
    assert cluster.finished(chain[0], 120) == "FAILED", "never COMPLETED when not done"
    assert cluster.finished(export, 300) == "COMPLETED", say(run_dir)
    assert [cluster.state(job) for job in chain[1:]] == ["COMPLETED", "COMPLETED"]
    assert [cluster.facts(job)["Restarts"] for job in chain] == ["0", "0", "0"]
    assert_same_weights(run_dir, undisturbed)


def test_a_cancelled_training_stops_the_chain_and_goes_on_when_submitted_again(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = upstream(undisturbed, tmp_path / "run")
    jobs = submit(cluster, run_dir, cache, "until=export")
    wait_for_step(cluster, run_dir, jobs["distill"])
    cluster.run("scancel", jobs["distill"])
    assert cluster.finished(jobs["distill"], 120) == "CANCELLED"
    assert cluster.finished(jobs["export"], 60) == "CANCELLED"
    assert not (run_dir / "export").exists()
    jobs = submit(cluster, run_dir, cache, "until=export")
    assert cluster.finished(jobs["export"], 300) == "COMPLETED", say(run_dir)
    assert_same_weights(run_dir, undisturbed)


def test_a_stage_that_fails_stops_the_chain(cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = upstream(undisturbed, tmp_path / "run")
    (run_dir / "prune" / "model.safetensors").write_bytes(b"cut short")
    jobs = submit(cluster, run_dir, cache, "until=export")
    assert cluster.finished(jobs["distill"], 200) == "FAILED", say(run_dir)
    assert cluster.finished(jobs["export"], 60) == "CANCELLED"
    log = (run_dir / "logs" / f"compress-distill-{jobs['distill']}.log").read_text()
    said = r"^try 0: refused: .*prune/model.safetensors is not a complete safetensors file"
    assert re.search(said, log, re.MULTILINE), log
    assert cluster.facts(jobs["distill"])["Restarts"] == "0", "another try would be refused as well"


def test_only_tries_without_a_new_commit_count(
    cluster: Cluster, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    """One is allowed: a try that has committed when it is killed is followed by another; one that hasn't ends it."""
    run_dir = upstream(undisturbed, tmp_path / "run")
    jobs = submit(cluster, run_dir, cache, "until=export", COMPRESS_TRIES="1")
    job = jobs["distill"]
    wait_for_step(cluster, run_dir, job)
    first = set(cluster.processes(job))
    os.kill(min(first), signal.SIGKILL)
    cluster.wait(lambda: cluster.facts(job)["Restarts"] == "1", 120, "requeue")
    cluster.wait(lambda: bool(set(cluster.processes(job)) - first), 120, "second try")
    os.kill(min(set(cluster.processes(job)) - first), signal.SIGKILL)
    assert cluster.finished(job, 120) == "FAILED"
    assert cluster.finished(jobs["export"], 60) == "CANCELLED"
    assert cluster.facts(job)["Restarts"] == "1"
    log = (run_dir / "logs" / f"compress-distill-{job}.log").read_text()
    assert re.findall(r"^try (\d): .* (\d) tries in a row", log, re.MULTILINE) == [("0", "0"), ("1", "1")], log


def test_dry_run_submits_nothing(cluster: Cluster, cache: Path, tmp_path: Path) -> None:
    before = cluster.run("squeue", "-h")
    said = subprocess.run(
        [REPOSITORY / "launch" / "pipeline.sh", "--dry-run", *SETTINGS, f"run_dir={tmp_path / 'run'}",
         f"cache_dir={cache}"],
        env={**os.environ, "PATH": PATH}, capture_output=True, text=True, timeout=120, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(said) == 6
    assert "--nodes=2" in said[3]
    assert "--dependency=afterok:ID_OF_PRUNE" in said[3]
    assert "--kill-on-invalid-dep=yes" in said[3]
    assert not (tmp_path / "run").exists()
    time.sleep(1)
    assert cluster.run("squeue", "-h") == before

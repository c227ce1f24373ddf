"""A run as a chain of jobs: what is asked for, what can't be submitted, what a job script is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST, REPOSITORY, Command, environment

from compress.config import load_config
from compress.errors import ConfigError
from compress.jobs import jobs_of

ON_TWO = ("cluster.num_nodes=2", "distill.micro_batch_size=1", "distill.global_batch_size=8")
SEARCH = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.max_parameters=160000",
          "search.num_candidates=2", "search.num_tokens=1024")  # fmt: skip


def test_the_distributed_stages_get_the_clusters_nodes_and_the_others_one(tmp_path: Path) -> None:
    settings = ["cluster.ranks_per_node=2", "cluster.jobs.score.num_nodes=1", "cluster.jobs.distill.time=1-00:00:00"]
    jobs = jobs_of(load_config(*FAST, *ON_TWO, *settings, f"run_dir={tmp_path / 'run'}"))
    asked = {str(job.stage): (job.num_nodes, job.ranks_per_node, job.time) for job in jobs}
    usual = (1, 1, "04:00:00")
    assert asked == {
        "tokenize": usual, "score": (1, 2, "04:00:00"), "prune": usual, "distill": (2, 2, "1-00:00:00"),
        "export": usual, "evaluate": (2, 2, "04:00:00"),
    }  # fmt: skip


def test_a_search_on_fewer_ranks_than_share_the_student_later_shares_its_own_among_all(tmp_path: Path) -> None:
    settings = [*SEARCH, "cluster.ranks_per_node=2", "cluster.jobs.distill.num_nodes=2", "cluster.shard_ranks=4"]
    jobs = jobs_of(load_config(*FAST, *settings, "distill.micro_batch_size=2", f"run_dir={tmp_path / 'run'}"))
    asked = {str(job.stage): job.num_nodes * job.ranks_per_node for job in jobs}
    assert (asked["search"], asked["distill"]) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["run_dir=runs/x"], "run_dir=runs/x must be an absolute path"),
        (["cluster.jobs.distill.cpus=0"], "cluster.jobs.distill.cpus=0 must be at least 1"),
        (["cluster.jobs.prune.num_nodes=2"], "cluster.jobs.prune asks for 2 nodes of 1 ranks, and the stage is one"),
        (["cluster.jobs.distill.submissions=0"], "cluster.jobs.distill.submissions=0 must be at least 1"),
        ([*ON_TWO, "cluster.shard_ranks=3"], "cluster.shard_ranks=3 must divide the 2 ranks"),
        ([*ON_TWO, "distill.micro_batch_size=8"], "WORLD_SIZE=2: the global batch of phase 1, 8 sequences, must be"),
        (["teacher.mode=auto"], "teacher.mode=auto is no chain of stages"),
        (
            [*ON_TWO, *SEARCH, "stage=search", "distill.micro_batch_size=8"],
            "WORLD_SIZE=2: the global batch of the search, 8 sequences, must be a multiple of 2 ranks",
        ),
    ],
)
def test_what_is_no_chain_of_jobs_is_refused(settings: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        jobs_of(load_config(*FAST, f"run_dir={tmp_path / 'run'}", *settings))


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where `python` is this one


def pipeline(*arguments: str, script: str = "pipeline.sh") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "launch" / script, *arguments], env={**environment(), "PATH": PATH},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_dry_run_prints_the_chain_and_writes_nothing(tmp_path: Path) -> None:
    done = pipeline("--dry-run", *FAST, *ON_TWO, f"run_dir={tmp_path / 'run'}")
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines] == [
        f"stage={stage}" for stage in ("tokenize", "score", "prune", "distill", "export", "evaluate")
    ], done.stderr
    assert "--dependency" not in lines[0]
    for before, line in zip(("TOKENIZE", "SCORE", "PRUNE", "DISTILL", "EXPORT"), lines[1:], strict=True):
        assert f"--dependency=afterok:ID_OF_{before} --kill-on-invalid-dep=yes" in line
    assert ["--nodes=2" in line for line in lines] == [False, True, False, True, False, True]
    assert all("--export=ALL " in line for line in lines), "a list has slurmd run a login shell before each job"
    assert not (tmp_path / "run").exists()


def test_the_lines_of_the_docs_make_a_chain() -> None:
    text = (REPOSITORY / "docs" / "cluster.md").read_text()
    [lines] = re.findall(r"( +settings=\(.*?\))\n +launch/pipeline.sh --dry-run", text, re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", f'{lines}\nlaunch/pipeline.sh --dry-run "${{settings[@]}}"'], cwd=REPOSITORY,
        env={**environment(), "PATH": PATH}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    distill = next(line for line in done.stdout.splitlines() if line.endswith("stage=distill "))
    assert "--nodes=8" in distill
    assert "COMPRESS_RANKS=8" in distill


def test_without_requeue_the_jobs_of_a_stage_follow_each_other_however_they_end(tmp_path: Path) -> None:
    submissions = ("cluster.jobs.distill.submissions=3", "until=export")
    lines = pipeline("--dry-run", *FAST, f"run_dir={tmp_path / 'run'}", *submissions).stdout.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["stage=prune", *3 * ["stage=distill"], "stage=export"]
    assert ["--no-requeue" in line for line in lines] == [False, False, False, True, True, True, False]
    waits = [line.partition("--dependency=")[2].split()[0].replace("\\", "") for line in lines[3:]]
    prune, distill = "afterok:ID_OF_PRUNE", "afterany:ID_OF_DISTILL"
    assert waits == [prune, f"{prune},{distill}", f"{prune},{distill}", "afterok:ID_OF_DISTILL"]
    assert ["COMPRESS_LINK=2" in line for line in lines[3:6]] == [False, True, False]


@pytest.mark.slow
def test_a_sweep_is_a_chain_for_every_combination_in_a_folder_of_its_own(tmp_path: Path) -> None:
    place = (*FAST, "until=prune", f"run_dir={tmp_path}/sweep")
    done = pipeline("--dry-run", *place, "prune.hidden_size=32,48", "seed=choice(1,2)", script="sweep.sh")
    names = [line.partition("sweep/")[2] for line in done.stdout.splitlines() if line.startswith("# run_dir=")]
    assert names == [f"prune.hidden_size-{size}_seed-{seed}" for size in (32, 48) for seed in (1, 2)], done.stderr
    submitted = [line for line in done.stdout.splitlines() if " sbatch " in line]
    assert len(submitted) == 4 * 3
    assert "prune.hidden_size=48" in submitted[-1]
    assert "seed=2" in submitted[-1]
    bad = pipeline(*place, "distill.learning_rate=1e-4,-1", script="sweep.sh")
    assert "distill.learning_rate=-1" in bad.stderr
    assert "a setting of several values" in pipeline(*place, script="sweep.sh").stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_what_is_done_is_not_submitted_again(command: Command, cache: Path, tmp_path: Path) -> None:
    place = [*FAST, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}"]
    assert command(*place, "until=tokenize").returncode == 0
    left = pipeline("--dry-run", *place, "until=prune")
    assert [line.split()[-1] for line in left.stdout.splitlines()] == ["stage=score", "stage=prune"]
    assert "--dependency" not in left.stdout.splitlines()[0]
    assert left.stderr == "done before: tokenize\n"
    assert pipeline("--dry-run", *place, "until=tokenize").stdout == ""
    other = pipeline("--dry-run", *place, "data.sequence_length=128")
    assert other.returncode == 2
    assert "tokens was made with other settings: data.sequence_length" in other.stderr


def test_a_wrong_setting_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    done = pipeline(*FAST, f"run_dir={tmp_path / 'run'}", "distill.num_tokns=5")
    assert done.returncode == 2
    assert "distill.num_tokns: no such key; did you mean distill.num_tokens" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_job_script_is_told_how_it_ended(command: Command, cache: Path, tmp_path: Path) -> None:
    outcome = tmp_path / "outcome"
    place = [*FAST, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}"]
    refused = command(*place, "stage=prune", COMPRESS_OUTCOME_FILE=str(outcome))
    assert refused.returncode == 2
    assert outcome.read_text().startswith("refused: stage=prune reads")
    command(*place, "stage=tokenize", COMPRESS_OUTCOME_FILE=str(outcome))
    assert outcome.read_text() == "done\n"
    outcome.unlink()
    command(*place, "stage=tokenize", COMPRESS_OUTCOME_FILE=str(outcome), RANK="1")
    assert not outcome.exists(), "the first rank speaks for all"
    assert os.environ.get("COMPRESS_OUTCOME_FILE") is None

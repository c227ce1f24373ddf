"""What each stage of a run asks Slurm for, for launch/pipeline.sh: `python -m compress.jobs [--sweep] SETTING...`.

Prints the run folder, then a line a stage that isn't done: name, nodes, ranks a node, time, CPUs, memory, submissions;
tabs between, - for none. With --sweep the settings of each run, tabs between, for launch/sweep.sh.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from compress.config import load_config
from compress.errors import CompressError, ConfigError
from compress.families import add_families
from compress.manifests import expectations, is_done
from compress.settings import CompressConfig, JobConfig, Stage, TeacherMode
from compress.stages import ON_RANKS, check_share, chosen_stages, run_dir_of


@dataclass(frozen=True)
class Job:
    """One stage's request; memory as sbatch takes it."""

    stage: Stage
    num_nodes: int
    ranks_per_node: int
    time: str
    cpus: int | None
    memory: str | None
    submissions: int

    def line(self) -> str:
        sizes = (self.num_nodes, self.ranks_per_node, self.time, self.cpus or "-", self.memory or "-")
        return "\t".join(str(word) for word in (self.stage, *sizes, self.submissions))


def jobs_of(config: CompressConfig) -> list[Job]:
    """The run's stages in order. Raises ConfigError for what can't be submitted as a chain of jobs."""
    if config.rounds or config.siblings or config.teacher.mode is TeacherMode.auto:
        what = "rounds" if config.rounds else "siblings" if config.siblings else "teacher.mode=auto"
        raise ConfigError(f"{what} is no chain of stages, one job each, in this version; submit one run at a time")
    if not Path(config.run_dir).is_absolute():
        raise ConfigError(
            f"run_dir={config.run_dir} must be an absolute path on a file system that every node sees; write it so"
        )
    found = []
    for stage in chosen_stages(config):
        asked: JobConfig = getattr(config.cluster.jobs, stage)
        nodes, ranks = (config.cluster.num_nodes, config.cluster.ranks_per_node) if stage in ON_RANKS else (1, 1)
        nodes, ranks = asked.num_nodes or nodes, asked.ranks_per_node or ranks
        if stage not in ON_RANKS and nodes * ranks > 1:
            raise ConfigError(
                f"cluster.jobs.{stage} asks for {nodes} nodes of {ranks} ranks, and the stage is one process in this "
                "version; leave both out"
            )
        check_share(config, stage, nodes * ranks)
        time = asked.time or config.cluster.time
        found.append(Job(stage, nodes, ranks, time, asked.cpus, asked.memory, asked.submissions))
    return found


def jobs_left(config: CompressConfig) -> list[Job]:
    """`jobs_of` without what the run folder has already. Raises ArtifactError where it has it by other settings."""
    jobs = jobs_of(config)
    if not run_dir_of(config).exists():
        return jobs
    if config.architecture.table:
        add_families(Path(config.architecture.table).expanduser())
    expected = expectations(config)
    return [job for job in jobs if not is_done(config, job.stage, expected)]


def sweep_of(settings: Sequence[str]) -> list[list[str]]:
    """The settings of a run for every combination of values (key=a,b), its own run_dir last.

    Raises ConfigError where nothing has several values, no run_dir is given, or a run can't be submitted.
    """
    folders = [setting for setting in settings if setting.startswith("run_dir=")]
    others = [setting for setting in settings if setting not in folders]
    try:
        parsed = OverridesParser.create().parse_overrides(others)
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; settings are key=value, values of a sweep key=a,b") from error
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] if one.is_sweep_override()
        else [setting] for one, setting in zip(parsed, others, strict=True)
    ]  # fmt: skip
    if not folders or all(len(found) == 1 for found in values):
        raise ConfigError(
            "a sweep needs run_dir=, the folder of all its runs, and a setting of several values: key=a,b"
        )
    runs = []
    for chosen in itertools.product(*values):
        swept = [one for one, found in zip(chosen, values, strict=True) if len(found) > 1]
        name = "_".join(re.sub(r"[^\w.+-]+", "-", one) for one in swept)  # what neither Hydra nor sbatch reads anew
        run = [*chosen, f"{folders[-1]}/{name}"]
        jobs_of(load_config(*run))
        runs.append(run)
    return runs


def main() -> None:
    try:
        if sys.argv[1:2] == ["--sweep"]:
            print("\n".join("\t".join(run) for run in sweep_of(sys.argv[2:])))
            return
        config = load_config(*sys.argv[1:])
        jobs = jobs_left(config)
    except CompressError as error:
        print(f"compress: error: {error}", file=sys.stderr)
        sys.exit(2)
    left = [job.stage for job in jobs]
    done = [stage for stage in chosen_stages(config) if stage not in left]
    if done:
        print(f"done before: {', '.join(done)}", file=sys.stderr)
    print("\n".join([str(run_dir_of(config)), *(job.line() for job in jobs)]))


if __name__ == "__main__":
    main()

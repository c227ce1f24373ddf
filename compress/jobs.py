"""What each stage of a run asks Slurm for, for launch/pipeline.sh: `python -m compress.jobs SETTING...`.

Prints the run folder, then a line a stage: name, nodes, ranks a node, time, CPUs, memory; tabs between, - for none.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from compress.config import load_config
from compress.errors import CompressError, ConfigError
from compress.settings import CompressConfig, JobConfig, Stage, TeacherMode
from compress.stages import ON_RANKS, chosen_stages, run_dir_of
from compress.training_rules import check_ranks, check_search_ranks


@dataclass(frozen=True)
class Job:
    """One stage's request; memory as sbatch takes it."""

    stage: Stage
    num_nodes: int
    ranks_per_node: int
    time: str
    cpus: int | None
    memory: str | None

    def line(self) -> str:
        words = (self.stage, self.num_nodes, self.ranks_per_node, self.time, self.cpus or "-", self.memory or "-")
        return "\t".join(str(word) for word in words)


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
        if stage is Stage.distill:
            check_ranks(config, nodes * ranks)
        if stage is Stage.search:
            check_search_ranks(config, nodes * ranks)
        found.append(Job(stage, nodes, ranks, asked.time or config.cluster.time, asked.cpus, asked.memory))
    return found


def main() -> None:
    try:
        config = load_config(*sys.argv[1:])
        lines = [str(run_dir_of(config)), *(job.line() for job in jobs_of(config))]
    except CompressError as error:
        print(f"compress: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()

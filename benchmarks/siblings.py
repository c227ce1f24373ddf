"""Two students in one teacher pass: seconds of the distill stage's step over those of two runs, taking turns.

    python -m benchmarks.siblings                   # from the repository's root, on an idle machine; about 10 min

SmolLM2-135M as teacher, students of 20 layers and of MLPs of 864, steps of 2x512 tokens. Three processes run the
distill stage at the same time, both students together and each alone, and take turns step by step in a rotating order,
so that a disturbance meets all of them; a step is timed from its turn to where the next one stands ready. The bar is
1.05x of (teacher + student 1 + student 2) over (2 teachers + student 1 + student 2): the teacher's own seconds of a
step are logged by each run, so what two runs would take with one teacher is (run 1 + run 2 - one teacher), and together
may take 1.05x of that. Figures are medians over the turns and their quartiles.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Turns,
    TurnTaker,
    log_plainly,
    machine,
    pipeline_arguments,
    start_as_the_makefile_does,
    write_result,
)

RECIPE = "smollm2_135m_to_100m"
PRUNING = {"short": "num_hidden_layers: 20", "narrow": "intermediate_size: 864"}
RUNS = {"together": ("short", "narrow"), "short": ("short",), "narrow": ("narrow",)}
WARMUP = 2


def settings_of(run_dir: Path, members: tuple[str, ...], num_steps: int, extra: list[str]) -> list[str]:
    siblings = ",".join(f"{{name: {name}, prune: {{{PRUNING[name]}}}}}" for name in members)
    cleared = ["removed_layers", "intermediate_size"]
    return [
        f"recipe={RECIPE}", f'run_dir="{run_dir}"', f"distill.num_tokens={num_steps * 1024}", "score.num_sequences=16",
        "distill.checkpoint_steps=10000", "prune.compensate=false", *[f"prune.{key}=null" for key in cleared],
        f"siblings=[{siblings}]", *extra,
    ]  # fmt: skip


# ---- in a run's process -----------------------------------------------------------------------------------------


def work(arguments: list[str]) -> None:
    """The distill stage, which stands still before each student's step until it is given a turn."""
    from compress import distill
    from compress.config import load_config
    from compress.pipeline import run

    log_plainly()
    turns, step = Turns(), distill.accumulate_gradients

    def in_turn(*given: Any, **options: Any) -> Any:
        turns.wait()
        return step(*given, **options)

    run(load_config(*arguments, "until=prune"))
    distill.accumulate_gradients = in_turn
    run(load_config(*arguments, "until=distill"))


# ---- in the driver's process ------------------------------------------------------------------------------------


class Run:
    """One of the three, in a process of its own."""

    def __init__(self, name: str, runs: Path, num_steps: int, extra: list[str]) -> None:
        self.members, self.folder = RUNS[name], runs / name
        for member in self.members:
            shutil.rmtree(self.folder / member / "distill", ignore_errors=True)
        arguments = settings_of(self.folder, self.members, num_steps, extra)
        command = [sys.executable, "-m", "benchmarks.siblings", "--worker", *arguments]
        self.process = TurnTaker(command, runs / f"{name}.log")

    def step(self) -> float:
        """Seconds of one step of every student."""
        return sum(self.process.step() for _ in self.members)

    def teacher_seconds(self) -> list[float]:
        """Of each step, by the log of the student that asks first."""
        lines = (self.folder / self.members[0] / "distill" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row["seconds"] * row["share_of_seconds"]["teacher"] for row in rows]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2:])
        return
    parser = pipeline_arguments(__doc__, "siblings")
    parser.add_argument("--turns", type=int, default=24)
    options = parser.parse_args()
    start_as_the_makefile_does()
    facts = machine()
    turns = WARMUP + options.turns
    runs: dict[str, Run] = {}
    try:
        for name in RUNS:
            runs[name] = Run(name, options.runs, turns + 2, options.set)
        seconds: dict[str, list[float]] = {name: [] for name in RUNS}
        for turn in range(turns):
            order = list(RUNS)[turn % 3 :] + list(RUNS)[: turn % 3]
            for name in order:
                seconds[name].append(runs[name].step())
        teachers = {name: runs[name].teacher_seconds()[:turns] for name in RUNS}
    finally:
        for run in runs.values():
            run.process.kill()
    rows = []
    for turn in range(WARMUP, turns):
        two_runs = seconds["short"][turn] + seconds["narrow"][turn]
        teacher = (teachers["short"][turn] + teachers["narrow"][turn]) / 2
        together = seconds["together"][turn]
        rows.append({
            "together": together, "two runs": two_runs, "one teacher": teacher,
            "over two runs": together / two_runs, "over one teacher less": together / (two_runs - teacher),
        })  # fmt: skip
    summary = {}
    for key in rows[0]:
        low, middle, high = statistics.quantiles([row[key] for row in rows], n=4, method="inclusive")
        summary[key] = {"median": middle, "low": low, "high": high}
    write_result(options.output, {"machine": facts, "turns": rows, "summary": summary})
    for key, found in summary.items():
        print(f"{key}: {found['median']:.2f} ({found['low']:.2f}..{found['high']:.2f})")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

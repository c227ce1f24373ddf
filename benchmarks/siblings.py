"""Two students in one teacher pass: seconds of the distill stage over those of two runs, reckoned from three.

    python -m benchmarks.siblings                   # from the repository's root, on an idle machine; about 10 min

SmolLM2-135M as teacher, students of 20 layers and of MLPs of 864, 12,288 tokens each (12 steps of 2x512, the first left
out; a figure is the median step's). Alternating: both together, each alone. The bar is 1.05x of (teacher +
student 1 + student 2) over (2 teachers + student 1 + student 2): the teacher's own seconds of a step are logged by each
run, so what two runs would take with one teacher is (run 1 + run 2 - one teacher), and together may take 1.05x of that.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import (
    log_plainly,
    machine,
    pipeline_arguments,
    spread,
    start_as_the_makefile_does,
    write_result,
)

RECIPE = "smollm2_135m_to_100m"
PRUNING = {"short": "num_hidden_layers: 20", "narrow": "intermediate_size: 864"}


def settings_of(run_dir: Path, extra: list[str]) -> list[str]:
    cleared = ["removed_layers", "intermediate_size"]
    return [
        f"recipe={RECIPE}", f'run_dir="{run_dir}"', "distill.num_tokens=12288", "score.num_sequences=16",
        "prune.compensate=false", *[f"prune.{key}=null" for key in cleared], *extra,
    ]  # fmt: skip


def seconds_of(folder: Path) -> tuple[float, float]:
    """(of the median step, without the first, which warms up; the teacher's in it)."""
    rows = [json.loads(line) for line in (folder / "distill" / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = statistics.median(row["seconds"] for row in rows)
    return seconds, statistics.median(row["seconds"] * row["share_of_seconds"]["teacher"] for row in rows)


def train(run_dir: Path, members: list[str], extra: list[str]) -> dict[str, tuple[float, float]]:
    """Run up to distill, the stages before it kept from an earlier time; member -> `seconds_of`."""
    from compress.config import load_config
    from compress.pipeline import run

    siblings = ",".join(f"{{name: {name}, prune: {{{PRUNING[name]}}}}}" for name in members)
    for name in members:
        shutil.rmtree(run_dir / name / "distill", ignore_errors=True)
    run(load_config(*settings_of(run_dir, extra), f"siblings=[{siblings}]", "until=distill"))
    return {name: seconds_of(run_dir / name) for name in members}


def main() -> None:
    parser = pipeline_arguments(__doc__, "siblings")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        found: dict[str, Any] = {}
        order = [["short", "narrow"], ["short"], ["narrow"]]
        for members in order[number % 3 :] + order[: number % 3]:
            for name, (seconds, teacher) in train(options.runs / "both", members, options.set).items():
                key = f"{name}, {'together' if len(members) > 1 else 'alone'}"
                found[key] = {"seconds": seconds, "teacher": teacher}
        rounds.append(found)
        alone = [found["short, alone"], found["narrow, alone"]]
        together = sum(found[f"{name}, together"]["seconds"] for name in PRUNING)
        two_runs = sum(row["seconds"] for row in alone)
        teacher = statistics.mean(row["teacher"] for row in alone)
        found |= {"together": together, "two runs": two_runs, "over one teacher less": together / (two_runs - teacher)}
        print(
            f"round {number + 1}: a step together {together:.2f} s, of two runs {two_runs:.2f} s, the teacher's of "
            f"them {2 * teacher:.2f} s",
            flush=True,
        )
    ratio = spread([found["over one teacher less"] for found in rounds])
    saved = spread([found["together"] / found["two runs"] for found in rounds])
    write_result(options.output, {"machine": machine(), "rounds": rounds, "over_ideal": ratio, "over_two_runs": saved})
    print(f"together over two runs: {saved['median']:.2f}; over two runs less one teacher: {ratio['median']:.2f} "
          f"({ratio['min']:.2f}..{ratio['max']:.2f}); written: {options.output}")  # fmt: skip


if __name__ == "__main__":
    main()

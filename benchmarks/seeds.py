"""The demo at full length for several seeds: how much of its result is chance.

    python -m benchmarks.seeds                    # from the repository's root; seeds 0, 1, 2, about 10 min each
    python -m benchmarks.seeds --seeds 0 1 2 3 4

Each seed is a run of the recipe smollm2_135m_to_100m by the real pipeline with `seed=`: it draws the training sequences
and their order; scores and the pruned student are the same for all and made once. The figure is `excess_loss`, the
distilled student's loss minus the teacher's in nats per token, on every validation set: `quac` is the one to quote,
since nothing was chosen on it. The median over the seeds is what the README states, the range stands beside it.
Resumable: a killed run goes on from its checkpoint, finished seeds are skipped while settings and inputs are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import (
    load_rows,
    log_plainly,
    machine,
    pipeline_arguments,
    run_row,
    spread,
    start_as_the_makefile_does,
    write_result,
)

RECIPE = "smollm2_135m_to_100m"


def measure(seed: int, run_dir: Path, extra: list[str], previous: dict[str, Any] | None, sources: list[Path]) -> Any:
    """One seed's row; `previous` unchanged when its settings and inputs are those of now."""
    settings = [f"recipe={RECIPE}", f"name=seed_{seed}", f'run_dir="{run_dir}"', *extra, f"seed={seed}"]
    facts, metrics = run_row(f"seed {seed}", settings, previous, sources, ("tokens", "score", "prune"))
    if metrics is None:
        return facts
    return {
        **facts,
        "excess_loss": metrics["excess_loss"],
        "gap_closed": metrics["gap_closed"],
        "kl_to_teacher": {name: found["kl_to_teacher"] for name, found in metrics["distilled"]["sets"].items()},
    }


def summarise(rows: dict[str, Any]) -> dict[str, Any]:
    sets = next(iter(rows.values()))["excess_loss"]
    return {
        "excess_loss": {name: spread([row["excess_loss"][name] for row in rows.values()]) for name in sets},
        "distill_seconds": spread([row["distill_seconds"] for row in rows.values()]),
    }


def show(rows: dict[str, Any], summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    title = f"{RECIPE}: {first['parameters']:,} parameters, {first['num_tokens']:,} tokens, {len(rows)} seeds"
    result = Table(title=title, title_justify="left")
    result.add_column("seed")
    for name in first["excess_loss"]:
        result.add_column(f"{name}: excess loss", justify="right")
    result.add_column("distill, s", justify="right")
    for index, (seed, row) in enumerate(rows.items()):
        losses = [f"{loss:.4f}" for loss in row["excess_loss"].values()]
        result.add_row(seed, *losses, f"{row['distill_seconds']:.0f}", end_section=index == len(rows) - 1)
    figures = [*summary["excess_loss"].values()]
    seconds = summary["distill_seconds"]
    result.add_row("median", *[f"{f['median']:.4f}" for f in figures], f"{seconds['median']:.0f}")
    spans = [f"{f['min']:.4f}..{f['max']:.4f}" for f in figures]
    result.add_row("range", *spans, f"{seconds['min']:.0f}..{seconds['max']:.0f}")
    Console(width=120).print(result)


def main() -> None:
    parser = pipeline_arguments(__doc__, "seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    before = load_rows(options.output)
    rows: dict[str, Any] = {}
    sources: list[Path] = []
    for seed in options.seeds:
        run_dir = options.runs / f"seed_{seed}"
        rows[str(seed)] = measure(seed, run_dir, options.set, before.get(str(seed)), sources)
        sources.append(run_dir)
        summary = summarise(rows)
        # Rows of other seeds stay in the file, for a later call that asks for them.
        facts = {"machine": machine(), "settings": options.set, "seeds": list(map(int, rows)), "summary": summary}
        write_result(options.output, {**facts, "rows": {**before, **rows}})
    show(rows, summary)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

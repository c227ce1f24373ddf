"""Which objective recovers most: the demo's student distilled by each, three seeds, equal tokens.

    python -m benchmarks.objectives                                     # from the repository's root: hours on 2 cores
    python -m benchmarks.objectives --only bild --seeds 0               # one row
    python -m benchmarks.objectives --best 4 --skip "forward_kl, "      # then the best objectives, at 65,536 tokens
    python -m benchmarks.objectives --tokens 36864 --only forward_kl --skip "forward_kl, " "forward_kl +"
                                                                        # AdamW for as long as Muon takes
    python -m benchmarks.objectives --tokens 81920 --only forward_kl --skip "forward_kl, " "forward_kl +"
                                                                        # forward KL for as long as dynamic_kl's 65,536
    python -m benchmarks.objectives --speed 3 --skip random prev "forward_kl, c" # what a step takes, on an idle machine
    python -m benchmarks.objectives --table                             # what docs/objectives.md prints

SmolLM2-135M cut to the recipe's 98.8 M, 24,576 training tokens, everything else as the recipe says. Judged by the KL to
the teacher on the selection set: what recovers the teacher. The loss is beside it and can't judge, since training on
the text's own tokens lowers it past what the teacher would say, at the cost of what it knew. QuAC is measured along and
looked at for the final table only. Rows that are done are skipped, so the script can be stopped at any time;
results/objectives.json has one row an objective, seed and number of tokens.

The rows `random weights` and `cross-entropy only` are the baselines of Minitron (arXiv 2407.14679, section 4.3): the
same shape distilled from nothing, and the pruned student trained on the text alone, both at equal tokens; `previous
self` is DynSDPB's kind of training, to be compared with the latter.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    log_plainly,
    machine,
    pipeline_arguments,
    run_row,
    share_stages,
    spread,
    start_as_the_makefile_does,
    write_result,
)

if TYPE_CHECKING:
    from compress.settings import CompressConfig

RECIPE = "smollm2_135m_to_100m"
NUM_TOKENS, BEST_TOKENS = 24_576, 65_536
STEPS, TOKENS_PER_STEP = 12, 1024  # of a run for the clock
# Name -> settings. Where a paper names the options it uses, they are those.
CONTENDERS: dict[str, list[str]] = {
    "forward_kl": [],
    "forward_kl, Muon at 0.01": ["distill.optimizer=muon", "distill.muon_learning_rate=0.01"],
    "forward_kl, Muon at 0.02": ["distill.optimizer=muon", "distill.muon_learning_rate=0.02"],
    "forward_kl, Muon at 0.005": ["distill.optimizer=muon", "distill.muon_learning_rate=0.005"],
    "forward_kl, Muon at 0.0025": ["distill.optimizer=muon", "distill.muon_learning_rate=0.0025"],
    "forward_kl, corrected teacher": [
        "correct.num_tokens=24576",
        "correct.trial_tokens=12288",
        "correct.learning_rate=1e-4",
        "correct.min_gain=0",
    ],
    "forward_kl, T=2": ["distill.objectives=[{temperature: 2, squared: true}]"],
    "reverse_kl": ["distill.objectives=[{objective: reverse_kl}]"],
    "jensen_shannon, beta 0.5": ["distill.objectives=[{objective: jensen_shannon}]"],
    "jensen_shannon, beta 0.1": ["distill.objectives=[{objective: jensen_shannon, beta: 0.1}]"],
    "skew_kl": ["distill.objectives=[{objective: skew_kl}]"],
    "skew_reverse_kl": ["distill.objectives=[{objective: skew_reverse_kl}]"],
    "total_variation": ["distill.objectives=[{objective: total_variation}]"],
    "adaptive_kl": ["distill.objectives=[{objective: adaptive_kl}]"],
    "top_k_kl, k=64": ["distill.objectives=[{objective: top_k_kl, k: 64}]"],
    "bild, k=8": ["distill.objectives=[{objective: bild, temperature: 3}]"],
    "dac_kl": ["distill.objectives=[{objective: dac_kl, lower_quantile: 0.95}]"],
    "dynamic_kl": ["distill.objectives=[{objective: dynamic_kl}]"],
    "uncertainty_kl": ["distill.objectives=[{objective: uncertainty_kl}]"],
    "forward_kl + span_relation": ["distill.objectives=[{}, {objective: span_relation, weight: 10}]"],
    "forward_kl + 0.3 cross_entropy": ["distill.objectives=[{}, {objective: cross_entropy, weight: 0.3}]"],
    "forward_kl + hidden_cosine": ["distill.objectives=[{}, {objective: hidden_cosine, layers: [[-3, -3]]}]"],
    "forward_kl + hidden_mse": ["distill.objectives=[{}, {objective: hidden_mse, layers: [[-3, -3]], weight: 0.01}]"],
    "forward_kl + embedding_mse": ["distill.objectives=[{}, {objective: embedding_mse}]"],
    "forward_kl + minilm": [
        "distill.objectives=[{}, {objective: minilm_attention, weight: 0.1}, {objective: minilm_value, weight: 0.1}]"
    ],
    "forward_kl, cached, 12 samples": ["teacher.mode=cached"],
    "label_smoothing": ["distill.objectives=[{objective: label_smoothing}]"],
    "cross-entropy only": ["distill.objectives=[{objective: cross_entropy}]"],
    "previous self, DLB": [
        "teacher.mode=previous_self",
        "distill.micro_batch_size=1",
        "distill.objectives=[{objective: cross_entropy}, {temperature: 3, squared: true}]",
    ],
    "previous self, dynamic": [
        "teacher.mode=previous_self",
        "distill.micro_batch_size=1",
        "distill.objectives=[{objective: cross_entropy}, {objective: dynamic_kl}]",
    ],
    "random weights": ["distill.init_from=RANDOM"],
}


def key_of(name: str, seed: int, num_tokens: int) -> str:
    return f"{name} | seed {seed} | {num_tokens}"


def random_student(runs: Path, pruned: Path) -> Path:
    """The pruned student's shape with transformers' own fresh weights, made once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = runs / "random_student"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        for file in pruned.glob("*.json"):
            if "token" in file.name or file.name in ("vocab.json", "special_tokens_map.json"):
                shutil.copyfile(file, folder / file.name)
        for file in [*pruned.glob("*.txt"), *pruned.glob("*.jinja")]:
            shutil.copyfile(file, folder / file.name)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pruned), dtype=torch.float32).save_pretrained(
            folder
        )
    return folder


def against_teacher(config: CompressConfig) -> dict[str, Any]:
    """What stage evaluate says of the export, without the pruned model and the clock: the same tokens."""
    from compress.evaluate import sets_of
    from compress.inputs import teacher_of
    from compress.metrics import language_modelling
    from compress.models import load_model
    from compress.parallel import resolve_dtype

    run_dir, dtype = Path(config.run_dir), resolve_dtype(config.compute_dtype)
    folders = {"teacher": teacher_of(config), "distilled": run_dir / "export"}
    models = {name: load_model(folder, dtype).eval() for name, folder in folders.items()}
    sets = {name: language_modelling(models, batches) for name, batches in sets_of(config, run_dir).items()}
    steps = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    return {
        "fastest_step_seconds": min(step["seconds"] for step in steps),  # which a busy machine disturbs least
        "distilled": {
            "parameters": sum(p.numel() for p in models["distilled"].parameters()),
            "sets": {name: figures["distilled"] for name, figures in sets.items()},
        },
        "excess_loss": {name: found["distilled"]["loss"] - found["teacher"]["loss"] for name, found in sets.items()},
    }


def settings_of(name: str, seed: int, num_tokens: int, runs: Path, extra: list[str], shared: Path) -> list[str]:
    slug = "".join(letter if letter.isalnum() else "_" for letter in name)
    run_dir = runs / f"{slug}_{seed}_{num_tokens}"
    settings = [
        f"recipe={RECIPE}", f"name={slug}", f'run_dir="{run_dir}"', f"distill.num_tokens={num_tokens}",
        "evaluate.generate_tokens=1", "evaluate.max_tokens=8192", f"seed={seed}", *CONTENDERS[name], *extra,
    ]  # fmt: skip
    if name == "random weights":
        settings = [s.replace("RANDOM", f'"{random_student(runs, shared / "prune")}"') for s in settings]
    return settings


def step_costs(names: list[str], rounds: int, runs: Path, extra: list[str], shared: Path) -> dict[str, Any]:
    """The seconds of a step over those of forward_kl's, by contender: medians of a few steps, in turns."""
    from compress.config import load_config
    from compress.pipeline import run
    from compress.settings import Stage

    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        seconds = {}
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            config = load_config(*settings_of(name, 0, STEPS * TOKENS_PER_STEP, runs / "speed", extra, shared))
            run_dir = Path(config.run_dir)
            shutil.rmtree(run_dir / "distill", ignore_errors=True)
            share_stages(config, shared, ("tokens", "score", "prune"))
            run(dataclasses.replace(config, until=Stage.distill))
            steps = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
            seconds[name] = statistics.median(step["seconds"] for step in steps[STEPS // 4 :])
            shutil.rmtree(run_dir / "distill")
        for name in names:
            ratios[name].append(seconds[name] / seconds["forward_kl"])
    return {name: spread(found) for name, found in ratios.items()}


def measure(name: str, seed: int, num_tokens: int, runs: Path, extra: list[str], previous: Any, shared: Path) -> Any:
    """One row; `previous` unchanged when its settings and inputs are those of now."""
    settings = settings_of(name, seed, num_tokens, runs, extra, shared)
    facts, metrics = run_row(
        key_of(name, seed, num_tokens), settings, previous, [shared], ("tokens", "score", "prune"), against_teacher
    )
    if metrics is None:
        return facts
    sets = metrics["distilled"]["sets"]
    return {
        **facts,
        "objective": name,
        "seed": seed,
        "fastest_step_seconds": metrics["fastest_step_seconds"],
        "excess_loss": metrics["excess_loss"],
        "kl_to_teacher": {one: figures["kl_to_teacher"] for one, figures in sets.items()},
        "top1_agreement": {one: figures["top1_agreement"] for one, figures in sets.items()},
    }


def by_objective(rows: dict[str, Any], num_tokens: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        if row["num_tokens"] == num_tokens:
            found.setdefault(row["objective"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: _median(item[1], "kl_to_teacher", "selection")))


def _median(rows: list[dict[str, Any]], figure: str, name: str) -> float:
    return statistics.median(row[figure][name] for row in rows)


def markdown(rows: dict[str, Any], num_tokens: int, costs: dict[str, Any]) -> str:
    """The table, the best on the selection set first; figures are medians over seeds, with the range of the first."""
    lines = [
        "| objective | seeds | KL to the teacher | top-1 | excess loss | QuAC: KL | excess loss | a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_objective(rows, num_tokens).items():
        divergences = [row["kl_to_teacher"]["selection"] for row in found]
        lines.append(
            f"| {name} | {len(found)} | {statistics.median(divergences):.3f} "
            f"({min(divergences):.3f}..{max(divergences):.3f}) | {_median(found, 'top1_agreement', 'selection'):.1%} | "
            f"{_median(found, 'excess_loss', 'selection'):.3f} | {_median(found, 'kl_to_teacher', 'quac'):.3f} | "
            f"{_median(found, 'excess_loss', 'quac'):.3f} | "
            + (f"{costs[name]['median']:.2f}x |" if name in costs else "|")
        )
    return "\n".join(lines)


def main() -> None:
    parser = pipeline_arguments(__doc__, "objectives")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name begins so")
    parser.add_argument("--skip", nargs="+", default=[], help="contenders whose name begins so are left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--best", type=int, default=0, help="instead: the best so many, at 65,536 tokens")
    parser.add_argument("--speed", type=int, default=0, help="instead: so many rounds of a few steps of each, timed")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    options = parser.parse_args()
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows, costs = before.get("rows", {}), before.get("steps", {})
    if not options.table:
        start_as_the_makefile_does()
        log_plainly()
        num_tokens = BEST_TOKENS if options.best else options.tokens
        names = [*by_objective(rows, NUM_TOKENS)] if options.best else list(CONTENDERS)
        if options.only:
            names = [name for name in names if name.startswith(tuple(options.only))]
        names = [name for name in names if not name.startswith(tuple(options.skip))][: options.best or None]
        shared = options.runs / f"forward_kl_0_{NUM_TOKENS}"
        facts = {"machine": machine(), "settings": options.set}
        if options.speed:
            costs |= step_costs(names, options.speed, options.runs, options.set, shared)
            write_result(options.output, {**facts, "steps": costs, "rows": rows})
        for seed in () if options.speed else options.seeds:  # a whole table of one seed first
            for name in names:
                key = key_of(name, seed, num_tokens)
                rows[key] = measure(name, seed, num_tokens, options.runs, options.set, rows.get(key), shared)
                write_result(options.output, {**facts, "steps": costs, "rows": rows})
    for num_tokens in sorted({row["num_tokens"] for row in rows.values()}):
        print(f"\n{num_tokens:,} tokens\n\n{markdown(rows, num_tokens, costs)}")


if __name__ == "__main__":
    main()

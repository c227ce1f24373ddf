"""Which criterion, and is it better than ModelOpt's: SmolLM2-135M to about 100 M parameters by every one of them.

    python -m benchmarks.criteria                        # from the repository's root; about 70 min on two idle cores
    python -m benchmarks.criteria --only width           # or depth, options, final; parts that are done are skipped
    python -m benchmarks.criteria --num-tokens 512 --final-tokens 512 --set score.depth_sequences=4   # does it run

Four tables from one set of scores (the recipe smollm2_135m_to_100m, 64 calibration sequences):

    width   every width criterion cuts the MLPs to 864 (99.7 M parameters), is distilled for --num-tokens and judged on
            the selection set. Beside it, untrained on calibration text, the KL when it cuts the hidden size to 432, or
            three of nine heads with their key-value group.
    depth   the same for every depth criterion and 20 of 30 layers (99.1 M).
    options what merging heads and compensating change, at 6 of 9 heads and MLPs of 992 (99.7 M).
    final   three seeds of --final-tokens: the winner of this project's search against the two models that ModelOpt 0.43
            itself chose and cut within 100 M (benchmarks/modelopt_choice.py), with its own divisors and with finer
            ones; the search may use no more parameters than the smaller of the two. Chosen on the selection set by
            everybody; QuAC, which nobody chose by, stands beside it. All are distilled by this project's distill stage
            with the same tokens, as students `pruned elsewhere` (distill.init_from), so only the pruning differs.

`excess` is the loss minus the teacher's, nats per token; lower is better everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    default_cache,
    log_plainly,
    machine,
    peer_python,
    pipeline_arguments,
    run_row,
    share_stages,
    start_as_the_makefile_does,
    write_result,
)

RECIPE = "smollm2_135m_to_100m"
LAYERS, REMOVED = 30, 10
SELECTION = 'data.validation=[{path: "embedded:boolq-selection", name: selection}]'
AGGREGATIONS = ("mean", "l2", "variance")
WIDTH = [
    "activation:l2/mean",  # Minitron's and ModelOpt's
    *[f"activation:{b}/{s}" for b in AGGREGATIONS for s in AGGREGATIONS if (b, s) != ("l2", "mean")],
    "weighted_activation:l2/mean",
    "weighted_activation:l2/l2",
    "taylor",
    "weight_magnitude",
]
DEPTH = ["block_influence", "block_cosine", "loss", "loss_greedy", "nmse", "nmse_greedy", "kl", "kl_greedy", "task"]
# What may be done to the weights beside cutting them, at a shape that loses a third of the heads and of the MLPs.
OPTIONS = {"cut only": [], "heads merged": ["prune.merge_heads=true"], "compensated": ["prune.compensate=true"]}
OPTIONS_SHAPE = ["prune.num_attention_heads=6", "prune.intermediate_size=992"]
ALONE = {"hidden 432": {"hidden_size": 432}, "6 heads": {"num_attention_heads": 6, "num_key_value_heads": 2}}
MODELOPT = ("torch==2.13.0", "transformers==5.23.0", "nvidia-modelopt==0.43.0", "megatron-core==0.16.1", "psutil",
            "requests")  # fmt: skip
MAX_PARAMETERS = 100_000_000
SEEDS = (0, 1, 2)
NO_SHAPE = ("prune.removed_layers=null", "prune.intermediate_size=null")


def scores(extra: Sequence[str]) -> list[str]:
    """The settings of the one scoring that every run shares."""
    width = ",".join(f'"{name}"' for name in WIDTH)
    return [f"recipe={RECIPE}", SELECTION, f"score.width=[{width}]", f"score.depth=[{','.join(DEPTH)}]",
            f"score.max_removed_layers={REMOVED}", "score.depth_sequences=8", "evaluate.generate_tokens=1",
            *NO_SHAPE, *extra]  # fmt: skip


def run_until(stage: str, settings: Sequence[str]) -> Path:
    from compress.config import load_config
    from compress.pipeline import run

    config = load_config(*settings, f"until={stage}")
    run(config)
    return Path(config.run_dir)


def row_of(name: str, settings: Sequence[str], previous: dict[str, Any] | None, shared: Sequence[Path]) -> Any:
    """One row with its figures by set; `previous` when its settings and inputs are those of now."""
    from compress.config import load_config

    facts, metrics = run_row(name, settings, previous, shared)
    if metrics is None:
        return facts
    shutil.rmtree(Path(load_config(*settings).run_dir) / "export")  # there are dozens of them
    sets = {
        dataset: {
            model: {
                "excess_loss": metrics[model]["sets"][dataset]["loss"] - teacher["loss"],
                "kl_to_teacher": metrics[model]["sets"][dataset]["kl_to_teacher"],
                "perplexity": metrics[model]["sets"][dataset]["perplexity"],
            }
            for model in ("pruned", "distilled")
        }
        for dataset, teacher in metrics["teacher"]["sets"].items()
    }
    return {**facts, "sets": sets}


def alone(run_dir: Path, settings: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each of ALONE, the KL of the untrained model that each width criterion would leave."""
    from dataclasses import replace

    from compress.architecture import with_sizes
    from compress.config import load_config
    from compress.folders import read_model
    from compress.inputs import source_of
    from compress.models import load_model
    from compress.parallel import resolve_dtype
    from compress.recommendation import compare_criteria
    from compress.targets import importance_of
    from compress.tokens import TokenSet

    config = load_config(*settings)
    info = read_model(source_of(config), trust_remote_code=False)
    importance = replace(importance_of(run_dir, info), depths={})
    model = load_model(info.folder, resolve_dtype(config.compute_dtype)).eval().requires_grad_(False)
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    batches = [tokens.batch(group) for group in tokens.spread(16, 4)]
    return {
        name: compare_criteria(model, batches, importance, info.shape, with_sizes(info.shape, sizes))["width"]["kl"]
        for name, sizes in ALONE.items()
    }


# ---- ModelOpt ----------------------------------------------------------------------------------------------------


def write_tokens(run_dir: Path, path: Path, num_sequences: int) -> None:
    """The rows that ModelOpt scores and chooses by: the same calibration sequences, eight of the selection set."""
    import torch
    from safetensors.torch import save_file

    from compress.tokens import TokenSet

    def rows(folder: Path, count: int) -> torch.Tensor:
        tokens = TokenSet.open(folder)
        return torch.cat([tokens.batch(group).input_ids for group in tokens.spread(count, 4)]).int().contiguous()

    path.parent.mkdir(parents=True, exist_ok=True)
    calibration = rows(run_dir / "tokens" / "calibration", num_sequences)
    save_file({"calibration": calibration, "selection": rows(run_dir / "tokens" / "validation" / "selection", 8)}, path)


def modelopt(work: Path, teacher: Path, divisors: str, cache: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that ModelOpt pruned, with what transformers needs beside the weights, and how it was chosen."""
    folder = work / f"modelopt-{divisors}"
    if not (folder / "choice.json").exists():
        python = peer_python(cache, "modelopt-0.43.0", MODELOPT)
        command = [python, "-m", "benchmarks.modelopt_choice", "--teacher", str(teacher), "--divisors", divisors]
        command += ["--tokens", str(work / "tokens.safetensors"), "--output", str(folder)]
        command += ["--max-parameters", str(MAX_PARAMETERS)]
        print(f"ModelOpt, {divisors} divisors", flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        for file in teacher.glob("*token*"):
            shutil.copy(file, folder)
    return folder, json.loads((folder / "choice.json").read_text())


# ---- the tables ---------------------------------------------------------------------------------------------------


def criterion_rows(kind: str, rows: dict[str, Any], base: Path, settings: list[str], runs: Path, save: Any) -> None:
    """One row for each of WIDTH, DEPTH or OPTIONS into `rows`."""
    from compress.config import load_config
    from compress.folders import read_model
    from compress.inputs import source_of
    from compress.targets import importance_of

    importance = importance_of(base, read_model(source_of(load_config(*settings)), trust_remote_code=False))
    best = 'prune.width_criterion="weighted_activation:l2/l2"'
    for name in {"width": WIDTH, "depth": DEPTH, "options": list(OPTIONS)}[kind]:
        run_dir = runs / f"{kind}_{name.replace(':', '_').replace('/', '_').replace(' ', '_')}"
        plain = "prune.compensate=false"
        if kind == "width":
            shape = [plain, "prune.intermediate_size=864", f'prune.width_criterion="{name}"']
        elif kind == "depth":
            shape = [plain, f"prune.removed_layers={importance.depth(name).of(REMOVED)}".replace(" ", "")]
        else:
            shape = [plain, *OPTIONS_SHAPE, best, *OPTIONS[name]]
        mine = [*settings, f'run_dir="{run_dir}"', f"name={kind}", *shape]
        rows[name] = row_of(f"{kind}: {name}", mine, rows.get(name), [base])
        save()


def final_rows(result: dict[str, Any], base: Path, settings: list[str], options: Any, save: Any) -> None:
    from compress.config import load_config
    from compress.folders import read_model
    from compress.inputs import source_of
    from compress.targets import importance_of

    cache = default_cache().resolve()
    teacher = Path(source_of(load_config(*settings)))
    write_tokens(base, options.runs / "tokens.safetensors", load_config(*settings).score.num_sequences)
    students: dict[str, Path] = {}
    for divisors in ("default", "fine"):
        students[f"ModelOpt 0.43: {divisors} divisors"], choice = modelopt(options.runs, teacher, divisors, cache)
        result["modelopt"][divisors] = choice
        save()
    # No more parameters than either of them, so that size can't be what decides.
    limit = min(choice["num_parameters"] for choice in result["modelopt"].values())
    folder = options.runs / "search"
    mine = [*settings, f'run_dir="{folder}"', "name=search", f"prune.max_parameters={limit}",
            "prune.width_criterion='weighted_activation:l2/l2'", "prune.depth_criterion=kl_greedy",
            "shape.multiple_of=32", "search.num_candidates=6", "search.num_tokens=8192", "search.judge=selection",
            f"distill.num_tokens={options.final_tokens}"]  # fmt: skip
    share_stages(load_config(*mine), base)
    students["compress: search"] = run_until("prune", mine) / "prune"
    result["search"] = json.loads((folder / "search" / "report.json").read_text())
    save()
    # And at ModelOpt's better shape itself, where only the choice of units and the compensation differ.
    chosen = result["modelopt"]["fine"]["sizes"]
    importance = importance_of(base, read_model(source_of(load_config(*settings)), trust_remote_code=False))
    gone = importance.depth("kl_greedy").of(LAYERS - chosen["num_hidden_layers"])
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    mine = [*settings, f'run_dir="{options.runs / "same_shape"}"', "name=same_shape",
            "prune.width_criterion='weighted_activation:l2/l2'", f"prune.removed_layers={gone}".replace(" ", ""),
            *(f"prune.{name}={chosen[name]}" for name in widths)]  # fmt: skip
    share_stages(load_config(*mine), base)
    students["compress: ModelOpt's finer shape"] = run_until("prune", mine) / "prune"
    # Ours and ModelOpt's better model first, whole seeds of both: a run that is cut short can compare them.
    for name, folder in reversed(students.items()):
        for seed in SEEDS:
            run_dir = options.runs / f"final_{folder.parent.name}_{folder.name}_{seed}"
            mine = [f"recipe={RECIPE}", *NO_SHAPE, f'run_dir="{run_dir}"', "name=final", f"seed={seed}",
                    f'distill.init_from="{folder}"', f"distill.num_tokens={options.final_tokens}",
                    "evaluate.generate_tokens=1", "evaluate.max_tokens=8192", "prune.compensate=false",
                    *options.set]  # fmt: skip
            key = f"{name}, seed {seed}"
            result["final"][key] = row_of(key, mine, result["final"].get(key), [])
            save()


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    for kind in ("width", "depth", "options"):
        rows = result[kind]
        if not rows:
            continue
        first = next(iter(rows.values()))
        extra = list(ALONE) if kind == "width" else []
        table = Table(title=f"{kind}: {first['parameters']:,} parameters, {first['num_tokens']:,} tokens")
        for column in ("criterion", "KL", "perplexity", "excess", "distilled: KL", "perplexity", "excess", *extra):
            table.add_column(column, justify="left" if column == "criterion" else "right")
        best_first = sorted(rows, key=lambda name: rows[name]["sets"]["selection"]["distilled"]["kl_to_teacher"])
        for name in best_first:
            row = rows[name]
            figures = [format_figures(row["sets"]["selection"][model]) for model in ("pruned", "distilled")]
            table.add_row(name, *figures[0], *figures[1], *[f"{result['alone'][other][name]:.3f}" for other in extra])
        console.print(table)
    if not result["final"]:
        return
    table = Table(title="final: median (min..max) of the seeds")
    columns = ("student", "parameters", "set", "KL untrained", "perplexity", "KL distilled", "perplexity", "excess")
    for column in columns:
        table.add_column(column, justify="left" if column in ("student", "set") else "right")
    for name in dict.fromkeys(key.rpartition(", seed ")[0] for key in result["final"]):
        rows = [row for key, row in result["final"].items() if key.rpartition(", seed ")[0] == name]
        for dataset in rows[0]["sets"]:
            before = rows[0]["sets"][dataset]["pruned"]
            after = [row["sets"][dataset]["distilled"] for row in rows]
            cells = [f"{before['kl_to_teacher']:.3f}", f"{before['perplexity']:.1f}"]
            for key, digits in (("kl_to_teacher", 3), ("perplexity", 1), ("excess_loss", 3)):
                values = [float(row[key]) for row in after]
                span = f"{min(values):.{digits}f}..{max(values):.{digits}f}"
                cells.append(f"{statistics.median(values):.{digits}f} ({span})")
            table.add_row(name, f"{rows[0]['parameters']:,}", dataset, *cells)
    console.print(table)


def format_figures(figures: dict[str, float]) -> list[str]:
    return [f"{figures['kl_to_teacher']:.3f}", f"{figures['perplexity']:.1f}", f"{figures['excess_loss']:.3f}"]


def main() -> None:
    parser = pipeline_arguments(__doc__, "criteria")
    parser.add_argument("--num-tokens", type=int, default=8192, help="distill.num_tokens of every criterion")
    parser.add_argument("--final-tokens", type=int, default=16384, help="of every final student")
    parser.add_argument("--only", choices=("width", "depth", "options", "final"))
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    result: dict[str, Any] = {
        "alone": {},
        "width": {},
        "depth": {},
        "options": {},
        "modelopt": {},
        "search": {},
        "final": {},
    }
    if options.output.exists():
        result |= json.loads(options.output.read_text())

    def save() -> None:
        write_result(options.output, {**result, "machine": machine()})

    budget = f"distill.num_tokens={options.num_tokens}"
    settings = [*scores(options.set), budget, f"evaluate.max_tokens={options.num_tokens}"]
    base = run_until("score", [*settings, f'run_dir="{options.runs / "scores"}"', "name=scores",
                               "prune.intermediate_size=864"])  # fmt: skip
    result["scores"] = json.loads((base / "score" / "report.json").read_text())
    if not result["alone"]:
        result["alone"] = alone(base, settings)
    save()
    for kind in ("width", "depth", "options"):
        if options.only in (None, kind):
            criterion_rows(kind, result[kind], base, settings, options.runs, save)
    if options.only in (None, "final"):
        final_rows(result, base, scores(options.set), options, save)
    show(result)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

"""Which shape near 100 M parameters distils best: the same short distillation for each, judged on the selection set.

    python -m benchmarks.shapes                                   # from the repository's root; about 3 min a shape
    python -m benchmarks.shapes --num-tokens 65536 --only mix_27_layers_MLP_992  # one shape at full length
    python -m benchmarks.shapes --set prune.compensate=false      # another setting for all

Every shape is a run of the recipe smollm2_135m_to_100m by the real pipeline; only the shape and distill.num_tokens
differ. `excess loss` is the distilled student's loss minus the teacher's on the selection set, nats per token: lower is
better. `untrained` is the same figure right after pruning, which ranks shapes otherwise, hence the distillation. QuAC,
the set that the final table quotes, is not looked at: a shape chosen on it would flatter that table.

Layers go in the order in which kl_greedy removes them, scored once for all shapes (about 8 minutes; --removal-order
gives one that is known). Tokens and scores are made once and hard-linked into each run. Finished shapes are kept in the
results file with the fingerprint of all their settings and inputs, and skipped when it is unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    load_rows,
    log_plainly,
    machine,
    pipeline_arguments,
    run_row,
    start_as_the_makefile_does,
    write_result,
)

RECIPE = "smollm2_135m_to_100m"
MAX_PARAMETERS = 100_000_000
LAYERS = 30
SELECTION = 'data.validation=[{path: "embedded:boolq-selection", name: selection}]'
NUM_REMOVED = 10  # as many as the shallowest shape needs

# name -> (layers, sizes). SmolLM2-135M has 30 layers, hidden 576, intermediate 1536, 9 query and 3 key-value heads.
# MLPs are multiples of 32, as llama.cpp's quantised types want (compress/engines.yaml). 432 isn't, since a
# hidden size must divide by the 9 heads too.
SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "depth only: 20 layers": (20, {}),
    "width only: MLP 864": (30, {"intermediate_size": 864}),
    "width only: MLP 1024, 6 heads": (
        30,
        {"intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "width only: hidden 432, MLP 1504": (30, {"hidden_size": 432, "intermediate_size": 1504}),
    "mix: 27 layers, MLP 992": (27, {"intermediate_size": 992}),
    "mix: 25 layers, MLP 1120": (25, {"intermediate_size": 1120}),
    "mix: 23 layers, MLP 1280": (23, {"intermediate_size": 1280}),
}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).replace("__", "_").strip("_")


def overrides(name: str, num_layers: int, sizes: dict[str, int], order: Sequence[int]) -> list[str]:
    """The settings that give a shape; whatever shape the recipe has is taken back first."""
    removed = sorted(order[: LAYERS - num_layers])
    settings: dict[str, Any] = {
        "hidden_size": None,
        "intermediate_size": None,
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "num_hidden_layers": None,
        "max_parameters": None,
        **sizes,
        "removed_layers": removed or None,
    }
    shape = [f"prune.{key}={'null' if value is None else value}" for key, value in settings.items()]
    return [f"name=shape_{slug(name)}", *[setting.replace(" ", "") for setting in shape]]


def common_settings(run_dir: Path, extra: Sequence[str]) -> list[str]:
    return [f"recipe={RECIPE}", SELECTION, f'run_dir="{run_dir}"', "evaluate.generate_tokens=1", *extra]


def removal_order(runs: Path, extra: Sequence[str]) -> list[int]:
    """The layers in the order in which kl_greedy removes them: tokenize and score once, in a run of their own."""
    from safetensors.torch import load_file

    from compress.config import load_config
    from compress.pipeline import run

    run_dir = runs / "greedy"
    settings = [
        *common_settings(run_dir, extra),
        "name=shape_greedy",
        "prune.removed_layers=null",
        f"prune.num_hidden_layers={LAYERS - NUM_REMOVED}",
        "score.depth=[kl_greedy]",
    ]
    for stage in ("tokenize", "score"):
        run(load_config(*settings, f"stage={stage}"))
    found: list[int] = load_file(run_dir / "score" / "importance.safetensors")["depth/kl_greedy/removed"][-1].tolist()
    return found


def measure(name: str, settings: Sequence[str], previous: dict[str, Any] | None, sources: Sequence[Path]) -> Any:
    """One shape's row; `previous` unchanged when its settings and inputs are those of now."""
    from compress.errors import ConfigError

    facts, metrics = run_row(name, settings, previous, sources)
    if metrics is None:
        return facts
    if facts["parameters"] > MAX_PARAMETERS:
        raise ConfigError(f"{name} has {facts['parameters']:,} parameters, more than {MAX_PARAMETERS:,}")
    sets = {model: metrics[model]["sets"]["selection"] for model in ("teacher", "pruned", "distilled")}
    return {
        **facts,
        "settings": [s for s in settings if not s.startswith(("run_dir", "data.validation"))],
        "pruned_excess_loss": sets["pruned"]["loss"] - sets["teacher"]["loss"],
        "excess_loss": metrics["excess_loss"]["selection"],
        "kl_to_teacher": sets["distilled"]["kl_to_teacher"],
        "top1_agreement": sets["distilled"]["top1_agreement"],
    }


def show(rows: dict[str, Any], num_tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"SmolLM2-135M to 100 M: shapes after {num_tokens:,} tokens, selection set"
    result = Table(title=title, title_justify="left")
    for column in ("shape", "parameters", "untrained", "excess loss", "KL to the teacher", "top-1", "distill, s"):
        result.add_column(column, justify="left" if column == "shape" else "right")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["excess_loss"]):
        result.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['pruned_excess_loss']:.3f}",
            f"{row['excess_loss']:.3f}",
            f"{row['kl_to_teacher']:.3f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['distill_seconds']:.0f}",
        )
    Console(width=120).print(result)


def main() -> None:
    parser = pipeline_arguments(__doc__, "shapes")
    parser.add_argument("--num-tokens", type=int, default=16384, help="distill.num_tokens of every shape")
    parser.add_argument("--only", nargs="+", default=[], help="shapes by name, or the run folder's form of it")
    parser.add_argument("--removal-order", type=int, nargs=NUM_REMOVED, help="layers, first removed first")
    options = parser.parse_args()
    start_as_the_makefile_does()
    log_plainly()
    chosen = {n: s for n, s in SHAPES.items() if not options.only or {n, slug(n)} & set(options.only)}
    if not chosen:
        parser.error(f"--only {options.only}: there are {', '.join(map(slug, SHAPES))}")
    order = options.removal_order or removal_order(options.runs, options.set)
    rows = load_rows(options.output)
    sources = [options.runs / "greedy"]
    for name, (num_layers, sizes) in chosen.items():
        shape = overrides(name, num_layers, sizes, order)
        run_dir = options.runs / f"{slug(name)}_{options.num_tokens}"
        extra = [f"distill.num_tokens={options.num_tokens}", *shape, *options.set]
        rows[name] = measure(name, common_settings(run_dir, extra), rows.get(name), sources)
        sources.append(run_dir)
        write_result(options.output, {"machine": machine(), "removal_order": list(order), "rows": rows})
    show({name: row for name, row in rows.items() if row["num_tokens"] == options.num_tokens}, options.num_tokens)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()

"""Stage evaluate: teacher against pruned against distilled, on every validation set, and on the machine's clock."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from compress.artifacts import read_json, remedy_for, write_json
from compress.devices import CPU, device_of, set_attention
from compress.embedded import resolve
from compress.errors import ArtifactError, ConfigError
from compress.folders import read_model
from compress.inputs import KEPT, MEMORY_SHARE, check_device, export_folder, student_of, teacher_of, whole_bytes
from compress.metrics import generation_speed, language_modelling
from compress.models import load_tokenizer
from compress.multiple_choice import read_items
from compress.parallel import Ranks, agreed_dtype, free_bytes, joined
from compress.progress import track
from compress.settings import CompressConfig, set_name
from compress.streaming import load_on
from compress.tokens import TokenBatch, TokenSet

log = logging.getLogger(__name__)
METRICS = "metrics.json"


def folder_name(config: CompressConfig) -> str:
    """`evaluate`, or `evaluate-step-16` beside `export-step-16`."""
    return "evaluate" if config.export.step is None else f"evaluate-step-{config.export.step}"


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write evaluate/metrics.json; its form is in the README and stays.

    Under torchrun every rank calls it and takes its share of the sequences; the first one times, and writes.
    """
    with joined() as ranks:
        _run(config, run_dir, ranks)


def _run(config: CompressConfig, run_dir: Path, ranks: Ranks) -> None:
    trust = config.teacher.trust_remote_code
    teacher = teacher_of(config)
    folders = {
        "teacher": teacher,
        "pruned": student_of(config, run_dir),
        "distilled": run_dir / export_folder(config),
    }
    device = device_of(config.cluster.device)
    dtype = agreed_dtype(config.compute_dtype, ranks, device)
    together = 0
    if device.type != "cpu":
        together = sum(whole_bytes(config, read_model(folder, trust), device) for folder in folders.values())
    if ranks.agree(str(together <= MEMORY_SHARE * free_bytes(device))) != "True":
        log.warning("evaluate: the models together are %.1f GB, too much for a GPU here: on CPUs", together / 1e9)
        device = CPU
    models = {name: load_on(device, folder, dtype, trust) for name, folder in folders.items()}
    usual = {name: one.config._attn_implementation for name, one in models.items()}
    for one in models.values():
        set_attention(one, device, dtype, config, "evaluate")
    metrics: dict[str, Any] = {
        name: {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_bytes": sum(f.stat().st_size for f in folders[name].glob("*.safetensors") if f.name != KEPT),
            "sets": {},
        }
        for name, model in models.items()
    }
    for name, batches in sets_of(config, run_dir).items():
        there = (batch.to(device) for batch in batches)
        for model, figures in language_modelling(models, there, ranks=ranks).items():
            metrics[model]["sets"][name] = figures
    if not ranks.is_main:
        return
    sets = [set_name(source) for source in config.data.validation]
    loss = {model: {s: metrics[model]["sets"][s]["loss"] for s in sets} for model in models}
    metrics["excess_loss"] = {s: loss["distilled"][s] - loss["teacher"][s] for s in sets}
    metrics["gap_closed"] = {
        s: _share(loss["pruned"][s] - loss["distilled"][s], loss["pruned"][s] - loss["teacher"][s]) for s in sets
    }
    prompt = torch.tensor([load_tokenizer(teacher, trust)("The history of the city begins")["input_ids"]])
    compared = {name: models[name] for name in ("teacher", "distilled")}
    for name, one in compared.items():  # one token after the other, as others generate
        one.set_attn_implementation(usual[name])
    speeds = generation_speed(compared, prompt, config.evaluate.generate_tokens)
    for model, speed in speeds.items():
        metrics[model]["tokens_per_second"] = speed
    if config.evaluate.lm_eval:
        from compress.lm_eval import multiple_choice

        for name in models:
            metrics[name]["tasks"] = multiple_choice(config, folders[name], dtype, device)
    write_json(run_dir / folder_name(config) / METRICS, metrics)


def _share(part: float, whole: float) -> float | None:
    """None where there was no gap to close."""
    return part / whole if whole > 0 else None


def sets_of(config: CompressConfig, run_dir: Path) -> dict[str, Iterator[TokenBatch]]:
    """Of each validation set evaluate.max_tokens, spread over it, in micro-batches, with their progress."""
    return {name: _batches(config, run_dir, name) for name in map(set_name, config.data.validation)}


def _batches(config: CompressConfig, run_dir: Path, name: str) -> Iterator[TokenBatch]:
    tokens = TokenSet.open(run_dir / "tokens" / "validation" / name)
    wanted = tokens.num_sequences
    if config.evaluate.max_tokens is not None:
        wanted = min(wanted, max(1, int(config.evaluate.max_tokens) // tokens.sequence_length))
    groups = tokens.spread(wanted, config.evaluate.micro_batch_size)
    batches = (tokens.batch(group) for group in groups)
    return track(batches, f"evaluating on {name}", len(groups), "tok", lambda batch: batch.input_ids.numel())


def preflight(config: CompressConfig) -> None:
    """Raise before any long work for a device that isn't here or can't do with such sequences and, with lm-eval asked
    for, when it isn't installed or its data isn't there."""
    check_device(config, "evaluate")
    if not config.evaluate.lm_eval:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError("evaluate.lm_eval=true needs lm-eval: pip install 'compress[lm-eval]'") from None
    path = Path(resolve(config.evaluate.lm_eval_path, Path(config.cache_dir).expanduser())).expanduser()
    read_items(path, "evaluate.lm_eval_path")


def table(config: CompressConfig, run_dir: Path) -> Table:
    """The results as a person reads them."""
    path = run_dir / folder_name(config) / METRICS
    metrics = read_json(path)
    try:
        return _table(metrics)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} lacks {error}; {remedy_for(path)}") from error


def _table(metrics: dict[str, Any]) -> Table:
    result = Table(title="teacher, pruned, distilled", title_justify="left")
    result.add_column("")
    for name in ("teacher", "pruned", "distilled"):
        result.add_column(name, justify="right")
    models = [metrics[name] for name in ("teacher", "pruned", "distilled")]

    def row(label: str, form: str, values: list[Any], end: bool = False) -> None:
        result.add_row(label, *["-" if v is None else form.format(v) for v in values], end_section=end)

    row("parameters", "{:,}", [m["parameters"] for m in models])
    row("weights, MB", "{:.1f}", [m["weights_bytes"] / 1e6 for m in models])
    row("generation, tokens/s", "{:.1f}", [m.get("tokens_per_second") for m in models], end=True)
    for name in metrics["excess_loss"]:
        sets = [m["sets"][name] for m in models]
        row(f"{name}: loss, nats/token", "{:.4f}", [s["loss"] for s in sets])
        row("  perplexity", "{:.2f}", [s["perplexity"] for s in sets])
        row("  KL to the teacher, nats/token", "{:.4f}", [s["kl_to_teacher"] for s in sets])
        row("  top-1 agreement", "{:.1%}", [s["top1_agreement"] for s in sets])
        row("  excess loss", "{:.4f}", [None, sets[1]["loss"] - sets[0]["loss"], metrics["excess_loss"][name]])
        row("  gap closed", "{:.1%}", [None, None, metrics["gap_closed"][name]], end=True)
    for task in models[0].get("tasks", {}):
        scores = [m["tasks"][task] for m in models]
        row(f"{task}: accuracy (n={scores[0]['num_items']})", "{:.1%}", [s["accuracy"] for s in scores])
        row("  standard error", "{:.1%}", [s["standard_error"] for s in scores])
        row("  length-normalised accuracy", "{:.1%}", [s["accuracy_normalized"] for s in scores], end=True)
    return result

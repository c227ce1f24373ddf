"""Stage correct: train the teacher on the distillation text before it is distilled from, where that helps.

Minitron's teacher correction (arXiv 2408.11796): a teacher whose own training data was different guides a student less
well on this text. The first tokens are a trial, whose gain on the validation sets tells whether the rest is worth its
time; figures of the student are against the original teacher all the same.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress import checkpoint
from compress.artifacts import link, read_json, write_json
from compress.devices import device_of, set_attention
from compress.inputs import teacher_of
from compress.metrics import language_modelling
from compress.models import cast_weights, load_model
from compress.parallel import resolve_dtype
from compress.phases import num_tokens
from compress.rules import correction_config
from compress.settings import CompressConfig
from compress.streaming import load_on
from compress.training import load_trained
from compress.validation import validation_batches

log = logging.getLogger(__name__)
REPORT, TRIAL = "report.json", "trial.json"


def run(
    config: CompressConfig,
    run_dir: Path,
    train: Callable[[CompressConfig, Path], None],
    export: Callable[[CompressConfig, Path], None],
) -> None:
    """Write correct/report.json and, unless the trial gained too little, correct/export, a Hugging Face folder.

    `train` and `export` are what stages distill and export do. Raises as they; after a kill it goes on where it was.
    """
    folder = run_dir / "correct"
    link(folder / "tokens", run_dir / "tokens")
    trial, whole = (correction_config(config, str(teacher_of(config)), phases) for phases in (1, 2))
    checkpoints = folder / "distill" / "checkpoints"
    if (folder / TRIAL).exists() and checkpoint.steps(checkpoints):  # judged before a kill, maybe at an earlier step
        report = read_json(folder / TRIAL)
    else:
        train(trial, folder)
        report = _gains(trial, folder, run_dir)
        write_json(folder / TRIAL, report)
    needed = report["gain"] >= config.correct.min_gain
    log.info(
        "correct: after %s tokens the teacher's validation loss is %+.2f%%: %s", f"{num_tokens(trial):,.0f}",
        -100 * report["gain"],
        "going on" if needed else f"less than correct.min_gain={config.correct.min_gain:g}, so it stays as it is",
    )  # fmt: skip
    if needed:
        train(whole, folder)
        export(whole, folder)
        report = {**_gains(whole, folder, run_dir), "trial": report}
        log.info("correct: the teacher's validation loss is %+.2f%%", -100 * report["gain"])
    write_json(folder / REPORT, {"needed": needed, **report})
    shutil.rmtree(checkpoints)  # as large as the teacher six times over, and nothing goes on
    (folder / TRIAL).unlink()


def _gains(config: CompressConfig, folder: Path, run_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint has gained: losses of each validation set, and the mean share that they fell by."""
    found = checkpoint.newest(folder / "distill" / "checkpoints")
    assert found is not None, "training ends with a checkpoint"
    trust, device = config.teacher.trust_remote_code, device_of(config.cluster.device)
    dtype = resolve_dtype(config.compute_dtype, device)
    model = load_model(teacher_of(config), torch.float32, trust)
    load_trained(found[0], model)
    cast_weights(model, dtype)
    models = {"teacher": load_on(device, teacher_of(config), dtype, trust), "corrected": model.eval().to(device)}
    for one in models.values():
        set_attention(one, device, dtype, config)
    sets = {
        name: language_modelling(models, [batch.to(device) for batch in batches])
        for name, batches in validation_batches(config, run_dir).items()
    }
    losses = {name: {model: figures[model]["loss"] for model in models} for name, figures in sets.items()}
    gains = [1 - loss["corrected"] / loss["teacher"] for loss in losses.values()]
    return {
        "num_tokens": int(found[1]["tokens"]),
        "gain": sum(gains) / len(gains),
        "loss": losses,
        "kl_to_teacher": {name: figures["corrected"]["kl_to_teacher"] for name, figures in sets.items()},
    }

"""Stage export: the trained student as a Hugging Face folder that loads anywhere, checked by loading it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from compress import checkpoint
from compress.artifacts import MANIFEST, building_folder, open_permissions, replace_contents, write_json
from compress.contract import describe_export, log_engines
from compress.errors import ArtifactError, ConfigError
from compress.inputs import export_folder, student_of, teacher_of
from compress.models import cast_weights, load_model
from compress.parallel import resolve_dtype
from compress.phases import Progress, num_steps
from compress.settings import CompressConfig
from compress.slicing import copy_companions
from compress.targets import ADAPTERS
from compress.training import load_trained

log = logging.getLogger(__name__)
REPORT = "report.json"


def preflight(config: CompressConfig, run_dir: Path, training: bool) -> None:
    """Raise ConfigError for a step that isn't kept, and, with `training` still to run, won't be either."""
    step, folder = config.export.step, run_dir / "distill" / "checkpoints"
    kept = checkpoint.steps(folder)
    if step is None or step in kept:
        return
    settings, last = config.distill, num_steps(config)
    planned: list[int] = []
    if training:
        begun = kept[-1] if kept else 0
        planned = sorted({*kept, last, *range(settings.checkpoint_steps, last, settings.checkpoint_steps)})
        planned = [s for s in planned if s in kept or s > begun][-settings.keep_checkpoints :]
    if step not in planned:
        raise ConfigError(
            f"export.step={step} is not kept: "
            + (f"training to step {last} will leave the steps {planned}" if training else f"{folder} has {kept}")
            + f"; choose one of them, or see distill.checkpoint_steps={settings.checkpoint_steps} and "
            f"distill.keep_checkpoints={settings.keep_checkpoints}"
        )


def run(config: CompressConfig, run_dir: Path) -> None:
    """Write the newest committed step (or export.step) as a folder whose reloaded logits equal the trained student's.

    Raises ArtifactError when there is no whole checkpoint, the step isn't kept, or the reloaded folder differs.
    """
    trust = config.teacher.trust_remote_code
    teacher = teacher_of(config)
    pruned = student_of(config, run_dir)
    held = run_dir / f".{export_folder(config)}-held"
    with checkpoint.held(run_dir / "distill" / "checkpoints", held, config.export.step) as found:
        if found is None:
            raise ArtifactError(f"{run_dir / 'distill'} has no committed checkpoint yet; run stage=distill first")
        path, facts = found
        last = num_steps(config, Progress.of(facts).shortened)
        if config.export.step is None and facts["step"] != last:
            raise ArtifactError(
                f"{run_dir / 'distill'}: training ended at step {last}, but the newest whole checkpoint "
                f"is of step {facts['step']}. Delete {run_dir / 'distill' / MANIFEST} and run stage=distill to train "
                f"the rest again, or give export.step={facts['step']}"
            )
        model = load_model(pruned, torch.float32, trust)
        averaged = config.distill.ema_decay is not None
        load_trained(path, model, averaged)
    dtype = resolve_dtype(config.export.dtype)
    cast_weights(model.eval(), dtype)
    model.config.dtype = dtype
    target = run_dir / export_folder(config)
    with building_folder(run_dir / f".{target.name}-new") as folder:
        # The routers of a mixture, which compute in float32, are stored as the rest.
        model.save_pretrained(
            folder, state_dict={name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        )
        copy_companions(teacher, folder, trust)
        if (pruned / ADAPTERS).is_dir():
            shutil.copytree(pruned / ADAPTERS, folder / ADAPTERS)
        open_permissions(folder)
        _check_reloaded(folder, model, trust)
        contract = describe_export(folder, trust)
        weights = (
            f"their moving average, distill.ema_decay={config.distill.ema_decay}" if averaged else "the last step's"
        )
        report = {"step": facts["step"], "num_tokens": facts["tokens"], "weights": weights, "contract": contract}
        write_json(folder / REPORT, report)
    replace_contents(run_dir / f".{target.name}-new", target)
    log_engines(contract)
    log.info("exported step %d (%d tokens) to %s", facts["step"], facts["tokens"], target)


@torch.inference_mode()
def _check_reloaded(folder: Path, model: torch.nn.Module, trust_remote_code: bool) -> None:
    """Every tensor and the logits of a fresh strict load must equal the trained student's, bit for bit."""
    again = load_model(folder, next(model.parameters()).dtype, trust_remote_code).eval()
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    wrong = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs]
    wrong += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    ids = torch.arange(32)[None] % again.config.vocab_size
    same = torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    if wrong or not same:
        raise ArtifactError(
            f"{folder}: the reloaded model differs from the trained one (tensors {sorted(wrong)[:3]}, logits "
            f"{'equal' if same else 'differ'}); please report this"
        )

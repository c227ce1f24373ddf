"""Vocabularies of two models: padding is reconciled from distill to evaluate, a real difference is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.errors import ConfigError
from compress.models import check_vocabulary


def _resized(folder: Path, to: Path, rows: int) -> Path:
    """The model with as many rows in its embedding and head, and the same tokenizer."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "report.json", "manifest.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    model.save_pretrained(to)
    return to


def test_a_padded_student_is_trained_exported_and_judged_as_one_without(
    run: Run, finished_source: Path, tmp_path: Path
) -> None:
    pruned = finished_source / "prune"
    rows = json.loads((pruned / "config.json").read_text())["vocab_size"]
    padded = _resized(pruned, tmp_path / "padded", rows + 32)
    for name, folder in (("plain", pruned), ("more", padded)):
        run(f"run_dir={tmp_path / name}", f"distill.init_from={folder}", "export.dtype=float32")
    losses, judged, exports = [], [], []
    for name in ("plain", "more"):
        folder = tmp_path / name
        losses.append([json.loads(line)["loss"] for line in (folder / "distill" / "metrics.jsonl").open()])
        judged.append(json.loads((folder / "evaluate" / "metrics.json").read_text())["distilled"]["sets"]["validation"])
        exports.append(load_file(folder / "export" / "model.safetensors"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for figure in ("loss", "kl_to_teacher", "top1_agreement"):
        assert judged[1][figure] == pytest.approx(judged[0][figure], rel=1e-2), figure
    embedding = "model.embed_tokens.weight"
    assert len(exports[1][embedding]) == rows + 32
    assert torch.allclose(exports[1][embedding][:rows], exports[0][embedding], atol=1e-4)


def test_a_vocabulary_that_lacks_a_token_is_refused(teacher: Path, tmp_path: Path) -> None:
    student = _resized(teacher, tmp_path / "student", 500)
    with pytest.raises(ConfigError, match=r"vocab_size of student .* is 500, of teacher .* 512, and the tokenizer has"):
        check_vocabulary(teacher, student)
    check_vocabulary(teacher, _resized(teacher, tmp_path / "padded", 520))

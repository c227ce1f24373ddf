"""The recommended criterion is the one whose student, really cut, is nearest to the teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from families import make_batch, make_model, save_model

from compress import score
from compress.architecture import shape_of, with_sizes
from compress.config import load_config
from compress.families import Shape
from compress.importance import estimate_importance
from compress.metrics import language_modelling
from compress.models import load_model
from compress.recommendation import compare_criteria
from compress.scores import Importance, LayerRemovals
from compress.slicing import select, slice_checkpoint
from compress.tokens import TokenSet


def cut_kl(folder: Path, out: Path, importance: Importance, shape: Shape, gone: list[int], width: str | None) -> float:
    slice_checkpoint(folder, out, select(importance, shape, gone, width=width))
    models = {"teacher": load_model(folder, torch.float32).eval(), "student": load_model(out, torch.float32).eval()}
    return language_modelling(models, [make_batch()])["student"]["kl_to_teacher"]


@pytest.mark.parametrize("variant", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("asked", [{"intermediate": 0.5, "layers": 2}, {}])
def test_the_kl_of_a_criterion_is_that_of_the_student_it_would_cut(
    variant: str, asked: dict[str, float], tmp_path: Path
) -> None:
    model = make_model(variant).eval()
    folder, teacher = save_model(tmp_path / "teacher", model), shape_of(model.config)
    importance = estimate_importance(model, [make_batch()], ["activation:l2/mean", "activation:mean/variance"])
    layers = teacher.num_hidden_layers
    removals = {
        "block_influence": importance.depths["block_influence"],
        "mine": LayerRemovals([[0], [0, 1]], [1.0, 2.0]),
    }
    importance = replace(importance, depths={**removals, "short": LayerRemovals([], [])})
    wide = "intermediate_size" if teacher.intermediate_size else "moe_intermediate_size"
    sizes = {wide: getattr(teacher, wide) // 2, "num_hidden_layers": layers - 2} if asked else {}
    found = compare_criteria(model, [make_batch()], importance, teacher, with_sizes(teacher, sizes))
    width = with_sizes(teacher, {wide: found["width"]["sizes"][wide]})
    assert getattr(width, wide) == sizes.get(wide, 48)
    for number, (name, kl) in enumerate(found["width"]["kl"].items()):
        assert kl == pytest.approx(cut_kl(folder, tmp_path / f"w{number}", importance, width, [], name), rel=1e-3)
    left = layers - 2 if asked else int(0.75 * layers)
    assert found["depth"]["num_hidden_layers"] == left
    assert set(found["depth"]["kl"]) == set(removals), "one that doesn't reach so far is left out"
    for number, (name, kl) in enumerate(found["depth"]["kl"].items()):
        gone = importance.depths[name].of(layers - left)
        shape = with_sizes(teacher, {"num_hidden_layers": left})
        assert kl == pytest.approx(cut_kl(folder, tmp_path / f"d{number}", importance, shape, gone, None), rel=1e-3)
    for axis in ("width", "depth"):
        assert found[axis]["best"] == min(found[axis]["kl"], key=found[axis]["kl"].__getitem__)


def test_several_criteria_end_with_a_recommendation(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    criteria = ("score.width=[activation:l2/mean,taylor,weight_magnitude]", "score.depth=[block_influence,kl_greedy]")
    for stage in ("tokenize", "score"):
        run(*criteria, f"stage={stage}")
    report = json.loads((tmp_path / "run" / "score" / "report.json").read_text())
    advice = report["recommendation"]
    assert set(advice["width"]["kl"]) == {"activation:l2/mean", "taylor", "weight_magnitude"}
    assert set(advice["depth"]["kl"]) == {"block_influence", "kl_greedy"}
    shown = capsys.readouterr().err
    assert f"{advice['depth']['kl']['kl_greedy']:.4f}" in shown
    assert "KL to the teacher of the untrained model that each leaves" in shown


def test_criteria_are_judged_on_text_that_they_did_not_choose_by(finished_source: Path) -> None:
    tokens = TokenSet.open(finished_source / "tokens" / "calibration")
    config = load_config("recipe=tiny", "score.depth_sequences=3", "score.micro_batch_size=2")
    seen = {index for group in tokens.spread(3, 2) for index in group}
    judged = [index for group in score._unseen(config, tokens) for index in group]
    assert len(judged) == 3
    assert not seen & set(judged)
    config.score.depth_sequences = tokens.num_sequences
    assert sorted(index for group in score._unseen(config, tokens) for index in group) == list(
        range(tokens.num_sequences)
    ), "there is no other text then"

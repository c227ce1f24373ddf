"""Removed heads are folded into kept ones as the paper's formula says, and the student still is the masked teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VARIANTS, make_model, save_model, student_sizes
from safetensors.torch import load_file

from compress.architecture import shape_of, with_sizes
from compress.config import load_config
from compress.contract import check_student
from compress.errors import ConfigError
from compress.folders import read_model
from compress.merging import merged_weights
from compress.selftest import random_importance
from compress.slicing import select, slice_checkpoint


def formula(score: list[float], kept: int) -> dict[int, int]:
    """i -> 2K - i + 1 over ranks that begin at 1, as heads."""
    ranked = sorted(range(len(score)), key=lambda head: -score[head])
    total = len(score)
    return {ranked[i - 1]: ranked[2 * kept - i] for i in range(max(1, 2 * kept - total + 1), kept + 1)}


@pytest.mark.parametrize("kept_heads", [1, 2, 3, 4, 5])
def test_query_heads_merge_inside_their_group(kept_heads: int, tmp_path: Path) -> None:
    """Two groups of six; K below, at and above half of L."""
    model = make_model("qwen2", num_attention_heads=12, num_key_value_heads=2, dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    importance = random_importance(info.shape)
    kept = select(importance, with_sizes(info.shape, {"num_attention_heads": 2 * kept_heads}))
    merged = merged_weights(info, importance.width(), kept)
    assert set(merged) == {f"model.layers.{i}.self_attn.q_proj.{p}" for i in range(5) for p in ("weight", "bias")}
    before, scores = load_file(tmp_path / "teacher" / "model.safetensors"), importance.width()["query_heads"]
    for name, tensor in merged.items():
        layer = int(name.split(".")[2])
        heads, old = tensor.unflatten(0, (12, 10)), before[name].unflatten(0, (12, 10))
        expected = old.clone()
        for group in (0, 1):
            for head, partner in formula(scores[layer, 6 * group : 6 * group + 6].tolist(), kept_heads).items():
                expected[6 * group + head] = 2 * old[6 * group + head] - old[6 * group + partner]
        torch.testing.assert_close(heads, expected)


def test_heads_with_keys_and_values_of_their_own_merge_whole(tmp_path: Path) -> None:
    model = make_model("llama", num_key_value_heads=6, dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    importance = random_importance(info.shape)
    importance.width()["key_value_heads"].copy_(importance.width()["query_heads"])
    kept = select(importance, with_sizes(info.shape, {"num_attention_heads": 4}))
    merged = merged_weights(info, importance.width(), kept)
    assert {name.split(".")[-2] for name in merged} == {"q_proj", "k_proj", "v_proj"}
    before = load_file(tmp_path / "teacher" / "model.safetensors")
    for name, tensor in merged.items():
        old = before[name].unflatten(0, (6, 10))
        expected = old.clone()
        for head, partner in formula(importance.width()["query_heads"][int(name.split(".")[2])].tolist(), 4).items():
            expected[head] = 2 * old[head] - old[partner]
        torch.testing.assert_close(tensor.unflatten(0, (6, 10)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_with_merged_heads_is_the_masked_teacher_with_them(variant: str, tmp_path: Path) -> None:
    model = make_model(variant, dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    importance = random_importance(info.shape)
    kept = select(importance, with_sizes(shape_of(model.config), student_sizes(variant)))
    merged = merged_weights(info, importance.width(), kept)
    assert merged
    assert not any("norm" in name or "sinks" in name or "o_proj" in name or "dense" in name for name in merged)
    slice_checkpoint(info, tmp_path / "student", kept, replaced=merged)
    check_student(tmp_path / "student", info, kept, merged)


def test_a_head_that_repeats_its_partner_changes_nothing_and_whole_groups_leave_no_trace(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.self_attn.q_proj.weight.unflatten(0, (3, 2, 10))
            rows[:, 1] = rows[:, 0]
    info = read_model(save_model(tmp_path / "teacher", model))
    importance = random_importance(info.shape)
    kept = select(importance, with_sizes(info.shape, {"num_attention_heads": 3}))
    before = load_file(tmp_path / "teacher" / "model.safetensors")
    merged = merged_weights(info, importance.width(), kept)
    assert len(merged) == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.items())
    groups = select(importance, with_sizes(info.shape, {"num_attention_heads": 4, "num_key_value_heads": 2}))
    assert merged_weights(info, importance.width(), groups) == {}


def test_merging_and_compensation_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"prune.merge_heads=true can't be combined with prune.compensate=true"):
        load_config("recipe=tiny", "prune.merge_heads=true", "prune.compensate=true")

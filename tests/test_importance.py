"""Scores against an independent computation in numpy, and what they must not depend on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SIZES, logits, make_batch, make_model, rows
from safetensors.torch import load_file, save_file

from compress.architecture import shape_of
from compress.artifacts import open_tensors
from compress.errors import ArtifactError, NumericalError
from compress.importance import AGGREGATIONS, Importance, estimate_importance, load_importance, save_importance
from compress.tokens import TokenBatch

FIELDS = ("hidden_D", "intermediate_LF", "query_heads_LH", "key_value_heads_LG", "block_influence_L")


def aggregate(values: np.ndarray, kind: str) -> np.ndarray:
    """Over axis 0, as the paper writes them."""
    if kind == "mean":
        return np.abs(values).mean(0)
    return np.sqrt((values**2).sum(0)) if kind == "l2" else values.var(0)


def record(model: Any, batch: TokenBatch) -> dict[str, list[np.ndarray]]:
    """For each named point of the model, one (real tokens, channels) array for each sequence."""
    found: dict[str, list[np.ndarray]] = {}
    handles = []

    def keep(name: str, of_output: bool) -> Any:
        def hook(_module: Any, arguments: Any, output: Any) -> None:
            value = output if of_output else arguments[0]
            for row, valid in zip(value, batch.valid_mask, strict=True):
                found.setdefault(name, []).append(row[valid].double().numpy())

        return hook

    for number, layer in enumerate(model.model.layers):
        for part, module, of_output in (
            ("norm1", layer.input_layernorm, True),
            ("norm2", layer.post_attention_layernorm, True),
            ("mlp", layer.mlp.down_proj, False),
            ("attention", layer.self_attn.o_proj, False),
            ("in", layer.input_layernorm, False),
            ("out", layer, True),
        ):
            handles.append(module.register_forward_hook(keep(f"{part}{number}", of_output)))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


def by_numpy(model: Any, batch: TokenBatch, sequence: str, over_batch: str) -> dict[str, np.ndarray]:
    found = record(model, batch)
    layers, dim = range(SIZES["num_hidden_layers"]), SIZES["head_dim"]

    def score(name: str) -> np.ndarray:
        return aggregate(np.stack([aggregate(values, sequence) for values in found[name]]), over_batch)

    columns = np.stack([score(f"attention{n}") for n in layers])
    cosines = []
    for n in layers:
        before, after = np.concatenate(found[f"in{n}"]), np.concatenate(found[f"out{n}"])
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        cosines.append(((before * after).sum(1) / norms).mean())
    return {
        "hidden_D": sum(score(f"norm{part}{n}") for n in layers for part in (1, 2)),
        "intermediate_LF": np.stack([score(f"mlp{n}") for n in layers]),
        "query_heads_LH": np.sqrt((columns.reshape(len(layers), -1, dim) ** 2).sum(-1)),
        "key_value_heads_LG": np.sqrt((columns.reshape(len(layers), SIZES["num_key_value_heads"], -1) ** 2).sum(-1)),
        "block_influence_L": 1 - np.array(cosines),
    }


def assert_close(one: Importance, other: Importance) -> None:
    for field in FIELDS:
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sequence", "over_batch"), product(AGGREGATIONS, AGGREGATIONS))
@pytest.mark.parametrize("padded", [False, True])
def test_scores_equal_an_independent_computation(sequence: str, over_batch: str, padded: bool) -> None:
    model, batch = make_model("qwen3-biases"), make_batch(5, 12, padded=padded)
    estimate = estimate_importance(
        model, [rows(batch, 0, 3), rows(batch, 3, 5)], sequence_aggregation=sequence, batch_aggregation=over_batch
    )
    for field, expected in by_numpy(model, batch, sequence, over_batch).items():
        measured = getattr(estimate, field)
        assert measured.dtype == torch.float32
        assert measured.shape == expected.shape
        np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=field)
    assert (estimate.num_sequences, estimate.num_tokens) == (5, int(batch.valid_mask.sum()))


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scores_do_not_depend_on_the_micro_batch(variant: str, aggregation: str) -> None:
    model, batch = make_model(variant), make_batch(6, 12, padded=True)
    both = {"sequence_aggregation": aggregation, "batch_aggregation": aggregation}
    whole = estimate_importance(model, [batch], **both)
    for size in (1, 4):
        parts = [rows(batch, start, min(start + size, 6)) for start in range(0, 6, size)]
        assert_close(estimate_importance(model, parts, **both), whole)


def test_scores_do_not_depend_on_padding() -> None:
    model, batch = make_model(), make_batch(4, 12)
    expected = estimate_importance(model, [batch])
    pad = torch.full((4, 5), 7)
    at = torch.arange(5).expand(4, -1)
    no = torch.zeros((4, 5), dtype=torch.bool)
    extra = TokenBatch(pad, at, no, no)
    longer = TokenBatch(*(torch.cat(pair, 1) for pair in zip(vars(batch).values(), vars(extra).values(), strict=True)))
    empty = TokenBatch(longer.input_ids[:1], longer.position_ids[:1], *(torch.zeros_like(longer.valid_mask[:1]),) * 2)
    with_empty = TokenBatch(
        *(torch.cat(pair) for pair in zip(vars(longer).values(), vars(empty).values(), strict=True))
    )
    assert_close(estimate_importance(model, [with_empty, empty]), expected)
    with pytest.raises(NumericalError, match="no real token"):
        estimate_importance(model, [empty])


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    estimate_importance(model, [make_batch()])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_weighted_scores_are_of_what_a_column_adds() -> None:
    """Scaling a column of the reader by c scales its weighted score by c, and leaves the plain one alone."""
    batch, scale = make_batch(), 3.0
    plain, weighted = (estimate_importance(make_model(), [batch], weighted=w) for w in (False, True))
    model = make_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[:, 7] *= scale
    plain_scaled, weighted_scaled = (estimate_importance(model, [batch], weighted=w) for w in (False, True))
    torch.testing.assert_close(plain_scaled.intermediate_LF, plain.intermediate_LF)
    ratio_LF = weighted_scaled.intermediate_LF / weighted.intermediate_LF
    assert ratio_LF[4, 7] == pytest.approx(scale)
    ratio_LF[4, 7] = 1
    assert ratio_LF[:4].allclose(torch.ones(4, 72)), "the last layer's MLP changes nothing before it"
    norm_F = torch.linalg.vector_norm(make_model().model.layers[1].mlp.down_proj.weight, dim=0)
    torch.testing.assert_close(weighted.intermediate_LF[1], plain.intermediate_LF[1] * norm_F.float())
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight[:, 20:30] *= scale  # head 2 of 10 columns
    heads_H = estimate_importance(model, [batch], weighted=True).query_heads_LH[4]
    expected_H = weighted.query_heads_LH[4] * torch.tensor([1, 1, scale, 1, 1, 1])
    torch.testing.assert_close(heads_H, expected_H)
    torch.testing.assert_close(weighted.hidden_D, plain.hidden_D)


def test_scores_that_are_not_finite_name_the_module() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(NumericalError, match=r"model.layers.2.mlp.down_proj: 1 of 72"):
        estimate_importance(model, [make_batch()])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Importance]:
    importance = estimate_importance(make_model(), [make_batch()])
    importance = replace(importance, removal_order=torch.tensor([3, 1]), removal_kl=torch.tensor([0.5, 1.0]))
    save_importance(tmp_path / "importance.safetensors", importance, "abc")
    return tmp_path / "importance.safetensors", importance


def test_scores_survive_the_file(saved: tuple[Path, Importance]) -> None:
    path, importance = saved
    loaded = load_importance(path, shape_of(make_model().config), "abc")
    for name, value in vars(importance).items():
        same = torch.equal(value, getattr(loaded, name)) if torch.is_tensor(value) else value == getattr(loaded, name)
        assert same, name


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    with open_tensors(path) as reader:
        header = reader.metadata()
    change(tensors)
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(hidden=t["hidden"][:-1].clone()), r"hidden has size \(47,\), the teacher's is \(48,\)"),
        (
            lambda t: t["intermediate"].__setitem__((0, 0), float("nan")),
            "intermediate holds values that are not finite",
        ),
        (lambda t: t.pop("query_heads"), "holds .*, expected"),
        (lambda t: t.pop("layers.removal_kl"), "holds .*, expected"),
        (lambda t: t["layers.removal_order"].__setitem__(0, 1), "no order of distinct layers"),
    ],
)
def test_a_spoilt_file_of_scores_is_refused(saved: tuple[Path, Importance], change: Any, message: str) -> None:
    rewrite(saved[0], change)
    with pytest.raises(ArtifactError, match=message):
        load_importance(saved[0], shape_of(make_model().config), "abc")


def test_scores_of_another_teacher_or_no_scores_are_refused(saved: tuple[Path, Importance], tmp_path: Path) -> None:
    shape = shape_of(make_model().config)
    with pytest.raises(ArtifactError, match="scored on another teacher"):
        load_importance(saved[0], shape, "abd")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="not a file of scores"):
        load_importance(tmp_path / "other.safetensors", shape, "abc")
    with pytest.raises(ArtifactError, match="is missing"):
        load_importance(tmp_path / "none.safetensors", shape, "abc")

"""Compensation is the least-squares optimum, and leaves alone what needs none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import logits, make_batch, make_model, rows, save_model

from compress.architecture import shape_of, taps, with_sizes
from compress.compensation import DAMPING, compensated_weights, moment_bytes, reconstruct, stream_compensated_weights
from compress.contract import check_student
from compress.errors import NumericalError
from compress.folders import read_model
from compress.importance import estimate_importance, experts_of, run_expert
from compress.models import load_model
from compress.slicing import select, slice_checkpoint
from compress.step import trunk


def _inputs(columns: int, rank: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(400, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)


def test_the_kept_columns_are_the_least_squares_optimum() -> None:
    inputs_NX, weight_OX = _inputs(12, 12), torch.randn(5, 12, dtype=torch.float64)
    kept_K = torch.tensor([0, 2, 3, 7, 10])
    result_OX = reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=0.0)
    best_KO = torch.linalg.lstsq(inputs_NX[:, kept_K], inputs_NX @ weight_OX.T).solution
    torch.testing.assert_close(result_OX[:, kept_K], best_KO.T, rtol=1e-9, atol=1e-9)
    removed_X = torch.ones(12, dtype=torch.bool).index_fill(0, kept_K, False)
    assert torch.equal(result_OX[:, removed_X], weight_OX[:, removed_X])


def test_columns_that_repeat_others_are_replaced_without_loss() -> None:
    inputs_NX = _inputs(12, 4)  # any 4 columns in general position span the others
    weight_OX = torch.randn(5, 12, dtype=torch.float64)
    kept_K = torch.arange(6)
    result_OX = reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=1e-12)
    torch.testing.assert_close(
        inputs_NX[:, kept_K] @ result_OX[:, kept_K].T, inputs_NX @ weight_OX.T, rtol=1e-4, atol=1e-4
    )


def test_uncorrelated_columns_and_heavy_damping_leave_the_weight_as_it_is() -> None:
    weight_OX = torch.randn(5, 8, dtype=torch.float64)
    kept_K = torch.tensor([1, 4, 6])
    torch.testing.assert_close(reconstruct(weight_OX, torch.eye(8), kept_K), weight_OX)
    inputs_NX = _inputs(8, 8)
    torch.testing.assert_close(
        reconstruct(weight_OX, inputs_NX.T @ inputs_NX, kept_K, damping=1e9), weight_OX, rtol=1e-6, atol=1e-6
    )


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        reconstruct(torch.ones(2, 3), torch.full((3, 3), float("nan")), torch.tensor([0]))


SIZES = {"intermediate_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4}


def _inputs_of(model: Any, name: str, batch: Any) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, arguments, _o: seen.append(arguments[0]))
    with torch.no_grad():
        trunk(model, batch)
    handle.remove()
    return seen[0][batch.valid_mask].double()


def _keep_layers(model: Any, numbers: list[int]) -> None:
    """Each with the attention that it has by its own number, which transformers looks up by place."""
    model.model.layers = torch.nn.ModuleList([model.model.layers[number] for number in numbers])
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in numbers]


DENSE = [
    "llama",
    "llama-biases",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
]  # OLMo 2: test_masking


@pytest.mark.parametrize("variant", DENSE)
def test_the_student_is_the_masked_teacher_with_the_folded_weights(variant: str, tmp_path: Path) -> None:
    """Sliced equals masked, and each folded matrix is the least-squares answer to what the kept layers see."""
    model = make_model(variant, dtype=torch.float32)
    batch = make_batch(16, padded=True)
    importance = estimate_importance(model, [batch])
    kept = select(importance, with_sizes(shape_of(model.config), SIZES), [1])  # the layers behind it move by one
    folded = compensated_weights(model, [rows(batch, 0, 5), rows(batch, 5, 16)], kept)
    assert len(model.model.layers) == 5, "the removed layer is back"
    layers = kept["layers"].tolist()
    assert set(folded) == {
        f"model.layers.{i}.{m}.weight" for i in layers for m in ("mlp.down_proj", "self_attn.o_proj")
    }
    slice_checkpoint(save_model(tmp_path / "teacher", model), tmp_path / "student", kept, replaced=folded)
    student = load_model(tmp_path / "student", torch.float32)

    _keep_layers(model, layers)
    head_dim = model.config.head_dim
    with torch.no_grad():
        for position, layer in enumerate(layers):
            heads = kept["query_heads"][position]
            columns = {
                "mlp.down_proj": kept["intermediate"][position],
                "self_attn.o_proj": (heads[:, None] * head_dim + torch.arange(head_dim)).flatten(),
            }
            for module, kept_K in columns.items():
                inputs_NX = _inputs_of(model, f"model.layers.{position}.{module}", batch)
                moment_XX = inputs_NX.T @ inputs_NX
                weight_OX = model.model.layers[position].get_parameter(f"{module}.weight").double()
                # The ridge as further rows of an ordinary least-squares problem.
                ridge = math.sqrt(DAMPING * moment_XX.diagonal().mean().item()) * torch.eye(len(kept_K)).double()
                left = torch.cat([inputs_NX[:, kept_K], ridge])
                right = torch.cat([inputs_NX @ weight_OX.T, ridge @ weight_OX[:, kept_K].T])
                best_KO = torch.linalg.lstsq(left, right).solution
                found = folded[f"model.layers.{layer}.{module}.weight"][:, kept_K].double()
                torch.testing.assert_close(found, best_KO.T, rtol=1e-3, atol=1e-3)
        for position, layer in enumerate(layers):
            mlp, attention = model.model.layers[position].mlp, model.model.layers[position].self_attn
            mlp.down_proj.weight.copy_(folded[f"model.layers.{layer}.mlp.down_proj.weight"])
            attention.o_proj.weight.copy_(folded[f"model.layers.{layer}.self_attn.o_proj.weight"])
            removed = torch.ones(72, dtype=torch.bool).index_fill(0, kept["intermediate"][position], False)
            mlp.down_proj.weight[:, removed] = 0
            for head in set(range(6)) - set(kept["query_heads"][position].tolist()):
                attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
    torch.testing.assert_close(logits(student, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_what_it_will_hold_is_known_before() -> None:
    model = make_model("mixtral")
    shape = shape_of(model.config)
    importance = estimate_importance(model, [make_batch()])
    sizes = {"num_hidden_layers": 4, "moe_intermediate_size": 16}
    kept = select(importance, with_sizes(shape, sizes))
    assert moment_bytes(shape, kept) == 4 * 4 * shape.num_experts * shape.moe_intermediate_size**2
    kept = select(importance, with_sizes(shape, {"num_attention_heads": 4, "num_key_value_heads": 2}))
    heads = shape.num_attention_heads * shape.head_dim
    assert moment_bytes(shape, kept) == 4 * shape.num_hidden_layers * heads**2


def test_nothing_is_folded_where_nothing_that_is_read_is_pruned() -> None:
    model = make_model()
    kept = select(estimate_importance(model, [make_batch()]), with_sizes(shape_of(model.config), {"hidden_size": 24}))
    assert compensated_weights(model, [make_batch()], kept) == {}


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_each_experts_matrix_is_the_least_squares_answer_for_the_tokens_routed_to_it(
    variant: str, tmp_path: Path
) -> None:
    """By the router's weights; the contract compares the cut student with the masked teacher that has them."""
    model = make_model(variant, dtype=torch.float32)
    folder = tmp_path / "teacher"
    info = read_model(save_model(folder, model))
    batch = make_batch(16, padded=True)
    sizes = {"num_experts": 3, "moe_intermediate_size": 16, "num_attention_heads": 4, "num_hidden_layers": 4}
    importance = estimate_importance(model, [batch])
    kept = select(importance, with_sizes(shape_of(model.config), {**sizes, "num_key_value_heads": 2}))
    batches = [rows(batch, 0, 5), rows(batch, 5, 16)]
    folded = compensated_weights(model, batches, kept)
    streamed = stream_compensated_weights(info, torch.float32, batches, kept, tmp_path / "spill")
    assert set(streamed) == set(folded)
    for name, weight in folded.items():
        torch.testing.assert_close(streamed[name], weight, rtol=1e-3, atol=1e-4)  # a solve amplifies the last bits
    student = tmp_path / "student"
    slice_checkpoint(info, student, kept, replaced=folded)
    assert check_student(student, info, kept, folded)["logits_difference"] < 1e-4

    # The first layer's inputs are the teacher's own, so its experts can be checked by hand.
    first = kept["layers"][0].item()
    _keep_layers(model, kept["layers"].tolist())
    experts = experts_of(model.model.layers[0])
    seen: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments))
    with torch.no_grad():
        trunk(model, batch)
    handle.remove()
    hidden_ND, index_NK, weight_NK = seen[0]
    pattern = taps(info.family).expert_intermediate
    assert pattern is not None
    for expert, units_K in zip(kept["experts"][0].tolist(), kept["expert_intermediate"][0], strict=True):
        token_M, place_M = ((index_NK == expert) & batch.valid_mask.flatten()[:, None]).nonzero(as_tuple=True)
        with torch.no_grad():
            inner_MX = run_expert(experts, expert, hidden_ND[token_M])[0] * weight_NK[token_M, place_M, None]
        inner_MX, down_XX = inner_MX.double(), experts.down_proj[expert].detach().double()
        weight_OX = down_XX.T if experts.is_transposed else down_XX
        best_OX = reconstruct(weight_OX, inner_MX.T @ inner_MX, units_K)
        name = pattern.replace("*", str(first), 1)
        found = folded[name.replace("*", str(expert))] if "*" in name else folded[name][expert]
        found_OX = found.T if experts.is_transposed else found
        torch.testing.assert_close(found_OX.double(), best_OX, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found_OX[:, units_K].double(), weight_OX[:, units_K], rtol=1e-2, atol=1e-2)

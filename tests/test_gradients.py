"""Taylor scores against finite differences, weight magnitudes against what slicing takes away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, axes_of, logits, make_batch, make_model, rows, save_model
from safetensors.torch import load_file
from test_slicing import keep

from compress.architecture import shape_of, taps
from compress.errors import NumericalError
from compress.families import AXES, family_of
from compress.folders import read_model
from compress.gradients import estimate_taylor, weight_magnitude
from compress.importance import run_expert
from compress.slicing import slice_checkpoint
from compress.tokens import TokenBatch


def loss_of(model: Any, batch: TokenBatch) -> float:
    """Mean next-token cross-entropy of one sequence."""
    labels = torch.roll(batch.input_ids, -1, 1)[batch.loss_mask]
    return torch.nn.functional.cross_entropy(logits(model, batch)[batch.loss_mask], labels).item()


def scaled(module: Any, columns: slice, factor: float, of_output: bool) -> Any:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[..., columns] *= factor
        return value

    if of_output:
        return module.register_forward_hook(lambda _m, _a, output: change(output))
    return module.register_forward_pre_hook(lambda _m, arguments: (change(arguments[0]),))


def by_difference(model: Any, batch: TokenBatch, attach: Callable[[float], list[Any]]) -> float:
    """|d loss / d factor| at 1 of a factor on a unit's activation."""
    found = []
    for factor in (1.001, 0.999):
        handles = attach(factor)
        found.append(loss_of(model, batch))
        for handle in handles:
            handle.remove()
    return abs(found[0] - found[1]) / 0.002


DENSE = ["llama", "qwen2-window", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox"]


@pytest.mark.parametrize("variant", DENSE)
def test_taylor_scores_are_what_the_loss_would_change_by(variant: str) -> None:
    model, batch = make_model(variant), make_batch(1, 12)
    scores, shape = estimate_taylor(model, [batch]), shape_of(model.config)
    where, layers = taps(family_of(model.config.to_dict(), "")), model.base_model.layers
    inner = {name: pattern.partition(".layers.*.")[2] for name, pattern in
             (("intermediate", where.intermediate), ("heads", where.query_heads))}  # fmt: skip
    dim, group = shape.head_dim, shape.group_size * shape.head_dim
    for layer in (0, 3):
        down, out = (layers[layer].get_submodule(inner[name]) for name in ("intermediate", "heads"))
        cases = [
            ("intermediate", 7, down, slice(7, 8)),
            ("query_heads", 4, out, slice(4 * dim, 5 * dim)),
            ("key_value_heads", 1, out, slice(group, 2 * group)),
        ]
        for axis, unit, module, columns in cases:
            expected = by_difference(model, batch, lambda f, m=module, c=columns: [scaled(m, c, f, False)])
            assert scores[axis][layer, unit].item() == pytest.approx(expected, rel=0.02, abs=2e-4), (axis, layer)
    norms = [m.get_submodule(p.partition(".layers.*.")[2]) for m in layers for p in where.hidden]
    expected = by_difference(model, batch, lambda f: [scaled(norm, slice(5, 6), f, True) for norm in norms])
    assert scores["hidden"][5].item() == pytest.approx(expected, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_taylor_scores_of_experts_are_what_the_loss_would_change_by(variant: str) -> None:
    model, batch = make_model(variant), make_batch(1, 12)
    scores, experts = estimate_taylor(model, [batch]), model.model.layers[2].mlp.experts

    def attach(expert: int, unit: int | None, factor: float) -> list[Any]:
        def forward(hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            result = torch.zeros_like(hidden)
            for number in range(experts.num_experts):
                token, place = (index == number).nonzero(as_tuple=True)
                if number == expert and unit is not None:  # scale what the unit adds
                    whole = run_expert(experts, number, hidden[token])[1]
                    others = torch.tensor([u for u in range(scores["expert_intermediate"].shape[2]) if u != unit])
                    rest = run_expert(experts, number, hidden[token], others)[1]
                    out = rest + factor * (whole - rest)
                else:
                    out = run_expert(experts, number, hidden[token])[1] * (factor if number == expert else 1)
                result.index_add_(0, token, out * weight[token, place, None])
            return result

        experts.forward = forward

        class Handle:
            def remove(self) -> None:
                del experts.forward

        return [Handle()]

    expert = int(scores["experts"][2].argmax())
    expected = by_difference(model, batch, lambda f: attach(expert, None, f))
    assert scores["experts"][2, expert].item() == pytest.approx(expected, rel=0.02, abs=2e-4)
    unit = int(scores["expert_intermediate"][2, expert].argmax())
    expected = by_difference(model, batch, lambda f: attach(expert, unit, f))
    assert scores["expert_intermediate"][2, expert, unit].item() == pytest.approx(expected, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen3_moe"])
def test_taylor_scores_do_not_depend_on_the_micro_batch_and_leave_the_model_alone(variant: str) -> None:
    model, batch = make_model(variant), make_batch(6, 12, padded=True)
    before = logits(model, batch)
    whole = estimate_taylor(model, [batch])
    parts = estimate_taylor(model, [rows(batch, 0, 1), rows(batch, 1, 4), rows(batch, 4, 6)])
    for axis, scores in whole.items():
        torch.testing.assert_close(parts[axis], scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits(model, batch), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_taylor_refuses_what_has_nothing_to_learn_from_or_is_not_finite() -> None:
    model, batch = make_model(), make_batch()
    batch.loss_mask[:] = False
    with pytest.raises(NumericalError, match="no loss token"):
        estimate_taylor(model, [batch])
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(NumericalError, match=r"taylor: scores of .* are not finite"):
        estimate_taylor(model, [make_batch()])


def energy(folder: Path) -> float:
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    return sum(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_magnitude_is_what_slicing_takes_away(variant: str, tmp_path: Path) -> None:
    """The squares of the removed units' scores are the squares of the weights that are gone."""
    model = make_model(variant)
    folder = save_model(tmp_path / "teacher", model)
    scores, shape = weight_magnitude(read_model(folder)), shape_of(model.config)
    assert set(scores) == {axis for axis, size in AXES.items() if getattr(shape, size)}
    for axis in ("hidden", "intermediate", "query_heads", "experts", "expert_intermediate"):
        if axis not in axes_of(variant):
            continue
        kept = keep(model, axes_of(variant)[axis])
        slice_checkpoint(folder, tmp_path / axis, kept)
        squares = scores[axis].double().square()
        if axis == "expert_intermediate":
            stays = sum(squares[i, j, u].sum() for i in range(5) for j, u in enumerate(kept[axis][i]))
        elif axis == "hidden":
            stays = squares[kept[axis]].sum()
        else:
            stays = squares.gather(1, kept[axis]).sum()
        gone = float(squares.sum() - stays)
        assert gone > 1, axis
        assert energy(folder) - energy(tmp_path / axis) == pytest.approx(gone, rel=1e-4), axis

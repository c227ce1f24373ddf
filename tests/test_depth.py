"""Greedy removal with cached prefixes is greedy removal."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make_batch, make_model, rows
from torch import nn

from compress.depth import greedy_layer_removal, removal_reach
from compress.errors import ConfigError, NumericalError


def brute_force(model: nn.Module, batch: object, num_remove: int) -> tuple[list[int], list[float]]:
    """Every candidate as a model of its own, run from the embedding, with full logits."""

    def log_probabilities(kept: list[int]) -> torch.Tensor:
        cut = copy.deepcopy(model)
        cut.model.layers = nn.ModuleList(cut.model.layers[j] for j in kept)
        cut.config.num_hidden_layers = len(kept)
        if getattr(cut.config, "layer_types", None):
            cut.config.layer_types = [cut.config.layer_types[j] for j in kept]
        output = cut(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
        return output.logits[batch.loss_mask].log_softmax(-1)

    kept = list(range(len(model.model.layers)))
    teacher = log_probabilities(kept)
    order, curve = [], []
    for _ in range(num_remove):
        kl = {}
        for layer in kept:
            student = log_probabilities([j for j in kept if j != layer])
            kl[layer] = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
        best = min(kl, key=lambda j: kl[j])
        order.append(best)
        curve.append(kl[best])
        kept.remove(best)
    return order, curve


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_greedy_removal_equals_brute_force(variant: str, seed: int) -> None:
    model, batch = make_model(variant, seed=seed), make_batch(5, 16, seed=seed, padded=True)
    order, curve = brute_force(model, batch, 4)
    removal = greedy_layer_removal(model, [rows(batch, 0, 2), rows(batch, 2, 5)], 4)
    assert removal.order == order
    assert removal.kl == pytest.approx(curve, rel=1e-5)
    assert removal.num_trials == 5 + 4 + 3 + 2


def lazy_layers() -> nn.Module:
    """A deep model whose layers differ much in weight, as a trained one's do."""
    model = make_model(num_hidden_layers=8)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            scale = [0.9, 0.5, 0.05, 0.1, 0.02, 0.2, 0.07, 0.8][number]
            layer.mlp.down_proj.weight *= scale
            layer.self_attn.o_proj.weight *= scale
    return model


def test_skipping_dear_layers_removes_the_same_ones_with_fewer_trials() -> None:
    model, batch = lazy_layers(), make_batch(4, 16)
    seen: list[int] = []

    def progress(trials: object, total: int) -> object:
        assert total == 8 + 7 + 6 + 5
        for trial in trials:
            seen.append(trial)
            yield trial

    every = greedy_layer_removal(model, [batch], 4)
    lazy = greedy_layer_removal(model, [batch], 4, skip_share=0.5, progress=progress)
    assert lazy.order == every.order
    assert lazy.kl == every.kl
    assert every.num_trials == 26
    assert lazy.num_trials < 20
    assert len(seen) == 26, "progress reaches its total, skipped candidates counted"


def test_loss_tokens_are_bounded_and_spread_over_all_batches() -> None:
    from compress.depth import _spread

    batch = make_batch(6, 16, padded=True)
    parts = [rows(batch, 0, 1), rows(batch, 1, 6)]
    total = int(batch.loss_mask.sum())
    places = _spread(parts, 10**6)
    assert [len(p) for p in places] == [int(part.loss_mask.sum()) for part in parts]
    few = _spread(parts, 10)
    assert sum(len(p) for p in few) == 10
    assert all(bool(part.loss_mask.flatten()[place].all()) for part, place in zip(parts, few, strict=True))
    whole = _spread([batch], 10)[0]
    ranks = [int(batch.loss_mask.flatten()[:place].sum()) for place in whole.tolist()]
    assert ranks == [i * total // 10 for i in range(10)]
    assert torch.equal(torch.cat([few[0], few[1] + 16]), whole)


def test_what_cannot_be_measured_is_refused() -> None:
    model, batch = make_model(), make_batch()
    with pytest.raises(ConfigError, match="num_remove=5"):
        greedy_layer_removal(model, [batch], 5)
    batch.loss_mask[:] = False
    with pytest.raises(NumericalError, match="no loss token"):
        greedy_layer_removal(model, [batch], 1)
    broken, batch = make_model(), make_batch()
    with torch.no_grad():
        broken.model.layers[4].mlp.up_proj.weight[:] = float("nan")
    with pytest.raises(NumericalError, match=r"KL without model.layers.0 is nan"):
        greedy_layer_removal(broken, [batch], 1)
    assert not any(m._forward_pre_hooks for m in broken.modules())


def test_how_far_scoring_goes() -> None:
    assert removal_reach(30, 20, None) == 10
    assert removal_reach(30, 20, 4) == 10
    assert removal_reach(30, 20, 12) == 12
    assert removal_reach(30, None, 12) == 12
    assert removal_reach(30, None, None) == 15
    with pytest.raises(ConfigError, match=r"score.max_removed_layers=30 must be within 0 and 29"):
        removal_reach(30, None, 30)

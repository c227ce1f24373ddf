"""Greedy removal with cached prefixes is greedy removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from families import logits, make_batch, make_model, rows
from torch import nn
from transformers import PreTrainedModel

from compress.depth import rank_layers, removal_reach, spread_loss_tokens
from compress.errors import ConfigError, NumericalError
from compress.tokens import TokenBatch


def divergence(model: PreTrainedModel, batch: TokenBatch) -> Callable[[list[int]], float]:
    """KL(teacher || model of these layers only), nats per token: a model of its own, run whole, with full logits."""

    def log_probabilities(kept: list[int]) -> torch.Tensor:
        cut = copy.deepcopy(model)
        cut.base_model.layers = nn.ModuleList(cut.base_model.layers[j] for j in kept)
        cut.config.num_hidden_layers = len(kept)
        if getattr(cut.config, "layer_types", None):
            cut.config.layer_types = [cut.config.layer_types[j] for j in kept]
        return logits(cut, batch)[batch.loss_mask].log_softmax(-1)

    teacher = log_probabilities(list(range(len(model.model.layers))))

    def kl_of(kept: list[int]) -> float:
        return float((teacher.exp() * (teacher - log_probabilities(kept))).sum(-1).mean())

    return kl_of


def brute_force(model: PreTrainedModel, batch: TokenBatch, num_remove: int) -> tuple[list[int], list[float]]:
    kl_of, kept = divergence(model, batch), list(range(len(model.model.layers)))
    order, curve = [], []
    for _ in range(num_remove):
        kl = {layer: kl_of([j for j in kept if j != layer]) for layer in kept}
        best = min(kl, key=lambda j: kl[j])
        order.append(best)
        curve.append(kl[best])
        kept.remove(best)
    return order, curve


# How much each layer writes: unequal, as a trained model's, so that layers go in no simple order.
SCALES = [0.9, 0.5, 0.05, 0.1, 0.02, 0.2, 0.07, 0.8]


def uneven_model(variant: str, seed: int, scales: Sequence[float] = SCALES) -> PreTrainedModel:
    model = make_model(variant, seed=seed, num_hidden_layers=len(scales))
    with torch.no_grad():
        for scale, layer in zip(scales, model.model.layers, strict=True):
            layer.mlp.down_proj.weight *= scale
            layer.self_attn.o_proj.weight *= scale
    return model


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_greedy_removal_equals_brute_force(variant: str, seed: int) -> None:
    model, batch = uneven_model(variant, seed), make_batch(5, seed=seed, padded=True)
    order, curve = brute_force(model, batch, 5)
    assert order not in (sorted(order), sorted(order, reverse=True)), "layers before and after earlier ones must go"
    removal = rank_layers(model, [rows(batch, 0, 2), rows(batch, 2, 5)], 5)
    assert removal.removed == [order[: n + 1] for n in range(5)]
    assert removal.cost == pytest.approx(curve, rel=1e-5)
    assert removal.num_trials == 8 + 7 + 6 + 5 + 4


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@torch.no_grad()
def test_skipping_dear_layers_follows_its_rule_and_saves_trials(share: float) -> None:
    model, batch = uneven_model("llama", 0, [0.3, 0.2, 0.12, 0.15, 0.1, 0.18, 0.14, 0.25]), make_batch(4)
    kl_of = divergence(model, batch)
    kept, rise, reached, trials, order = list(range(8)), {}, 0.0, 0, []
    for _ in range(4):
        best, chosen = math.inf, -1
        for layer in sorted(kept, key=lambda j: rise.get(j, 0.0)):
            if layer in rise and reached + share * rise[layer] >= best:
                continue
            kl, trials = kl_of([j for j in kept if j != layer]), trials + 1
            rise[layer] = kl - reached
            best, chosen = min((best, chosen), (kl, layer))
        kept.remove(chosen)
        order, reached = [*order, chosen], best
    seen: list[int] = []

    def progress(candidates: Iterator[int], total: int) -> Iterator[int]:
        assert total == 8 + 7 + 6 + 5
        for candidate in candidates:
            seen.append(candidate)
            yield candidate

    every = rank_layers(model, [batch], 4)
    lazy = rank_layers(model, [batch], 4, skip_share=share, progress=progress)
    assert lazy.removed[-1] == order
    assert lazy.num_trials == trials < every.num_trials == 26
    assert lazy.cost[-1] < every.cost[-1] * 1.1, "what is skipped would hardly have been chosen"
    assert len(seen) == 26, "progress reaches its total, skipped candidates counted"


def test_loss_tokens_are_bounded_and_spread_over_all_batches() -> None:
    batch = make_batch(6, 16, padded=True)
    parts = [rows(batch, 0, 1), rows(batch, 1, 6)]
    total = int(batch.loss_mask.sum())
    places = spread_loss_tokens(parts, 10**6)
    assert [len(p) for p in places] == [int(part.loss_mask.sum()) for part in parts]
    few = spread_loss_tokens(parts, 10)
    assert sum(len(p) for p in few) == 10
    assert all(bool(part.loss_mask.flatten()[place].all()) for part, place in zip(parts, few, strict=True))
    whole = spread_loss_tokens([batch], 10)[0]
    ranks = [int(batch.loss_mask.flatten()[:place].sum()) for place in whole.tolist()]
    assert ranks == [i * total // 10 for i in range(10)]
    assert torch.equal(torch.cat([few[0], few[1] + 16]), whole)


def test_what_cannot_be_measured_is_refused() -> None:
    model, batch = make_model(), make_batch()
    with pytest.raises(ConfigError, match="num_remove=5"):
        rank_layers(model, [batch], 5)
    batch.loss_mask[:] = False
    with pytest.raises(NumericalError, match="no loss token"):
        rank_layers(model, [batch], 1)
    broken, batch = make_model(), make_batch()
    with torch.no_grad():
        broken.model.layers[4].mlp.up_proj.weight[:] = float("nan")
    with pytest.raises(NumericalError, match=r"the damage without layer 0 is nan"):
        rank_layers(broken, [batch], 1)
    assert not any(m._forward_pre_hooks for m in broken.modules())


def test_how_far_scoring_goes() -> None:
    assert removal_reach(30, 20, None) == 10
    assert removal_reach(30, 20, 4) == 10
    assert removal_reach(30, 20, 12) == 12
    assert removal_reach(30, None, 12) == 12
    assert removal_reach(30, None, None) == 15
    with pytest.raises(ConfigError, match=r"score.max_removed_layers=30 must be within 0 and 29"):
        removal_reach(30, None, 30)

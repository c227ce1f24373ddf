"""A budget gives legal shapes that use it, whose real model has exactly the parameters that were computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LONGROPE, VARIANTS, make_batch, make_model, save_model
from transformers import CONFIG_MAPPING

from compress.architecture import ModelInfo, check_shape, num_parameters, shape_of, with_sizes
from compress.errors import ConfigError
from compress.families import FAMILIES, PRUNABLE
from compress.folders import read_model
from compress.importance import estimate_importance
from compress.scores import Importance, LayerRemovals, rank_correlation
from compress.shapes import (
    Grid,
    active_limit,
    enumerate_shapes,
    extremes,
    memory_limit,
    non_embedding_limit,
    parameter_limit,
    rank,
)
from compress.slicing import select


def grid(info: ModelInfo, max_parameters: int, **bounds: Any) -> Grid:
    return Grid([parameter_limit(info, max_parameters)], **bounds)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelInfo]:
    folder = tmp_path_factory.mktemp("models")
    return {v: read_model(save_model(folder / v, make_model(v))) for v in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_shapes_are_legal_within_the_budget_and_real(variant: str, share: float, models: dict[str, ModelInfo]) -> None:
    info = models[variant]
    budget = int(share * num_parameters(info, info.shape))
    found = enumerate_shapes(info, grid(info, budget, multiple_of=4))
    assert len(found) >= (1 if info.family.locked else 5)
    assert len({shape for shape, _ in found}) == len(found)
    for shape, count in found:
        assert 0.9 * budget <= count <= budget
        check_shape(info, shape, 4)
        for name in set(PRUNABLE) - {"num_experts"}:
            assert getattr(shape, name) >= getattr(info.shape, name) / 2
        assert not shape.num_experts or shape.num_experts >= 3
    for shape, count in found[:: max(1, len(found) // 4)]:
        fields = {info.family.field(name): getattr(shape, name) for name in info.family.prunable}
        real = make_model(variant, **fields)
        assert sum(p.numel() for p in real.parameters()) == count


def test_no_legal_shape_within_the_bounds_is_missed(models: dict[str, ModelInfo]) -> None:
    """Against trying everything; narrower MLPs are left out when a wider one fits."""
    info = models["llama"]
    budget = int(0.6 * num_parameters(info, info.shape))
    best: dict[tuple[int, ...], int] = {}
    for layers in range(3, 6):
        for hidden in range(24, 49):
            for heads in range(3, 7):
                for groups in range(2, 4):
                    for width in range(36, 73):
                        sizes = dict(zip(PRUNABLE, (hidden, width, layers, heads, groups), strict=False))
                        shape = with_sizes(info.shape, sizes)
                        try:
                            check_shape(info, shape, 8)
                        except ConfigError:
                            continue
                        if num_parameters(info, shape) <= budget:
                            key = (hidden, layers, heads, groups)
                            best[key] = max(best.get(key, 0), width)
    everything = {
        with_sizes(info.shape, dict(zip(PRUNABLE, (k[0], width, *k[1:]), strict=False))) for k, width in best.items()
    }
    expected = {shape for shape in everything if num_parameters(info, shape) >= 0.9 * budget}
    assert {shape for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=8))} == expected


def test_given_sizes_stay_and_the_bounds_hold(models: dict[str, ModelInfo]) -> None:
    info = models["llama"]
    budget = int(0.7 * num_parameters(info, info.shape))
    for shape, _ in enumerate_shapes(
        info, grid(info, budget, multiple_of=4, fixed={"hidden_size": 36, "num_hidden_layers": 5})
    ):
        assert (shape.hidden_size, shape.num_hidden_layers) == (36, 5)
    for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=4, max_removed_layers=1)):
        assert shape.num_hidden_layers >= 4
    for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=4, max_depth_pruning=0)):
        assert shape.num_hidden_layers == 5
    for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=4, max_width_pruning=0)):
        assert with_sizes(shape, {"num_hidden_layers": 5}) == info.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_parameters": 10**9}, r"is not smaller than the teacher's"),
        ({"max_parameters": 1000}, r"prune.max_parameters=1,000 .* out of reach .*nearest: prune.hidden_size=24"),
        (
            {"max_width_pruning": 0, "min_budget_ratio": 0.999},
            r"out of reach .* nearest: prune.num_hidden_layers=3 with .*; prune.num_hidden_layers=4 with",
        ),
        ({"fixed": {"hidden_size": 42}}, r"prune.hidden_size=42 must be a multiple .* nearest: 36 or 48"),
        (
            {"fixed": {"hidden_size": 38}},
            r"no shape is legal with prune.hidden_size=38, .*\(for Llama .* a multiple of num_attention_heads\); "
            r"legal with the rest as given: prune.hidden_size=36 or 40$",
        ),
        (
            {"fixed": {"num_attention_heads": 5, "num_hidden_layers": 4}},
            r"no shape is legal with prune.num_attention_heads=5, .*same number of query heads, 1 to 2\); "
            r"legal with the rest as given: prune.num_attention_heads=4 or 6$",
        ),
        (
            {"fixed": {"num_attention_heads": 3}, "tensor_parallel": 2},
            r"no shape is legal with .*shape.tensor_parallel=2, .*given: prune.num_attention_heads=4$",
        ),
        (
            {"fixed": {"intermediate_size": 61}, "tensor_parallel": 2, "multiple_of": 1},
            r"no shape is legal with prune.intermediate_size=61, .*shape.tensor_parallel=2, "
            r".*given: prune.intermediate_size=60 or 62$",
        ),
        ({"fixed": {"num_key_value_heads": 4}}, r"prune.num_key_value_heads=4 is more than the teacher's 3"),
    ],
)
def test_a_budget_out_of_reach_names_what_can_be_reached(
    change: dict[str, object], message: str, models: dict[str, ModelInfo]
) -> None:
    info = models["llama"]
    settings = {"max_parameters": int(0.7 * num_parameters(info, info.shape)), "multiple_of": 4, **change}
    with pytest.raises(ConfigError, match=message):
        enumerate_shapes(info, grid(info, **settings))


@pytest.mark.parametrize(
    ("variant", "sizes", "given"),
    [
        ("gpt_neox", {}, {"hidden_size": 40, "num_attention_heads": 4}),
        ("gpt_neox", {}, {"hidden_size": 40}),
        ("gpt_neox", {}, {"num_attention_heads": 4}),
        # SmolLM2's 9 heads in 3 groups: hidden sizes that only a smaller number of heads divides.
        ("llama", {"hidden_size": 72, "num_attention_heads": 9}, {"hidden_size": 60, "num_attention_heads": 6}),
        ("llama", {"hidden_size": 72, "num_attention_heads": 9}, {"hidden_size": 60}),
        # One head a group: the groups follow the heads, both beyond max_width_pruning.
        ("llama", {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 16},
         {"num_attention_heads": 4}),
        ("llama", {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 16},
         {"num_key_value_heads": 4}),
    ],
)  # fmt: skip
def test_given_sizes_under_a_budget_find_open_ones_that_suit(
    variant: str, sizes: dict[str, int], given: dict[str, int], tmp_path: Path
) -> None:
    info = read_model(save_model(tmp_path, make_model(variant, **sizes)))
    bounds: dict[str, Any] = {"multiple_of": 4, "fixed": given}
    budget = (sum(extremes(info, Grid([], **bounds)))) // 2
    found = enumerate_shapes(info, grid(info, budget, min_budget_ratio=0.5, **bounds))
    assert found
    for shape, _ in found:
        check_shape(info, shape, 4)
        assert {name: getattr(shape, name) for name in given} == given


def test_a_given_hidden_size_finds_its_heads_among_many() -> None:
    """A grid of 65 numbers of heads takes every third; the one that goes with a given hidden size isn't lost."""
    config = CONFIG_MAPPING["gpt_neox"](hidden_size=1280, num_attention_heads=128).to_dict()
    info = ModelInfo(Path(), config, FAMILIES["gpt_neox"], shape_of(CONFIG_MAPPING["gpt_neox"].from_dict(config)), {})
    for heads in (125, 126, 127):
        bounds = Grid([], multiple_of=1, fixed={"hidden_size": 10 * heads, "num_hidden_layers": 20})
        low, high = extremes(info, bounds)
        assert low < high


def test_every_shape_of_longrope_is_one_that_transformers_loads(tmp_path: Path) -> None:
    """Its factors are counted by hidden_size // num_attention_heads, a rule that the table doesn't hold."""
    info = read_model(save_model(tmp_path, make_model("phi3", **LONGROPE)))
    budget = int(0.6 * num_parameters(info, info.shape))
    bounds: dict[str, Any] = {"multiple_of": 4, "min_budget_ratio": 0.5}
    found = enumerate_shapes(info, grid(info, budget, **bounds))
    for shape, _ in found:
        check_shape(info, shape, 4)
    assert {(s.hidden_size, s.num_attention_heads) for s, _ in found} == {(48, 6), (36, 4), (32, 4), (28, 3), (24, 3)}
    with pytest.raises(ConfigError, match=r"short_factor field must have length 3, got 4.*hidden_size=32 or 36") as no:
        enumerate_shapes(info, grid(info, budget, fixed={"hidden_size": 40}, **bounds))
    assert "prune.max_parameters" not in str(no.value), "no budget would help"


@pytest.fixture(scope="module")
def importance() -> Importance:
    return estimate_importance(make_model(), [make_batch()])


def test_every_axis_costs_and_more_costs_more(importance: Importance) -> None:
    teacher = shape_of(make_model().config)

    def damage(**sizes: int) -> float:
        return rank([(with_sizes(teacher, sizes), 1)], importance, teacher)[0].damage

    assert damage() == pytest.approx(0, abs=1e-12)
    steps = {
        "hidden_size": (44, 36, 24),
        "intermediate_size": (68, 60, 36),
        "num_hidden_layers": (4, 3, 2),
        "num_attention_heads": (3,),
    }
    for name, values in steps.items():
        costs = [damage(**{name: value}) for value in values]
        assert costs[0] > 1e-4
        assert costs == sorted(costs)
    assert damage(num_key_value_heads=2, num_attention_heads=4) > damage()


def test_damage_follows_what_the_scores_say() -> None:
    """An axis whose dropped units have no importance is free; ranking puts it first."""
    teacher = shape_of(make_model().config)
    importance = estimate_importance(make_model(), [make_batch()])
    importance.width()["intermediate"][:, 40:] = 0
    narrow = with_sizes(teacher, {"intermediate_size": 40})
    others = [with_sizes(teacher, s) for s in ({"hidden_size": 36}, {"num_hidden_layers": 4})]
    ranked = rank([(shape, 1) for shape in (*others, narrow)], importance, teacher)
    assert ranked[0].shape == narrow
    assert ranked[0].damage == pytest.approx(0, abs=1e-9)
    assert all(c.damage == pytest.approx(sum(c.parts.values())) for c in ranked)


def test_measured_kl_sets_the_scale(importance: Importance) -> None:
    teacher = shape_of(make_model().config)
    shapes = [(with_sizes(teacher, s), 1) for s in ({"num_hidden_layers": 3}, {"intermediate_size": 40})]
    order = importance.block_influence_L.argsort()[:2]
    influence = importance.block_influence_L[order]
    kl = [3 * float(influence[0]), 7 * float(influence.sum())]
    layers = order.tolist()
    depths = {"kl_greedy": LayerRemovals([layers[:1], layers], kl), **importance.depths}
    measured = rank(shapes, replace(importance, depths=depths), teacher)
    plain = rank(shapes, importance, teacher)
    found = {c.shape: c.damage for c in measured}
    by_influence = {c.shape: c.damage for c in plain}
    assert found[shapes[0][0]] == pytest.approx(float(kl[1]))
    assert found[shapes[1][0]] == pytest.approx(3 * by_influence[shapes[1][0]], rel=1e-5)


def _with_costs(importance: Importance, cost: list[float]) -> Importance:
    order = importance.block_influence_L.argsort().tolist()
    removals = LayerRemovals([order[: n + 1] for n in range(len(cost))], cost)
    return replace(importance, depths={"task": removals})


@pytest.mark.parametrize(
    ("cost", "number"),
    [
        ([-0.01, 0.02, 0.05], 2),
        ([0.0, 0.02, 0.05], 2),
        ([-0.01, 0.001, 0.05], 3),  # what lies within the improvement tells nothing
        ([0.001, -0.01, 0.05], 3),
    ],
)
def test_layers_that_better_go_leave_widths_their_damage(
    cost: list[float], number: int, importance: Importance
) -> None:
    """The scale is of the first removal that harms by more than another improves."""
    teacher = shape_of(make_model().config)
    narrow = with_sizes(teacher, {"hidden_size": 24, "intermediate_size": 36})
    plain = rank([(narrow, 1)], importance, teacher)[0].damage
    influence = importance.block_influence_L.sort().values.double()[:number].sum()
    found = rank([(narrow, 1)], _with_costs(importance, cost), teacher)[0].damage
    assert found == pytest.approx(float(plain * cost[number - 1] / influence), rel=1e-5)


def test_without_a_removal_that_harms_widths_count_by_block_influence(importance: Importance) -> None:
    teacher = shape_of(make_model().config)
    shapes = [(with_sizes(teacher, s), 1) for s in ({"num_hidden_layers": 3}, {"intermediate_size": 36})]
    layers, narrow = rank(shapes, _with_costs(importance, [-0.02, 0.01]), teacher)
    assert layers.damage == pytest.approx(0.01)
    assert narrow.damage == pytest.approx(rank(shapes[1:], importance, teacher)[0].damage)


def test_the_lost_share_is_that_of_what_select_drops(importance: Importance) -> None:
    teacher = shape_of(make_model().config)
    shape = with_sizes(teacher, {"intermediate_size": 40, "num_hidden_layers": 4})
    kept = select(importance, shape)
    energy = importance.width()["intermediate"].double().square()
    lost = 0.0
    for layer, units in zip(kept["layers"].tolist(), kept["intermediate"], strict=True):
        share = 1 - energy[layer, units].sum() / energy[layer].sum()
        lost += float(share * importance.block_influence_L[layer]) / 2
    assert rank([(shape, 1)], importance, teacher)[0].parts["intermediate"] == pytest.approx(lost, rel=1e-5)


def test_a_grid_of_a_large_model_stays_small() -> None:
    from compress.shapes import MAX_CHOICES, _heads, _thinned, _widths

    teacher = shape_of(make_model("llama").config)
    large = with_sizes(
        teacher,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8},
    )  # fmt: skip
    bounds = Grid([], multiple_of=64)
    for name in ("hidden_size", "intermediate_size"):
        options = _widths(name, getattr(large, name), 64, bounds, {})
        assert len(options) <= MAX_CHOICES + 1
        assert all(o % 64 == 0 for o in options)
    for groups in (8, 64):
        heads = _thinned(_heads(with_sizes(large, {"num_key_value_heads": groups}), bounds, {}))
        assert (64, groups) in heads
        assert len(heads) <= MAX_CHOICES


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_every_limit_holds_of_the_real_model(variant: str, models: dict[str, ModelInfo]) -> None:
    """Each against a count on a model of that shape; together, all of them at once, and the tightest is used."""
    info = models[variant]
    whole = make_model(variant)

    def outside(model: Any) -> int:
        tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        return sum(p.numel() for p in model.parameters() if id(p) not in tables)

    def active(model: Any) -> int:
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        config = model.config
        count = info.shape.num_experts and getattr(config, info.family.field("num_experts"))
        return sum(p.numel() for p in model.parameters()) - (
            experts - experts * config.num_experts_per_tok // count if count else 0
        )

    def held(model: Any) -> int:
        from transformers import DynamicCache

        cache = DynamicCache()
        model(input_ids=torch.zeros(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
        states = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return 2 * (sum(p.numel() for p in model.parameters()) + sum(t.numel() for t in states))

    measures = {non_embedding_limit: outside, active_limit: active, memory_limit: held}
    every = []
    for make, count in measures.items():
        extra = (2, 7, 3) if make is memory_limit else ()
        limit = make(info, int(0.75 * count(whole)), *extra)
        every.append((limit, count))
        assert limit.measure(info.shape) == count(whole)
    for chosen in (*([pair] for pair in every), every):
        found = enumerate_shapes(info, Grid([limit for limit, _ in chosen], multiple_of=4))
        for shape, _ in found[:: max(1, len(found) // 3)]:
            model = make_model(variant, **{info.family.field(n): getattr(shape, n) for n in info.family.prunable})
            assert all(limit.measure(shape) == count(model) <= limit.value for limit, count in chosen)
            assert any(count(model) >= 0.9 * limit.value for limit, count in chosen)


def test_sizes_divide_over_the_ranks_of_tensor_parallel(models: dict[str, ModelInfo]) -> None:
    """6 heads in 3 groups and an MLP of 72: two ranks share 2 or 4 heads, and copy one group or share two."""
    info = models["llama"]
    budget = int(0.6 * num_parameters(info, info.shape))
    found = {shape for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=4, tensor_parallel=2))}
    assert found
    assert all(s.num_attention_heads % 2 == 0 and s.intermediate_size % 2 == 0 for s in found)
    assert all(s.num_key_value_heads % 2 == 0 or s.num_key_value_heads == 1 for s in found)
    assert found < {shape for shape, _ in enumerate_shapes(info, grid(info, budget, multiple_of=4))}
    with pytest.raises(ConfigError, match=r"num_attention_heads=3 can't be split over shape.tensor_parallel=2 ranks"):
        check_shape(info, with_sizes(info.shape, {"num_attention_heads": 3}), 4, 2)
    with pytest.raises(ConfigError, match=r"num_key_value_heads=3 can't be split over shape.tensor_parallel=2"):
        check_shape(info, info.shape, 4, 2)


def test_several_limits_out_of_reach_are_all_named(models: dict[str, ModelInfo]) -> None:
    info = models["llama"]
    limits = [parameter_limit(info, int(0.7 * num_parameters(info, info.shape))), memory_limit(info, 1000, 2, 64, 1)]
    with pytest.raises(
        ConfigError, match=r"prune.max_parameters=.* with prune.max_bytes=1,000 .* out of reach"
    ) as caught:
        enumerate_shapes(info, Grid(limits, multiple_of=4))
    assert "bytes of weights and of keys and values of 1 x 64 tokens" in str(caught.value)


def test_rank_correlation_is_spearmans() -> None:
    one = torch.tensor([[1.0, 2, 3, 10], [1, 2, 3, 10], [1, 2, 3, 4]])
    other = torch.tensor([[0.1, 0.2, 0.3, 0.4], [4, 3, 2, 1], [2, 1, 3, 4]])
    # 1 - 6 * (1 + 1 + 0 + 0) / (4 * 15), by hand
    torch.testing.assert_close(rank_correlation(one, other), torch.tensor([1, -1, 0.8], dtype=torch.float64))
    assert rank_correlation(torch.tensor([1.0]), torch.tensor([1.0])) == 0

"""Scores against an independent computation in numpy, and what they must not depend on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SIZES, VARIANTS, logits, make_batch, make_model, rows
from safetensors.torch import load_file, save_file

from compress.architecture import shape_of
from compress.artifacts import open_tensors
from compress.criteria import AGGREGATIONS, parse_criterion
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.families import AXES
from compress.importance import estimate_importance
from compress.reductions import aggregate_sequence
from compress.scores import Importance, LayerRemovals, load_importance, save_importance
from compress.tokens import TokenBatch


def fields_of(importance: Importance, criterion: str | None = None) -> dict[str, torch.Tensor]:
    return {**importance.width(criterion), "block_influence": importance.block_influence_L}


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
        "hidden": sum(score(f"norm{part}{n}") for n in layers for part in (1, 2)),
        "intermediate": np.stack([score(f"mlp{n}") for n in layers]),
        "query_heads": np.sqrt((columns.reshape(len(layers), -1, dim) ** 2).sum(-1)),
        "key_value_heads": np.sqrt((columns.reshape(len(layers), SIZES["num_key_value_heads"], -1) ** 2).sum(-1)),
        "block_influence": 1 - np.array(cosines),
    }


def assert_close(one: Importance, other: Importance) -> None:
    for criterion in one.widths:
        ours, theirs = fields_of(one, criterion), fields_of(other, criterion)
        assert ours.keys() == theirs.keys()
        for name, scores in ours.items():
            torch.testing.assert_close(scores, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sequence", "over_batch"), product(AGGREGATIONS, AGGREGATIONS))
@pytest.mark.parametrize("padded", [False, True])
def test_scores_equal_an_independent_computation(sequence: str, over_batch: str, padded: bool) -> None:
    model, batch = make_model("qwen3-biases"), make_batch(5, 12, padded=padded)
    criterion = f"activation:{over_batch}/{sequence}"
    estimate = estimate_importance(model, [rows(batch, 0, 3), rows(batch, 3, 5)], [criterion])
    for field, expected in by_numpy(model, batch, sequence, over_batch).items():
        measured = fields_of(estimate, criterion)[field]
        assert measured.dtype == torch.float32
        assert measured.shape == expected.shape
        np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=field)
    assert (estimate.num_sequences, estimate.num_tokens) == (5, int(batch.valid_mask.sum()))


PAIRS = [f"activation:{over_batch}/{sequence}" for over_batch, sequence in product(AGGREGATIONS, AGGREGATIONS)]


def test_all_pairs_of_one_pass_are_those_of_a_pass_each() -> None:
    model, batch = make_model("qwen3_moe"), make_batch(4, 12, padded=True)
    together = estimate_importance(model, [batch], PAIRS)
    assert list(together.widths) == PAIRS
    for pair in PAIRS:
        alone = estimate_importance(model, [batch], [pair])
        for axis, scores in alone.width().items():
            assert torch.equal(scores, together.width(pair)[axis]), (pair, axis)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled kernels need g++")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_kernels_give_the_same_scores(dtype: torch.dtype) -> None:
    """Also where some tokens are padding, and what padding holds counts for nothing."""
    for variant in ("qwen3-biases", "mixtral"):
        model = make_model(variant, dtype=dtype)
        for padded in (False, True):
            batch = make_batch(5, 12, padded=padded)
            blocked, compiled = (estimate_importance(model, [batch], PAIRS, compile=how) for how in (False, True))
            assert_close(compiled, blocked)


def test_padding_that_is_not_finite_counts_for_nothing() -> None:
    values = torch.randn(2, 6, 5).index_fill_(1, torch.tensor([4, 5]), float("nan"))
    valid = torch.ones(2, 6, dtype=torch.bool).index_fill_(1, torch.tensor([4, 5]), False)
    for name in AGGREGATIONS:
        expected = aggregate_sequence(values[:, :4], None, name)
        torch.testing.assert_close(aggregate_sequence(values, valid, name), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_do_not_depend_on_the_micro_batch(variant: str) -> None:
    model, batch = make_model(variant), make_batch(6, 12, padded=True)
    whole = estimate_importance(model, [batch], PAIRS)
    for size in (1, 4):
        parts = [rows(batch, start, min(start + size, 6)) for start in range(0, 6, size)]
        assert_close(estimate_importance(model, parts, PAIRS), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_listening_changes_nothing_and_every_axis_is_scored(variant: str) -> None:
    model, batch = make_model(variant), make_batch()
    before, shape = logits(model, batch), shape_of(model.config)
    seen = []
    handle = model.base_model.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state))
    importance = estimate_importance(model, [batch])
    handle.remove()
    torch.testing.assert_close(model.get_output_embeddings()(seen[0]).argmax(-1), before.argmax(-1))
    expected = {axis for axis, size in AXES.items() if getattr(shape, size)}
    assert set(importance.width()) == expected
    for axis, scores in importance.width().items():
        assert scores.shape[-1] == getattr(shape, AXES[axis])
        assert bool((scores > 0).all() if "expert" not in axis else scores.any()), axis  # some see no token
    assert torch.equal(logits(model, batch), before)
    assert not any("forward" in vars(module) for module in model.modules()), "the experts' own forward is back"


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "qwen3_moe-normed", "gpt_oss"])
def test_scores_of_experts_equal_an_independent_computation(variant: str) -> None:
    """Token by token, expert by expert, in numpy's order of operations; only what the router chose counts."""
    model, batch = make_model(variant), make_batch(3, 12, padded=True)
    found: dict[int, list[tuple[Any, Any, Any]]] = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        handles.append(
            experts.register_forward_pre_hook(lambda m, a, number=number: found.setdefault(number, []).append((m, *a)))
        )
    logits(model, batch)
    for handle in handles:
        handle.remove()
    importance = estimate_importance(model, [rows(batch, 0, 1), rows(batch, 1, 3)], ["activation:l2/mean"])
    valid = batch.valid_mask
    for number, calls in found.items():
        [(module, hidden, index, weight)] = calls
        gate_up, down = module.gate_up_proj.detach().numpy(), module.down_proj.detach().numpy()
        for expert in range(module.num_experts):
            norms, units = [], np.zeros((*valid.shape, importance.width()["expert_intermediate"].shape[2]))
            for token in np.flatnonzero(valid.flatten().numpy()):
                places = (index[token] == expert).nonzero().flatten().tolist()
                if not places:
                    continue
                x = hidden[token].detach().numpy()
                if variant == "gpt_oss":
                    inner = x @ gate_up[expert] + module.gate_up_proj_bias[expert].detach().numpy()
                    gate, up = np.minimum(inner[::2], module.limit), np.clip(inner[1::2], -module.limit, module.limit)
                    unit = (up + 1) * gate / (1 + np.exp(-module.alpha * gate))
                    out = unit @ down[expert] + module.down_proj_bias[expert].detach().numpy()
                else:
                    inner = gate_up[expert] @ x
                    gate, up = np.split(inner, 2)
                    unit = gate / (1 + np.exp(-gate)) * up
                    out = down[expert] @ unit
                norms.append(np.linalg.norm(out * float(weight[token, places[0]])))
                units[token // valid.shape[1], token % valid.shape[1]] = unit
            expected = np.mean(norms) if norms else 0.0
            np.testing.assert_allclose(float(importance.width()["experts"][number, expert]), expected, rtol=1e-4)
            means = np.stack([np.abs(row[real]).mean(0) for row, real in zip(units, valid.numpy(), strict=True)])
            scored = importance.width()["expert_intermediate"][number, expert].numpy()
            np.testing.assert_allclose(scored, np.sqrt((means**2).sum(0)), rtol=1e-4, atol=1e-7)


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
    both = ["activation:l2/mean", "weighted_activation:l2/mean"]

    def scores(model: Any) -> tuple[Any, Any]:
        found = estimate_importance(model, [batch], both)
        return found.width(both[0]), found.width(both[1])

    plain, weighted = scores(make_model())
    model = make_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[:, 7] *= scale
    plain_scaled, weighted_scaled = scores(model)
    torch.testing.assert_close(plain_scaled["intermediate"], plain["intermediate"])
    ratio_LF = weighted_scaled["intermediate"] / weighted["intermediate"]
    assert ratio_LF[4, 7] == pytest.approx(scale)
    ratio_LF[4, 7] = 1
    assert ratio_LF[:4].allclose(torch.ones(4, 72)), "the last layer's MLP changes nothing before it"
    norm_F = torch.linalg.vector_norm(make_model().model.layers[1].mlp.down_proj.weight, dim=0)
    torch.testing.assert_close(weighted["intermediate"][1], plain["intermediate"][1] * norm_F.float())
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight[:, 20:30] *= scale  # head 2 of 10 columns
    heads_H = scores(model)[1]["query_heads"][4]
    expected_H = weighted["query_heads"][4] * torch.tensor([1, 1, scale, 1, 1, 1])
    torch.testing.assert_close(heads_H, expected_H)
    torch.testing.assert_close(weighted["hidden"], plain["hidden"])


def test_scores_that_are_not_finite_name_the_module() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(NumericalError, match=r"layer 2, mlp.down_proj: 1 of 72"):
        estimate_importance(model, [make_batch()])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Importance]:
    importance = estimate_importance(
        make_model(), [make_batch()], ["activation", "weighted_activation"], similarity=True
    )
    depths = {"kl_greedy": LayerRemovals([[3], [3, 1]], [0.5, 1.0]), **importance.depths}
    importance = replace(importance, depths=depths)
    save_importance(tmp_path / "importance.safetensors", importance, "abc")
    return tmp_path / "importance.safetensors", importance


def test_scores_survive_the_file(saved: tuple[Path, Importance]) -> None:
    path, importance = saved
    loaded = load_importance(path, shape_of(make_model().config), "abc")
    assert list(loaded.widths) == list(importance.widths), "their order is which one is used"
    for criterion, widths in importance.widths.items():
        assert all(torch.equal(scores, loaded.widths[criterion][axis]) for axis, scores in widths.items())
    assert list(loaded.depths) == ["kl_greedy", "block_influence"]
    assert loaded.depth() == LayerRemovals([[3], [3, 1]], [0.5, 1.0])
    assert loaded.depth("block_influence").removed == importance.depths["block_influence"].removed
    assert torch.equal(loaded.block_influence_L, importance.block_influence_L)
    assert loaded.similarity_SS is not None
    assert torch.equal(loaded.similarity_SS, importance.similarity_SS)
    assert (loaded.num_sequences, loaded.num_tokens) == (importance.num_sequences, importance.num_tokens)


def test_a_criterion_that_was_not_scored_names_those_that_were(saved: tuple[Path, Importance]) -> None:
    with pytest.raises(
        ConfigError, match=r"prune.width_criterion=taylor was not scored: the scores hold activation:l2"
    ):
        saved[1].width("taylor")
    with pytest.raises(ConfigError, match=r"prune.depth_criterion=nmse was not scored: the scores hold kl_greedy"):
        saved[1].depth("nmse")
    assert saved[1].width("activation") is saved[1].widths["activation:l2/mean"], "a name without its aggregations"


@pytest.mark.parametrize("text", ["activatio", "activation:l2", "activation:l2/median", "taylor:l2/mean", ""])
def test_a_criterion_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"score.width: "):
        parse_criterion(text)


HIDDEN = "width/activation:l2/mean/hidden"


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    with open_tensors(path) as reader:
        header = reader.metadata()
    change(tensors)
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({HIDDEN: t[HIDDEN][:-1].clone()}),
            r"activation:l2/mean/hidden has size \(47,\), the teacher's is \(48,\)",
        ),
        (
            lambda t: t["width/activation:l2/mean/intermediate"].__setitem__((0, 0), float("nan")),
            "intermediate holds values that are not finite",
        ),
        (lambda t: t.pop("width/activation:l2/mean/query_heads"), "holds other tensors than its header says"),
        (lambda t: t.pop("depth/kl_greedy/cost"), "holds other tensors than its header says"),
        (lambda t: t["depth/kl_greedy/removed"].__setitem__((1, 0), 1), "aren't sets of 1, 2, ... layers"),
        (lambda t: t["depth/kl_greedy/removed"].__setitem__((0, 0), 5), "aren't sets of 1, 2, ... layers"),
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

"""Objectives on hidden states: each is its formula and gradient, on any family, in one step with the others."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import on_ranks
from families import VARIANTS, make_batch, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.capture import Listening, check_models, check_terms, listening, make_projections, recording
from compress.errors import ArchitectureError, ConfigError
from compress.families import FAMILIES
from compress.objectives import hidden
from compress.objectives.hidden import AttentionInputs, Inside, Recorded, log_weights
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Term
from compress.parallel import ALONE, launched, recompute_layers, shard, single_process_mesh
from compress.step import StudentModule, accumulate_gradients, trunk
from compress.teacher import Teacher
from compress.tokens import TokenBatch

GOLDEN = json.loads((Path(__file__).parent / "golden" / "objectives.json").read_text())["minilm"]
HIDDEN = [name for name, objective in OBJECTIVES.items() if objective.hidden]
RELATIONS = ["minilm_attention", "minilm_value"]


def _loss(inside: Inside, term: Term) -> Tensor:
    function = OBJECTIVES[term.objective].inside
    assert function is not None
    return function(inside, term)


# -- formulas


@pytest.mark.parametrize(("name", "key"), [("minilm_attention", "attention"), ("minilm_value", "value")])
def test_golden_relations(name: str, key: str) -> None:
    """What numpy makes of MiniLM's formulas, with a causal mask: tests/golden/regenerate.py."""

    def inputs(whose: str) -> Recorded:
        q, k, v = (torch.tensor(GOLDEN[f"{letter}_{whose}"], dtype=torch.float64)[None] for letter in "QKV")
        return Recorded({}, {-1: AttentionInputs(q, k, v, q.shape[-1] ** -0.5)})

    inside = Inside(inputs("s"), inputs("t"), {}, torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool))
    assert _loss(inside, Term(name)).item() / 3 == pytest.approx(GOLDEN[key], rel=1e-9)


def _case(student: tuple[int, int, int], teacher: tuple[int, int, int], **facts: Any) -> Inside:
    """Random attention inputs of (query heads, key-value heads, head_dim), two rows of packed documents."""
    generator = torch.Generator().manual_seed(sum(student))

    def make(heads: int, groups: int, dim: int) -> Recorded:
        q, k, v = (
            torch.randn(2, n, 11, dim, generator=generator, dtype=torch.float64) for n in (heads, groups, groups)
        )
        for x in (q, k, v):
            x.requires_grad_()
        return Recorded({}, {-1: AttentionInputs(q, k, v, 0.7, **facts)})

    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
    mask = torch.rand(2, 11, generator=generator) < 0.6
    return Inside(make(*student), make(*teacher), {}, positions, mask)


def _documents(positions_BT: Tensor) -> Tensor:
    return (positions_BT == 0).cumsum(1)


def _naive_relation(inside: Inside, name: str) -> Tensor:
    """Whole maps, every mask by comparison of all pairs, every head by hand, and autograd through it."""

    def scores(inputs: AttentionInputs, relation_heads: int | None) -> Tensor:
        left, right, scale, cap = inputs.query_BHTd, inputs.key_BGTd, inputs.scale, inputs.softcap
        if name == "minilm_value":
            left, right, scale, cap = inputs.value_BGTd, inputs.value_BGTd, inputs.value_BGTd.shape[-1] ** -0.5, None
        else:
            right = torch.stack([right[:, h * right.shape[1] // left.shape[1]] for h in range(left.shape[1])], 1)
        if relation_heads:
            flat = [torch.cat(list(x.unbind(1)), -1).chunk(relation_heads, -1) for x in (left, right)]
            left, right = (torch.stack(x, 1) for x in flat)
            scale, cap = left.shape[-1] ** -0.5, None
        found = left @ right.transpose(-1, -2) * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    student, teacher = inside.student.attention[-1], inside.teacher.attention[-1]
    counts = [x.value_BGTd.shape[1] if name == "minilm_value" else x.query_BHTd.shape[1] for x in (student, teacher)]
    heads = None if counts[0] == counts[1] else 2  # of every unequal case below
    documents, at = _documents(inside.position_ids_BT), torch.arange(11)
    seen = (documents[:, :, None] == documents[:, None, :]) & (at[:, None] >= at[None, :])
    if student.window is not None and name == "minilm_attention":
        seen &= at[:, None] - at[None, :] < student.window
    q, p = (scores(x, heads).masked_fill(~seen[:, None], -1e30).softmax(-1) for x in (student, teacher))
    kl = torch.where(seen[:, None], p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0).sum(-1).mean(1)
    return kl[inside.loss_mask_BT].sum()


CASES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]] = {
    "equal heads": ((4, 4, 3), (4, 4, 5), {}),
    "groups": ((4, 2, 3), (4, 1, 4), {}),
    "fewer heads": ((2, 2, 5), (6, 6, 3), {}),
    "soft cap and window": ((4, 2, 3), (4, 2, 3), {"softcap": 1.5, "window": 3}),
}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("case", CASES)
def test_relations_are_their_formula_and_gradient(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, facts = CASES[case]
    if case == "groups" and name == "minilm_value":
        teacher = (4, 4, 4)  # two relation heads out of 2 x 3 and 4 x 4 channels
    inside = _case(student, teacher, **facts)
    monkeypatch.setattr(hidden, "_BLOCK_SCORES", 4 * 11 * 2)  # few query tokens a block
    ours, expected = _loss(inside, Term(name)), _naive_relation(inside, name)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    inputs = inside.student.attention[-1]
    of = [inputs.query_BHTd, inputs.key_BGTd] if name == "minilm_attention" else [inputs.value_BGTd]
    for mine, theirs in zip(torch.autograd.grad(ours * 0.3, of), torch.autograd.grad(expected * 0.3, of), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    teachers = inside.teacher.attention[-1].query_BHTd
    assert torch.autograd.grad(_loss(inside, Term(name)), [teachers], allow_unused=True) == (None,)


def test_states_are_their_formula_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)

    def states(width: int) -> dict[int | str, Tensor]:
        return {
            key: torch.randn(9, width, generator=generator, dtype=torch.float64).requires_grad_()
            for key in (0, 1, -1, "embedding")
        }

    for width in (5, 7):  # of the student; the teacher's is 7
        student, teacher = states(width), states(7)
        names = ("layer_0_to_1", "layer_1_to_-1", "embedding")
        weights = {n: torch.randn(7, width, generator=generator, dtype=torch.float64).requires_grad_() for n in names}
        mask = torch.ones(1, 9, dtype=torch.bool)
        inside = Inside(Recorded(student, {}), Recorded(teacher, {}), weights, torch.arange(9)[None], mask)
        pairs = [[0, 1], [1, -1]]

        def mapped(key: int | str, name: str) -> Tensor:
            return student[key] @ weights[name].T if width != 7 else student[key]  # noqa: B023

        both = [(mapped(0, "layer_0_to_1"), teacher[1]), (mapped(1, "layer_1_to_-1"), teacher[-1])]
        expected = {
            "hidden_cosine": sum(
                1 - (s[n] @ t[n]) / (s[n].norm() * t[n].norm()) for s, t in both for n in range(9)
            ) / 2,
            "hidden_mse": sum(((s - t) ** 2).sum() / 7 for s, t in both) / 2,
            "embedding_mse": ((mapped("embedding", "embedding") - teacher["embedding"]) ** 2).sum() / 7,
        }  # fmt: skip
        for name, value in expected.items():
            ours = _loss(inside, Term(name, layers=pairs))
            torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)
            inputs = [student[0], student[1], student["embedding"], *(weights.values() if width != 7 else ())]
            options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
            mine, theirs = (torch.autograd.grad(x, inputs, **options) for x in (ours, value))
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_the_size_of_a_mean_square_does_not_depend_on_the_width() -> None:
    for width in (4, 4000):
        one = torch.full((3, width), 0.5)
        empty = torch.zeros(1, 3)
        inside = Inside(Recorded({-1: one}, {}), Recorded({-1: one * 0}, {}), {}, empty.long(), empty.bool())
        assert _loss(inside, Term("hidden_mse")).item() == pytest.approx(3 * 0.25)


# -- recording


def _documents_of(batch: TokenBatch) -> list[tuple[int, slice]]:
    found = []
    for row in range(len(batch.position_ids)):
        starts = [*(batch.position_ids[row] == 0).nonzero()[:, 0].tolist(), batch.position_ids.shape[1]]
        found += [(row, slice(a, b)) for a, b in itertools.pairwise(starts)]
    return found


@pytest.mark.parametrize("variant", [name for name, (kind, _) in VARIANTS.items() if kind != "gpt_oss"])
def test_recomputed_attention_is_what_the_model_computes(variant: str) -> None:
    """Of every layer of every family: rotations, norms, groups, windows and soft caps, document by document."""
    model, batch = make_model(variant), make_batch()
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad(), recording(model, Listening(attention=frozenset(layers)), batch.loss_mask) as recorded:
        trunk(model, batch)
    model.set_attn_implementation("eager")
    for row, document in _documents_of(batch)[:4]:
        ids = batch.input_ids[row : row + 1, document]
        with torch.no_grad():
            maps = model.base_model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        for layer in layers:
            relation = hidden._attention(recorded.attention[layer])
            rows = torch.arange(document.start, document.stop)
            keys, seen = hidden._seen_keys(batch.position_ids[row], rows, relation.window)
            assert keys == document or relation.window, "no key of another document"
            weights = log_weights(relation, row, rows, keys, seen)[0].exp()
            torch.testing.assert_close(weights, maps[layer][0].to(weights.dtype), rtol=1e-5, atol=1e-6)


def test_recorded_states_are_those_of_transformers() -> None:
    model, batch = make_model("llama"), make_batch()
    what = Listening(outputs=frozenset([1, -2]), embedding=True)
    with recording(model, what, batch.loss_mask) as recorded:
        trunk(model, batch)
    arguments = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    states = model.base_model(**arguments, output_hidden_states=True).hidden_states
    for key, number in ((1, 2), (-2, 4), ("embedding", 0)):  # of 5 layers, behind the embedding
        torch.testing.assert_close(recorded.states_ND[key], states[number][batch.loss_mask])
    assert recorded.states_ND.keys() == {1, -2, "embedding"}, "nothing that wasn't asked for"
    assert not recorded.attention


def test_listening_ends_with_its_block() -> None:
    model, batch = make_model("llama"), make_batch()
    what = Listening(frozenset([0]), frozenset([0]), True)
    with pytest.raises(ZeroDivisionError), recording(model, what, batch.loss_mask):
        raise ZeroDivisionError
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_that_passes_the_interface_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("llama"), make_batch()
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "self_attn", _OwnAttention())
    with (
        pytest.raises(ArchitectureError, match="model_type=llama: the attention of layer 0"),
        recording(model, Listening(attention=frozenset([0])), batch.loss_mask),
    ):
        trunk(model, batch)


class _OwnAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def test_sinks_are_refused_by_the_family_s_name() -> None:
    families = [FAMILIES["gpt_oss"]] * 2
    with pytest.raises(ArchitectureError, match=r"objectives\[1\]: minilm_attention .* gpt-oss \(gpt_oss\) .* sinks"):
        check_terms([Term("forward_kl"), Term("minilm_attention")], families, [3, 3])
    check_terms([Term("minilm_value")], families, [3, 3])


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([[0, 0], [2, 1]], "the student has 2 layers, so no layer 2"),
        ([[-3, 0]], "the student has 2 layers, so no layer -3"),
        ([[1, 3]], "the teacher has 3 layers, so no layer 3; give .* within -3 and 2 for the teacher"),
    ],
)
@pytest.mark.parametrize("name", ["hidden_cosine", "minilm_value"])
def test_a_layer_that_is_not_there_is_refused(layers: list[list[int]], said: str, name: str) -> None:
    terms = [Term("forward_kl"), Term(name, layers=layers)]
    with pytest.raises(ConfigError, match=rf"distill.objectives\[1\].layers=.* of {name}: {said}"):
        check_models(terms, _model(16, 2, 1), _model(32, 3, 2))
    check_terms(terms, [FAMILIES["llama"]] * 2, [None, None])


def test_layers_that_see_different_windows_are_refused() -> None:
    full, window = _case((4, 2, 3), (4, 2, 3)), _case((4, 2, 3), (4, 2, 3), window=3)
    inside = Inside(full.student, window.teacher, {}, full.position_ids_BT, full.loss_mask_BT)
    with pytest.raises(ConfigError, match=r"layer -1 of the student, seeing all tokens, .* teacher, seeing 3 tokens"):
        _loss(inside, Term("minilm_attention"))


# -- in a step

EVERY = [
    Term("forward_kl"),
    Term("hidden_cosine", 0.5, layers=[[0, 0], [-1, -1]]),
    Term("hidden_mse", 0.7),
    Term("minilm_attention", 0.9, layers=[[0, 1]]),
    Term("minilm_value", 1.1),
    Term("embedding_mse", 1.3),
]


def _model(width: int, layers: int, seed: int, heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    ))  # fmt: skip


def _batch() -> TokenBatch:
    """Eight packed rows, one of them without a loss token."""
    batch = make_batch(8, 14, seed=5)
    batch.loss_mask[3] = False
    return batch


def _rows(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    return TokenBatch(*(tensor[start:stop] for tensor in vars(batch).values()))


def _gradients(
    size: int, terms: list[Term], dtype: torch.dtype = torch.float32, recompute: bool = False
) -> tuple[tuple[float, ...], dict[str, Tensor]]:
    batch = _batch()
    with single_process_mesh() as mesh:
        teacher = Teacher(_model(32, 3, 1, heads=8).to(dtype), listening(terms, to_teacher=True))
        model = _model(16, 2, 2)
        if recompute:
            recompute_layers(model)
        student = StudentModule(model, make_projections(terms, 16, 32, seed=3)).train()
        shard(student, model.model.layers, mesh, dtype)
        found = accumulate_gradients(student, teacher, [_rows(batch, i, i + size) for i in range(0, 8, size)], terms)
        assert found.loss == pytest.approx(sum(t.weight * x for t, x in zip(terms, found.terms, strict=True)))
        gradients = {n: p.grad.full_tensor().clone() for n, p in student.named_parameters() if p.grad is not None}
    return found.terms, gradients


@pytest.mark.parametrize("size", [1, 2])
def test_gradient_is_the_same_for_every_split_projections_included(size: int) -> None:
    means, gradients = _gradients(8, EVERY)
    split_means, split = _gradients(size, EVERY)
    assert split_means == pytest.approx(means, rel=1e-5)
    assert {"projections.layer_0_to_0", "projections.layer_-1_to_-1", "projections.embedding"} <= gradients.keys()
    assert split.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (split[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_recomputed_layers_give_the_same_gradient() -> None:
    means, gradients = _gradients(4, EVERY)
    again, recomputed = _gradients(4, EVERY, recompute=True)
    assert again == means
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("name", HIDDEN)
def test_a_term_alone_trains_what_lies_below_it(name: str) -> None:
    _, gradients = _gradients(4, [Term(name)])
    assert gradients["model.model.embed_tokens.weight"].norm() > 0
    assert "model.lm_head.weight" not in gradients
    top = gradients["model.model.layers.1.mlp.down_proj.weight"].norm()
    assert (top > 0) == name.startswith("hidden"), "attention and embedding lie below the last MLP"


def test_bfloat16_is_close_to_float32() -> None:
    exact, gradients = _gradients(8, EVERY)
    rounded, others = _gradients(8, EVERY, torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=0.05, abs=1e-3)
    for name, gradient in gradients.items():
        assert others[name].dtype == torch.float32
        assert (others[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_the_step_equals_the_textbook_on_plain_models() -> None:
    """Two terms through projections, against autograd on the hidden states that transformers hands out."""
    terms = [Term("hidden_mse", 0.7, layers=[[0, 1]]), Term("embedding_mse", 1.3)]
    means, gradients = _gradients(2, terms)
    batch, teacher, student = _batch(), _model(32, 3, 1, heads=8), _model(16, 2, 2)
    projections = make_projections(terms, 16, 32, seed=3)
    arguments = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    ours, theirs = (
        [x[batch.loss_mask] for x in model.model(**arguments, output_hidden_states=True).hidden_states]
        for model in (student, teacher)
    )
    mse = [
        F.mse_loss(ours[s] @ projections[name].T, theirs[t].detach())
        for s, t, name in ((1, 2, "layer_0_to_1"), (0, 0, "embedding"))
    ]
    assert means == pytest.approx([x.item() for x in mse], rel=1e-5)
    (0.7 * mse[0] + 1.3 * mse[1]).backward()
    plain = {f"model.{n}": p for n, p in student.named_parameters()}
    plain |= {f"projections.{n}": p for n, p in projections.items()}
    for name, parameter in plain.items():
        if parameter.grad is not None and parameter.grad.any():
            assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_a_model_against_itself_is_zero() -> None:
    model = _model(32, 3, 1)
    student = StudentModule(copy.deepcopy(model))
    terms = [replace(term, layers=[[0, 0], [-1, -1]]) if term.layers else term for term in EVERY]
    found = accumulate_gradients(student, Teacher(model, listening(terms, to_teacher=True)), [_batch()], terms)
    assert found.terms == pytest.approx([0] * len(terms), abs=1e-6)
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


@pytest.mark.parametrize(
    "variant", ["mistral-window", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral", "gpt_oss"]
)
def test_packed_documents_do_not_see_each_other(variant: str) -> None:
    """The sum of every term over packed rows is the sum over each document alone."""
    window = variant in ("mistral-window", "gemma2", "gpt_oss")
    terms = [term for term in EVERY if term.objective != "minilm_attention" or not window]
    if window and variant != "gpt_oss":  # which has sinks
        terms.append(Term("minilm_attention", layers=[[0, 0]]))  # of one kind
    layers = {"max_window_layers": 2} if "qwen" in variant else {}
    teacher = Teacher(make_model(variant, seed=1, **layers), listening(terms, to_teacher=True))
    student = StudentModule(make_model(variant, seed=2, **layers))
    batch = make_batch(3, 20)

    def sums(part: TokenBatch) -> Tensor:
        with torch.no_grad():
            return student(part, teacher.signal(part), terms, [1.0] * len(terms))[1].double()

    alone = torch.zeros(len(terms), dtype=torch.float64)
    for row, document in _documents_of(batch):
        alone += sums(TokenBatch(*(tensor[row : row + 1, document] for tensor in vars(batch).values())))
    torch.testing.assert_close(sums(batch), alone, rtol=1e-5, atol=1e-6)


def test_no_loss_tokens_is_zero_with_zero_gradients() -> None:
    batch = _rows(_batch(), 3, 4)
    student = StudentModule(_model(16, 2, 2), make_projections(EVERY, 16, 32, seed=3))
    teacher = Teacher(_model(32, 3, 1, heads=8), listening(EVERY, to_teacher=True))
    found = accumulate_gradients(student, teacher, [batch], EVERY)
    assert found.loss == 0
    assert not any(p.grad.any() for p in student.parameters())


def test_projections_depend_on_the_seed_alone_and_exist_only_between_widths() -> None:
    torch.manual_seed(7)
    one = make_projections(EVERY, 16, 32, seed=3)
    torch.rand(3)
    other = make_projections(list(reversed(EVERY)), 16, 32, seed=3)
    assert [tuple(p.shape) for p in one.values()] == [(32, 16)] * 3
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["embedding"], make_projections(EVERY, 16, 32, seed=4)["embedding"])
    assert not list(make_projections(EVERY, 32, 32, seed=3))
    kept = torch.randperm(32)[:16]
    hidden = torch.randn(5, 32)
    for start in make_projections(EVERY, 16, 32, seed=3, kept_D=kept).values():
        mapped = hidden[:, kept] @ start.T
        assert torch.equal(mapped[:, kept], hidden[:, kept])
        assert mapped.count_nonzero() == 5 * 16
    assert not list(make_projections([Term("forward_kl"), Term("minilm_value")], 16, 32, seed=3))


# -- on ranks


def _write_differences(folder: Path) -> None:
    """Of the gradient of each rank's half, sharded, from the whole batch's on one plain model: relative, by tensor."""
    differences = {}
    inner = Term("minilm_attention", layers=[[0, 0]])  # from within a layer, whose own output then has no gradient
    for terms in (EVERY, [inner]):
        ranks = launched()
        found = []
        for mesh, own in ((init_device_mesh("cpu", (ranks.size,)), ranks), (None, ALONE)):
            model = _model(16, 2, 2)
            student = StudentModule(model, make_projections(terms, 16, 32, seed=3)).train()
            if mesh is not None:
                shard(student, model.model.layers, mesh, torch.float32)
            teacher = Teacher(_model(32, 3, 1, heads=8), listening(terms, to_teacher=True))
            parts = [_rows(_batch(), i, i + 2) for i in range(own.rank * 4, own.rank * 4 + 8 // own.size, 2)]
            means = accumulate_gradients(student, teacher, parts, terms, own).terms
            gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            found.append((means, {n: g.full_tensor() if mesh is not None else g for n, g in gradients.items()}))
        (means, gradients), (alone, whole) = found
        assert means == pytest.approx(alone, rel=1e-5)
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            size = gradient.norm().clamp_min(1e-30)  # of one that is all zeros too: then so must the other be
            differences[f"{len(terms)} terms, {name}"] = (gradients[name] - gradient).norm() / size
    save_file(differences, folder / f"{launched().rank}.safetensors")


@pytest.mark.slow
def test_gradient_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, _write_differences, tmp_path)
    for rank in range(2):
        differences = load_file(tmp_path / f"{rank}.safetensors")
        assert any("projections" in name for name in differences)
        for name, difference in differences.items():
            assert difference <= 1e-5, (rank, name)

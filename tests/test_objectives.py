"""The chunked objective equals the textbook formula, value and gradients, however it is cut."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.comparison import compare, compare_chunk
from compress.config import load_config
from compress.errors import ConfigError
from compress.models import OutputHead
from compress.objectives import distillation_loss
from compress.objectives.chunked import DenseSignal, Targets, chunked_loss
from compress.objectives.forward_kl import forward_kl_
from compress.objectives.table import OBJECTIVES, combines_with, markdown
from compress.objectives.terms import OPTIONS, Rows, Term
from compress.settings import ObjectiveName


def _case(tokens: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, 7), (vocabulary, 7), (tokens, 5), (vocabulary, 5)
    student, head, teacher, teacher_head = (torch.randn(*size, generator=generator, dtype=dtype) for size in sizes)
    return [student.requires_grad_(), head.requires_grad_(), teacher, teacher_head]


def _textbook(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student @ head.T / temperature, -1)
    log_p = F.log_softmax(teacher @ teacher_head.T / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(2, 60), st.integers(1, 50), st.integers(1, 20), st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_equals_the_textbook_for_every_chunk(
    tokens: int, vocabulary: int, chunk: int, rows: int, temperature: float, seed: int
) -> None:
    """However many tokens a chunk has, and the products within it."""
    case = _case(tokens, vocabulary, seed=seed)
    with mock.patch("compress.objectives.chunked.rows_per_product", return_value=rows):
        ours = distillation_loss(*case, temperature=temperature, chunk_tokens=chunk)
    expected = _textbook(*case, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(
        torch.autograd.grad(ours * 0.37, case[:2]), torch.autograd.grad(expected * 0.37, case[:2]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_gradient_by_finite_differences() -> None:
    student, head, teacher, teacher_head = _case(6, 11)
    gradients = torch.autograd.grad(
        distillation_loss(student, head, teacher, teacher_head, chunk_tokens=4), [student, head]
    )
    with torch.no_grad():
        for seed in range(5):
            torch.manual_seed(seed)
            step = [1e-5 * torch.randn_like(student), 1e-5 * torch.randn_like(head)]
            up, down = (
                distillation_loss(student + sign * step[0], head + sign * step[1], teacher, teacher_head).item()
                for sign in (1, -1)
            )
            slope = sum((g * d).sum().item() for g, d in zip(gradients, step, strict=True))
            assert (up - down) / 2 == pytest.approx(slope, rel=1e-6)


def test_a_second_backward_is_refused() -> None:
    """The gradient is scaled in place: silently wrong the second time, so it must be loud."""
    student, head, teacher, teacher_head = _case(3, 5)
    loss = distillation_loss(student, head, teacher, teacher_head)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


def test_many_blocks_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache-sized blocks inside a chunk change nothing: here 2 rows a block, the last of them 1."""
    case = _case(9, 13)
    whole = distillation_loss(*case)
    monkeypatch.setattr("compress.objectives.forward_kl.block_rows", lambda _: 2)
    blocks = distillation_loss(*case)
    torch.testing.assert_close(whole, blocks, rtol=1e-12, atol=0)


def test_teacher_against_itself_is_zero_and_so_is_its_gradient() -> None:
    student, head, *_ = _case(8, 20)
    loss = distillation_loss(student, head, student.detach(), head.detach())
    assert abs(loss.item()) < 1e-12
    for gradient in torch.autograd.grad(loss, [student, head]):
        assert gradient.abs().max() < 1e-12


def test_a_split_into_micro_batches_adds_up() -> None:
    student, head, teacher, teacher_head = _case(12, 20)
    whole = torch.autograd.grad(distillation_loss(student, head, teacher, teacher_head), [student, head])
    parts = [slice(0, 1), slice(1, 1), slice(1, 8), slice(8, 12)]
    losses = [distillation_loss(student[p], head, teacher[p], teacher_head) for p in parts]
    for mine, theirs in zip(torch.autograd.grad(sum(losses, torch.zeros(())), [student, head]), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_no_tokens_is_zero_with_zero_gradients() -> None:
    student, head, teacher, teacher_head = _case(1, 20)
    loss = distillation_loss(student[:0], head, teacher[:0], teacher_head)
    gradients = torch.autograd.grad(loss, [student, head])
    assert loss.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_masked_teacher_rows_of_the_vocabulary_are_harmless() -> None:
    """A teacher logit of -inf (a banned token) has probability 0: finite value, finite gradient."""
    student, head, teacher, teacher_head = _case(5, 12)
    teacher = torch.cat([teacher.detach(), torch.ones(5, 1, dtype=torch.float64)], 1)
    teacher_head = torch.cat([teacher_head, torch.zeros(12, 1, dtype=torch.float64)], 1)
    teacher_head[3, -1] = -torch.inf
    loss = distillation_loss(student, head, teacher, teacher_head)
    keep = [v for v in range(12) if v != 3]
    log_q = F.log_softmax(student @ head.T, -1)[:, keep]
    log_p = F.log_softmax(teacher @ teacher_head[keep].T, -1)
    torch.testing.assert_close(loss, F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [student, head]))


def test_bfloat16_inputs_keep_the_divergence_in_float32() -> None:
    """Against the textbook on the same bfloat16-rounded logits: the softmax and the sum must not lose bits."""
    case = [t.detach().to(torch.bfloat16).requires_grad_(i < 2) for i, t in enumerate(_case(64, 500))]
    loss = distillation_loss(*case)
    assert loss.dtype == torch.float32
    log_q = F.log_softmax((case[0] @ case[1].T).double(), -1)
    log_p = F.log_softmax((case[2] @ case[3].T).double(), -1)
    expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()


ON_LOGITS = [name for name, objective in OBJECTIVES.items() if objective.function is not None]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "objectives.json").read_text())


def _term(text: str) -> Term:
    """A term from `bild k=4 temperature=3`."""
    name, *options = text.split()
    found = {key: float(value) if key != "k" else int(value) for key, value in (o.split("=") for o in options)}
    return Term(name, **found)  # type: ignore[arg-type]


def _of_logits(
    student_NV: Tensor, teacher_NV: Tensor | None, terms: list[Term], labels_N: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`chunked_loss` on logits as they are: hidden states through the identity."""
    count, vocabulary = student_NV.shape
    head = OutputHead(torch.eye(vocabulary, dtype=student_NV.dtype))
    labels_N = torch.zeros(count, dtype=torch.int64) if labels_N is None else labels_N
    paired_N = options.pop("paired_N", torch.ones(count, dtype=torch.bool))
    signal = None if teacher_NV is None else DenseSignal(teacher_NV, head)
    return chunked_loss(student_NV, head, signal, Targets(labels_N, paired_N), terms, **options)


@pytest.mark.parametrize("text", GOLDEN["per_token"])
def test_golden_numbers(text: str) -> None:
    """What numpy makes of the papers' formulas, token by token: tests/golden/regenerate.py."""
    student, teacher = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("student", "teacher"))
    labels = torch.tensor(GOLDEN["labels"])
    for row, expected in enumerate(GOLDEN["per_token"][text]):
        here = slice(row, row + 1)
        logits = student[here].clone().requires_grad_()
        loss, _ = _of_logits(logits, teacher[here], [_term(text)], labels[here])
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        if text in GOLDEN["gradient"]:  # by central differences of the formula
            [gradient] = torch.autograd.grad(loss, [logits])
            assert gradient[0].tolist() == pytest.approx(GOLDEN["gradient"][text][row], abs=1e-8)


def test_golden_previous_self() -> None:
    """DLB: cross-entropy and 3**2 KL at temperature 3 against what the model itself said before."""
    student, previous = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("student", "previous"))
    terms = [Term("cross_entropy"), Term("forward_kl", temperature=3, squared=True)]
    golden = GOLDEN["previous_self"]
    for row, label in enumerate(GOLDEN["labels"]):
        logits = student[row : row + 1].clone().requires_grad_()
        scales = [term.factor for term in terms]
        loss, sums = _of_logits(logits, previous[row : row + 1], terms, torch.tensor([label]), scales=scales)
        assert sums[1].item() == pytest.approx(golden["kl temperature=3"][row], rel=1e-9)
        assert loss.item() == pytest.approx(golden["dlb"][row], rel=1e-9)
        [gradient] = torch.autograd.grad(loss, [logits])
        assert gradient[0].tolist() == pytest.approx(golden["dlb gradient"][row], abs=1e-8)


def test_golden_span() -> None:
    student, teacher = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("student", "teacher"))
    loss, _ = _of_logits(student, teacher, [Term("span_relation")])
    assert loss.item() == pytest.approx(GOLDEN["span_relation"], rel=1e-9)


def _naive(term: Term, student: Tensor, teacher: Tensor, labels: Tensor, paired: Tensor) -> Tensor:
    """The objective's formula in plain torch, summed over tokens, for autograd to differentiate."""
    z, t = student / term.temperature, teacher / term.temperature
    p, q = t.softmax(-1), z.softmax(-1)

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one.log() - other.log())).sum(-1)

    if term.objective == "forward_kl":
        return kl(p, q).sum()
    if term.objective == "reverse_kl":
        return kl(q, p).sum()
    if term.objective == "jensen_shannon":
        m = term.beta * p + (1 - term.beta) * q
        return (term.beta * kl(p, m) + (1 - term.beta) * kl(q, m)).sum()
    if term.objective == "skew_kl":
        return kl(p, term.skew * p + (1 - term.skew) * q).sum()
    if term.objective == "skew_reverse_kl":
        return kl(q, (1 - term.skew) * p + term.skew * q).sum()
    if term.objective == "total_variation":
        return (p - q).abs().sum() / 2
    if term.objective == "adaptive_kl":
        ordered, order = p.sort(-1, descending=True)
        head = ordered.cumsum(-1) <= term.head_mass
        head[:, 0] = True
        gap = (p - q).abs().detach().gather(-1, order)
        share = (gap * head).sum(-1) / gap.sum(-1)
        return (share * kl(p, q) + (1 - share) * kl(q, p)).sum()
    if term.objective == "top_k_kl":
        ids = t.topk(term.k).indices
        whole = [x.gather(-1, ids) for x in (p, q)]
        one, other = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in whole)
        return kl(one, other).sum()
    if term.objective == "bild":
        total = torch.zeros((), dtype=z.dtype)
        for leader in (t, z.detach()):
            ids = leader.topk(term.k).indices
            ours, theirs = z.gather(-1, ids), t.gather(-1, ids)
            pairs = [(i, j) for i in range(term.k) for j in range(i + 1, term.k)]
            differences = [torch.stack([x[:, i] - x[:, j] for i, j in pairs], -1).softmax(-1) for x in (theirs, ours)]
            total = total + kl(*differences).sum()
        return total
    if term.objective == "dac_kl":
        low, high = (torch.quantile(p, x, dim=-1, keepdim=True) for x in (term.lower_quantile, term.upper_quantile))
        kept = (p >= low) & (p <= high) | (p == p.amax(-1, keepdim=True))
        one, other = (x.masked_fill(~kept, -1e30).softmax(-1) for x in (t, z))
        return torch.where(kept, one * (one.clamp_min(1e-300).log() - other.clamp_min(1e-300).log()), 0).sum()
    if term.objective == "span_relation":
        error = p[:-1] * p[1:] - q[:-1] * q[1:]
        return (error.square().sum(-1) * paired[:-1]).sum()
    if term.objective == "uncertainty_kl":
        weight = -(q * q.log()).sum(-1).detach() / math.log(q.shape[-1])
        return (weight * kl(p, q)).sum()
    if term.objective == "dynamic_kl":
        certainty = 1 + (p * p.log()).sum(-1, keepdim=True) / math.log(p.shape[-1])
        two = p.topk(2, -1).values
        tau = 1 + (term.max_temperature - 1) * (two[:, :1] - two[:, 1:])
        return ((certainty * tau**2)[:, 0] * kl((t / tau).softmax(-1), (z / tau).softmax(-1))).sum()
    if term.objective == "cross_entropy":
        return F.cross_entropy(z, labels, reduction="sum")
    assert term.objective == "label_smoothing", term.objective
    target = (1 - term.smoothing) * F.one_hot(labels, z.shape[-1]).to(z.dtype) + term.smoothing * p
    return -(target * q.log()).sum()


@pytest.mark.parametrize("name", ON_LOGITS)
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(9, 40), st.integers(1, 50), st.integers(1, 20), st.sampled_from([0.7, 1.0, 3.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_objective_is_its_formula_and_gradient_for_every_chunk(
    name: str, tokens: int, vocabulary: int, chunk: int, rows: int, temperature: float, seed: int
) -> None:
    """Value and both gradients, through bias, scale and soft cap, against autograd on whole logits."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (x.requires_grad_() for x in (make(tokens, 7), make(vocabulary, 7), make(vocabulary)))
    teacher_hidden, teacher_head = make(tokens, 5), OutputHead(make(vocabulary, 5), 20.0, make(vocabulary), 0.5)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    paired = torch.rand(tokens, generator=generator) < 0.7
    term = Term(name, temperature=temperature, k=5, lower_quantile=0.3, upper_quantile=0.9, beta=0.3, smoothing=0.4)
    head = OutputHead(weight, 15.0, bias, 0.8)
    with mock.patch("compress.objectives.chunked.rows_per_product", return_value=rows):
        loss, sums = chunked_loss(
            hidden, head, DenseSignal(teacher_hidden, teacher_head), Targets(labels, paired), [term], [0.37],
            chunk_tokens=chunk,
        )  # fmt: skip
    logits = 15 * torch.tanh((hidden @ weight.T + bias) * 0.8 / 15)
    teacher = 20 * torch.tanh((teacher_hidden @ teacher_head.weight_VD.T + teacher_head.bias_V) * 0.5 / 20)
    expected = _naive(term, logits, teacher, labels, paired)
    torch.testing.assert_close(sums[0], expected, rtol=1e-8, atol=1e-10)
    inputs = [hidden, weight, bias]
    theirs = torch.autograd.grad(0.37 * expected, inputs, allow_unused=True)
    for mine, other in zip(torch.autograd.grad(loss, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ON_LOGITS if not OBJECTIVES[name].labels_only])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_teacher_that_is_not_finite_shows(name: str, wrong: float) -> None:
    """In the loss or its gradient, by one logit of one token: a run must not learn nothing without a word."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 40)
    teacher[2, 9] = wrong
    labels, function = torch.zeros(6, dtype=torch.int64), OBJECTIVES[name].function
    assert function is not None
    loss, gradient = function(Rows(student, teacher, labels, torch.ones(6, dtype=torch.bool)), Term(name, k=5))
    assert not bool(loss.sum().isfinite() & gradient.isfinite().all())
    assert not compare_chunk(teacher.softmax(-1), teacher.log_softmax(-1), student.log_softmax(-1), labels)[
        0
    ].isfinite()


def test_a_sum_of_terms_is_their_weighted_sum() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 40, dtype=torch.float64, requires_grad=True), torch.randn(30, 40).double()
    labels = torch.randint(0, 40, (30,))
    terms = [Term(name, temperature=1 + n % 3, k=5) for n, name in enumerate(ON_LOGITS)]
    scales = [0.5 + n for n in range(len(terms))]
    whole, sums = _of_logits(student, teacher, terms, labels, scales=scales, chunk_tokens=7)
    [gradient] = torch.autograd.grad(whole, [student])
    expected = torch.zeros_like(gradient)
    for number, (term, scale) in enumerate(zip(terms, scales, strict=True)):
        alone, _ = _of_logits(student, teacher, [term], labels, scales=[scale])
        assert sums[number].item() == pytest.approx(alone.item() / scale, rel=1e-10)
        expected += torch.autograd.grad(alone, [student])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ON_LOGITS if not OBJECTIVES[name].labels_only])
def test_a_divergence_of_a_model_from_itself_is_zero(name: str) -> None:
    """And so is its gradient; label smoothing is 0 in its gradient alone, and only where the label doesn't count."""
    logits = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    loss, _ = _of_logits(logits, logits.detach(), [Term(name, smoothing=1.0)])
    if name != "label_smoothing":
        assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, [logits])[0].abs().max() < 1e-12


def test_limits_lead_to_each_other() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(20, 30).double(), torch.randn(20, 30).double()

    def value(name: str, **options: Any) -> float:
        return float(_of_logits(student, teacher, [Term(name, **options)])[0].item())

    forward = value("forward_kl")
    assert value("skew_kl", skew=0.0) == pytest.approx(forward, rel=1e-12)
    assert value("skew_kl", skew=1.0) == pytest.approx(0, abs=1e-12)
    assert value("dac_kl") == pytest.approx(forward, rel=1e-12)
    assert value("top_k_kl", k=30) == pytest.approx(forward, rel=1e-9)
    assert value("skew_reverse_kl", skew=0.0) == pytest.approx(value("reverse_kl"), rel=1e-12)
    assert value("label_smoothing", smoothing=0.0) == pytest.approx(value("cross_entropy"), rel=1e-12)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_shift_of_the_logits_changes_nothing(name: str) -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(10, 30).double(), torch.randn(10, 30).double()
    term = [Term(name)]
    shifted, _ = _of_logits(student + 5, teacher - 3, term)
    torch.testing.assert_close(shifted, _of_logits(student, teacher, term)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_far_apart_stays_finite_in_float32(name: str) -> None:
    """Probabilities that underflow, on either side: value and gradient are numbers."""
    student = torch.zeros(4, 50).index_fill_(1, torch.tensor([3]), 200.0).requires_grad_()
    teacher = torch.zeros(4, 50).index_fill_(1, torch.tensor([7]), 200.0)
    loss, _ = _of_logits(student, teacher, [Term(name)])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, [student])[0].isfinite().all()


def test_ties_are_taken_by_id() -> None:
    """bfloat16 heads give equal logits; which comes first decides the sign of BiLD's differences."""
    teacher = torch.tensor([[2.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.5, 0.2, 0.9, -0.3]], dtype=torch.float64)
    loss, _ = _of_logits(student, teacher, [Term("bild", k=3, temperature=3.0)])
    assert loss.item() == pytest.approx(GOLDEN["tie"], rel=1e-9)


def test_no_tokens_is_zero_with_zero_gradients_for_every_objective() -> None:
    student = torch.randn(0, 30, requires_grad=True)
    loss, sums = _of_logits(student, torch.randn(0, 30), [Term(name) for name in ON_LOGITS])
    assert loss.item() == 0
    assert not sums.any()
    loss.backward()


def test_the_settings_name_every_objective() -> None:
    assert [str(name) for name in ObjectiveName] == list(OBJECTIVES)
    for objective in OBJECTIVES.values():
        assert set(objective.options) <= set(OPTIONS)


def test_the_docs_print_the_tables() -> None:
    assert markdown() in (REPOSITORY / "docs" / "objectives.md").read_text()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_config_refuses_exactly_what_the_table_calls_no(name: str) -> None:
    """Alone, or beside cross-entropy where the model's own earlier word needs it."""
    settings = {
        "online": ("teacher.mode=online",),
        "cache: sample": ("teacher.mode=cached",),
        "cache: top_k": ("teacher.mode=cached", "cache.kind=top_k"),
        "previous self": ("teacher.mode=previous_self",),
        "compile, search": ("distill.compile=true",),
    }
    table = combines_with(OBJECTIVES[name])
    assert table.keys() == settings.keys()
    for column, chosen in settings.items():
        beside = ",{objective: cross_entropy}" if column == "previous self" else ""
        terms = f"distill.objectives=[{{objective: {name}}}{beside}]"
        expectation = contextlib.nullcontext() if table[column] else pytest.raises(ConfigError)
        with expectation:
            load_config("recipe=tiny", "distill.micro_batch_size=1", terms, *chosen)


def test_a_banned_token_is_measured_as_it_is_trained() -> None:
    """A teacher's logit of -inf: validation's KL is the objective's, and a number."""
    torch.manual_seed(3)
    teacher, student = torch.randn(5, 30), torch.randn(5, 30)
    teacher[:, 4] = -torch.inf
    head = OutputHead(torch.eye(30))
    banned = OutputHead(torch.eye(30), bias_V=torch.zeros(30).index_fill_(0, torch.tensor([4]), -torch.inf))
    signal = DenseSignal(torch.where(teacher.isinf(), 0.0, teacher), banned)
    kl, _, _ = compare(student, head, signal, torch.zeros(5, dtype=torch.int64)).tolist()
    targets = Targets(torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool))
    assert kl == pytest.approx(chunked_loss(student, head, signal, targets, [Term("forward_kl")])[0].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="a compiled kernel needs g++")
def test_the_compiled_kernel_is_the_plain_one() -> None:
    """Loss and gradient of forward KL in blocks of 16 rows, a token banned by the teacher among them."""
    torch.manual_seed(4)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
        student, teacher = 5 * torch.randn(2, 150, 333, dtype=torch.float64)
        teacher[3, 7] = -torch.inf
        for temperature, scale in ((1.0, 1.0), (3.0, 0.7)):
            plain, compiled = (student.to(dtype, copy=True) for _ in range(2))
            expected = forward_kl_(plain, teacher.to(dtype), temperature, scale)
            found = forward_kl_(compiled, teacher.to(dtype), temperature, scale, compiled=True)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            assert float((compiled - plain).norm() / plain.norm()) < max(tolerance, torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled kernels need g++")
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("tokens", [0, 40, 80, 100])  # no chunk, one, two and three
def test_the_compiled_loss_is_the_plain_one(tokens: int, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where with AMX the head's gradient comes from turned products."""
    monkeypatch.setattr("compress.objectives.chunked.cpu_has", lambda _: amx)
    torch.manual_seed(5)
    made = [torch.randn(*size).bfloat16() for size in ((tokens, 24), (77, 24), (tokens, 16), (77, 16))]
    hidden, weight = (x.requires_grad_() for x in made[:2])
    signal = DenseSignal(made[2], OutputHead(made[3]))
    targets = Targets(torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.bool))
    found = []
    for compiled in (False, True):
        loss, sums = chunked_loss(
            hidden, OutputHead(weight), signal, targets, [Term("forward_kl")], [0.5], chunk_tokens=40, compiled=compiled
        )
        found.append((sums, *torch.autograd.grad(loss, [hidden, weight])))
    for plain, other in zip(*found, strict=True):
        assert plain.shape == other.shape
        assert float((plain - other).norm()) <= 4e-3 * float(plain.norm())

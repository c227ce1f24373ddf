"""The chunked objective equals the textbook formula, value and gradients, however it is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.objectives import distillation_loss


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
@given(st.integers(1, 40), st.integers(2, 60), st.integers(1, 50), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 99))
def test_equals_the_textbook_for_every_chunk(
    tokens: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    case = _case(tokens, vocabulary, seed=seed)
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
    monkeypatch.setattr("compress.objectives._block_rows", lambda _: 2)
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


def test_published_vector() -> None:
    """KL(teacher || student) of the plain_divergences vector, at temperatures 1 and 3 (identity heads)."""
    vector = json.loads((Path(__file__).parent / "golden" / "plain_divergences.json").read_text())
    teacher, student = (torch.tensor(vector[k], dtype=torch.float64).reshape(-1, 8) for k in ("teacher", "student"))
    eye = torch.eye(8, dtype=torch.float64)
    for temperature, expected in vector["forward_kl_mean"].items():
        loss = distillation_loss(student, eye, teacher, eye, temperature=float(temperature))
        assert loss.item() / len(student) == pytest.approx(expected, rel=1e-9)

"""The model's own earlier word as a teacher: the overlapping sampler, and that it is of before the update."""

from __future__ import annotations

import pytest
import torch
from families import make_batch, make_model, rows

from compress.models import OutputHead, output_head
from compress.objectives.terms import Term
from compress.step import StudentModule, accumulate_gradients, trunk
from compress.teacher import PreviousSelf, overlapping


def test_the_sampler_repeats_the_fresh_half() -> None:
    """The vector dlb_half_overlap_sampler: order 0..9, n = 2 -> [01], [01|23], [23|45], ..."""
    draws = [tuple(map(list, overlapping(step, 2))) for step in range(5)]
    assert draws == [([], [0, 1]), ([0, 1], [2, 3]), ([2, 3], [4, 5]), ([4, 5], [6, 7]), ([6, 7], [8, 9])]


@pytest.mark.parametrize("size", [1, 2])
def test_its_word_is_of_before_the_update(size: int) -> None:
    """Over three steps, against the textbook: temperature**2 KL(what it said then || what it says now) on the repeated
    half, cross-entropy on both; the same for every micro-batch size."""
    model, whole = make_model("llama", dtype=torch.float64), make_batch(8, 12, padded=True)
    student, previous = StudentModule(model), PreviousSelf()
    terms = [Term("cross_entropy"), Term("forward_kl", temperature=3.0, squared=True)]
    said: dict[int, torch.Tensor] = {}
    for step in range(3):
        repeated, fresh = overlapping(step, 2)
        window = [rows(whole, i, i + size) for draws in (repeated, fresh) for i in draws[::size]]
        previous.begin(window, len(repeated))
        hidden: list[torch.Tensor] = []
        found = accumulate_gradients(student, previous, window, terms, keep=hidden)
        with torch.no_grad():
            one = {i: rows(whole, i, i + 1) for i in (*repeated, *fresh)}
            logits = {i: _logits(model, batch) for i, batch in one.items()}
        assert found.num_tokens == sum(len(x) for x in logits.values())
        if step:
            now, then = (torch.cat([x[i] for i in repeated]) / 3 for x in (logits, said))
            p, q = then.softmax(-1), now.softmax(-1)
            expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
            assert expected > 1e-6  # the step between has changed it
            assert 9 * found.terms[1] == pytest.approx(expected.item(), rel=1e-9)
        else:
            assert found.terms[1] == 0
        said = logits
        head = output_head(model)
        previous.remember(window, hidden, OutputHead(head.weight_VD.detach().clone()))
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert set(previous.state()) == {"previous/hidden", "previous/weight"}


def _logits(model: torch.nn.Module, batch: object) -> torch.Tensor:
    hidden_ND = trunk(model, batch)[batch.loss_mask]  # type: ignore[arg-type,attr-defined]
    return hidden_ND @ output_head(model).weight_VD.T  # type: ignore[arg-type]

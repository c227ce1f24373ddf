"""The step's selftest holds for models that are right, and says what is wrong with those that aren't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from families import VARIANTS, make_batch, make_model

from compress import objectives, step, steptest
from compress.errors import NumericalError
from compress.models import OutputHead
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Term
from compress.steptest import own_text, properties
from compress.tokens import TokenBatch


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_property_holds_for_every_family(variant: str, tmp_path: Path) -> None:
    teacher, student = (make_model(variant, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    terms = [Term("forward_kl"), Term("cross_entropy", weight=0.1)]
    batch = own_text(tmp_path, teacher.config.vocab_size)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    wrong = {}
    for name, measure in properties(teacher, student, batch, terms):
        error, allowed = measure()
        if not error <= allowed:
            wrong[name] = error
    assert wrong == {}
    for name, tensor in student.state_dict().items():  # of the same dtype too
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_every_objective_is_tried() -> None:
    teacher, student = make_model("llama", dtype=torch.float32), make_model("qwen3", dtype=torch.float32)
    names = []
    terms = [Term(name) for name in OBJECTIVES]
    for name, measure in properties(teacher, student, make_batch(), terms):
        error, allowed = measure()
        assert error <= allowed, name
        names.append(name)
    of_logits = [objective for objective in OBJECTIVES.values() if objective.function is not None]
    assert len(names) == 5 + sum(1 if objective.detached else 2 for objective in of_logits)


@pytest.mark.slow
def test_every_line_finds_what_it_is_for(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("until=prune")

    def found() -> str:
        with pytest.raises(NumericalError) as caught:
            run("stage=selftest")
        return str(caught.value)

    run("stage=selftest")
    right = step.targets_of
    monkeypatch.setattr(steptest, "targets_of", lambda batch, pairs: _shifted(right(batch, pairs)))
    assert "shift are transformers' own" in found()
    monkeypatch.undo()
    monkeypatch.setattr(step, "_counts", lambda window, *_: ([1.0 / len(window)], 1, 1))
    assert "the same for every split" in found()
    monkeypatch.undo()
    sound = objectives.chunked.forward_kl_
    for broken, line in (
        (lambda s, t, temperature, scale, *_: sound(s, t, temperature, 1.1 * (scale or 1)), "finite differences"),
        (lambda s, t, temperature, scale, *_: sound(s, t, temperature, scale) + 1e-3, "KL(teacher, teacher) is 0"),
        (lambda s, *more: sound(s, *more) * (1 if s.dtype is torch.float64 else 1.01), "float32 is float64"),
    ):
        monkeypatch.setattr(objectives.chunked, "forward_kl_", broken)
        assert line in found()
        monkeypatch.undo()
    product = objectives.chunked._plus_product
    monkeypatch.setattr(objectives.chunked, "_plus_product", lambda *more, **last: 1.1 * product(*more, **last))
    assert "finite differences" in found()
    monkeypatch.undo()
    own = steptest.without_padding
    monkeypatch.setattr(steptest, "without_padding", lambda one, other: tuple(map(_turned, own(one, other))))
    assert "padding of the vocabulary" in found()
    monkeypatch.undo()
    apart = steptest.trunk
    monkeypatch.setattr(steptest, "trunk", lambda model, batch: apart(model, _leaking(batch)))
    assert "packed documents are as each alone" in found()


def _turned(head: OutputHead) -> OutputHead:
    return replace(head, weight_VD=head.weight_VD.roll(1, 1))


def _leaking(batch: TokenBatch) -> TokenBatch:
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))


def _shifted(targets: objectives.Targets) -> objectives.Targets:
    return objectives.Targets(targets.labels_N.roll(1), targets.paired_N)

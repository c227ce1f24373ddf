"""The step's selftest holds for models that are right, and says what is wrong with those that aren't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from families import VARIANTS, make_batch, make_model

from compress import objectives, step, steptest
from compress.errors import NumericalError
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Term
from compress.steptest import own_text, properties


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_property_holds_for_every_family(variant: str, tmp_path: Path) -> None:
    teacher, student = (make_model(variant, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    terms = [Term("forward_kl"), Term("cross_entropy", weight=0.1)]
    batch = own_text(tmp_path, teacher.config.vocab_size)
    wrong = {}
    for name, measure in properties(teacher, student, batch, terms):
        error, allowed = measure()
        if not error <= allowed:
            wrong[name] = error
    assert wrong == {}


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


def test_a_wrong_shift_a_wrong_count_and_a_wrong_gradient_are_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(step, "_counts", lambda window, *_: ([1.0 / len(window)], 1))
    assert "the same for every split" in found()
    monkeypatch.undo()
    wrong = objectives.chunked.forward_kl_
    monkeypatch.setattr(
        objectives.chunked,
        "forward_kl_",
        lambda s, t, temperature, scale, *_: wrong(s, t, temperature, 1.1 * (scale or 1)),
    )
    assert "finite differences" in found()


def _shifted(targets: objectives.Targets) -> objectives.Targets:
    return objectives.Targets(targets.labels_N.roll(1), targets.paired_N)

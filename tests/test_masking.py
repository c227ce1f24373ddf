"""The masked teacher of the program is the one silenced by hand, and leaves the teacher as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VARIANTS, axes_of, logits, make_batch, make_model, rows, save_model, student_sizes
from test_slicing import CUTS, assert_same, keep
from test_slicing import masked as by_hand

from compress.architecture import shape_of
from compress.compensation import compensated_weights
from compress.masking import masked
from compress.models import load_model
from compress.slicing import slice_checkpoint


@pytest.mark.parametrize(("variant", "axis"), CUTS)
def test_the_masked_teacher_is_the_one_silenced_by_hand(variant: str, axis: str) -> None:
    model, batch = make_model(variant), make_batch()
    before, parameters = logits(model, batch), {n: p.clone() for n, p in model.named_parameters()}
    kept = keep(model, axes_of(variant)[axis])
    expected = logits(by_hand(model, kept), batch)
    with masked(model, kept) as silenced:
        found = logits(silenced, batch)
    assert_same(expected, found)
    assert (expected - before).abs().max() > 0.1, "the mask changed nothing"
    assert torch.equal(logits(model, batch), before), "the teacher is itself again"
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert shape_of(model.config).num_hidden_layers == 5


def test_an_error_inside_leaves_the_teacher_as_it_was() -> None:
    model, batch = make_model("gpt_oss"), make_batch()
    before = logits(model, batch)
    with pytest.raises(ZeroDivisionError), masked(model, keep(model, student_sizes("gpt_oss"))):
        _ = 1 / 0
    assert torch.equal(logits(model, batch), before)


def fold(model: Any, replaced: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Put full-size weights in place of the teacher's own; returns what takes them out again."""
    before = {name: model.get_parameter(name).detach().clone() for name in replaced}

    def write(values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)

    write(replaced)
    return lambda: write(before)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "moe" not in v and v not in ("mixtral", "gpt_oss")])
def test_folded_weights_are_masked_as_they_are_sliced(variant: str, tmp_path: Path) -> None:
    model, batch = make_model(variant), make_batch(16, padded=True)
    before = logits(model, batch)
    kept = keep(model, student_sizes(variant))
    folded = compensated_weights(model, [rows(batch, 0, 5), rows(batch, 5, 16)], kept)
    assert len(folded) == 2 * 3, "down and output projection of three kept layers"
    slice_checkpoint(save_model(tmp_path / "teacher", model), tmp_path / "student", kept, replaced=folded)
    student = load_model(tmp_path / "student", torch.float64)
    undo = fold(model, folded)
    with masked(model, kept):
        assert_same(logits(model, batch), logits(student, batch))
    undo()
    assert torch.equal(logits(model, batch), before)

"""A model seen one layer at a time is the model: scores bit for bit, logits too, with a layer in memory."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from families import VARIANTS, logits, make_batch, make_model, rows, save_model

from compress.artifacts import open_tensors
from compress.criteria import AGGREGATIONS
from compress.errors import ArtifactError, NumericalError
from compress.folders import read_model
from compress.importance import estimate_importance, stream_importance
from compress.streaming import LayerStream, States, through_layer

PAIRS = [f"activation:{batch}/{sequence}" for batch, sequence in product(AGGREGATIONS, AGGREGATIONS)]
CRITERIA = [*PAIRS, "weighted_activation:l2/l2"]


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_scores_are_those_of_the_whole_model(variant: str, spilled: bool, tmp_path: Path) -> None:
    model, batch = make_model(variant, dtype=torch.float32), make_batch(6, 12, padded=True)
    parts = [rows(batch, 0, 1), rows(batch, 1, 4), rows(batch, 4, 6)]
    info = read_model(save_model(tmp_path / "teacher", model))
    expected = estimate_importance(model, parts, CRITERIA)
    spill = tmp_path / "spill" if spilled else None
    found = stream_importance(info, torch.float32, parts, CRITERIA, spill=spill)
    assert list(found.widths) == CRITERIA
    for criterion, axes in expected.widths.items():
        for axis, scores in axes.items():
            assert torch.equal(scores, found.widths[criterion][axis]), (criterion, axis)
    assert torch.equal(expected.block_influence_L, found.block_influence_L)
    assert expected.depths == found.depths
    assert (found.num_sequences, found.num_tokens) == (expected.num_sequences, expected.num_tokens)
    assert not list((tmp_path / "spill").glob("*")), "the spilled states are gone"


@pytest.mark.parametrize(("variant", "tied"), [(v, t) for v in VARIANTS for t in (False, True)])
@torch.no_grad()
def test_the_layers_in_turn_are_the_model(variant: str, tied: bool, tmp_path: Path) -> None:
    model, batch = make_model(variant, tied), make_batch(2, 20)
    stream = LayerStream(read_model(save_model(tmp_path / "m", model, "60KB")), torch.float64)
    hidden = None
    for number in range(stream.num_layers):
        layer = stream.layer(number)
        hidden = stream.embed(layer, batch.input_ids) if hidden is None else hidden
        hidden, final = through_layer(layer, hidden, batch.position_ids)
    found = stream.head_logits(final.flatten(0, 1)).unflatten(0, (2, 20))
    torch.testing.assert_close(found.double(), logits(model, batch), rtol=1e-5, atol=1e-4)


def test_a_layer_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    info = read_model(save_model(tmp_path / "m", make_model()))
    del info.tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ArtifactError, match=r"layer 2 doesn't load: \['model.layers.0.mlp.up_proj.weight'\]"):
        LayerStream(info, torch.float32).layer(2)


def test_a_disk_too_small_for_the_states_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(6, 12)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ArtifactError, match=r"hidden states take .* GB are free; lower score.num_sequences"):
        States([batch], 48, torch.float32, tmp_path)
    assert not (tmp_path / "hidden.bin").exists()


def test_scores_that_are_not_finite_and_no_text_are_refused(tmp_path: Path) -> None:
    model, batch = make_model(dtype=torch.float32), make_batch()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    info = read_model(save_model(tmp_path / "m", model))
    with pytest.raises(NumericalError, match=r"layer 2, mlp.down_proj: 1 of 72"):
        stream_importance(info, torch.float32, [batch], spill=tmp_path / "spill")
    assert not list((tmp_path / "spill").glob("*"))
    batch.valid_mask[:] = False
    with pytest.raises(NumericalError, match="no real token"):
        stream_importance(info, torch.float32, [batch])
    with open_tensors(tmp_path / "m" / "model.safetensors") as reader:
        assert reader.keys()

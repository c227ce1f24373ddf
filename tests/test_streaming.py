"""A model seen one layer at a time is the model: scores bit for bit, logits too, with a layer in memory."""

from __future__ import annotations

import json
import resource
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Run, full_disk_after
from families import VARIANTS, logits, make_batch, make_model, rows, save_model
from safetensors.torch import load_file

from compress.artifacts import open_tensors
from compress.criteria import AGGREGATIONS
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.folders import read_model
from compress.importance import estimate_importance, stream_importance
from compress.parallel import available_bytes
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
    found = torch.cat(list(stream.head_logits(final.flatten(0, 1))), 1).unflatten(0, (2, 20))
    torch.testing.assert_close(found.double(), logits(model, batch), rtol=1e-5, atol=1e-4)


def test_a_layer_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    info = read_model(save_model(tmp_path / "m", make_model()))
    del info.tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ArtifactError, match=r"layer 2 doesn't load: \['model.layers.0.mlp.up_proj.weight'\]"):
        LayerStream(info, torch.float32).layer(2)


def test_a_disk_too_small_for_the_states_says_so(tmp_path: Path) -> None:
    """By the kernel's limit on a file's size: the room is taken at once, not when a page is first written."""
    batch = make_batch(6, 12)
    with (
        full_disk_after(1000),
        pytest.raises(ArtifactError, match=r"hidden states take .* GB are free .* lower score.num_sequences"),
    ):
        States([batch], 48, torch.float32, tmp_path)
    assert not (tmp_path / "hidden.bin").exists()


def test_a_disk_too_small_for_the_spill_is_said_before_any_text_is_encoded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"spill.* take .* GB and .* GB are free; lower score.num_sequences="):
        run("score.stream=true", "score.num_sequences=1000000000000")
    assert not (tmp_path / "run" / "tokens").exists()


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


def test_a_streamed_run_gives_the_same_scores_and_the_same_student(
    run: Run, finished_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("prune.compensate=true", "score.width=[weighted_activation:l2/l2,weight_magnitude]")
    for name, stream in (("whole", "false"), ("streamed", "true")):
        for stage in ("tokenize", "score", "prune"):
            run(f"run_dir={tmp_path / name}", f"stage={stage}", f"score.stream={stream}", *settings)
    for files in ("score/importance.safetensors", "prune/model*.safetensors", "prune/kept.safetensors"):
        whole, streamed = (
            {key: tensor for file in (tmp_path / name).glob(files) for key, tensor in load_file(file).items()}
            for name in ("whole", "streamed")
        )
        assert whole.keys() == streamed.keys()
        assert whole
        assert all(torch.equal(whole[key], streamed[key]) for key in whole), files
    assert len(list((tmp_path / "streamed" / "prune").glob("model-*.safetensors"))) > 1, "a shard a layer"
    assert not [path for path in (tmp_path / "streamed").iterdir() if "spill" in path.name]
    reports = [
        json.loads((tmp_path / n / "prune" / "report.json").read_text())["contract"] for n in ("whole", "streamed")
    ]
    assert reports[0] == reports[1]


def test_what_needs_the_whole_model_is_refused_when_it_does_not_fit(run: Run, tmp_path: Path) -> None:
    for setting in ("score.width=[taylor]", "score.depth=[kl_greedy]", "score.depth=[block_influence,block_cosine]"):
        with pytest.raises(
            ConfigError, match=r"needs the whole teacher in memory, 0.0 GB of weights.* and .* GB are free"
        ):
            run("score.stream=true", setting)
    assert not (tmp_path / "run").exists()


def test_free_memory_is_within_the_process_own_limit() -> None:
    free = available_bytes()
    assert 10**8 < free < 10**13
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (used + 5 * 10**8, hard))
        assert available_bytes() == pytest.approx(5 * 10**8, rel=0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

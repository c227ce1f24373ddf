"""A checkpoint is whole or not there, holds no pickle, and is read in any layout."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from benchmarks.common import PeakMemory, anonymous_bytes
from compress import checkpoint
from compress.errors import ArtifactError
from compress.parallel import single_process_mesh


def _state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((4, 3), value),
        "optimizer/a/step": torch.tensor(value),
        "optimizer/b": torch.arange(5.0),
    }


def _save(folder: Path, step: int, keep: int = 3) -> None:
    checkpoint.save(folder, step, _state(float(step)), {"tokens": step * 10}, keep)


def test_round_trip_also_between_sharded_and_plain(tmp_path: Path) -> None:
    with single_process_mesh() as mesh:
        sharded = {"model/a": DTensor.from_local(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])}
        checkpoint.save(tmp_path, 1, sharded, {}, 1)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        again = {"model/a": DTensor.from_local(torch.zeros(4, 3), mesh, [Shard(0)])}
        checkpoint.load(found[0], again)
        assert torch.equal(again["model/a"].full_tensor(), torch.arange(12.0).view(4, 3))
    plain = {"model/a": torch.zeros(4, 3)}
    checkpoint.load(found[0], plain)
    assert torch.equal(plain["model/a"], torch.arange(12.0).view(4, 3))


def test_random_state_comes_back_when_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(5)
    _save(tmp_path, 1)
    drawn = torch.rand(3)
    state = _state(0.0)
    checkpoint.load(tmp_path / "step_00000001", state)
    assert not torch.equal(torch.rand(3), drawn), "an export must not touch the random state"
    checkpoint.load(tmp_path / "step_00000001", state, restore_rng=True)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(state["model/a"], torch.ones(4, 3))


def test_keeps_the_newest_and_says_what_is_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        _save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [6, 8]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1] == {"step": 8, "tokens": 80}
    with (
        pytest.raises(ArtifactError, match=r"step 4 is not kept; there are \[6, 8\]; see distill.keep_checkpoints"),
        checkpoint.held(tmp_path, tmp_path / "held", 4),
    ):
        pass


def test_a_held_step_outlives_its_removal(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "step_00000001").iterdir()}
    with checkpoint.held(tmp_path, tmp_path / "held", 1) as found:
        assert found is not None
        for step in (2, 3, 4):
            _save(tmp_path, step, keep=2)
        assert checkpoint.steps(tmp_path) == [3, 4]
        assert {file.name: file.read_bytes() for file in found[0].iterdir()} == before
    assert not (tmp_path / "held").exists()


def test_a_step_that_goes_while_it_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    listed = checkpoint.steps(tmp_path)
    next((tmp_path / "step_00000001").glob("*.safetensors")).unlink()
    monkeypatch.setattr(checkpoint, "steps", lambda _folder: listed)  # as it was before the removal
    with (
        pytest.raises(ArtifactError, match="step 1 is damaged or was removed; there are now"),
        checkpoint.held(tmp_path, tmp_path / "held", 1),
    ):
        pass
    with checkpoint.held(tmp_path, tmp_path / "held") as found:
        assert found is not None
        assert found[1]["step"] == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "marker", "file"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    (shard,) = (tmp_path / "step_00000002").glob("*.safetensors")
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-4])
    elif damage == "flipped":
        shard.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    elif damage == "file":
        shard.unlink()
    else:
        (tmp_path / "step_00000002" / checkpoint.MARKER).write_text("{")
    with caplog.at_level(logging.WARNING, logger="compress"):
        logging.getLogger("compress").propagate = True
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step_00000002 is damaged" in caplog.text


def test_saving_takes_no_memory_of_the_states_size(tmp_path: Path) -> None:
    state = {f"model/{number}": torch.zeros(4 << 20) for number in range(8)}  # 128 MiB
    before = anonymous_bytes()
    with PeakMemory(0.002) as peak:
        checkpoint.save(tmp_path, 1, state, {}, 1)
    assert peak.bytes - before < 32 << 20


def test_without_marker_it_is_not_there_and_none_whole_is_an_error(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp-1").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    next((tmp_path / "step_00000001").glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"none of the checkpoints \[1\] is whole; delete the folder"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(ArtifactError, match="does not hold this model"):
        checkpoint.load(tmp_path / "step_00000001", {"model/unknown": torch.zeros(2)})
    with pytest.raises(ArtifactError, match="does not hold this model"):
        checkpoint.load(tmp_path / "step_00000001", {"model/a": torch.zeros(5, 3)})


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    files = sorted(f.suffix for f in (tmp_path / "step_00000001").iterdir())
    assert files == [".json", ".safetensors"]


def test_what_a_resume_passed_over_goes_and_what_was_just_saved_stays(tmp_path: Path) -> None:
    """Step 32 is damaged and 16 the best: training goes on from 16, and its next save is kept, with keep=1 too."""
    _save(tmp_path, 16)
    _save(tmp_path, 32)
    checkpoint.save(tmp_path, 20, _state(20.0), {}, 1, {16: 0.5, 32: 0.7, 20: 0.6})
    assert checkpoint.steps(tmp_path) == [16, 20]

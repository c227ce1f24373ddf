"""Phases: one after the other is one run; appending one goes on with a finished run, and only that is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, without_times
from safetensors.torch import load_file

from compress import estimate
from compress.artifacts import fingerprint_path
from compress.config import load_config
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.estimate import estimate_seconds
from compress.phases import num_steps, num_tokens, phase_settings, phases_of
from compress.settings import Stage
from compress.tokens import Rows, SequenceOrder, TokenSet, shard_name, write_index, write_shard

# Four steps of 8 x 64 tokens, then four of 4 x 32 at another rate and another mix of the sources.
FIRST = "{num_tokens: 2048}"
SECOND = "{num_tokens: 512, sequence_length: 32, global_batch_size: 4, learning_rate: 1e-3, weights: [0.5, 0.5]}"
SETTINGS = ("distill.checkpoint_steps=2", "distill.micro_batch_size=2", "distill.keep_checkpoints=9",
            "distill.warmup_steps=1")  # fmt: skip


def phases(*which: str) -> str:
    return f"distill.phases=[{','.join(which)}]"


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    (shard,) = (run_dir / "distill" / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return load_file(shard)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    return [without_times(row) for row in rows]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# -- rows in pieces


def packed(folder: Path) -> TokenSet:
    """Three rows of 16: documents over the cuts, padding that begins at a cut, a row that is nearly all padding."""
    starts = np.zeros((3, 16), np.uint8)
    starts[:, 0] = 1
    starts[0, [3, 10]] = starts[1, 8] = starts[2, 2] = 1
    loss = np.ones((3, 16), np.uint8)
    loss[0, 5] = 0
    rows = Rows(np.arange(48, dtype=np.int32).reshape(3, 16), starts, loss, np.array([16, 8, 2], np.int32))
    write_shard(folder / shard_name(0), rows, {})
    write_index(folder, 16, 100, [shard_name(0)])
    return TokenSet.open(folder)


def test_pieces_are_rows_of_their_own(tmp_path: Path) -> None:
    whole = packed(tmp_path)
    cut, row = whole.cut(8), whole.batch([0, 1, 2])
    piece = cut.batch(range(6))
    assert (cut.num_sequences, cut.source_sizes, cut.sequence_length) == (6, [6], 8)
    for name in ("input_ids", "valid_mask"):
        assert torch.equal(getattr(piece, name).view(3, 16), getattr(row, name)), name
    assert piece.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert piece.position_ids[1].tolist() == [0, 1, 0, 1, 2, 3, 4, 5], "a document goes on as one of its own"
    assert not piece.loss_mask[:, -1].any(), "no target reaches over the cut"
    inside = row.loss_mask.clone()
    inside[:, 7] = False
    assert torch.equal(piece.loss_mask.view(3, 16), inside)
    assert cut.loss_tokens.tolist() == piece.loss_mask.sum(1).tolist()
    assert whole.batch([0]).input_ids.shape == (1, 16), "the whole rows are still there"
    assert torch.equal(cut.batch([3, 0]).input_ids, piece.input_ids[[3, 0]])


def test_no_sequence_comes_twice_in_an_epoch_whatever_the_phases() -> None:
    sizes, seed = [600, 300, 100], 3
    first = SequenceOrder(sizes, [0.6, 0.3, 0.1], 101, seed)
    second = SequenceOrder(sizes, [0.1, 0.8, 0.1], 203, seed, first, pieces=4)
    third = SequenceOrder(sizes, [0.6, 0.0, 0.4], 90, seed, second)
    rows = [first.indices(0, 101), second.indices(0, 203) // 4, third.indices(0, 90)]
    assert second.indices(0, 203).tolist() == [r * 4 + n for r in rows[1][::4].tolist() for n in range(4)][:203]
    dealt = np.concatenate([rows[0], rows[1][::4], rows[2]])
    assert len(set(dealt.tolist())) == len(dealt), "no source has been through once"
    assert ((rows[2] < 600) | (rows[2] >= 900)).all(), "a share of 0 leaves a source out"
    assert abs((rows[1][::4] // 300 == 2).sum() / 51 - 0.8) < 0.05
    for start, stop in ((0, 1), (3, 90), (5, 6), (202, 203)):
        assert second.indices(start, stop).tolist() == second.indices(0, 203)[start:stop].tolist()


@pytest.mark.parametrize("shares", [None, [0.7, 0.3]])
def test_two_phases_alike_are_one_long_one(shares: list[float] | None) -> None:
    whole = SequenceOrder([40, 13], shares, 90_000, 1).indices(0, 90_000)
    first = SequenceOrder([40, 13], shares, 70_001, 1)
    second = SequenceOrder([40, 13], shares, 19_999, 1, first)
    assert np.array_equal(np.concatenate([first.indices(0, 70_001), second.indices(0, 19_999)]), whole)


# -- the run


@pytest.fixture(scope="module")
def from_the_start(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both phases; look, don't touch."""
    from conftest import _run

    folder = tmp_path_factory.mktemp("phases") / "run"
    _run(cache, folder, (phases(FIRST, SECOND), *SETTINGS))
    return folder


def test_phases_appended_to_a_finished_run_equal_those_had_from_the_start(
    run: Run, tmp_path: Path, from_the_start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run("distill.num_tokens=2048", *SETTINGS)
    once = fingerprint_path(run_dir / "prune")
    exported = (run_dir / "export" / "model.safetensors").read_bytes()
    run(phases("{}"), "distill.num_tokens=2048", *SETTINGS)  # the same in other words: nothing to do
    assert (run_dir / "export" / "model.safetensors").read_bytes() == exported
    caplog.set_level("INFO", "compress")
    run(phases("{}", SECOND), "distill.num_tokens=2048", *SETTINGS)
    assert "distill: resuming after step 4" in caplog.text
    assert "evaluate: it was done with fewer distill.phases" in caplog.text
    assert fingerprint_path(run_dir / "prune") == once
    assert same(weights(run_dir, 8), weights(from_the_start, 8))
    assert metrics(run_dir) == metrics(from_the_start)
    ours, theirs = (f / "export" / "model.safetensors" for f in (run_dir, from_the_start))
    assert ours.read_bytes() == theirs.read_bytes() != exported
    manifests = [json.loads((f / "evaluate" / "manifest.json").read_text()) for f in (run_dir, from_the_start)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


def test_each_phase_has_its_own_steps_tokens_and_schedule(from_the_start: Path) -> None:
    rows = metrics(from_the_start)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["tokens"] for row in rows] == [512, 1024, 1536, 2048, 2176, 2304, 2432, 2560]
    assert all(row["loss_tokens"] <= 4 * 31 for row in rows[4:])
    rates = [row["learning_rate"] for row in rows]
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 2e-3 * 0.55, 2e-4])
    assert rates[4:] == pytest.approx([0.5e-3, 1e-3, 1e-3 * 0.55, 1e-4])


@pytest.mark.parametrize("keep", [2, 6])
def test_resume_in_any_phase_is_bit_identical(run: Run, tmp_path: Path, from_the_start: Path, keep: int) -> None:
    run_dir = Path(shutil.copytree(from_the_start, tmp_path / "run"))
    distill = run_dir / "distill"
    (distill / "manifest.json").rename(distill / "started.json")
    for folder in ("export", "evaluate"):
        shutil.rmtree(run_dir / folder)
    for step in (2, 4, 6, 8):
        if step > keep:
            shutil.rmtree(distill / "checkpoints" / f"step_{step:08d}")
    run(phases(FIRST, SECOND), *SETTINGS)
    assert same(weights(run_dir, 8), weights(from_the_start, 8))
    assert metrics(run_dir) == metrics(from_the_start)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ((FIRST, SECOND.replace("1e-3", "2e-3")), r"distill.phases.2.learning_rate was 0.001, is now 0.002"),
        ((FIRST,), r"distill.phases.2 was \{.*'num_tokens': 512.*\}, is now None"),
        ((FIRST.replace("2048", "4096"), SECOND), "distill.num_tokens was 2048.0, is now 4096.0"),
        (("{num_tokens: 2048, sequence_length: 32}", SECOND, SECOND), "phases.1.sequence_length was 64, is now 32"),
    ],
)
def test_changing_or_removing_a_phase_is_refused(
    which: tuple[str, ...], said: str, run: Run, tmp_path: Path, from_the_start: Path
) -> None:
    run_dir = Path(shutil.copytree(from_the_start, tmp_path / "run"))
    before = fingerprint_path(run_dir)
    with pytest.raises(ArtifactError, match=said):
        run(phases(*which), *SETTINGS)
    assert fingerprint_path(run_dir) == before


def test_an_appended_phase_binds_once_a_step_of_it_is_kept(run: Run, tmp_path: Path, from_the_start: Path) -> None:
    run_dir = Path(shutil.copytree(from_the_start, tmp_path / "run"))
    wild, mended = (f"{{learning_rate: {rate}, num_tokens: 1024}}" for rate in ("1e30", "1e-3"))
    with pytest.raises(NumericalError, match=r"distill step 10: .* step 8 is kept.* distill.learning_rate=1e\+30"):
        run(phases(FIRST, SECOND, wild), *SETTINGS, "stage=distill")
    run(phases(FIRST, SECOND), *SETTINGS)  # still done, as it was
    run(phases(FIRST, SECOND, mended), *SETTINGS, "stage=distill")
    assert metrics(run_dir)[-1]["step"] == 10
    with pytest.raises(ArtifactError, match=r"distill.phases.3.learning_rate was 0.001, is now 1e\+30"):
        run(phases(FIRST, SECOND, wild), *SETTINGS, "stage=distill")
    with pytest.raises(ArtifactError, match=r"distill.phases.3 was .* is now None"):
        run(phases(FIRST, SECOND), *SETTINGS)


@pytest.mark.parametrize(
    ("which", "parts"),
    [
        (
            "{sequence_length: 128}",
            ("[0].sequence_length=128 is longer than data.sequence_length=64", "tokenizes anew"),
        ),
        ("{sequence_length: 24}", ("[0].sequence_length=24", "divide data.sequence_length=64", "16, 32")),
        ("{sequence_length: 4}", ("[0].sequence_length=4 must be 8 or more", "8, 16")),
        ("{}, {global_batch_size: 3}", ("[1].global_batch_size=3 must be a multiple of distill.micro_batch_size=2",)),
        (
            "{num_tokens: 100}",
            ("[0].num_tokens=100", "less than one step of distill.global_batch_size", "= 512 tokens"),
        ),
        ("{num_tokens: -5}", ("[0].num_tokens=-5", "whole positive number")),
        ("{num_tokens: many}", ("distill.phases[0].num_tokens=many must be a number",)),
        ("{learning_rate: 0}", ("[0].learning_rate=0", "positive")),
        ("{global_batch_size: 0}", ("[0].global_batch_size=0 must be at least 1",)),
        ("{weights: [1]}", ("[0].weights=[1.0]", "each of the 2 sources")),
        ("{weights: [0, 0]}", ("not all 0",)),
        ("{tokens: 5}", ("tokens: no such key",)),
    ],
)
def test_phases_that_cannot_be_are_refused(which: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("recipe=tiny", "data.sequence_length=64", "distill.micro_batch_size=2", phases(which))
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def test_weights_need_weights_from_the_start() -> None:
    unweighted = "data.train=[{path: 'embedded:tiny-train'},{path: 'embedded:tiny-chat'}]"
    with pytest.raises(ConfigError, match=r"data.train gives no weights, so that its sources are dealt as one"):
        load_config("recipe=tiny", unweighted, phases("{}", "{weights: [0.5, 0.5]}"))


def test_plan_and_estimate_count_every_phase(
    cache: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "flops_per_second", lambda *_: 1e9)
    config = load_config("recipe=tiny", phases(FIRST, SECOND), "data.sequence_length=64", f"cache_dir={cache}",
                         "distill.micro_batch_size=2")  # fmt: skip
    assert (num_steps(config), num_tokens(config)) == (8, 2560)
    assert [phase.first_step for phase in phases_of(config, {1: 3})] == [0, 3]
    assert phases_of(config, {1: 3})[1].tokens_before == 3 * 512
    longer = load_config("recipe=tiny", phases("{num_tokens: 1B}", "{num_tokens: 3B}"), f"cache_dir={cache}")
    shorter = load_config("recipe=tiny", "distill.num_tokens=1B", f"cache_dir={cache}")
    seconds = [estimate_seconds(c, [Stage.distill])[Stage.distill] for c in (longer, shorter)]
    assert seconds[0] / seconds[1] == pytest.approx(4, rel=1e-2)
    run("stage=plan", phases("{num_tokens: 1B}", "{num_tokens: 3B}"))
    assert "distill, 4,000,000,000 tokens" in capsys.readouterr().out


def test_muon_follows_a_phases_rate() -> None:
    config = load_config("recipe=tiny", "distill.learning_rate=1e-3", "distill.muon_learning_rate=0.02",
                         phases("{}", "{learning_rate: 5e-4}"))  # fmt: skip
    assert [phase["muon_learning_rate"] for phase in phase_settings(config)] == [0.02, 0.01]


def test_phases_appended_to_a_cached_run_extend_its_cache(run: Run, tmp_path: Path) -> None:
    """Whole shards are kept, and the end is that of a run that had the phase from the start."""
    cached = ("teacher.mode=cached", "cache.sequences_per_shard=4", "distill.num_tokens=2048", *SETTINGS)
    again = "{num_tokens: 1024, learning_rate: 1e-3}"
    run(f"run_dir={tmp_path / 'later'}", *cached)
    first = (tmp_path / "later" / "cache" / "shard-00000.safetensors").stat().st_mtime_ns
    run(f"run_dir={tmp_path / 'later'}", phases("{}", again), *cached)
    assert (tmp_path / "later" / "cache" / "shard-00000.safetensors").stat().st_mtime_ns == first
    run(f"run_dir={tmp_path / 'start'}", phases("{}", again), *cached)
    ours, theirs = (tmp_path / name / "export" / "model.safetensors" for name in ("later", "start"))
    assert ours.read_bytes() == theirs.read_bytes()

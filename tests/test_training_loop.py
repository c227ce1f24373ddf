"""What goes on beside the steps: validation, early stops, the moving average, checkpoints; each exact across a resume.

Every run is of 8 steps of 512 tokens, from one that is tokenized, scored and pruned.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, _run, full_disk_after, signal_in_step, without_times
from safetensors.torch import load_file

from compress import checkpoint, distill
from compress.config import load_config
from compress.errors import ArtifactError, ConfigError, Interrupted
from compress.settings import CompressConfig
from compress.training_log import progress_line

STEP = 8 * 64
VALIDATED = ("distill.validate_steps=1", "distill.validate_tokens=512")
# 1e12 nats per million tokens: nothing falls so fast, so the first slope stops it.
STOPPED = ("distill.validate_steps=2", "distill.validate_tokens=512", "distill.stop_slope=1e12",
           "distill.stop_validations=2", "distill.warmup_steps=1")  # fmt: skip
WSD = ("distill.learning_rate_curve=wsd", "distill.decay_share=0.25")
EMA = ("distill.ema_decay=0.9",)


@pytest.fixture(scope="module")
def pruned(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "run"
    _run(cache, folder, ("until=prune",))
    return folder


@pytest.fixture
def train(cache: Path, pruned: Path, tmp_path: Path) -> Any:
    """train(name, *settings): distill in tmp_path/name, every step kept unless the settings say otherwise."""

    def start(name: str, *settings: str, until: str = "distill") -> Path:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(pruned, folder)
        _run(cache, folder, (*KEPT, f"until={until}", *settings))
        return folder

    return start


# A term's own way is the learning rate's: an early stop starts the decay of both.
SCHEDULED = ("distill.objectives=[{weight_end: 0.25, temperature_end: 3, curve: wsd}]",)
LONG_STOP = (*STOPPED, *WSD, *EMA, *SCHEDULED, "distill.num_tokens=10240")
KEPT = ("distill.checkpoint_steps=1", "distill.keep_checkpoints=99")


@pytest.fixture(scope="module")
def stopped(cache: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps under a wsd schedule that was stopped after 4, exported; look, don't touch."""
    folder = Path(shutil.copytree(pruned, tmp_path_factory.mktemp("stopped") / "run"))
    _run(cache, folder, (*KEPT, *LONG_STOP, "until=export"))
    return folder


@pytest.fixture(scope="module")
def averaged(cache: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a moving average, exported in float32; look, don't touch."""
    folder = Path(shutil.copytree(pruned, tmp_path_factory.mktemp("averaged") / "run"))
    _run(cache, folder, (*KEPT, *EMA, "export.dtype=float32", "until=export"))
    return folder


def config(*settings: str) -> CompressConfig:
    return load_config("recipe=tiny", *settings)


def steps(run_dir: Path) -> list[int]:
    return checkpoint.steps(run_dir / "distill" / "checkpoints")


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    (shard,) = (run_dir / "distill" / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return load_file(shard)


def rows(run_dir: Path, kind: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    return [without_times(row) for row in found if kind in row]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def cut_back(run_dir: Path, step: int) -> None:
    """As a kill after `step` was kept would leave it, the log further on than the checkpoints."""
    distill = run_dir / "distill"
    (distill / "manifest.json").rename(distill / "started.json")
    shutil.rmtree(run_dir / "export", ignore_errors=True)
    for later in steps(run_dir):
        if later > step:
            shutil.rmtree(distill / "checkpoints" / f"step_{later:08d}")


def test_a_signal_in_the_last_step_ends_the_command_too(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is done and saved, but nothing that follows begins; the same command goes on with it."""
    whole = train("whole", until="export")
    counted = signal_in_step(monkeypatch, 8)
    with pytest.raises(Interrupted, match="step 8 of 8 is saved"):
        train("cut", until="export")
    cut = whole.with_name("cut")
    assert not (cut / "export").exists()
    train("cut", until="export")
    assert len(counted) == 8
    assert same(load_file(cut / "export" / "model.safetensors"), load_file(whole / "export" / "model.safetensors"))


# -- validation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_validation_changes_nothing(cache: Path, pruned: Path, tmp_path: Path, dtype: str) -> None:
    plain, watched = (Path(shutil.copytree(pruned, tmp_path / name)) for name in ("plain", "watched"))
    for folder, settings in ((plain, ()), (watched, VALIDATED)):
        chosen = load_config(*FAST, f"run_dir={folder}", f"cache_dir={cache}", f"compute_dtype={dtype}",
                             "distill.num_tokens=2048", "distill.keep_checkpoints=9", *settings)  # fmt: skip
        distill.run(chosen, folder)
    assert [row["step"] for row in rows(watched, "validation")] == [1, 2, 3, 4]
    assert same(weights(plain, 4), weights(watched, 4))
    assert rows(plain) == rows(watched)


def test_validation_says_what_evaluate_says_and_status_reads_it(train: Any) -> None:
    settings = ("distill.validate_steps=4", "distill.validate_tokens=1024", "export.dtype=float32", *EMA)
    run_dir = train("a", *settings, until="evaluate")
    judged = json.loads((run_dir / "evaluate" / "metrics.json").read_text())["distilled"]["sets"]["validation"]
    first, last = rows(run_dir, "validation")
    for name, figure in last["validation"]["validation"].items():
        assert figure == pytest.approx(judged[name], rel=1e-4), name
    assert first["kl_to_teacher"] != last["kl_to_teacher"]
    line = progress_line(load_config("recipe=tiny", "data.sequence_length=64", "distill.num_tokens=4096"), run_dir)
    assert line.startswith("step 8 of 8, loss ")
    assert f"KL to the teacher {last['kl_to_teacher']:.4f} at step 8, lowest" in line


def test_a_step_says_where_its_time_went(train: Any) -> None:
    run_dir = train("a", "cluster.peak_flops=1e12", "distill.num_tokens=1024")
    found = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        shares = row["share_of_seconds"]
        assert shares.keys() == {"teacher", "student", "head", "optimizer"}
        assert all(0 < share < 1 for share in shares.values())
        assert sum(shares.values()) == pytest.approx(1)
    # The tiny teacher's and student's products, 2 FLOP a parameter and 6; what a step of them takes at the peak.
    parameters = [
        sum(t.numel() for n, t in load_file(f).items() if "embed" not in n or len(t) != 512)
        for f in (run_dir / "prune").glob("model.safetensors")
    ]
    assert 6 * parameters[0] * STEP / 1e12 < found[0]["mfu"] * found[0]["seconds"] < 60 * parameters[0] * STEP / 1e12
    measured = json.loads((train("b", "distill.num_tokens=512") / "distill" / "metrics.jsonl").read_text())["mfu"]
    assert 0 < measured < 1, "of what a product does here"


def test_a_forecast_comes_with_enough_validations(train: Any) -> None:
    run_dir = train("a", *VALIDATED, "distill.warmup_steps=1")
    foretold = [row["forecast"] for row in rows(run_dir, "validation")]
    assert foretold[:4] == [None] * 4, "four after the warm-up"
    assert all(one["tokens"] == 8 * STEP and one["kl_to_teacher"] >= 0 for one in foretold[4:])
    measured = rows(run_dir, "validation")[-1]["kl_to_teacher"]
    assert foretold[-1]["kl_to_teacher"] == pytest.approx(measured, rel=0.1), "at the end it is what was measured"


def test_no_forecast_before_two_per_cent_of_the_tokens(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 400 steps, though there are enough validations after five."""
    signal_in_step(monkeypatch, 9)
    with pytest.raises(Interrupted):
        train("a", *VALIDATED, "distill.warmup_steps=1", f"distill.num_tokens={400 * STEP}")
    foretold = [row["forecast"] is not None for row in rows(tmp_path / "a", "validation")]
    assert foretold == [False] * 7 + [True] * 2


# -- stopping


def test_a_stop_with_wsd_is_the_run_that_was_planned_so_and_is_exported(train: Any, stopped: Path) -> None:
    # Validations at 2 and 4, so the decay begins after 4 steps: 1 + 1 + (4 - 1) / 0.75 = 6 steps in all.
    assert steps(stopped)[-1] == 6
    assert [row["stop"] for row in rows(stopped, "stop")] == [{"phase": 1, "steps": 6}]
    rates = [row["learning_rate"] for row in rows(stopped)]
    assert rates[1:5] == [2e-3] * 4
    assert rates[5] == pytest.approx(2e-4)
    planned = train("planned", *WSD, *EMA, *SCHEDULED, "distill.num_tokens=3072", "distill.warmup_steps=1")
    assert rows(stopped) == rows(planned)
    assert same(weights(stopped, 6), weights(planned, 6))
    assert json.loads((stopped / "export" / "report.json").read_text())["step"] == 6
    line = progress_line(config("data.sequence_length=64", "distill.num_tokens=10240"), stopped)
    assert line.startswith("step 6 of 6, ")


@pytest.mark.parametrize("kept", [3, 4, 5])
def test_a_stop_is_exact_across_a_resume(train: Any, stopped: Path, tmp_path: Path, kept: int) -> None:
    run_dir = Path(shutil.copytree(stopped, tmp_path / "a"))
    cut_back(run_dir, kept)
    torch.manual_seed(7)
    train("a", *LONG_STOP)
    assert steps(run_dir)[-1] == 6
    assert same(weights(run_dir, 6), weights(stopped, 6))
    for kind in ("loss", "validation", "stop"):
        assert rows(run_dir, kind) == rows(stopped, kind)


def test_other_curves_stop_at_once_and_the_next_phase_goes_on_with_unseen_text(train: Any) -> None:
    phases = "distill.phases=[{num_tokens: 8192}, {num_tokens: 1024}]"
    stopped = train("stopped", *STOPPED, phases, "distill.learning_rate_curve=constant")
    assert steps(stopped)[-1] == 4 + 2, "the second one has too few validations to stop"
    assert [row["tokens"] for row in rows(stopped)] == [n * STEP for n in range(1, 7)]
    plain = train("plain", "distill.phases=[{num_tokens: 2048}, {num_tokens: 1024}]",
                  "distill.learning_rate_curve=constant", "distill.warmup_steps=1")  # fmt: skip
    assert same(weights(stopped, 6), weights(plain, 6))


def test_without_a_threshold_or_while_it_falls_nothing_stops(train: Any) -> None:
    run_dir = train("a", "distill.validate_steps=2", "distill.validate_tokens=512", "distill.stop_slope=1e-9",
                    "distill.stop_validations=2", "distill.warmup_steps=1", *WSD)  # fmt: skip
    kl = [row["kl_to_teacher"] for row in rows(run_dir, "validation")]
    assert kl == sorted(kl, reverse=True), "it falls throughout"
    assert steps(run_dir)[-1] == 8


# -- the moving average


def test_the_average_is_its_formula_and_is_what_is_exported(averaged: Path) -> None:
    average = {n: t.double() for n, t in load_file(averaged / "prune" / "model.safetensors").items()}
    for step in range(1, 9):
        decay = min(0.9, (1 + step) / (10 + step))
        state = weights(averaged, step)
        average = {n: decay * t + (1 - decay) * state[f"model/model.{n}"].double() for n, t in average.items()}
    exported = load_file(averaged / "export" / "model.safetensors")
    for name, tensor in average.items():
        assert torch.allclose(exported[name].double(), tensor, atol=1e-6), name
        assert not torch.equal(exported[name], state[f"model/model.{name}"]), name
        assert torch.equal(exported[name], state[f"average/model.{name}"]), name
    report = json.loads((averaged / "export" / "report.json").read_text())
    assert report["weights"] == "their moving average, distill.ema_decay=0.9"


def test_the_average_resumes_bit_identical_and_training_is_as_without(
    train: Any, averaged: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(averaged, tmp_path / "a"))
    cut_back(run_dir, 3)
    train("a", *EMA)
    assert same(weights(run_dir, 8), weights(averaged, 8))
    without = weights(train("b"), 8)
    assert all(torch.equal(t, weights(averaged, 8)[n]) for n, t in without.items())


# -- checkpoints


def test_the_best_is_kept_beside_the_newest(train: Any) -> None:
    worse = "distill.phases=[{num_tokens: 2048}, {num_tokens: 2048, learning_rate: 0.3}]"
    run_dir = train("a", *VALIDATED, worse, "distill.keep_best=true", "distill.keep_checkpoints=2")
    kl = {row["step"]: row["kl_to_teacher"] for row in rows(run_dir, "validation")}
    best = min(kl, key=lambda step: kl[step])
    assert best <= 4
    assert steps(run_dir) == [best, 7, 8]


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model/a": torch.full((400,), value)}


def test_a_writer_in_a_thread_writes_what_was_there_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real save behind a gate: the state and the random numbers move on while it waits."""
    gate, real, running = threading.Event(), checkpoint.save, []

    def gated(*arguments: Any) -> Path:
        running.append(arguments[1])
        gate.wait(30)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", gated)
    torch.manual_seed(5)
    tensors = state(1.0)
    with checkpoint.Writer(tmp_path, 2, asynchronous=True) as writer:
        writer.save(1, tensors, {"tokens": 1})
        drawn = torch.rand(3)
        tensors["model/a"].fill_(2)
        writer.check()
        assert not checkpoint.steps(tmp_path)
        threading.Timer(0.2, gate.set).start()
        writer.save(2, tensors, {"tokens": 2})  # waits: at most one is in flight
        assert running[0] == 1
        assert 1 in checkpoint.steps(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]
    again = state(0.0)
    checkpoint.load(tmp_path / "step_00000001", again, restore_rng=True)
    assert torch.equal(again["model/a"], torch.ones(400))
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("at_once", [True, False])
def test_an_asynchronous_copy_takes_memory_once_and_never_what_is_being_written(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that change as soon as they may; what grows between saves (the previous batch) is as welcome."""
    if not at_once:
        monkeypatch.setattr(checkpoint, "AT_ONCE_BYTES", 0)
    state = {"model/a": torch.zeros(500, 500)}
    with checkpoint.Writer(tmp_path, 3, asynchronous=True) as writer:
        places = []
        for step in (1, 2, 3):
            state["model/a"].fill_(step)
            state["previous/b"] = torch.full((step,), float(step))
            writer.save(step, state, {})
            if not at_once:
                writer.wait_for_copy()
            places.append(writer._copy["model/a"].data_ptr())
            state["model/a"].fill_(-1)
    assert len(set(places)) == 1
    for step in (1, 2, 3):
        found = {"model/a": torch.empty(500, 500), "previous/b": torch.empty(step)}
        checkpoint.load(tmp_path / f"step_{step:08d}", found)
        assert torch.equal(found["model/a"], torch.full((500, 500), float(step)))
        assert torch.equal(found["previous/b"], torch.full((step,), float(step)))


def test_a_failed_write_in_a_thread_is_raised_at_the_next_call_and_leaves_what_was(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path, 1, asynchronous=True) as writer:
        writer.save(1, state(1.0), {})
        writer.wait()
        with full_disk_after(256):
            writer.save(2, state(2.0), {})
            while writer._writing is not None and not writer._writing.done():
                pass
        with pytest.raises(ArtifactError, match="step_00000002: the disk is full"):
            writer.check()
        assert writer.committed == 1
    assert checkpoint.steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    with full_disk_after(256), pytest.raises(ArtifactError, match="the disk is full"), \
            checkpoint.Writer(tmp_path, 1, asynchronous=True) as writer:  # fmt: skip
        writer.save(2, state(2.0), {})  # and leaving the block waits for it


def test_what_ends_training_is_not_hidden_by_a_failed_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("compress").propagate = True

    def train() -> None:
        with checkpoint.Writer(tmp_path, 1, asynchronous=True) as writer:
            writer.save(1, state(1.0), {})
            raise KeyError

    with full_disk_after(256), pytest.raises(KeyError):
        train()
    assert "the checkpoint in flight was not committed" in caplog.text


def test_asynchronous_checkpoints_hold_the_same_and_a_full_disk_ends_the_run(
    train: Any, averaged: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(averaged, tmp_path / "a"))
    cut_back(run_dir, 3)
    settings = ("distill.async_checkpoint=true", *EMA)
    with full_disk_after(700 * 1024), pytest.raises(ArtifactError, match="step_00000004: the disk is full"):
        train("a", *settings)
    assert steps(run_dir) == [1, 2, 3]
    train("a", *settings)
    assert steps(run_dir) == list(range(1, 9))
    for step in (4, 8):
        assert same(weights(run_dir, step), weights(averaged, step))


def test_the_optimizer_waits_for_the_copy(
    train: Any, averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor's copy begins late: the step beside it ends first, and what is written is of before it."""
    real, late = checkpoint._copied, threading.Event()

    def slow(*arguments: Any) -> torch.Tensor:
        late.wait(0.01)  # a hundred tensors of them are longer than a step
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(checkpoint, "_copied", slow)
    run_dir = Path(shutil.copytree(averaged, tmp_path / "a"))
    cut_back(run_dir, 5)
    train("a", "distill.async_checkpoint=true", *EMA)
    for step in (6, 7, 8):
        assert same(weights(run_dir, step), weights(averaged, step))


def test_a_write_that_failed_ends_the_run_at_the_next_step(train: Any, tmp_path: Path) -> None:
    rare = ("distill.async_checkpoint=true", "distill.checkpoint_steps=50", "distill.num_tokens=51200")
    with full_disk_after(700 * 1024), pytest.raises(ArtifactError, match="step_00000050: the disk is full"):
        train("a", *rare)
    assert 50 <= rows(tmp_path / "a")[-1]["step"] < 99, "the next checkpoint is due after step 100"


# -- refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("distill.stop_slope=0.1",), "distill.stop_slope=0.1 is of KL in validations; set distill.validate_steps"),
        (("distill.stop_slope=0", "distill.validate_steps=2"), "distill.stop_slope=0.0 must be a positive number"),
        (("distill.stop_validations=1",), "distill.stop_validations=1 must be at least 2"),
        (("distill.validate_steps=0",), "distill.validate_steps=0 must be at least 1"),
        (("distill.validate_tokens=0",), "distill.validate_tokens=0.0 must be a whole positive number"),
        (("distill.keep_best=true",), "must be a multiple of distill.validate_steps=None; set validate_steps=16"),
        (("distill.keep_best=true", "distill.validate_steps=5"), "multiple of distill.validate_steps=5"),
        (("distill.ema_decay=1",), "distill.ema_decay=1.0 must be within 0 and 1, 1 excluded"),
        (("distill.decay_share=1",), "distill.decay_share=1.0 must be within 0 and 1, 1 excluded"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*settings)


def test_what_a_stop_is_judged_by_binds_only_with_a_threshold(train: Any, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"distill.validate_steps was 2, is now 1"):
        train("a", *LONG_STOP, "distill.validate_steps=1")
    plain = train("b", "distill.num_tokens=1024")
    train("b", "distill.num_tokens=1024", *VALIDATED)
    assert not rows(plain, "validation"), "done before, and validation changes no result"

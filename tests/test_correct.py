"""Teacher correction: trained on the text, kept only where it gains, distilled from, and never compared with."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from conftest import Run
from safetensors.torch import load_file

from compress.errors import ArtifactError, ConfigError
from compress.folders import weights_fingerprint

# Four steps of 512 tokens, one of them the trial; any gain will do.
CORRECT = ("correct.num_tokens=2048", "correct.min_gain=0", "correct.learning_rate=1e-3")


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _logged(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "distill" / "metrics.jsonl").read_text().splitlines()]


def test_the_corrected_teacher_is_distilled_from_and_the_original_compared_with(
    run: Run, finished: Path, teacher_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _read(finished / "evaluate" / "metrics.json")
    for later in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / later)
    run(*CORRECT)
    report = _read(finished / "correct" / "report.json")
    assert report["needed"]
    assert report["num_tokens"] == 2048
    assert report["trial"]["num_tokens"] == 512
    assert report["gain"] > report["trial"]["gain"] > 0
    for figures in report["loss"].values():
        assert figures["corrected"] < figures["teacher"]
    corrected = finished / "correct" / "export"
    assert weights_fingerprint(corrected) != weights_fingerprint(teacher_source)
    assert not (finished / "correct" / "distill" / "checkpoints").exists()
    after = _read(finished / "evaluate" / "metrics.json")
    assert after["teacher"]["sets"] == before["teacher"]["sets"]
    assert after["distilled"]["sets"] != before["distilled"]["sets"]
    # The same training, with the corrected teacher as any other.
    other = tmp_path / "other"
    run(f"run_dir={other}", f"teacher.path={corrected}", f"distill.init_from={finished / 'prune'}", "until=distill")
    assert _logged(other) == _logged(finished)
    capsys.readouterr()
    run(*CORRECT, "stage=status")
    assert "correct" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match=r"correct\.learning_rate was 0\.001, is now 0\.002"):
        run(*CORRECT[:2], "correct.learning_rate=2e-3")


def test_a_trial_that_gains_too_little_leaves_the_teacher(
    run: Run, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "compress")
    expected = _logged(finished)
    for later in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / later)
    run("correct.num_tokens=2048", "correct.min_gain=1", "until=distill")
    report = _read(finished / "correct" / "report.json")
    assert not report["needed"]
    assert report["num_tokens"] == 512
    assert not (finished / "correct" / "export").exists()
    assert _logged(finished) == expected
    assert "less than correct.min_gain=1, so it stays as it is" in caplog.text


@pytest.mark.slow
def test_a_killed_correction_goes_on(
    run: Run, finished: Path, spawn: Callable[..., Popen[str]], tmp_path: Path
) -> None:
    """SIGTERM in the second phase; the folder is that of a run that was left alone."""
    settings = (*CORRECT, "correct.num_tokens=16384", "until=cache", "distill.checkpoint_steps=1")
    process = spawn(*settings)
    log, deadline = finished / "correct" / "distill" / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert 5 < len(log.read_text().splitlines()) < 32
    assert not (finished / "correct" / "report.json").exists()
    with pytest.raises(ArtifactError, match="was begun with other settings"):
        run(*settings, "correct.learning_rate=2e-3")
    run(*settings)
    alone = tmp_path / "alone"
    shutil.copytree(finished, alone, ignore=shutil.ignore_patterns("correct"))
    run(*settings, f"run_dir={alone}")
    ours, theirs = (load_file(folder / "correct" / "export" / "model.safetensors") for folder in (finished, alone))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    reports = [_read(folder / "correct" / "report.json") for folder in (finished, alone)]
    assert reports[0] == reports[1], "the trial is judged where it ended, not where the kill came"


@pytest.mark.slow
def test_siblings_share_one_correction(run: Run, tmp_path: Path) -> None:
    members = "siblings=[{name: a, prune: {num_hidden_layers: 3}}, {name: b, prune: {num_hidden_layers: 2}}]"
    both = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", members)
    run(*CORRECT, *both, "until=correct")
    folder = tmp_path / "run"
    assert (folder / "a" / "correct" / "export").is_dir()
    assert (folder / "b" / "correct").is_symlink()
    assert not list(folder.glob("*/distill"))
    run(*CORRECT, *both, "until=distill")
    run(*CORRECT, "prune.intermediate_size=null", "until=distill", f"run_dir={tmp_path / 'alone'}")
    assert _logged(folder / "a") == _logged(tmp_path / "alone")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("correct.learning_rate=1e-3",), r"correct\.num_tokens is null"),
        (("correct.num_tokens=1000",), r"correct\.num_tokens=1000 must hold a trial .* 512 tokens .* 1024 or more"),
        (("correct.num_tokens=2048", "correct.trial_tokens=2048"), "2560 or more"),
        (("correct.num_tokens=2048", "correct.trial_tokens=100"), "1024 or more"),
        (("correct.num_tokens=2048", "correct.min_gain=1.5"), r"min_gain=1\.5 must be within 0 and 1"),
        (("correct.num_tokens=2048", "correct.learning_rate=0"), "learning_rate=0.* must be a positive number"),
        (("correct.num_tokens=2048", "teacher.mode=previous_self", "distill.micro_batch_size=1"), "has none"),
        (("stage=correct",), r"stage=correct needs correct\.num_tokens"),
    ],
)
def test_bad_settings_are_refused(run: Run, tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    if "teacher.mode=previous_self" in settings:
        settings = (*settings, "distill.objectives=[{objective: cross_entropy}]")
    with pytest.raises(ConfigError, match=message):
        run(*settings)
    assert not (tmp_path / "run").exists()

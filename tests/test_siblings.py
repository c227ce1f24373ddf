"""Several students in one teacher pass: each comes out as if it were trained alone, and the teacher runs once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run, signal_in_step
from safetensors.torch import load_file

from compress import checkpoint
from compress.errors import ConfigError, Interrupted
from compress.teacher import Teacher

BOTH = "siblings=[{name: wide, prune: {intermediate_size: 64}}, {name: short, prune: {num_hidden_layers: 3}}]"
ALONE = {"wide": ("prune.intermediate_size=64",), "short": ("prune.num_hidden_layers=3",)}
# The recipe's own pruning is taken back.
NONE = ("prune.intermediate_size=null", "prune.num_hidden_layers=null")


def _weights(folder: Path) -> dict[str, object]:
    return load_file(folder / "export" / "model.safetensors")


def test_each_is_what_it_would_be_alone_and_the_teacher_runs_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    right = Teacher.signal
    monkeypatch.setattr(Teacher, "signal", lambda self, batch: asked.append(1) or right(self, batch))
    run(f"run_dir={tmp_path / 'both'}", *NONE, BOTH)
    together = len(asked)
    for name, pruning in ALONE.items():
        asked.clear()
        run(f"run_dir={tmp_path / name}", *NONE, *pruning)
        assert together == len(asked), "both students cost the teacher what one does"
        ours, theirs = _weights(tmp_path / "both" / name), _weights(tmp_path / name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours), name
        steps = [json.loads(line)["step"] for line in (tmp_path / "both" / name / "distill" / "metrics.jsonl").open()]
        assert steps == list(range(1, len(steps) + 1))
    asked.clear()
    run(f"run_dir={tmp_path / 'both'}", *NONE, BOTH)
    assert not asked, "done before"


@pytest.mark.slow
def test_each_draws_its_own_random_numbers(run: Run, teacher: Path, tmp_path: Path) -> None:
    """A student with dropout, beside another."""
    path = teacher / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.5}))
    both, alone = tmp_path / "both", tmp_path / "alone"
    run(f"run_dir={both}", f"teacher.path={teacher}", *NONE, BOTH, "until=export")
    run(f"run_dir={alone}", f"teacher.path={teacher}", *NONE, *ALONE["short"], "until=export")
    ours, theirs = _weights(both / "short"), _weights(alone)
    assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.mark.slow
def test_one_that_is_behind_catches_up(run: Run, tmp_path: Path) -> None:
    """After a kill between two saves: the checkpoints of one are older."""
    settings = (
        f"run_dir={tmp_path / 'both'}",
        *NONE,
        BOTH,
        "distill.checkpoint_steps=1",
        "distill.keep_checkpoints=99",
    )
    run(*settings)
    before = {name: _weights(tmp_path / "both" / name) for name in ALONE}
    for name, kept in (("wide", 2), ("short", 4)):
        folder = tmp_path / "both" / name
        for step in folder.glob("distill/checkpoints/step_*"):
            if int(step.name[5:]) > kept:
                shutil.rmtree(step)
        (folder / "distill" / "manifest.json").rename(folder / "distill" / "started.json")
        for stage in ("export", "evaluate"):
            shutil.rmtree(folder / stage)
    run(*settings)
    for name, expected in before.items():
        again = _weights(tmp_path / "both" / name)
        assert all((again[key] == expected[key]).all() for key in expected), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((BOTH.replace("short", "wide"),), "must differ"),
        ((BOTH.replace("short", "tokens"),), "becomes a folder beside tokens"),
        ((BOTH, "prune.num_hidden_layers=2"), "give prune inside of siblings"),
        ((BOTH, "stage=distill"), "siblings run all their stages"),
        ((BOTH, "teacher.mode=auto"), "set online or cached for siblings"),
        ((BOTH, "rounds=[{prune: {num_hidden_layers: 3}}]"), "can't be combined"),
        (("siblings=[{name: a, prune: {min_tokens_per_second: 5}}]",), "siblings: a: prune.min_tokens_per_second"),
    ],
)
def test_what_siblings_cannot_be_is_refused(run: Run, settings: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(*NONE, *settings)


@pytest.mark.slow
def test_a_signal_saves_all_of_them(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised while the second one steps: the first, which has done its step, is saved too, and both go on exactly."""
    settings = (*NONE, BOTH)
    run(f"run_dir={tmp_path / 'whole'}", *settings)
    signal_in_step(monkeypatch, 6)
    with pytest.raises(Interrupted):
        run(f"run_dir={tmp_path / 'cut'}", *settings)
    monkeypatch.undo()
    kept = {name: checkpoint.steps(tmp_path / "cut" / name / "distill" / "checkpoints") for name in ALONE}
    assert all(kept.values()), kept
    run(f"run_dir={tmp_path / 'cut'}", *settings)
    for name in ALONE:
        ours, theirs = _weights(tmp_path / "cut" / name), _weights(tmp_path / "whole" / name)
        assert all((ours[key] == theirs[key]).all() for key in theirs), name


def test_one_cache_serves_all_and_nothing_after_until_runs(run: Run, tmp_path: Path) -> None:
    run(f"run_dir={tmp_path / 'both'}", *NONE, BOTH, "teacher.mode=cached", "until=cache")
    for name in ALONE:
        assert (tmp_path / "both" / name / "cache" / "manifest.json").exists()
        assert not (tmp_path / "both" / name / "distill").exists()
    assert (tmp_path / "both" / "short" / "cache").is_symlink()


def test_measured_removals_are_each_ones_own(run: Run, tmp_path: Path) -> None:
    """How far a measured depth criterion goes is in the scores' fingerprint."""
    deep = "siblings=[{name: a, prune: {num_hidden_layers: 3}}, {name: b, prune: {num_hidden_layers: 2}}]"
    run(f"run_dir={tmp_path / 'both'}", *NONE, deep, "score.depth=[kl]", "until=prune")
    assert not (tmp_path / "both" / "b" / "score").is_symlink()
    assert (tmp_path / "both" / "b" / "tokens").is_symlink()

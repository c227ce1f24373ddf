"""teacher.mode=auto picks what its measurements say, once for a run, and trains as that mode would."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.errors import ArtifactError, ConfigError
from compress.teacher_choice import seconds_of

AGAIN = ("distill.num_tokens=65536", "data.train=[{path: 'embedded:tiny-chat'}]")  # the same text several times


@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0.001, 10), st.floats(0, 10), st.floats(0, 10))
def test_a_cache_pays_only_for_text_that_comes_again(
    draws: int, sequences: int, forward: float, head: float, drawing: float
) -> None:
    online, cached = seconds_of(draws, sequences, forward, head, head + drawing)
    if draws <= sequences:
        assert cached >= online
    if (draws - sequences) * (forward + head) > sequences * drawing * 1.001:
        assert cached < online


@pytest.mark.slow
def test_the_choice_is_said_kept_and_trained_by(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(*AGAIN, "teacher.mode=auto", f"run_dir={tmp_path / 'auto'}")
    made = json.loads((tmp_path / "auto" / "teacher_mode.json").read_text())
    assert f"teacher.mode=auto: {made['mode']}, since {made['why']}" in caplog.text
    assert made["draws"] > made["sequences"]
    assert (made["cached_seconds"] < made["online_seconds"]) == (made["mode"] == "cached")
    assert (tmp_path / "auto" / "cache").exists() == (made["mode"] == "cached")
    run(*AGAIN, f"teacher.mode={made['mode']}", f"run_dir={tmp_path / 'said'}")
    one, other = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("auto", "said"))
    assert all((one[key] == other[key]).all() for key in other)
    caplog.clear()
    run(*AGAIN, "teacher.mode=auto", f"run_dir={tmp_path / 'auto'}")
    assert "distill: done before, skipped" in caplog.text
    run(*AGAIN, f"teacher.mode={made['mode']}", f"run_dir={tmp_path / 'auto'}")  # is the same run


def test_what_must_be_refused_is_refused_before_the_text_is_tokenized(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not kept"):
        run(*AGAIN, "teacher.mode=auto", "export.step=5")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ((), "every sequence is drawn once"),
        ((*AGAIN, "distill.objectives=[{objective: bild}]"), "a cache can't serve it"),
        ((*AGAIN, "distill.objectives=[{objective: cross_entropy}]"), "no objective asks a teacher"),
    ],
)
def test_what_a_cache_cannot_save_stays_online(run: Run, tmp_path: Path, settings: tuple[str, ...], why: str) -> None:
    run(*settings, "teacher.mode=auto", "until=prune")
    made = json.loads((tmp_path / "run" / "teacher_mode.json").read_text())
    assert made["mode"] == "online"
    assert why in made["why"]


def test_a_choice_that_is_none_is_refused(run: Run, tmp_path: Path) -> None:
    run("until=tokenize")
    (tmp_path / "run" / "teacher_mode.json").write_text('{"mode": "wish"}')
    with pytest.raises(ArtifactError, match="says mode='wish', which is neither online nor cached"):
        run("teacher.mode=auto")


def test_a_choice_does_not_outlive_the_settings_it_was_made_for(run: Run, tmp_path: Path) -> None:
    run("until=tokenize")
    (tmp_path / "run" / "teacher_mode.json").write_text('{"mode": "cached"}')
    with pytest.raises(ConfigError, match=r"has chosen teacher.mode=cached for this run, but distill.objectives\[0\]"):
        run("teacher.mode=auto", "distill.objectives=[{objective: reverse_kl}]")

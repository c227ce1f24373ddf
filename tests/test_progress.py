"""Progress is shown, and the loop's items pass through unchanged."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from compress import progress
from compress.progress import duration, track


def test_without_a_terminal_lines_tell_share_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    with caplog.at_level(logging.INFO):
        assert list(track(range(4), "distill", unit="tok", amount=lambda _: 2048)) == [0, 1, 2, 3]
    assert [line.split(",")[0] for line in caplog.messages] == [f"distill: {n}%" for n in (25, 50, 75, 100)]
    assert all("tok/s" in line for line in caplog.messages)
    assert caplog.messages[-1].endswith("0:00:00 left")


def test_lines_are_rare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    with caplog.at_level(logging.INFO):
        assert sum(track(range(1000), "fast")) == 499500
    assert caplog.messages == []


def test_on_a_terminal_a_bar_is_drawn_and_inner_loops_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    for _ in track(iter("ab"), "outer", total=2):
        assert list(track(range(3), "inner")) == [0, 1, 2]
    assert "outer" in screen.getvalue()
    assert "100%" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_a_loop_left_early_frees_the_next_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    for _ in track(range(5), "first"):
        break
    with caplog.at_level(logging.INFO):
        list(track(iter(range(2)), "second"))
    assert caplog.messages[0].startswith("second: 1 done")


def test_durations() -> None:
    assert duration(3725.4) == "1:02:05"

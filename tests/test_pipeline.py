from __future__ import annotations
from pathlib import Path
from conftest import Run

def test_one(finished: Path) -> None:
    pass
def test_two(finished: Path, run: Run) -> None:
    run()
def test_three(run: Run) -> None:
    run()

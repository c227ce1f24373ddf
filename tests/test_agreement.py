"""Ranks that were started differently are told so, on every rank, before they train apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import FAST
from distributed import on_ranks

from compress import agreement
from compress.agreement import check_agreement
from compress.config import load_config
from compress.errors import ConfigError
from compress.manifests import versions
from compress.parallel import ALONE, launched


def check(folder: Path, cache: Path, kind: str) -> None:
    ranks = launched()
    other = ranks.rank == 1
    settings = ["distill.beta2=0.98"] if kind == "settings" and other else []
    run_dir = folder / (f"run-{ranks.rank}" if kind == "folder" else "run")
    if kind == "code" and other:
        package = shutil.copytree(Path(agreement.__file__).parent, folder / "elsewhere" / "compress")
        (package / "objectives" / "terms.py").write_text("")
        agreement.__file__ = str(package / "agreement.py")
    if kind == "versions" and other:
        agreement.versions = lambda: {**versions(), "torch": "2.0"}
    if kind in ("files", "copies"):  # each node has a copy of its own
        student = Path(shutil.copytree(cache / "tiny" / "teacher", folder / f"student-{ranks.rank}"))
        if other:
            (student / ".cache").mkdir()
            (student / ".cache" / "download.lock").write_text("")
        if other and kind == "files":  # of which one was not brought up to date
            (student / "config.json").write_text("{}")
            (student / "notes.txt").write_text("")
        (folder / f"home-{ranks.rank}").mkdir()
        os.environ["HOME"] = str(folder / f"home-{ranks.rank}")
        student.rename(folder / f"home-{ranks.rank}" / "student")
        settings = ['distill.init_from="~/student"']
    agreement._PATIENCE = 1
    config = load_config(*FAST, "run_dir=run", f"cache_dir={cache}", *settings)
    try:
        check_agreement(config, run_dir, ranks)
        said = "agreed"
    except ConfigError as error:
        said = str(error)
    (folder / f"{ranks.rank}.txt").write_text(said)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("alike", "agreed", marks=pytest.mark.slow),
        ("settings", "rank 1 of 2 has another distill.beta2 than rank 0"),
        pytest.param("code", "than rank 0 (compress/objectives/terms.py); install", marks=pytest.mark.slow),
        pytest.param("versions", "rank 1 of 2 has another version of torch than rank 0", marks=pytest.mark.slow),
        pytest.param(
            "files", "has another distill.init_from=~/student than rank 0 (config.json", marks=pytest.mark.slow
        ),
        pytest.param("copies", "agreed", marks=pytest.mark.slow),
        ("folder", "is not the same folder for rank 1 of 2"),
    ],
)
def test_every_rank_is_told_what_differs(kind: str, said: str, cache: Path, tmp_path: Path) -> None:
    on_ranks(2, check, tmp_path, cache, kind)
    for rank in range(2):
        assert said in (tmp_path / f"{rank}.txt").read_text()
    assert not list(tmp_path.glob("run*/.seen*"))


def test_one_process_agrees_with_itself(cache: Path, tmp_path: Path) -> None:
    check_agreement(load_config(*FAST, "run_dir=run", f"cache_dir={cache}"), tmp_path / "run", ALONE)
    assert not (tmp_path / "run").exists()

"""The command line as a person meets it: help, the composed settings, typos, one's own recipes, sweeps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import FAST, Command, environment

from compress.__main__ import _checked_command_line
from compress.errors import CompressError


def test_help_says_what_can_be_typed(command: Command, tmp_path: Path) -> None:
    result = command("--help")
    assert result.returncode == 0
    for part in (
        "python -m compress recipe=tiny", "stage=status",
        "tokenize, score, search, prune, correct, cache, distill, export, evaluate",
        "--cfg job", "--config-dir DIR", "smollm2_135m_to_100m, smollm2_135m_to_80m_two_rounds, tiny",
        "num_tokens: ???", "trust_remote_code: false",
    ):  # fmt: skip
        assert part in result.stdout, part
    assert not result.stderr
    assert not list(tmp_path.iterdir())


def test_cfg_job_shows_the_composed_settings_whatever_is_still_missing(command: Command, tmp_path: Path) -> None:
    result = command("recipe=tiny", "distill.num_tokens=4096", "--cfg", "job")
    assert result.returncode == 0
    shown = yaml.safe_load(result.stdout)
    assert shown["distill"]["num_tokens"] == 4096
    assert shown["teacher"]["path"] == "embedded:tiny"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("distill.num_tokens and teacher.path must be set", "recipe=", "tiny")),
        (("recipe=tny",), ("recipe=tny: no such recipe; did you mean tiny",)),
        (("recipe=tiny", "distil.num_tokens=1"), ("distil.num_tokens: no such key; did you mean distill.num_tokens",)),
        (("recipe=tiny", "stage=purne"), ("stage=purne must be one of all, tokenize",)),
        (("recipe=tiny", "--cfg", "job", "distill.num_tokens=abc"), ("distill.num_tokens=abc must be a number",)),
        (("recipe=tiny", "--config-name", "foo"), ("--config-name isn't used here", "--config-dir DIR")),
        (("recipe=tiny", "threads=100000"), ("threads=100000 must be within 0 (chosen for you) and 1024",)),
    ],
)
def test_a_typo_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], parts: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("compress: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert all(part in result.stderr for part in parts), result.stderr
    assert not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_runs_each_name_and_ones_own_recipes_are_found(command: Command, cache: Path, tmp_path: Path) -> None:
    """Options may stand behind the settings; nothing is left in the working folder but runs/."""
    own = tmp_path / "own" / "recipe"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [tiny]\nseed: 7\n")
    fast = [setting for setting in FAST if not setting.startswith("recipe=")]
    settings = ("recipe=mine", *fast, "stage=tokenize", f"cache_dir={cache}", "name=a,b")
    result = command(*settings, "--config-dir", str(tmp_path / "own"), "--multirun")
    assert result.returncode == 0, result.stderr
    for name in ("a", "b"):
        manifest = yaml.safe_load((tmp_path / "runs" / name / "tokens" / "manifest.json").read_text())
        assert manifest["config"]["seed"] == 7
    assert {path.name for path in tmp_path.iterdir()} == {"own", "runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"a", "b", "sweeps"}
    assert not result.stdout, "standard output is for tables"
    assert re.search(r"^\[\d{4}-\d\d-\d\d [\d:]+\] tokenize: done in \d+ s$", result.stderr, re.MULTILINE), (
        result.stderr
    )


def test_status_goes_to_standard_output(command: Command, finished: Path) -> None:
    result = command("recipe=tiny", "stage=status", f"run_dir={finished}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" done ") == 6
    assert not result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["recipe=tiny", "distil.x=1"], ["distil.x: no such key"]),
        (["recipe=tiny", "--cfg", "job", "distil.x=1"], ["distil.x: no such key"]),
        (["--cfg=job", "recipe=nope"], ["recipe=nope: no such recipe"]),
        (["recipe=tiny", "-m", "name=a,b", "distil.x=1"], ["distil.x: no such key"]),
        (["-m", "recipe=tiny", "seed=1,x"], ["seed=x must be a whole number"]),
        (["-m", "recipe=tiny,nope"], ["recipe=nope: no such recipe"]),
        (
            ["-m", "recipe=tiny", "distill.learning_rate=1e-4,-1"],
            ["distill.learning_rate=-1.0 must be a positive number"],
        ),
        (["recipe=tiny", "name=a,b"], ["name=a,b", "--multirun"]),
        (["recipe=tiny", "--config-dir", "nowhere"], ["--config-dir nowhere is not a folder", "recipe/NAME.yaml"]),
        (["recipe=tiny", "--config-dir=nowhere"], ["--config-dir nowhere is not a folder"]),
        (["recipe=tiny", "+seed=1"], ["+seed", "write seed="]),
        (["tiny"], ["tiny: settings are written key=value"]),
    ],
)
def test_a_command_line_is_checked_before_hydra_sees_it(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(CompressError) as caught:
        _checked_command_line(arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "ordered"),
    [
        (["--help"], ["--help"]),
        (["recipe=nope", "--help"], ["--help", "recipe=nope"]),
        (["recipe=tiny", "--cfg", "job", "seed=1"], ["--cfg", "job", "recipe=tiny", "seed=1"]),
        (["recipe=tiny", "-m", "name=a,b"], ["-m", "recipe=tiny", "name=a,b"]),
        (["recipe=tiny", "hydra.run.dir=x"], ["recipe=tiny", "hydra.run.dir=x"]),
    ],
)
def test_options_may_stand_anywhere(arguments: list[str], ordered: list[str]) -> None:
    assert _checked_command_line(arguments) == ordered


def test_nothing_heavy_is_imported_for_an_answer() -> None:
    """A typo is answered in a second: torch and transformers take many."""
    probe = "import sys; import compress, compress.__main__, compress.config; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"  # noqa: E501
    result = subprocess.run(
        [sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

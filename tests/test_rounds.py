"""Several rounds: each prunes the student of the last, all learn from the original, over one set of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

from compress.errors import ConfigError

OPEN = ("prune.num_hidden_layers=null", "prune.intermediate_size=null")
ROUNDS = (*OPEN, "rounds=[{prune: {num_hidden_layers: 3}},{prune: {intermediate_size: 96}, num_tokens: 2048}]")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_rounds_prune_the_students_student_and_learn_from_the_teacher(run: Run, tmp_path: Path) -> None:
    run(*ROUNDS)
    first, second = (tmp_path / "run" / f"round_{number}" for number in (1, 2))
    one, two = (read(folder / "prune" / "report.json") for folder in (first, second))
    assert two["teacher"]["num_hidden_layers"] == one["student"]["num_hidden_layers"] == 3
    assert two["student"]["num_hidden_layers"] == 3
    assert two["student"]["intermediate_size"] == 96
    before, after = (load_file(folder / "model.safetensors") for folder in (first / "export", second / "prune"))
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(before[norm], after[norm]), "cut from the trained student of round 1"
    assert not torch.equal(load_file(first / "prune" / "model.safetensors")[norm], after[norm])
    metrics = [read(folder / "evaluate" / "metrics.json") for folder in (first, second)]
    assert metrics[0]["teacher"]["sets"] == metrics[1]["teacher"]["sets"], "one teacher for both"
    assert metrics[1]["distilled"]["parameters"] < metrics[0]["distilled"]["parameters"]
    rows = (second / "distill" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["tokens"] == 2048
    assert (second / "tokens").is_symlink(), "tokenized once"
    manifest = (second / "export" / "manifest.json").read_bytes()
    run(*ROUNDS)
    assert (second / "export" / "manifest.json").read_bytes() == manifest, "done before, skipped"
    run(*ROUNDS, "stage=status")


def test_what_prints_of_rounds_writes_nothing(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("plan", "status"):
        run(*ROUNDS, f"stage={stage}")
        assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().out
    assert shown.count("memory of a distillation step") == 2
    assert "round_2" in shown


def test_three_rounds_hand_their_adapters_on() -> None:
    from conftest import FAST

    from compress.config import load_config
    from compress.rules import round_config

    three = (
        "{prune: {num_hidden_layers: 3, adapters: [/a/one]}},{prune: {num_hidden_layers: 2}},{prune: {hidden_size: 48}}"
    )
    config = load_config(*FAST, *OPEN, f"rounds=[{three}]", "run_dir=r")
    found = [round_config(config, number).prune.adapters for number in (1, 2, 3)]
    assert found == [["/a/one"], ["r/round_1/export/adapters/one"], ["r/round_2/export/adapters/one"]]


def test_one_round_alone_needs_the_one_before(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"round 2 prunes .*round_1/export, which isn't there; run round=1"):
        run(*ROUNDS, "round=2")
    run(*ROUNDS, "round=1", "stage=tokenize")
    assert (tmp_path / "run" / "round_1" / "tokens" / "manifest.json").exists()


def test_a_source_other_than_the_teacher_is_what_is_pruned(run: Run, finished_source: Path, tmp_path: Path) -> None:
    """prune.source alone: the scores are of it, and a changed source is noticed."""
    settings = (*OPEN, "prune.num_hidden_layers=2", f"prune.source={finished_source / 'export'}")
    run(*settings)
    report = read(tmp_path / "run" / "prune" / "report.json")
    assert report["teacher"]["num_hidden_layers"] == 3
    assert report["student"]["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((*ROUNDS, "round=3"), "round=3 must be within 1 and the 2 of rounds"),
        (("rounds=[{prune: {num_hidden_layers: 3}}]",), "belong to a single round; give them inside of rounds"),
        ((*OPEN, "rounds=[{prune: {num_hidden_layers: 2}},{prune: {num_hidden_layers: 3}}]"),
         "round 2 has prune.num_hidden_layers=3, more than the 2 of the round before"),
        ((*OPEN, "rounds=[{prune: {num_hidden_layers: 3}},{prune: {intermediate_size: 97}}]"),
         "prune.intermediate_size=97 must be a multiple of"),
        ((*OPEN, "rounds=[{prune: {hidden: 3}}]"), r"rounds.*hidden.*no such key"),
        ((*OPEN, "rounds=[{num_tokens: -4}]"), "round 1: distill.num_tokens=-4.0 must be a whole positive number"),
        ((*ROUNDS, "until=prune"), "until=prune: a round needs the export of the one before; choose one with round=1"),
        ((*ROUNDS, "export.step=4"), "export.step=4: a round prunes the last step of the one before"),
        (("round=1",), r"round=1 chooses one of rounds, which is empty"),
        ((*OPEN, "rounds=[{prune: {num_hidden_layers: 3}},{prune: {num_hidden_layers: 3}}]"),
         r"prune.\* leaves the teacher as it is"),
        ((*OPEN, "rounds=[{prune: {num_hidden_layers: 2}},{prune: {removed_layers: [3]}}]"),
         r"prune.removed_layers=\[3\] must be distinct layers within 0 and 1"),
        (("prune.source=nowhere",), "prune.source=nowhere is no folder"),
    ],
)  # fmt: skip
def test_rounds_that_cannot_be_are_refused_before_anything_is_written(
    settings: tuple[str, ...], said: str, run: Run, tmp_path: Path
) -> None:
    from compress.errors import CompressError

    with pytest.raises(CompressError, match=said):
        run(*settings)
    assert not (tmp_path / "run").exists()

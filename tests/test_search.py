"""The search measures what it says, spends its tokens on the better half, survives kills; its winner is cut."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, Run
from distributed import ranks_of, torchrun, torchrun_until
from safetensors.torch import load_file

from compress import search
from compress.architecture import num_parameters
from compress.candidates import name_of, spread
from compress.config import load_config
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.folders import read_model
from compress.metrics import language_modelling
from compress.models import load_model
from compress.search import Round
from compress.shapes import Candidate
from compress.teacher import RecordedTeacher, Teacher
from compress.tokens import TokenSet

Spawn = Callable[..., "subprocess.Popen[str]"]
SHAPE = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.max_parameters=160000")
SEARCH = (*SHAPE, "search.num_candidates=5", "search.num_distilled=3", "search.num_tokens=1024",
          "search.num_sequences=6")  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def searched_source(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import _run

    folder = tmp_path_factory.mktemp("searched") / "run"
    _run(cache, folder, (*SEARCH, "search.continue_winner=true"))
    return folder


@pytest.fixture
def searched(searched_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched_source, tmp_path / "run"))


def test_rounds_halve_the_candidates_double_the_tokens_and_the_winner_is_cut(searched_source: Path) -> None:
    report = read(searched_source / "search" / "report.json")
    rounds = report["rounds"]
    assert [(r["num_tokens"], len(r["kl"])) for r in rounds] == [(0, 5), (1024, 3), (2048, 2)]
    for before, after in itertools.pairwise(rounds):
        best = sorted(before["kl"], key=before["kl"].__getitem__)
        assert set(after["kl"]) == set(best[: len(after["kl"])])
        assert sum(before["win_share"].values()) == pytest.approx(1)
    winner = report["winner"]["name"]
    assert winner == min(rounds[-1]["kl"], key=rounds[-1]["kl"].__getitem__)
    assert {row["sizes"]["num_hidden_layers"] for row in report["candidates"]} == {3, 4}, "depth is traded for width"
    assert all(0.9 * 160_000 <= row["num_parameters"] <= 160_000 for row in report["candidates"])
    for name in rounds[1]["kl"]:
        assert rounds[1]["kl"][name] < rounds[0]["kl"][name], "it was trained"
    student = read(searched_source / "prune" / "report.json")
    assert all(student["student"][size] == value for size, value in report["winner"]["sizes"].items())
    assert "best of the search within prune.max_parameters=160,000" in student["choices"]["num_hidden_layers"]
    ours, theirs = (
        load_file(searched_source / place / "model.safetensors") for place in ("prune", f"search/candidates/{winner}")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "prune/ stays untrained"
    left = {path.name for path in (searched_source / "search").iterdir()}
    assert left == {"candidates", "figures", "winner", "report.json", "manifest.json"}


def test_untrained_candidates_are_left_out_only_where_the_settings_say_so() -> None:
    """And then each round has half of the one before, down to one pair."""
    for settings, expected in (
        (("search.num_distilled=null",), [5, 3, 2]),
        ((), [3, 2]),
        (("search.num_distilled=2",), [2]),
    ):
        rounds = search._schedule(load_config("recipe=tiny", *SEARCH, *settings), 5)
        assert rounds[0] == (0, 5)
        assert [count for _, count in rounds[1:]] == expected


def test_the_figures_are_the_kl_that_evaluate_measures(searched_source: Path) -> None:
    report = read(searched_source / "search" / "report.json")
    config = read(searched_source / "search" / "manifest.json")["config"]
    tokens = TokenSet.open(searched_source / "tokens" / "validation" / report["judge"])
    batches = [tokens.batch(group) for group in tokens.spread(config["search"]["num_sequences"], 4)]
    folders = {row["name"]: searched_source / "search" / "candidates" / row["name"] for row in report["candidates"]}
    folders |= {"teacher": Path(config["cache_dir"]) / "tiny" / "teacher", "winner": searched_source / "search/winner"}
    models = {name: load_model(folder, torch.float32).eval() for name, folder in folders.items()}
    found = {name: row["kl_to_teacher"] for name, row in language_modelling(models, batches).items()}
    for name, kl in report["rounds"][0]["kl"].items():
        assert found[name] == pytest.approx(kl, rel=1e-5)
    assert found["winner"] == pytest.approx(min(report["rounds"][-1]["kl"].values()), rel=1e-5)


def test_distill_goes_on_from_the_winner(searched: Path, run: Run) -> None:
    """The same run without it starts from the untrained student, and its first step loses more."""

    def first_loss() -> float:
        return float(json.loads((searched / "distill" / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    trained = first_loss()
    for folder in ("distill", "export", "evaluate"):
        shutil.rmtree(searched / folder)
    run(*SEARCH, "stage=distill")
    assert trained < 0.9 * first_loss()


def test_training_in_rounds_is_training_in_one_go(searched: Path, run: Run, searched_source: Path) -> None:
    """1024 tokens and then 1024 more, against a search that begins with 2048: each sequence's KL, to the bit."""
    shutil.rmtree(searched / "search")
    run(*SEARCH, "search.num_tokens=2048", "stage=search")
    in_rounds = sorted((searched_source / "search" / "figures").glob("*-2048-tokens.json"))
    assert len(in_rounds) == 2
    for file in in_rounds:
        assert read(searched / "search" / "figures" / file.name) == read(file), file.name


def test_a_recorded_signal_is_the_teachers_and_costs_no_second_pass(
    searched_source: Path, teacher_source: Path, tmp_path: Path
) -> None:
    tokens = TokenSet.open(searched_source / "tokens" / "train")
    model = load_model(teacher_source, torch.float32)
    plain, recorded = Teacher(model), RecordedTeacher(model, tmp_path / "signals")
    batches = [tokens.batch([0, 3]), tokens.batch([3, 0]), tokens.batch([5])]
    expected = [plain.signal(batch).hidden_NE for batch in batches]
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.base_model.register_forward_pre_hook(count)
    for _ in range(2):
        for batch, hidden in zip(batches, expected, strict=True):
            assert torch.equal(recorded.signal(batch).hidden_NE, hidden)
    assert passes == len(batches)
    batches[2].loss_mask[0, :5] = False
    assert len(recorded.signal(batches[2]).hidden_NE) == int(batches[2].loss_mask.sum()), "another mask, another signal"


@pytest.mark.slow
def test_ranks_search_as_one_process(searched: Path, searched_source: Path, cache: Path) -> None:
    """Two copies of pairs; the first try of all four is killed among the trained candidates."""
    shutil.rmtree(searched / "search")
    settings = (*FAST, f"run_dir={searched}", f"cache_dir={cache}", *SEARCH, "search.continue_winner=true",
                "distill.micro_batch_size=2", "cluster.shard_ranks=2", "stage=search")  # fmt: skip
    figures = searched / "search" / "figures"
    log = searched.parent / "log"
    started = torchrun_until(lambda: len(list(figures.glob("*-1024-tokens.json"))) > 1, 4, log, *settings)
    os.kill(ranks_of(started.pid)[-1], signal.SIGKILL)
    assert started.wait(60) != 0
    assert not (searched / "search" / "report.json").exists()
    done = torchrun(4, searched.parent, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = (read(folder / "search" / "report.json") for folder in (searched, searched_source))
    assert found["winner"] == expected["winner"]
    for ours, theirs in zip(found["rounds"], expected["rounds"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    ours, theirs = (load_file(f / "search" / "winner" / "model.safetensors") for f in (searched, searched_source))
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_report(
    spawn: Spawn, run: Run, searched_source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "search"
    settings = (*SEARCH, "search.continue_winner=true", "stage=all")
    for wanted in (2, 6):
        process = spawn(*settings)
        deadline = time.monotonic() + 90
        while len(list((folder / "figures").glob("*.json"))) < wanted:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "report.json").exists()
    run(*settings)
    assert read(folder / "report.json") == read(searched_source / "search" / "report.json")
    assert not [path for path in (tmp_path / "run").rglob(".*") if not path.name.endswith((".lock", ".lease"))]


def test_a_diverged_candidate_loses_and_no_figure_of_other_settings_is_kept(run: Run, tmp_path: Path) -> None:
    """At a rate at which all diverge the search fails; at a sane one it starts anew instead of mixing the two."""
    for stage in ("tokenize", "score"):
        run(*SEARCH, f"stage={stage}")
    wild = (*SEARCH, "distill.learning_rate=1e30", "distill.warmup_steps=0", "stage=search")
    with pytest.raises(
        NumericalError, match=r"no candidate is finite after 1024 tokens; lower distill.learning_rate=1e"
    ):
        run(*wild)
    figures = tmp_path / "run" / "search" / "figures"
    assert read(sorted(figures.glob("*-1024-tokens.json"))[0]) == {"kl": None}
    run(*SEARCH, "stage=search")
    report = read(tmp_path / "run" / "search" / "report.json")
    assert len(report["rounds"]) == 3
    assert all(kl is not None for done in report["rounds"] for kl in done["kl"].values())


def test_without_tokens_the_untrained_kl_decides(run: Run, tmp_path: Path) -> None:
    settings = (*SHAPE, "search.num_candidates=3", "search.num_sequences=4")
    for stage in ("tokenize", "score", "search", "prune"):
        run(*settings, f"stage={stage}")
    report = read(tmp_path / "run" / "search" / "report.json")
    assert [r["num_tokens"] for r in report["rounds"]] == [0]
    assert report["winner"]["name"] == min(report["rounds"][0]["kl"], key=report["rounds"][0]["kl"].__getitem__)
    assert not (tmp_path / "run" / "search" / "winner").exists()


def test_a_speed_is_measured_and_refused_when_out_of_reach(run: Run, tmp_path: Path) -> None:
    shape = SHAPE[:2]
    few = ("search.num_candidates=2", "search.num_sequences=2")
    for stage in ("tokenize", "score"):
        run(*shape, *few, "prune.min_tokens_per_second=1e9", f"stage={stage}")
    with pytest.raises(
        ConfigError, match=r"min_tokens_per_second=1e\+09 is out of reach on this machine: the fastest of"
    ):
        run(*shape, *few, "prune.min_tokens_per_second=1e9", "stage=search")
    run(*shape, *few, "prune.min_tokens_per_second=1", "stage=search")
    report = read(tmp_path / "run" / "search" / "report.json")
    assert all(row["tokens_per_second"] >= 1 for row in report["candidates"])
    assert max(row["num_parameters"] for row in report["candidates"]) > 190_000, "the largest that is fast enough"


def candidate(layers: int, damage: float, teacher: Any) -> Candidate:
    from dataclasses import replace

    return Candidate(replace(teacher, num_hidden_layers=layers), 1, damage, {})


def test_the_best_of_each_depth_comes_first(teacher_source: Path) -> None:
    shape = read_model(teacher_source).shape
    ranked = [candidate(*pair, shape) for pair in ((4, 0.1), (4, 0.2), (3, 0.3), (4, 0.4), (2, 0.5), (3, 0.6))]
    assert [c.damage for c in spread(ranked)] == [0.1, 0.3, 0.5, 0.2, 0.6, 0.4]
    assert name_of(ranked[2].shape, shape) == "layers3"


def test_win_shares_say_how_sure_the_order_is() -> None:
    tokens = torch.full((40,), 10.0, dtype=torch.float64)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clear = Round(0, ["a", "b"], torch.stack([noise + 5, noise + 5.1]), tokens)
    assert clear.order() == ["a", "b"]
    assert clear.win_shares(0) == [1.0, 0.0], "paired: the sequences' own difficulty cancels"
    close = Round(0, ["a", "b"], torch.stack([noise + 5, noise.flip(0) + 5]), tokens)
    assert 0.1 < close.win_shares(0)[0] < 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("search.num_candidates=4",), r"search.num_candidates=4 searches within a budget; set one of prune.max_param"),
        (("stage=search",), "stage=search needs search.num_candidates, such as 8"),
        (("prune.min_tokens_per_second=10",), "is measured on candidates; set search.num_candidates"),
        ((*SHAPE, "search.continue_winner=true"), "goes on from a winner that was distilled"),
        ((*SEARCH, "search.num_tokens=100"), "search.num_tokens=100 is less than one step of"),
        ((*SEARCH, "search.judge=nope"), r"search.judge=nope is none of the validation sets \["),
        ((*SEARCH, "search.num_candidates=-1"), "search.num_candidates=-1 must be 0 or more"),
        (("prune.max_bytes=10", *SHAPE[:2]), r"prune.max_bytes=10 \(at least 90% of it used\) is out of reach"),
        (
            ("prune.max_active_parameters=1e12", *SHAPE[:2]),
            "is not smaller than the teacher's .* parameters a token meets",
        ),
        ((*SEARCH, "score.stream=true"), "compares candidates with the whole teacher in memory"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    settings: tuple[str, ...], said: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "limit", ["max_bytes=400K", "max_active_parameters=160K", "max_non_embedding_parameters=120K", "max_bytes=330000"]
)
def test_every_kind_of_budget_is_searched(limit: str, run: Run, tmp_path: Path) -> None:
    settings = (*SHAPE[:2], f"prune.{limit}", "search.num_candidates=2", "search.num_sequences=2", "until=prune",
                "shape.context_tokens=64")  # fmt: skip
    run(*settings)
    report = read(tmp_path / "run" / "search" / "report.json")
    student = read(tmp_path / "run" / "prune" / "report.json")["student"]
    assert all(student[size] == value for size, value in report["winner"]["sizes"].items())


def test_what_changes_no_figure_does_not_bind_the_search(run: Run, tmp_path: Path) -> None:
    """Nothing is trained and no bytes are counted, so neither the rate nor the export's dtype matters to it."""
    settings = (*SHAPE, "search.num_candidates=2", "search.num_sequences=2", "until=prune")
    run(*settings)
    before = (tmp_path / "run" / "search" / "manifest.json").read_bytes()
    run(*settings, "distill.learning_rate=1e-5", "export.dtype=float32")
    assert (tmp_path / "run" / "search" / "manifest.json").read_bytes() == before
    sized = (*SHAPE[:2], "prune.max_bytes=400K", "shape.context_tokens=64", *settings[3:], "run_dir=sized")
    run(*sized)
    with pytest.raises(ArtifactError, match=r"export.dtype was bfloat16, is now float32"):
        run(*sized, "export.dtype=float32")


def test_a_search_killed_after_its_report_goes_on(searched: Path, run: Run, searched_source: Path) -> None:
    """The manifest comes last: without it, and with the checkpoints gone already, the same command ends well."""
    manifest = read(searched / "search" / "manifest.json")
    (searched / "search" / "manifest.json").unlink()
    (searched / "search" / "started.json").write_text(json.dumps(manifest))
    run(*SEARCH, "search.continue_winner=true", "stage=search")
    assert read(searched / "search" / "report.json") == read(searched_source / "search" / "report.json")


def test_steps_or_a_judge_without_loss_tokens_are_refused_before_anything_is_cut(run: Run, tmp_path: Path) -> None:
    """Most rows are made of documents of one token, which is never a target; each source as a whole has targets."""
    real = {"text": "The river carries the letter under the bridge. " * 20}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*[{"text": "a"}] * 500, real]))
    alone = (*SEARCH, "data.append_eos=false", "distill.global_batch_size=1", "distill.micro_batch_size=1")
    for number, (changed, said) in enumerate((
        (f"data.train=[{{path: {mixed}}}]", r"search step \d+ of \d+ would have no loss token"),
        (f"data.validation=[{{path: {mixed}, name: mixed}}]", r"search.judge=mixed: none of the 1 seq.* holds a loss"),
    )):  # fmt: skip
        settings = (*alone, changed, f"run_dir={tmp_path / str(number)}", "search.num_sequences=1")
        for stage in ("tokenize", "score"):
            run(*settings, f"stage={stage}")
        with pytest.raises(ConfigError, match=said):
            run(*settings, "stage=search")
        assert not (tmp_path / str(number) / "search" / "candidates").exists()


def test_a_speed_with_sizes_that_cannot_be_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    speed = (*SHAPE[:2], "search.num_candidates=2", "prune.min_tokens_per_second=1")
    for given, said in (
        ("prune.hidden_size=50", "prune.hidden_size=50 must be a multiple of"),
        ("distill.init_from=x", "search.num_candidates=2 finds the student's shape, and distill.init_from=x has one"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(*speed, given)
        assert not (tmp_path / "run").exists()


def test_a_search_inside_of_rounds_compares_with_the_teacher(run: Run, cache: Path, tmp_path: Path) -> None:
    """In round 2 the candidates are cut from round 1's student, and judged against the original."""
    first, second = "num_hidden_layers: 3, max_parameters: 190K", "max_parameters: 150K"
    few = ("search.num_candidates=2", "search.num_sequences=4", "score.max_removed_layers=2")
    run(*SHAPE[:2], *few, f"rounds=[{{prune: {{{first}}}}},{{prune: {{{second}}}}}]")
    folder = tmp_path / "run" / "round_2"
    report = read(folder / "search" / "report.json")
    name = report["winner"]["name"]
    tokens = TokenSet.open(folder / "tokens" / "validation" / report["judge"])
    batches = [tokens.batch(group) for group in tokens.spread(4, 4)]
    models = {
        "teacher": load_model(cache / "tiny" / "teacher", torch.float32).eval(),
        "student": load_model(folder / "search" / "candidates" / name, torch.float32).eval(),
    }
    found = language_modelling(models, batches)["student"]["kl_to_teacher"]
    assert found == pytest.approx(report["rounds"][0]["kl"][name], rel=1e-5)
    assert read(folder / "prune" / "report.json")["teacher"]["num_hidden_layers"] == 3


def test_a_disk_too_small_for_the_candidates_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"take up to .* GB are free; lower search.num_candidates"):
        run(*SEARCH, "search.num_tokens=1e15")
    assert not (tmp_path / "run").exists()


def test_the_disk_estimate_is_not_below_what_lies_there(searched_source: Path, cache: Path) -> None:
    config = load_config(*FAST, f"run_dir={searched_source}", f"cache_dir={cache}", *SEARCH)
    info = read_model(cache / "tiny" / "teacher")
    weights = sum(f.stat().st_size for f in (searched_source / "search").rglob("model.safetensors"))
    assert search.disk_bytes(config, info, info.shape.hidden_size) > weights
    assert num_parameters(info, info.shape) > 160_000

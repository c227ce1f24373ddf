"""Scores and figures don't depend on how many ranks took a share of the text, and one file loads anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, Run
from distributed import on_ranks, torchrun
from families import make_batch, make_model, rows, save_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from compress.depth import rank_layers
from compress.folders import read_model
from compress.gradients import estimate_taylor
from compress.importance import estimate_importance, stream_importance
from compress.metrics import language_modelling
from compress.models import decoder_layers
from compress.parallel import Ranks, launched, shard
from compress.step import StudentModule
from compress.teacher import Teacher
from compress.tokens import TokenBatch
from compress.validation import validate

CRITERIA = ["activation:l2/mean", "activation:variance/variance", "weighted_activation:mean/l2"]


def batches() -> list[TokenBatch]:
    """Five unequal ones, padded: an odd share for two ranks and for three."""
    whole = make_batch(sequences=9, tokens=20, padded=True)
    return [rows(whole, start, stop) for start, stop in ((0, 2), (2, 4), (4, 5), (5, 8), (8, 9))]


def every_score(variant: str, teacher: Path | None = None) -> dict[str, torch.Tensor]:
    ranks, model = launched(), make_model(variant)
    found = estimate_importance(model, batches(), CRITERIA, similarity=True, ranks=ranks)
    tensors = {f"{name}/{axis}": t for name, widths in found.widths.items() for axis, t in widths.items()}
    tensors |= {f"taylor/{axis}": t for axis, t in estimate_taylor(model, batches(), ranks).items()}
    assert found.similarity_SS is not None
    tensors |= {"influence": found.block_influence_L, "similarity": found.similarity_SS}
    tensors["count"] = torch.tensor([found.num_sequences, found.num_tokens])
    for criterion in ("kl_greedy", "loss", "nmse_block"):
        removal = rank_layers(model, batches(), 2, criterion, max_loss_tokens=61, ranks=ranks)
        tensors[f"{criterion}/removed"] = torch.tensor(removal.removed[-1])
        tensors[f"{criterion}/cost"] = torch.tensor(removal.cost)
    if teacher is not None:
        spill = teacher / f"spill-{ranks.rank}"
        streamed = stream_importance(read_model(teacher), torch.float64, batches(), CRITERIA, spill=spill, ranks=ranks)
        tensors |= {f"streamed/{n}/{a}": t for n, widths in streamed.widths.items() for a, t in widths.items()}
    return tensors


def write_scores(variant: str, folder: Path, teacher: Path | None) -> None:
    save_file(every_score(variant, teacher), folder / f"{launched().rank}.safetensors")


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("llama", 2),
        pytest.param("llama", 3, marks=pytest.mark.slow),
        pytest.param("gemma2", 2, marks=pytest.mark.slow),
        pytest.param("mixtral", 3, marks=pytest.mark.slow),
    ],
)
def test_scores_are_the_same_on_any_number_of_ranks(variant: str, size: int, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", make_model(variant)) if variant == "llama" else None
    alone = every_score(variant, teacher)
    on_ranks(size, write_scores, variant, tmp_path, teacher)
    for rank in range(size):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            close = torch.allclose(found[name], expected, rtol=1e-5, atol=1e-9)
            assert close, f"{name}: {(found[name] - expected).abs().max():.3g} off on rank {rank}"


def test_work_is_dealt_without_loss_or_repetition() -> None:
    items = list(range(11))
    dealt = [list(Ranks(rank, 4).mine(items)) for rank in range(4)]
    assert sorted(item for hand in dealt for item in hand) == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert list(Ranks().mine(items)) == items


def write_figures(folder: Path) -> None:
    """Of a stage evaluate and of a validation in training, where the ranks share the student; as they come out."""
    ranks, teacher = launched(), make_model(dtype=torch.float32)
    models = {"teacher": teacher, "student": make_model(dtype=torch.float32, seed=1)}
    found: dict[str, Any] = {"evaluate": language_modelling(models, iter(batches()), ranks=ranks)}
    student = StudentModule(models["student"])
    shard(student, decoder_layers(models["student"]), init_device_mesh("cpu", (ranks.size,)), torch.float32)
    register_fsdp_forward_method(student, "figures")
    sets = {"five": batches(), "one": batches()[:1]}
    found["validation"] = validate(student, Teacher(teacher), sets, ranks)
    (folder / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_figures_are_the_same_on_any_number_of_ranks_to_the_bit(size: int, tmp_path: Path) -> None:
    """Shares are unequal, and a set has fewer batches than there are ranks."""
    on_ranks(1, write_figures, tmp_path)
    on_ranks(size, write_figures, tmp_path)
    alone = read(tmp_path / "1-0.json")
    assert alone["evaluate"]["student"]["kl_to_teacher"] > 0
    for key in ("kl_to_teacher", "loss", "top1_agreement"):
        evaluated, validated = alone["evaluate"]["student"], alone["validation"]["five"]
        assert validated[key] == pytest.approx(evaluated[key], rel=1e-5), "two ways to the same figure"
    for rank in range(size):
        assert read(tmp_path / f"{size}-{rank}.json") == alone


def test_what_was_dealt_out_comes_back_in_order() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(Ranks().in_order(rows), rows.double())
    assert Ranks().in_order(rows[:0]).shape == (0, 2)


@pytest.mark.slow
def test_torchrun_evaluates_as_one_process(finished: Path, run: Run, cache: Path, tmp_path: Path) -> None:
    alone = read(finished / "evaluate" / "metrics.json")
    shutil.rmtree(finished / "evaluate")
    done = torchrun(2, tmp_path, *FAST, f"cache_dir={cache}", f"run_dir={finished}", "stage=evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("teacher, pruned, distilled") == 1, "the first rank prints the table"
    found = read(finished / "evaluate" / "metrics.json")
    for model in ("teacher", "distilled"):
        del alone[model]["tokens_per_second"], found[model]["tokens_per_second"]
    assert found == alone
    run()  # skipped: it is done with these settings


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_torchrun_scores_and_one_process_goes_on(run: Run, cache: Path, tmp_path: Path) -> None:
    settings = ["score.width=[activation:l2/mean,taylor]", "score.micro_batch_size=2"]
    two = f"run_dir={tmp_path / 'two'}"
    run(f"run_dir={tmp_path / 'one'}", *settings, "until=score")
    run(two, *settings, "stage=tokenize")
    done = torchrun(2, tmp_path, *FAST, f"cache_dir={cache}", two, *settings, "stage=score")
    assert done.returncode == 0, done.stderr
    scored = (tmp_path / "two" / "score" / "importance.safetensors").stat().st_mtime_ns
    run(two, *settings)
    assert (tmp_path / "two" / "evaluate" / "manifest.json").exists()
    assert (tmp_path / "two" / "score" / "importance.safetensors").stat().st_mtime_ns == scored, "skipped"
    files = {name: load_file(tmp_path / name / "score" / "importance.safetensors") for name in ("one", "two")}
    assert files["one"].keys() == files["two"].keys()
    for name, expected in files["one"].items():
        torch.testing.assert_close(files["two"][name], expected, rtol=1e-5, atol=1e-9)
    prints = [read(tmp_path / name / "score" / "manifest.json")["fingerprint"] for name in ("one", "two")]
    assert prints[0] == prints[1], "how many ranks scored doesn't matter to what follows"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("stage=prune",), "WORLD_SIZE=2: stage=prune runs in one process in this version, only stage=score"),
        pytest.param(
            ("stage=score", "score.num_sequences=4"),
            "WORLD_SIZE=2: score.num_sequences=4 in micro-batches of ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("stage=score", "score.depth=[kl_greedy]", "score.depth_sequences=4"),
            "WORLD_SIZE=2: score.depth_seq",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_without_work_are_refused(
    settings: tuple[str, ...], said: str, run: Run, cache: Path, tmp_path: Path
) -> None:
    place = [*FAST, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}", "score.micro_batch_size=4"]
    if "stage=score" in settings:  # needs tokens first
        run("score.micro_batch_size=4", *settings, "stage=tokenize")
    done = torchrun(2, tmp_path, *place, *settings)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "run" / "score" / "manifest.json").exists()

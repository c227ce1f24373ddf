"""What asks models computes where cluster.device says, and finds there what a CPU finds; see pretended_device.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, REPOSITORY, Run, environment
from distributed import free_port
from families import make_model, save_model
from safetensors.torch import load_file

from compress.models import load_tokenizer
from compress.signals import SignalCache
from compress.tokens import TokenSet

CRITERIA = (
    "score.width=[activation,weighted_activation,taylor,weight_magnitude]",
    "score.depth=[block_influence,block_cosine,kl_greedy,loss,nmse_block,task]",
)
MIXTURE = ("prune.intermediate_size=null", "prune.moe_intermediate_size=16", "prune.num_hidden_layers=4")


def _pretended(cache: Path, run_dir: Path, *settings: str, ranks: int = 1) -> None:
    """The run on the pretended device, with every product computed there."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), REPOSITORY / "tests" / "pretended_device.py",
         *FAST, f"run_dir={run_dir}", f"cache_dir={cache}", *settings],
        cwd=run_dir.parent, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"here"')]
    assert len(found) == ranks
    for products in found:
        assert products["here"] == 0
        assert products["there"] > 100


def _importance(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "score" / "importance.safetensors")


def _check_scores(cache: Path, tmp_path: Path, *settings: str) -> None:
    """`tmp_path/run` is scored on a CPU; the same on the pretended device."""
    other = Path(shutil.copytree(tmp_path / "run", tmp_path / "there"))
    shutil.rmtree(other / "score")
    _pretended(cache, other, "stage=score", *settings)
    here, there = _importance(tmp_path / "run"), _importance(other)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture
def criteria(tmp_path: Path) -> tuple[str, ...]:
    """Settings that ask for all of them, with a task."""
    items = [{"question": f"What is {n}?", "choices": ["a river", "the harbour"], "label": n % 2} for n in range(8)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return *CRITERIA, f"score.task_path={path}"


def test_every_criterion_scores_on_a_device(
    finished: Path, criteria: tuple[str, ...], run: Run, cache: Path, tmp_path: Path
) -> None:
    shutil.rmtree(finished / "score")
    run("stage=score", *criteria)
    _check_scores(cache, tmp_path, *criteria)


@pytest.fixture
def mixture(teacher_source: Path, tmp_path: Path) -> tuple[str, ...]:
    """The settings of a tiny Qwen3-MoE with the embedded teacher's tokenizer."""
    tokenizer = load_tokenizer(teacher_source)
    model = make_model("qwen3_moe", dtype=torch.float32, vocab_size=len(tokenizer), moe_intermediate_size=24)
    folder = save_model(tmp_path / "teacher", model)
    tokenizer.save_pretrained(folder)
    return *MIXTURE, f"teacher.path={folder}"


@pytest.mark.slow
def test_a_mixture_is_scored_on_a_device(
    criteria: tuple[str, ...], mixture: tuple[str, ...], run: Run, cache: Path, tmp_path: Path
) -> None:
    run("stage=tokenize", *mixture, *criteria)
    run("stage=score", *mixture, *criteria)
    _check_scores(cache, tmp_path, *mixture, *criteria)


@pytest.mark.slow
def test_layers_stream_through_a_device(finished: Path, run: Run, cache: Path, tmp_path: Path) -> None:
    settings = "score.stream=true", "score.width=[weighted_activation,activation:variance/l2]"
    shutil.rmtree(finished / "score")
    run("stage=score", *settings)
    _check_scores(cache, tmp_path, *settings)


@pytest.mark.slow
def test_evaluation_on_a_device(finished: Path, cache: Path) -> None:
    def read() -> Any:
        metrics = json.loads((finished / "evaluate" / "metrics.json").read_text())
        for name in ("teacher", "distilled"):
            assert metrics[name].pop("tokens_per_second") > 0
        return metrics

    here = read()
    shutil.rmtree(finished / "evaluate")
    _pretended(cache, finished, "stage=evaluate")
    there = read()
    for name in ("teacher", "pruned", "distilled"):
        assert there[name]["sets"]["validation"] == pytest.approx(here[name]["sets"]["validation"], rel=1e-6, abs=1e-9)
        assert there[name]["parameters"] == here[name]["parameters"]


@pytest.mark.slow
def test_a_teacher_is_asked_for_a_cache_on_a_device(finished: Path, run: Run, cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "there"))
    run("stage=cache", "teacher.mode=cached")
    _pretended(cache, other, "stage=cache", "teacher.mode=cached")
    caches = [SignalCache(folder / "cache") for folder in (finished, other)]
    data = TokenSet.open(finished / "tokens" / "train")
    assert len(caches[0].indices) > 10
    for index in caches[0].indices:
        here, there = (one.read(data.batch([index])) for one in caches)
        same = (there.ids_NK == here.ids_NK).all(1)  # a draw at the edge of two ids may fall to either
        assert same.float().mean() > 0.95
        torch.testing.assert_close(there.entropy_N, here.entropy_N)


TERMS = {
    "logits": "reverse_kl jensen_shannon skew_kl skew_reverse_kl adaptive_kl top_k_kl dac_kl span_relation "
    "uncertainty_kl dynamic_kl cross_entropy label_smoothing",
    "inside": "forward_kl hidden_mse hidden_cosine minilm_attention minilm_value embedding_mse",
}
WATCHED = "distill.validate_tokens=512", "distill.validate_steps=2"


def _losses(run_dir: Path) -> list[list[float]]:
    """Of each step its loss and the gradient's norm, and of each validation its figures."""
    rows = map(json.loads, (run_dir / "distill" / "metrics.jsonl").read_text().splitlines())
    return [
        list(row["validation"]["validation"].values()) if "validation" in row else [row["loss"], row["gradient_norm"]]
        for row in rows
    ]


def _check_training(cache: Path, run: Run, finished: Path, *settings: str, ranks: int = 1) -> None:
    """Trained by one CPU, and by ranks that have a pretended device each."""
    for folder in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / folder, ignore_errors=True)
    other = Path(shutil.copytree(finished, finished.parent / "there"))
    run("stage=distill", *settings)
    _pretended(cache, other, "stage=distill", *settings, ranks=ranks)
    here, there = _losses(finished), _losses(other)
    assert len(here) >= 8
    assert len(there) == len(here)
    for one, same in zip(there, here, strict=True):
        assert one == pytest.approx(same, rel=1e-5)


def test_training_with_all_that_goes_on_beside_it_on_a_device(finished: Path, run: Run, cache: Path) -> None:
    beside = "distill.ema_decay=0.9", "distill.keep_best=true", "distill.async_checkpoint=true"
    _check_training(cache, run, finished, *WATCHED, *beside)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TERMS)
def test_objectives_on_a_device(kind: str, finished: Path, run: Run, cache: Path) -> None:
    """Those without jumps: total variation and BiLD choose by signs and ranks, which rounding turns."""
    terms = ",".join(f"{{objective: {name}}}" for name in TERMS[kind].split())
    _check_training(cache, run, finished, f"distill.objectives=[{terms}]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("teacher.whole_window=true", "distill.micro_batch_size=1"),
        ("teacher.mode=previous_self", "distill.objectives=[{objective: cross_entropy},{objective: forward_kl}]"),
        ("distill.optimizer=muon", "distill.muon_learning_rate=1e-4"),
    ],
    ids=["whole-window", "previous-self", "muon"],
)
def test_teachers_and_optimizers_on_a_device(settings: tuple[str, ...], finished: Path, run: Run, cache: Path) -> None:
    _check_training(cache, run, finished, *settings)


@pytest.mark.slow
def test_a_mixture_trains_on_a_device(mixture: tuple[str, ...], run: Run, cache: Path, tmp_path: Path) -> None:
    run("until=prune", *mixture)
    _check_training(cache, run, tmp_path / "run", *WATCHED, *mixture, "distill.balance_loss=0.01")


@pytest.mark.slow
def test_two_devices_share_a_model(finished: Path, run: Run, cache: Path) -> None:
    _check_training(cache, run, finished, *WATCHED, ranks=2)


@pytest.mark.slow
def test_a_training_goes_on_on_a_device(finished: Path, cache: Path) -> None:
    """From a checkpoint that a CPU wrote."""
    whole = _losses(finished)
    shutil.rmtree(finished / "distill" / "checkpoints" / "step_00000008")
    (finished / "distill" / "manifest.json").unlink()
    _pretended(cache, finished, "stage=distill")
    assert (finished / "distill" / "checkpoints" / "step_00000008").is_dir()
    for one, same in zip(_losses(finished), whole, strict=True):
        assert one == pytest.approx(same, rel=1e-5)


@pytest.mark.slow
def test_a_search_on_a_device(finished: Path, run: Run, cache: Path) -> None:
    settings = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.max_parameters=160000",
                "search.num_candidates=4", "search.num_distilled=2", "search.num_tokens=1024",
                "search.num_sequences=6", "stage=search")  # fmt: skip
    other = Path(shutil.copytree(finished, finished.parent / "there"))
    run(*settings)
    _pretended(cache, other, *settings)
    here, there = (json.loads((one / "search" / "report.json").read_text()) for one in (finished, other))
    assert there["winner"] == here["winner"]
    for one, same in zip(there["rounds"], here["rounds"], strict=True):
        assert one["kl"] == pytest.approx(same["kl"], rel=1e-4)

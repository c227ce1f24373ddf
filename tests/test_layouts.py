"""Training on several ranks is training on one: losses, weights, resume on another layout, a rank killed at any moment.

Real gloo ranks under torchrun, as users start them. In float32 losses agree to 1e-5 and weights to 1e-3 of their norm;
the same ranks give the same bits.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST
from distributed import ranks_of, torchrun, torchrun_until
from families import make_model, save_model
from safetensors.torch import load_file

from benchmarks.collectives import LAYOUTS, row_of
from compress import checkpoint, pipeline
from compress.config import load_config
from compress.errors import ConfigError
from compress.models import load_model, load_tokenizer
from compress.routing import routers_of
from compress.training import load_trained

STEPS = 20
# A learning rate low enough that rounding stays rounding: Adam's first steps are signs of gradients.
SETTINGS = [
    f"distill.num_tokens={STEPS * 8 * 64}", "distill.global_batch_size=8", "distill.micro_batch_size=2",
    "compute_dtype=float32", "distill.checkpoint_steps=5", "distill.keep_checkpoints=9", "distill.log_steps=1",
    "distill.validate_steps=10", "threads=1",
]  # fmt: skip


# Of a mixture: a rate at which no token is torn between two experts, and the further term of its loss.
MIXTURE = [
    "distill.num_tokens=10240", "distill.learning_rate=2e-4", "distill.balance_loss=0.01",
    "distill.checkpoint_steps=10", "distill.validate_steps=10", "prune.intermediate_size=null",
    "prune.num_hidden_layers=4", "prune.moe_intermediate_size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def mixture(cache: Path, teacher_source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The settings of a tiny Qwen3-MoE with the embedded teacher's tokenizer; one expert is dead from the start."""
    tokenizer = load_tokenizer(teacher_source)
    model = make_model("qwen3_moe", dtype=torch.float32, vocab_size=len(tokenizer), moe_intermediate_size=24)
    with torch.no_grad():
        router = routers_of(model)[1]
        one_D, other_D = router.weight[1].clone(), router.weight[3].clone()
        router.weight.copy_(torch.stack([0 * one_D, one_D, -one_D, other_D, -other_D]))
    folder = save_model(tmp_path_factory.mktemp("mixture") / "teacher", model)
    tokenizer.save_pretrained(folder)
    return [*MIXTURE, f"teacher.path={folder}"]


@pytest.fixture(scope="module")
def mixture_alone(mixture: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture distilled by one process."""
    folder = tmp_path_factory.mktemp("mixture-alone") / "run"
    for stage in ("tokenize", "score", "prune", "distill"):
        pipeline.run(load_config(*settings_of(folder, cache, *mixture, f"stage={stage}")))
    return folder


@pytest.fixture(scope="module")
def upstream(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is tokenized, scored and pruned, to be copied."""
    folder = tmp_path_factory.mktemp("layouts") / "run"
    for stage in ("tokenize", "score", "prune"):
        pipeline.run(load_config(*FAST, *SETTINGS, f"run_dir={folder}", f"cache_dir={cache}", f"stage={stage}"))
    return folder


@pytest.fixture(scope="module")
def alone(upstream: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains, uninterrupted."""
    folder = Path(shutil.copytree(upstream, tmp_path_factory.mktemp("alone") / "run"))
    for stage in ("distill", "export"):
        pipeline.run(load_config(*settings_of(folder, cache, "export.dtype=float32", f"stage={stage}")))
    return folder


def settings_of(run_dir: Path, cache: Path, *extra: str) -> list[str]:
    return [*FAST, *SETTINGS, f"run_dir={run_dir}", f"cache_dir={cache}", "stage=distill", *extra]


def train(size: int, run_dir: Path, cache: Path, *extra: str) -> Path:
    done = torchrun(size, run_dir.parent, *settings_of(run_dir, cache, *extra))
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def losses(run_dir: Path) -> list[float]:
    """Of each step, and then what validation said."""
    rows = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row] + [r["kl_to_teacher"] for r in rows if "validation" in r]


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    model = load_model(run_dir / "prune", torch.float32)
    load_trained(run_dir / "distill" / "checkpoints" / f"step_{step:08d}", model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_training(found: Path, expected: Path, steps: int = STEPS) -> None:
    ours, theirs = losses(found), losses(expected)
    assert len(ours) == len(theirs) == steps + 2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
    assert_close(weights(found, steps), weights(expected, steps))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (found[name] - weight).norm() / weight.norm()
        assert difference < 1e-3, f"{name}: {difference:.2g}"


@pytest.mark.parametrize(
    ("size", "extra"),
    [
        (2, ()),
        pytest.param(4, ("cluster.shard_ranks=2",), id="4-HSDP", marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(2, ("cluster.shard_ranks=1", "distill.async_checkpoint=true"), marks=pytest.mark.slow),
        pytest.param(2, ("teacher.whole_window=false", "distill.recompute=true"), marks=pytest.mark.slow),
        pytest.param(2, ("distill.compile=true",), marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one_process(
    size: int, extra: tuple[str, ...], upstream: Path, alone: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(upstream, tmp_path / "run"))
    assert_same_training(train(size, run_dir, cache, *extra), alone)
    export = ("export.dtype=float32", *extra, "stage=export", "cluster.shard_ranks=null")
    pipeline.run(load_config(*settings_of(run_dir, cache, *export)))
    exported, expected = (load_file(folder / "export" / "model.safetensors") for folder in (run_dir, alone))
    assert_close(exported, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "extra"),
    [
        (2, ()),
        (4, ()),
        pytest.param(4, ("cluster.shard_ranks=2",), id="4-HSDP"),
        (2, ("distill.recompute=true", "distill.micro_batch_size=1")),
        (1, ("distill.micro_batch_size=8",)),
    ],
)
def test_a_mixture_trains_on_ranks_as_in_one_process(
    size: int, extra: tuple[str, ...], mixture: list[str], mixture_alone: Path, cache: Path, tmp_path: Path
) -> None:
    """20 steps with packed documents and the balance loss. Its experts are shared unevenly, or not at all by some of
    four ranks; one of them has no token, on any rank, and what is logged of the load is that of all."""
    run_dir = as_pruned(mixture_alone, tmp_path)
    assert_same_training(train(size, run_dir, cache, *mixture, *extra), mixture_alone, steps=20)
    rows = [json.loads(line) for line in (mixture_alone / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["experts"]["num_dead"] >= 1
    assert experts(run_dir) == experts(mixture_alone)


def as_pruned(run_dir: Path, folder: Path) -> Path:
    """A copy of the run as it was before stage distill."""
    copy = Path(shutil.copytree(run_dir, folder / "run"))
    shutil.rmtree(copy / "distill")
    return copy


def experts(run_dir: Path) -> list[tuple[float, float]]:
    """Of each step, what counts choices and not probabilities."""
    rows = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    return [(row["experts"]["max_load_ratio"], row["experts"]["num_dead"]) for row in rows if "experts" in row]


@pytest.mark.slow
def test_a_mixture_goes_on_with_other_ranks(
    mixture: list[str], mixture_alone: Path, cache: Path, tmp_path: Path
) -> None:
    """The shares that the balance loss goes by are part of the checkpoint: on the same ranks it is bit-identical."""
    run_dir = Path(shutil.copytree(mixture_alone, tmp_path / "run"))
    take_back(run_dir, 10)
    train(2, run_dir, cache, *mixture)
    assert_same_training(run_dir, mixture_alone, steps=20)
    take_back(run_dir, 10)
    pipeline.run(load_config(*settings_of(run_dir, cache, *mixture)))
    assert losses(run_dir) == losses(mixture_alone)
    for name, weight in weights(mixture_alone, 20).items():
        assert torch.equal(weights(run_dir, 20)[name], weight), name


@pytest.mark.slow
def test_a_training_goes_on_with_other_ranks(upstream: Path, alone: Path, cache: Path, tmp_path: Path) -> None:
    """Two ranks, then one process, then four as pairs: each goes on from the checkpoint of the one before."""
    run_dir = Path(shutil.copytree(upstream, tmp_path / "run"))
    train(2, run_dir, cache)
    for size, step, extra in ((1, 5, ()), (4, 10, ("cluster.shard_ranks=2",))):
        take_back(run_dir, step)
        train(size, run_dir, cache, *extra)
    assert_same_training(run_dir, alone)


def take_back(run_dir: Path, step: int) -> None:
    """As a training looks whose newest committed step is this one."""
    manifest = run_dir / "distill" / "manifest.json"
    manifest.rename(manifest.with_name("started.json"))
    for later in checkpoint.steps(run_dir / "distill" / "checkpoints"):
        if later > step:
            shutil.rmtree(run_dir / "distill" / "checkpoints" / f"step_{later:08d}")


@pytest.mark.slow
def test_ranks_that_are_killed_at_any_moment_end_all_and_the_same_command_gives_the_same_bits(
    upstream: Path, cache: Path, tmp_path: Path
) -> None:
    """One after the other: as the ranks start, in a step, as a checkpoint is written, and after it."""
    steps = 3 * STEPS
    often = (f"distill.num_tokens={steps * 8 * 64}", "distill.checkpoint_steps=2", "distill.validate_steps=20")
    whole = train(2, Path(shutil.copytree(upstream, tmp_path / "whole")), cache, *often)
    run_dir = Path(shutil.copytree(upstream, tmp_path / "run"))
    folder, metrics = run_dir / "distill" / "checkpoints", run_dir / "distill" / "metrics.jsonl"

    def rows() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def newest() -> int:
        return max(checkpoint.steps(folder), default=0)

    killed: list[tuple[str, int]] = []
    for moment, victim in itertools.product(("start", "step", "writing", "commit"), (0, 1)):
        had, known, left = newest(), rows(), set(folder.glob(".step_*.tmp-*"))
        since: dict[str, Callable[[], Any]] = {
            "start": lambda: True,
            "step": lambda known=known: rows() > known,
            "writing": lambda left=left: set(folder.glob(".step_*.tmp-*")) - left,
            "commit": lambda had=had: newest() > had,
        }
        started = torchrun_until(since[moment], 2, tmp_path / "log", *settings_of(run_dir, cache, *often))
        until = time.monotonic() + 60
        while len(ranks_of(started.pid)) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(ranks_of(started.pid)[victim], signal.SIGKILL)
        assert started.wait(120) != 0, (moment, victim)
        assert not (run_dir / "distill" / "manifest.json").exists()
        killed.append((moment, newest()))
    assert len(killed) == 8
    assert killed[0][1] == 0 < killed[-1][1], "it went on from kill to kill"
    train(2, run_dir, cache, *often)
    assert losses(run_dir) == losses(whole)
    expected, found = weights(whole, steps), weights(run_dir, steps)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_all_and_the_others_say_where_they_waited(
    upstream: Path, alone: Path, cache: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(upstream, tmp_path / "run"))
    started, log = start_and_wait_for_a_step(run_dir, cache, tmp_path / "log", "cluster.stall_seconds=10")
    os.kill(ranks_of(started.pid)[1], signal.SIGSTOP)
    assert started.wait(120) != 0
    said = log.read_text()
    assert "Timeout (0:00:10)!" in said
    assert "in accumulate_gradients" in said or "in any" in said or "in save" in said, said[-3000:]
    train(2, run_dir, cache)
    assert_same_training(run_dir, alone)


def start_and_wait_for_a_step(
    run_dir: Path, cache: Path, log: Path, *settings: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """A training on two ranks that has committed a step, and its log."""
    folder = run_dir / "distill" / "checkpoints"
    return torchrun_until(lambda: checkpoint.steps(folder), 2, log, *settings_of(run_dir, cache, *settings)), log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("cluster.shard_ranks=3",), "cluster.shard_ranks=3 must divide the 2 ranks"),
        (("distill.global_batch_size=6",), "WORLD_SIZE=2: the global batch of phase 1, 6 sequences, must be a mult"),
        (("teacher.mode=auto",), "WORLD_SIZE=2: teacher.mode=auto works in one process"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    settings: tuple[str, ...], said: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match=re.escape(said)):
        pipeline.run(load_config(*settings_of(tmp_path / "run", cache, *settings)))
    assert not (tmp_path / "run" / "distill").exists()


def test_a_layout_of_more_ranks_is_refused_before_a_whole_run_in_one_process(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shard_ranks=3 must divide the 1 ranks"):
        pipeline.run(load_config(*settings_of(tmp_path / "run", cache, "stage=all", "cluster.shard_ranks=3")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_send_what_the_plan_says(layout: str, upstream: Path, cache: Path, tmp_path: Path) -> None:
    """Every collective of the stage, by torch's own operators: as many bytes of each kind, none larger than a unit."""
    num_ranks, extra = LAYOUTS[layout]
    settings = settings_of(
        Path(shutil.copytree(upstream, tmp_path / "run")), cache, "distill.validate_steps=null", *extra
    )  # fmt: skip
    found = row_of(num_ranks, settings, tmp_path, STEPS)
    assert found["collectives"]
    for what, figures in found["collectives"].items():
        assert figures["bytes"] == figures["modelled_bytes"], what
        assert figures["largest_bytes"] == figures["largest_modelled_bytes"] < found["logits_bytes"], what
    assert max(found["largest_of_others"].values()) < 2**16, "sums of losses, names of files"


@pytest.mark.slow
def test_ranks_of_a_mixture_send_hardly_more_than_the_plan_says(
    mixture: list[str], cache: Path, tmp_path: Path
) -> None:
    """Two ranks don't divide its five experts: routers get a row more, which isn't reckoned, and experts nothing."""
    settings = settings_of(tmp_path / "run", cache, *mixture, "distill.validate_steps=null", "compute_dtype=bfloat16")
    for stage in ("tokenize", "score", "prune"):
        pipeline.run(load_config(*settings, f"stage={stage}"))
    found = row_of(2, settings, tmp_path, 10240 // (8 * 64))
    assert list(found["collectives"]) == ["all-gather over 2", "reduce-scatter over 2"]
    for what, figures in found["collectives"].items():
        assert figures["modelled_bytes"] <= figures["bytes"] < 1.01 * figures["modelled_bytes"], what
        assert figures["largest_bytes"] < 1.01 * figures["largest_modelled_bytes"], what

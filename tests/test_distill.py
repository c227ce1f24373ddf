"""The distill stage on a real run folder: it learns, it resumes exactly, it refuses before training what can't work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import without_times
from safetensors.torch import load_file, save_file

from compress import checkpoint, distill, pipeline
from compress.config import load_config
from compress.errors import ConfigError, NumericalError
from compress.inputs import teacher_of
from compress.models import load_model
from compress.settings import CompressConfig
from compress.tokens import Rows, TokenSet, shard_facts, write_index, write_shard

STEPS = 4


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that is tokenized, scored and pruned, to be copied."""
    folder = tmp_path_factory.mktemp("distill")
    for stage in ("tokenize", "score", "prune"):
        pipeline.run(_config(folder, f"stage={stage}"))
    return folder


def _config(folder: Path, *overrides: str) -> CompressConfig:
    return load_config(
        "recipe=tiny", f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", "threads=1",
        f"distill.num_tokens={STEPS * 8 * 128}", "compute_dtype=float32", "distill.checkpoint_steps=1",
        "distill.keep_checkpoints=9", *overrides,
    )  # fmt: skip


def _copy(upstream: Path, to: Path) -> Path:
    shutil.copytree(upstream, to, dirs_exist_ok=True)
    return to


def _weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (shard,) = (folder / "run" / "distill" / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return load_file(shard)


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "distill" / "metrics.jsonl").read_text().splitlines()]


def _train(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    config = _config(folder, *overrides)
    distill.run(config, Path(config.run_dir))
    return _weights(folder, STEPS)


def _with_dropout(folder: Path) -> None:
    """Into the pruned student's config: its training draws random numbers then."""
    path = folder / "run" / "prune" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.5}))


@pytest.mark.parametrize("how", ["adamw", "muon", "dropout", "cached", "damaged"])
def test_resume_is_bit_identical(upstream: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """Train 4 == train 2, lose everything after that, go on: every weight, moment and figure of the log."""
    settings = {"muon": ("distill.optimizer=muon",), "cached": ("teacher.mode=cached",)}.get(how, ())
    whole, cut = _copy(upstream, tmp_path / "whole"), _copy(upstream, tmp_path / "cut")
    for folder in (whole, cut):
        if how == "dropout":
            _with_dropout(folder)
        if how == "cached":
            pipeline.run(_config(folder, "stage=cache", *settings))
    expected = _train(whole, *settings)
    _train(cut, *settings)
    for step in (3, 4):
        checkpoints = cut / "run" / "distill" / "checkpoints" / f"step_{step:08d}"
        if how == "damaged":  # they are there, and are passed over
            (shard,) = checkpoints.glob("*.safetensors")
            shard.write_bytes(shard.read_bytes()[:-1])
        else:
            shutil.rmtree(checkpoints)
    torch.manual_seed(99)
    torch.rand(5)
    again = _train(cut, *settings)
    assert ("step_00000004 is damaged" in caplog.text) == (how == "damaged"), caplog.text
    assert expected.keys() == again.keys()
    assert any("/momentum_buffer" in k for k in expected) == (how == "muon")
    for name, tensor in expected.items():
        assert torch.equal(tensor, again[name]), name
    ours, theirs = ([without_times(row) for row in _rows(f)] for f in (whole, cut))
    assert ours == theirs
    assert [row["step"] for row in ours] == [1, 2, 3, 4]


ITSELF = (
    "teacher.mode=previous_self",
    "distill.micro_batch_size=2",
    "distill.objectives=[{objective: cross_entropy},{temperature: 3, squared: true},{objective: dynamic_kl}]",
)


def test_a_training_against_its_own_earlier_word_resumes_exactly_and_loads_no_teacher(
    upstream: Path, tmp_path: Path
) -> None:
    """What it said at the last step, and the head of then, are in the checkpoint."""
    whole, cut = _copy(upstream, tmp_path / "whole"), _copy(upstream, tmp_path / "cut")
    # Half of each batch is what the step before saw: its first step has nothing to repeat.
    tokens = [row["loss_tokens"] for row in (_train(whole, *ITSELF), _rows(whole))[1]]
    expected = _weights(whole, STEPS)
    assert tokens[0] < 0.7 * tokens[1]
    assert [row["terms"]["forward_kl"] > 0 for row in _rows(whole)] == [False, True, True, True]
    assert {"previous/hidden", "previous/weight"} <= expected.keys()
    _train(cut, *ITSELF)
    for step in (3, 4):
        shutil.rmtree(cut / "run" / "distill" / "checkpoints" / f"step_{step:08d}")
    again = _train(cut, *ITSELF)
    for name, tensor in expected.items():
        assert torch.equal(tensor, again[name]), name
    pipeline.run(_config(whole, "stage=distill", *ITSELF))
    validated = _copy(upstream, tmp_path / "validated")
    watched = _train(validated, *ITSELF, "distill.validate_steps=2", "distill.validate_tokens=512")
    assert all(torch.equal(tensor, watched[name]) for name, tensor in expected.items())
    assert [row["step"] for row in _rows(validated) if "validation" in row] == [2, 4]


def test_its_own_word_needs_no_teacher_weights(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loaded = _copy(upstream, tmp_path / "run"), []
    right = distill.streamed_model
    monkeypatch.setattr(distill, "streamed_model", lambda path, *rest: loaded.append(path) or right(path, *rest))
    _train(folder, *ITSELF)
    assert loaded == [folder / "run" / "prune"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("distill.objectives=[{}]",), "add {objective: cross_entropy}"),
        (("distill.micro_batch_size=8",), "must be a multiple of 2 * distill.micro_batch_size=16"),
        (("distill.objectives=[{objective: cross_entropy},{objective: hidden_mse}]",), "has one; leave it out"),
    ],
)
def test_what_its_own_word_cannot_do_is_refused(settings: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        _config(tmp_path, *ITSELF, *settings)


def test_a_teacher_whose_logits_are_not_finite_is_named_with_sequence_and_token(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "run")
    config = _config(folder)
    weights = teacher_of(config) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NumericalError, match="the teacher's logits are not finite at token") as caught:
        distill.run(config, Path(config.run_dir))
    found = re.search(r"token (\d+) of training sequence (\d+)", str(caught.value))
    assert found is not None
    assert TokenSet.open(folder / "run" / "tokens" / "train").batch([int(found[2])]).loss_mask[0, int(found[1])]
    assert not list((folder / "run" / "distill").glob("checkpoints/step_*"))
    asked_only_then = "distill.objectives=[{objective: cross_entropy}]", "distill.validate_steps=1"
    with pytest.raises(NumericalError, match="step 1: the KL to the teacher is nan on the validation sets"):
        distill.run(_config(folder, *asked_only_then), Path(config.run_dir))


INSIDE = (
    "prune.hidden_size=48",
    "prune.intermediate_size=null",
    "distill.objectives=[{},{objective: hidden_cosine, layers: [[0,0],[-1,-1]]},{objective: minilm_attention},"
    "{objective: minilm_value},{objective: embedding_mse, weight: 0.1}]",
)


def test_a_loss_of_labels_alone_loads_no_teacher_and_trains_as_with_one(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless validation asks it."""
    settings = "distill.objectives=[{objective: cross_entropy}]"
    without, asked = _copy(upstream, tmp_path / "without"), _copy(upstream, tmp_path / "asked")
    opened: list[Path] = []
    load = distill.streamed_model
    monkeypatch.setattr(distill, "streamed_model", lambda path, *rest: opened.append(Path(path)) or load(path, *rest))
    alone = _train(without, settings)
    assert opened == [without / "run" / "prune"]
    validated = _train(asked, settings, "distill.validate_steps=4", "distill.validate_tokens=512")
    assert len(opened) == 3
    assert all(torch.equal(tensor, validated[name]) for name, tensor in alone.items())


@pytest.fixture(scope="module")
def narrow(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, its student narrower than its teacher."""
    folder = _copy(upstream, tmp_path_factory.mktemp("narrow"))
    shutil.rmtree(folder / "run" / "prune")
    pipeline.run(_config(folder, "stage=prune", *INSIDE))
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_projections_train_resume_exactly_and_are_not_exported(narrow: Path, tmp_path: Path, optimizer: str) -> None:
    settings = (*INSIDE, f"distill.optimizer={optimizer}")
    whole, cut = _copy(narrow, tmp_path / "whole"), _copy(narrow, tmp_path / "cut")
    expected = _train(whole, *settings)
    _train(cut, *settings)
    names = [f"projections.{name}" for name in ("layer_0_to_0", "layer_-1_to_-1", "embedding")]
    first = _weights(whole, 1)
    for name in names:
        assert not torch.equal(expected[f"model/{name}"], first[f"model/{name}"]), f"{name} is trained"
        assert f"optimizer/{name}/exp_avg" in expected, "by AdamW"
    for step in (3, 4):
        shutil.rmtree(cut / "run" / "distill" / "checkpoints" / f"step_{step:08d}")
    torch.manual_seed(99)
    again = _train(cut, *settings)
    assert expected.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    rows = _rows(whole)
    assert rows[-1]["terms"].keys() == {"forward_kl", "hidden_cosine", "minilm_attention", "minilm_value",
                                        "embedding_mse"}  # fmt: skip
    for name in ("hidden_cosine", "embedding_mse"):
        assert rows[-1]["terms"][name] < rows[0]["terms"][name]
    pipeline.run(_config(whole, "stage=distill", *settings))  # nothing is left to do but its manifest
    pipeline.run(_config(whole, "stage=export", "export.dtype=float32", *settings))
    exported = load_file(whole / "run" / "export" / "model.safetensors")
    start = load_file(whole / "run" / "prune" / "model.safetensors")
    assert exported.keys() == start.keys(), "the student's own tensors and no others"
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected[f"model/model.{name}"]), name


def test_projections_start_where_the_kept_channels_were(narrow: Path, tmp_path: Path) -> None:
    """At the first step nearer to the teacher than the random start of a student whose origin isn't known."""
    known, unknown = _copy(narrow, tmp_path / "known"), _copy(narrow, tmp_path / "unknown")
    (unknown / "run" / "prune" / "kept.safetensors").unlink()
    _train(known, *INSIDE)
    _train(unknown, *INSIDE)
    ours, theirs = (_rows(folder)[0]["terms"] for folder in (known, unknown))
    assert ours["forward_kl"] == theirs["forward_kl"]
    assert ours["hidden_cosine"] < 0.7 * theirs["hidden_cosine"]
    assert ours["embedding_mse"] < 0.7 * theirs["embedding_mse"]


def test_a_layer_that_is_not_there_is_refused_before_any_work(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "a")
    shutil.rmtree(folder / "run" / "score")
    objectives = "distill.objectives=[{},{objective: hidden_mse, layers: [[2,4]]}]"
    with pytest.raises(
        ConfigError, match=r"objectives\[1\].layers=\[\[2, 4\]\] of hidden_mse: the teacher has 4 layers"
    ):
        pipeline.run(_config(folder, objectives))
    assert not (folder / "run" / "score").exists()
    config = _config(folder, objectives.replace("[2,4]", "[3,3]"))
    by_hand = ("prune.num_hidden_layers=null", "prune.removed_layers=[1]")
    with pytest.raises(ConfigError, match="the student has 3 layers, so no layer 3; give"):
        distill.run(config, Path(config.run_dir))
    (folder / "run" / "prune").rename(tmp_path / "elsewhere")
    for ways in ((), by_hand, (f"distill.init_from={tmp_path / 'elsewhere'}",)):
        with pytest.raises(ConfigError, match="the student has 3 layers, so no layer 3; give"):
            pipeline.run(_config(folder, objectives.replace("[2,4]", "[3,3]"), *ways))
    assert not (folder / "run" / "distill").exists()


@pytest.mark.slow
def test_compiled_layers_train_alike_and_resume_exactly(upstream: Path, tmp_path: Path) -> None:
    eager, compiled = _copy(upstream, tmp_path / "eager"), _copy(upstream, tmp_path / "compiled")
    _train(eager)
    expected = _train(compiled, "distill.compile=true")
    for mine, theirs in zip(_rows(compiled), _rows(eager), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for step in (3, 4):
        shutil.rmtree(compiled / "run" / "distill" / "checkpoints" / f"step_{step:08d}")
    again = _train(compiled, "distill.compile=true")
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_micro_batch_size_does_not_change_the_training(upstream: Path, tmp_path: Path) -> None:
    one, other = _copy(upstream, tmp_path / "one"), _copy(upstream, tmp_path / "other")
    expected, again = _train(one, "distill.micro_batch_size=8"), _train(other, "distill.micro_batch_size=2")
    for name, tensor in expected.items():
        if name.startswith("model/"):
            assert (tensor - again[name]).norm() <= 1e-3 * tensor.norm(), name
    for mine, theirs in zip(_rows(one), _rows(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_it_learns_and_seed_and_schedule_matter(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "a")
    _train(folder)
    rows = _rows(folder)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["tokens"] == STEPS * 8 * 128
    other = _copy(upstream, tmp_path / "b")
    _train(other, "seed=1")
    assert _rows(other)[0]["loss"] != rows[0]["loss"], "another seed is another order of the text"


def test_bfloat16_keeps_float32_master_weights(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "a")
    config = _config(folder, "compute_dtype=bfloat16", "distill.learning_rate=1e-5")
    distill.run(config, Path(config.run_dir))
    weights = {n.removeprefix("model/"): t for n, t in _weights(folder, STEPS).items() if n.startswith("model/")}
    assert all(t.dtype == torch.float32 for t in weights.values())
    start = load_model(folder / "run" / "prune", torch.float32)
    moved = [(weights[f"model.{n}"] - p).abs().max() for n, p in start.named_parameters()]
    assert 0 < max(moved) < 1e-4, "steps far below a bfloat16 ulp of the weights must still add up"


def test_windows_without_loss_tokens_are_refused_before_training(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "a")
    for source in (folder / "run" / "tokens" / "train").iterdir():
        names = sorted(path.name for path in source.glob("*.safetensors"))
        for name in names:
            stored = load_file(source / name)
            arrays = {key: stored[key].numpy() for key in ("tokens", "starts", "loss", "lengths")}
            arrays["loss"][1:] = 0
            write_shard(source / name, Rows(**arrays), shard_facts(source / name))
        write_index(source, 128, 512, names)
    config = _config(folder, "distill.global_batch_size=1", "distill.micro_batch_size=1", "distill.num_tokens=1280")
    with pytest.raises(ConfigError, match=r"distill step \d+ of 10 would have no loss token .* masked. Raise"):
        distill.run(config, Path(config.run_dir))
    assert not (folder / "run" / "distill").exists()


def test_a_student_pruned_elsewhere(upstream: Path, tmp_path: Path) -> None:
    folder = _copy(upstream, tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    (folder / "run" / "prune").rename(elsewhere)
    _train(folder, f"distill.init_from={elsewhere}")
    assert checkpoint.steps(folder / "run" / "distill" / "checkpoints") == [1, 2, 3, 4]


def test_compile_without_a_compiler_is_refused_before_any_work(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy(upstream, tmp_path / "a")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"distill.compile=true needs a C\+\+ compiler .* or set it false"):
        pipeline.run(_config(folder, "distill.compile=true"))
    assert not (folder / "run" / "distill").exists()
    shutil.rmtree(folder / "run" / "score")
    with pytest.raises(ConfigError, match=r"score.compile=true needs a C\+\+ compiler .* or set it false"):
        pipeline.run(_config(folder, "score.compile=true", "stage=score"))

"""What a run folder allows: run what is missing, skip what is done, refuse what differs; and what status says of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from conftest import FAST, Run
from families import make_model, save_model, student_sizes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress import checkpoint, pipeline
from compress.artifacts import fingerprint_path
from compress.config import load_config
from compress.embedded import resolve
from compress.errors import ArtifactError, CompressError, ConfigError
from compress.families import FAMILIES
from compress.lease import run_lock
from compress.models import load_model
from compress.pipeline import STAGES
from compress.settings import CompressConfig, JobsConfig, Stage, set_name

# The search runs with search.num_candidates, the cache with teacher.mode=cached.
RUN = [stage for stage in STAGES if stage not in (Stage.search, Stage.correct, Stage.cache)]
FOLDERS = ["tokens", "score", "prune", "distill", "export", "evaluate"]


def refusal(run: Run, *overrides: str) -> str:
    with pytest.raises(CompressError) as caught:
        run(*overrides)
    return str(caught.value)


def skipped(text: str) -> list[str]:
    return re.findall(r"(\w+): done before, skipped", text)


def started(text: str) -> list[str]:
    return re.findall(r"(\w+): starting", text)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compress")


def test_a_first_run_makes_every_stage_and_a_second_skips_every_one(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    assert started(caplog.text) == [str(stage) for stage in RUN]
    assert re.search(r"will run tokenize, score, prune, distill, export, evaluate: about \d+ (s|min)", caplog.text)
    first_work = caplog.text.index("tokenize: starting")
    assert caplog.text.index("will run") < first_work, "what will run is said before it runs"
    for folder in FOLDERS:
        manifest = json.loads((tmp_path / "run" / folder / "manifest.json").read_text())
        assert {"fingerprint", "settings", "files", "upstream", "seconds", "versions", "config"} <= manifest.keys()
        assert not (tmp_path / "run" / folder / "started.json").exists()
    out = capsys.readouterr().out
    assert "gap closed" in out
    assert str(tmp_path / "run" / "prune") in out, "the paths of both models end the run, unbroken"
    assert str(tmp_path / "run" / "export") in out
    before = fingerprint_path(tmp_path / "run")
    caplog.clear()
    run()
    assert skipped(caplog.text) == [str(stage) for stage in RUN]
    assert not started(caplog.text)
    assert "gap closed" in capsys.readouterr().out
    assert fingerprint_path(tmp_path / "run") == before, "skipping writes nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


ASKED = {
    "num_nodes": "2",
    "ranks_per_node": "2",
    "time": "30",
    "cpus": "4",
    "memory": "8G",
    "submissions": "2",
}  # of a job
OUTSIDE = {
    "data.workers": "2",
    "score.compile": "true",
    "score.micro_batch_size": "2",
    "score.stream": "true",
    "cache.micro_batch_size": "2",
    "distill.micro_batch_size": "2",
    "teacher.whole_window": "true",
    "distill.checkpoint_steps": "3",
    "distill.keep_checkpoints": "1",
    "distill.log_steps": "4",
    "distill.validate_steps": "3",
    "distill.validate_tokens": "128",
    "distill.stop_validations": "2",
    "distill.keep_best": "true",
    "distill.async_checkpoint": "true",
    "distill.recompute": "true",
    "evaluate.micro_batch_size": "1",
    "threads": "2",
    "cluster.num_nodes": "2",
    "cluster.device": "cpu",
    "cluster.gpus_per_node": "8",
    "cluster.memory_bytes": "80GiB",
    "cluster.peak_flops": "989e12",
    "cluster.efficiency": "0.3",
    "cluster.price_per_gpu_hour": "2.5",
    "cluster.node_bandwidth": "450e9",
    "cluster.network_bandwidth": "50e9",
    "cluster.ranks_per_node": "2",
    "cluster.shard_ranks": "1",
    "cluster.stall_seconds": "60",
    "cluster.time": "30",
    **{f"cluster.jobs.{job.name}.{key}": value
       for job in dataclasses.fields(JobsConfig) for key, value in ASKED.items()},
}  # fmt: skip


def test_what_changes_only_speed_memory_or_logging_still_skips(
    run: Run, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(*(f"{key}={value}" for key, value in OUTSIDE.items()))
    assert skipped(caplog.text) == [str(stage) for stage in RUN]


def settings_of(node: type = CompressConfig, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(node).items():
        if dataclasses.is_dataclass(hint):
            yield from settings_of(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"


def test_every_setting_is_in_a_fingerprint_or_among_those_that_change_no_result() -> None:
    read = {key for entry in STAGES.values() for key in entry.reads}
    by_content = {"teacher.path", "teacher.revision", "teacher.trust_remote_code", "architecture.table"}
    outside = {*OUTSIDE, *by_content, "name", "run_dir", "cache_dir", "stage", "until", "rounds", "round", "siblings"}
    for key in settings_of():
        inside = key in read or key.split(".")[0] in read
        assert inside != (key in outside), f"{key} must be in one of StageEntry.reads, or in OUTSIDE here"


@pytest.mark.parametrize(
    ("override", "folder", "difference", "keeps"),
    [
        ("data.sequence_length=32", "tokens", "data.sequence_length was 64, is now 32", []),
        ("score.num_sequences=8", "score", "score.num_sequences was 16, is now 8", ["tokenize"]),
        ("prune.num_hidden_layers=2", "prune", "prune.num_hidden_layers was 3, is now 2", ["tokenize", "score"]),
        ("distill.learning_rate=1e-3", "distill", "distill.learning_rate was 0.002, is now 0.001",
         ["tokenize", "score", "prune"]),
        ("export.dtype=float32", "export", "export.dtype was bfloat16, is now float32",
         ["tokenize", "score", "prune", "distill"]),
        ("evaluate.max_tokens=512", "evaluate", "evaluate.max_tokens was 1024.0, is now 512.0",
         ["tokenize", "score", "prune", "distill", "export"]),
    ],
)  # fmt: skip
def test_a_changed_setting_is_refused_by_its_stage_and_leaves_the_ones_before_alone(
    override: str, folder: str, difference: str, keeps: list[str], run: Run, finished: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = fingerprint_path(finished)
    found = refusal(run, override)
    assert f"{finished / folder} was made with other settings" in found
    assert difference in found
    assert "another name=" in found
    assert f"delete {finished / folder}" in found
    assert not started(caplog.text), "refused before anything runs"
    assert fingerprint_path(finished) == before
    for stage in keeps:
        run(f"stage={stage}", override)
    assert skipped(caplog.text) == keeps


def test_after_deleting_what_the_message_names_the_same_command_goes_on(run: Run, finished: Path) -> None:
    kept = (finished / "prune" / "manifest.json").read_bytes()
    shutil.rmtree(finished / "distill")
    assert "stage distill changed" in refusal(run, "distill.learning_rate=1e-3")
    for folder in ("export", "evaluate"):
        shutil.rmtree(finished / folder)
    run("distill.learning_rate=1e-3")
    assert (finished / "prune" / "manifest.json").read_bytes() == kept
    assert (
        json.loads((finished / "evaluate" / "manifest.json").read_text())["config"]["distill"]["learning_rate"] == 1e-3
    )


def test_a_changed_input_file_is_named(run: Run, tmp_path: Path, cache: Path, teacher: Path) -> None:
    text = Path(shutil.copy(cache / "tiny" / "train.jsonl", tmp_path / "mine.jsonl"))
    settings = (f"data.train=[{{path: {text}}}]", f"teacher.path={teacher}")
    run("stage=tokenize", *settings)
    run("stage=score", *settings)
    with text.open("a") as handle:
        handle.write('{"text": "one more"}\n')
    assert "the text of data.train[0] changed" in refusal(run, "stage=tokenize", *settings)
    shutil.copy(cache / "tiny" / "train.jsonl", text)
    run("stage=tokenize", *settings)  # equal bytes, newer file: still done
    generation = teacher / "generation_config.json"
    generation.write_text(generation.read_text() + " ")
    assert "the teacher's files changed" in refusal(run, "stage=score", *settings)
    tokenizer = teacher / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "the teacher's tokenizer changed" in refusal(run, "stage=tokenize", *settings)


@pytest.mark.parametrize(
    ("stage", "reads", "first"),
    [("score", "tokens", "tokenize"), ("prune", "score", "score"), ("export", "distill", "distill"),
     ("evaluate", "tokens", "tokenize")],
)  # fmt: skip
def test_a_stage_without_its_input_says_which_stage_to_run(
    stage: str, reads: str, first: str, run: Run, tmp_path: Path
) -> None:
    found = refusal(run, f"stage={stage}")
    assert (
        found
        == f"stage={stage} reads {tmp_path / 'run' / reads}, which isn't done; run stage={first} or stage=all first"
    )
    assert not (tmp_path / "run").exists()


def test_a_stage_is_not_run_on_input_that_was_made_with_other_settings(run: Run, finished: Path) -> None:
    for folder in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / folder)
    found = refusal(run, "stage=distill", "prune.num_hidden_layers=2")
    assert f"{finished / 'prune'} was made with other settings: prune.num_hidden_layers was 3, is now 2" in found
    assert not (finished / "distill").exists()


def interrupt_distill(run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch, after: int = 4) -> None:
    """Leave the run as a kill after `after` steps of training would."""
    for folder in ("export", "evaluate"):
        shutil.rmtree(finished / folder)
    distill = finished / "distill"
    manifest = distill / "manifest.json"
    expected = json.loads(manifest.read_text())
    facts = {key: expected[key] for key in ("format_version", "settings", "files", "upstream", "fingerprint")}
    (distill / "started.json").write_text(json.dumps(facts))
    manifest.unlink()
    for step in checkpoint.steps(distill / "checkpoints"):
        if step > after:
            shutil.rmtree(distill / "checkpoints" / f"step_{step:08d}")
    lines = (distill / "metrics.jsonl").read_text().splitlines(keepends=True)
    (distill / "metrics.jsonl").write_text("".join(lines[: after + 1]))


@pytest.fixture
def half_trained(cache: Path, finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed in training, with step 4 of 8 kept, and step 5 in the metrics but not saved."""
    shutil.rmtree(finished / "distill")
    run("stage=distill", "distill.keep_checkpoints=9")
    interrupt_distill(run, finished, monkeypatch)
    return finished


def test_a_half_done_stage_goes_on_and_refuses_other_settings(
    half_trained: Path, finished_source: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    found = refusal(run, "distill.learning_rate=1e-3")
    assert (
        f"{half_trained / 'distill'} was begun with other settings: distill.learning_rate was 0.002, is now 0.001"
        in found
    )
    assert checkpoint.steps(half_trained / "distill" / "checkpoints") == [2, 4], "nothing was touched"
    run()
    assert "resuming after step 4" in caplog.text
    assert skipped(caplog.text) == ["tokenize", "score", "prune"]
    rows = [json.loads(line) for line in (half_trained / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)), "each step once"
    for file in ("model.safetensors", "config.json"):
        assert (half_trained / "export" / file).read_bytes() == (finished_source / "export" / file).read_bytes()


def test_after_a_failure_the_mended_setting_is_taken(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stage=tokenize")
    found = refusal(run, "stage=score", "score.num_sequences=100000")
    assert "score.num_sequences=100000" in found
    capsys.readouterr()
    run("stage=status")
    status = capsys.readouterr().out
    assert states(status)["score"] == "failed"
    assert "score.num_sequences=100000" in status
    run("stage=score")  # what the message asks for is what then works
    assert (tmp_path / "run" / "score" / "manifest.json").exists()
    assert not (tmp_path / "run" / "score" / "error.json").exists()
    run("stage=prune")
    found = refusal(run, "stage=distill", "distill.learning_rate=1e30", "distill.warmup_steps=0")
    assert "Lower distill.learning_rate=1e+30" in found
    run("stage=distill")


def test_a_kept_step_is_exported_and_evaluated_while_training_goes_on(half_trained: Path, run: Run) -> None:
    before = fingerprint_path(half_trained / "distill")
    with run_lock(half_trained, "distill"):  # as the training process holds it
        assert "which isn't done" in refusal(run, "stage=export")
        run("stage=export", "export.step=4", "export.dtype=float32")
        run("stage=evaluate", "export.step=4", "export.dtype=float32")
        assert "export.step=3 is not kept" in refusal(run, "stage=export", "export.step=3")
        assert "is being written by" in refusal(run, "stage=distill")
    assert fingerprint_path(half_trained / "distill") == before
    exported = load_file(half_trained / "export-step-4" / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in exported.items()}
    trained = {f"model/model.{name}": tensor.zero_() for name, tensor in state.items()}
    checkpoint.load(half_trained / "distill" / "checkpoints" / "step_00000004", trained)
    assert all(
        (state[name] == tensor).all()
        for name, tensor in load_file(half_trained / "export-step-4" / "model.safetensors").items()
    )
    metrics = json.loads((half_trained / "evaluate-step-4" / "metrics.json").read_text())
    assert metrics["distilled"]["sets"]["validation"]["kl_to_teacher"] > 0
    run()  # and the training still ends as it would have
    assert (half_trained / "export" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is not valid JSON"), ("", "is not valid JSON"), ("[]", "is no manifest"), ("{}", "is no manifest"),
     ('{"fingerprint": 3}', "is no manifest")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["manifest.json", "started.json"])
def test_a_damaged_manifest_is_named_with_what_to_do(
    content: str, said: str, name: str, run: Run, finished: Path
) -> None:
    path = finished / "prune" / name
    (finished / "prune" / "manifest.json").unlink()
    path.write_text(content)
    found = refusal(run)
    assert f"{path} {said}" in found
    assert "delete it and run its stage again" in found
    if name == "manifest.json":
        assert str(path) in refusal(run, "stage=status")
    path.unlink()
    run()


def test_a_manifest_of_another_format_is_refused(run: Run, finished: Path) -> None:
    path = finished / "score" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
    assert "the format of the run folder changed" in refusal(run)


def states(text: str) -> dict[str, str]:
    return {
        cells[1].strip(): cells[2].strip() for line in text.splitlines() if len(cells := re.split("[│┃]", line)) > 4
    }


def test_status_before_during_and_after(
    run: Run, finished_source: Path, half_trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run("stage=status", f"run_dir={tmp_path / 'new'}")
    found = states(capsys.readouterr().out)
    assert [found[stage] for stage in RUN] == ["not started"] * 6
    assert not (tmp_path / "new").exists(), "status reads only"

    (half_trained / "distill" / "error.json").write_text(json.dumps({"error": "SIGTERM: saved", "time": 0}))
    before = fingerprint_path(half_trained)
    run("stage=status")
    text = capsys.readouterr().out
    found = states(text)
    assert [found[stage] for stage in RUN] == ["done", "done", "done", "begun", "not started", "not started"]
    assert re.search(
        r"step 5 of 8, loss \d\.\d+, about \d s left; kept steps: 2, 4; last error: SIGTERM: saved",
        " ".join(text.split()),
    )
    assert "GB free" in text
    assert fingerprint_path(half_trained) == before

    run("stage=status", f"run_dir={finished_source}")
    found = states(capsys.readouterr().out)
    assert [found[stage] for stage in RUN] == ["done"] * 6


def test_the_fingerprint_is_of_contents_not_of_places(cache: Path, finished: Path, tmp_path: Path, run: Run) -> None:
    elsewhere = tmp_path / "moved"
    finished.rename(elsewhere)
    moved = Path(shutil.copytree(cache, tmp_path / "cache"))
    config = load_config(*FAST, f"run_dir={elsewhere}", f"cache_dir={moved}", "name=other")
    expected = pipeline.expectations(config)
    for source in [*config.data.train, *config.data.calibration, *config.data.validation]:
        source.name, source.path = set_name(source), str(resolve(source.path, moved))
    assert pipeline.expectations(config) == expected, "nor does it count how a file is named in the settings"
    for stage in RUN:
        entry = STAGES[stage]
        manifest = json.loads((elsewhere / entry.folder(config) / "manifest.json").read_text())
        assert manifest["fingerprint"] == expected[stage]["fingerprint"]


def test_new_weights_of_the_sources_keep_the_tokens_and_the_student(
    run: Run, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = 'data.train=[{path: "embedded:tiny-train", weight: 0.5}, {path: "embedded:tiny-chat", weight: 0.5}]'
    assert "data.train[*].weight was [0.9, 0.1], is now [0.5, 0.5]" in refusal(run, sources)
    for stage in ("tokenize", "score", "prune"):
        run(f"stage={stage}", sources)
    assert skipped(caplog.text) == ["tokenize", "score", "prune"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("export.step=9",), "export.step=9 is not kept: training to step 8 will leave the steps [6, 8]"),
        (("export.step=3",), "export.step=3 is not kept"),
        (("export.step=4", "distill.keep_checkpoints=2"), "will leave the steps [6, 8]; choose one of them"),
        (
            ("score.depth=[kl_greedy]", "score.max_removed_layers=9"),
            "score.max_removed_layers=9 must be within 0 and 3",
        ),
        (("run_dir=teacher/run", "teacher.path=teacher"), "run_dir=teacher/run lies inside of teacher.path=teacher"),
        (("run_dir=/proc/here",), "/proc/here: cannot be made a folder"),
    ],
)
def test_what_the_settings_tell_is_refused_before_the_first_stage(
    settings: tuple[str, ...], said: str, run: Run, teacher: Path, tmp_path: Path
) -> None:
    assert said in refusal(run, *settings)
    assert not (tmp_path / "run").exists()
    assert not (teacher / "run").exists()


def test_a_step_that_training_will_keep_can_be_asked_for(run: Run, tmp_path: Path) -> None:
    run("export.step=6")
    assert (tmp_path / "run" / "export-step-6" / "config.json").exists()


def test_too_little_calibration_text_is_said_before_the_training_text_is_encoded(run: Run, tmp_path: Path) -> None:
    found = refusal(run, "score.num_sequences=100000")
    assert "score.num_sequences=100000, but data.calibration gives only" in found
    assert not list((tmp_path / "run" / "tokens" / "train").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["glob[1].jsonl", "a*b.jsonl"])
def test_a_changed_file_with_a_globs_name_is_noticed(name: str, run: Run, tmp_path: Path, cache: Path) -> None:
    text = Path(shutil.copy(cache / "tiny" / "train.jsonl", tmp_path / name))
    settings = f'data.train=[{{path: "{text}"}}]'
    run("stage=tokenize", settings)
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:100]))
    assert "the text of data.train[0] changed" in refusal(run, "stage=tokenize", settings)


@pytest.mark.parametrize("file", ["evaluate/metrics.json", "prune/model.safetensors", "export/config.json"])
def test_a_damaged_stage_is_made_again_by_what_the_message_says(file: str, run: Run, finished: Path) -> None:
    path = finished / file
    path.write_bytes(path.read_bytes()[:100])
    for later in ("evaluate",) if file.startswith("export") else ("distill", "export", "evaluate"):
        if not file.startswith("evaluate"):
            shutil.rmtree(finished / later)
    found = refusal(run)
    folder = path.parent
    assert f"delete {folder} and run its stage again" in found
    assert str(path) in found or str(folder) in found
    shutil.rmtree(folder)
    run()
    assert json.loads((finished / "evaluate" / "metrics.json").read_text())["distilled"]


def test_a_damaged_line_of_metrics_stops_neither_status_nor_training(half_trained: Path, run: Run) -> None:
    metrics = half_trained / "distill" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 1, "tok{"step": 2}\n[]\n')
    run("stage=status")
    run()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_run_dir_takes_a_tilde(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run("stage=tokenize", 'run_dir="~/here"')
    assert (tmp_path / "here" / "tokens" / "manifest.json").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_the_run_folder_should_be_is_named(place: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / place)) + r".*choose another run_dir="):
        run(f"run_dir={tmp_path / place}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_student_pruned_elsewhere_skips_scoring_and_pruning(
    run: Run, finished_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = Path(shutil.copytree(finished_source / "prune", tmp_path / "student"))
    run(f"distill.init_from={student}", "prune.num_hidden_layers=null", "prune.intermediate_size=null")
    assert started(caplog.text) == ["tokenize", "distill", "export", "evaluate"]
    ours = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert ours == (finished_source / "export" / "model.safetensors").read_bytes()


def test_only_one_process_of_a_launcher_is_allowed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        run()


def test_the_estimate_grows_with_the_work(cache: Path) -> None:
    from compress.estimate import estimate_seconds

    def seconds(*overrides: str) -> dict[Stage, float]:
        return estimate_seconds(load_config(*FAST, f"cache_dir={cache}", *overrides), RUN)

    small, large = seconds(), seconds("distill.num_tokens=4e9", "score.num_sequences=1000000")
    assert set(small) == set(RUN)
    assert large[Stage.distill] > 100 * small[Stage.distill]
    assert large[Stage.score] > 10 * small[Stage.score]
    assert 0 < small[Stage.export] < 60


def family_folder(folder: Path, variant: str, tokenizer: Path, **sizes: int) -> Path:
    """A tiny random teacher of another family, with the embedded one's tokenizer."""
    save_model(folder, make_model(variant, vocab_size=512, **sizes))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("variant", ["qwen3", "gemma3"])
def test_one_line_prunes_a_folder_of_another_family_to_a_budget(
    variant: str, cache: Path, teacher_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """recipe=prune with a folder and a budget; only the text is a toy here."""
    folder = family_folder(tmp_path / "inhouse", variant, teacher_source)
    toy = ("train", "calibration", "validation")
    text = [f"data.{split}=[{{path: 'embedded:tiny-{split}'}}]" for split in toy]
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    few = ("score.num_sequences=8", "prune.compensate_sequences=8", "shape.multiple_of=4")
    line = ("recipe=prune", f"teacher.path={folder}", f"prune.max_parameters={int(0.8 * total)}")
    pipeline.run(load_config(*line, *FAST[1:5], *text, *few, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache}"))
    assert f"pruned, untrained:  {tmp_path / 'run' / 'prune'}" in capsys.readouterr().out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "prune")
    assert 0.7 * total <= sum(p.numel() for p in student.parameters()) <= 0.8 * total
    assert not (tmp_path / "run" / "distill").exists()
    with pytest.raises(ConfigError, match="until=all is no stage to stop after"):
        load_config(*FAST, "until=all")


def test_a_file_of_items_counts_by_what_it_holds(teacher_source: Path, run: Run, tmp_path: Path) -> None:
    """Moved, nothing is scored again; changed, the run says so."""
    items = [{"question": f"item {n}", "choices": ["left", "right"], "label": n % 2} for n in range(8)]
    path = tmp_path / "items.jsonl"

    def write(content: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(item) + "\n" for item in content))

    write(items)
    settings = ("score.depth=[task]", "score.task_items=8", "score.max_removed_layers=1", "until=score")
    run(*settings, f"score.task_path={path}")
    moved = path.rename(tmp_path / "moved.jsonl")
    scored = (tmp_path / "run" / "score" / "importance.safetensors").stat().st_mtime_ns
    run(*settings, f"score.task_path={moved}")
    assert (tmp_path / "run" / "score" / "importance.safetensors").stat().st_mtime_ns == scored
    write([{**item, "label": 1 - item["label"]} for item in items])
    with pytest.raises(ArtifactError, match=r"score\.task_path"):
        run(*settings, f"score.task_path={path}")


def test_what_scoring_would_need_is_not_asked_of_a_run_that_has_its_scores(finished: Path, run: Run) -> None:
    shutil.rmtree(finished / "evaluate")
    run("score.stream=true", "stage=all")
    shutil.rmtree(finished / "score")
    with pytest.raises(ConfigError, match="needs the whole teacher in memory"):
        run("score.stream=true", "score.width=[taylor]", "stage=score")


# torch's grouped product asks for rows of whole 16 bytes: of the teacher's experts, and of the student's in bfloat16.
WHOLE_ROWS: dict[str, dict[str, int]] = {"qwen3_moe": {"moe_intermediate_size": 32}}


@pytest.mark.parametrize("variant", ["gemma2", "phi3", "olmo2", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss"])
def test_every_stage_runs_on_every_kind_of_model_and_training_brings_it_nearer_to_its_teacher(
    variant: str, teacher_source: Path, tmp_path: Path, run: Run
) -> None:
    """Every axis cut. A random teacher knows no text, so that its distance is what training closes and not the loss."""
    folder = family_folder(tmp_path / "inhouse", variant, teacher_source, **WHOLE_ROWS.get(variant, {}))
    sizes = student_sizes(variant)
    if "num_experts" in sizes:
        sizes["hidden_size"] = 40
    run(
        f"teacher.path={folder}",
        "prune.intermediate_size=null",  # which the recipe gives and a mixture lacks
        *(f"prune.{name}={size}" for name, size in sizes.items()),
        "shape.multiple_of=4",
        "data.train=[{path: 'embedded:tiny-train'}]",
        "distill.num_tokens=2048",
        "evaluate.max_tokens=512",
    )
    metrics = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())
    found = {name: metrics[name]["sets"]["validation"] for name in ("teacher", "pruned", "distilled")}
    assert all(math.isfinite(value["loss"]) for value in found.values())
    assert found["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["distilled"]["kl_to_teacher"] < 0.95 * found["pruned"]["kl_to_teacher"]
    student = load_model(tmp_path / "run" / "export", torch.float32)
    total = sum(p.numel() for p in student.parameters())
    assert total == metrics["distilled"]["parameters"] < 0.7 * metrics["teacher"]["parameters"]
    for name, size in sizes.items():
        assert getattr(student.config, FAMILIES[student.config.model_type].field(name) or "") == size, name

"""Bad input through the front door: the error names key or file, what it is, the rule and the remedy, it comes before
any long work, and nothing is left half-written."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Run, full_disk_after
from safetensors.torch import load_file, save_file

from compress import checkpoint
from compress.artifacts import fingerprint_path
from compress.errors import ArtifactError, CompressError, ConfigError, NumericalError
from compress.stages import STAGES

Spawn = Callable[..., "subprocess.Popen[str]"]


def refusal(run: Run, *overrides: str) -> str:
    with pytest.raises(CompressError) as caught:
        run(*overrides)
    return str(caught.value)


def assert_refused_at_once(run: Run, tmp_path: Path, parts: tuple[str, ...], *overrides: str) -> None:
    found = refusal(run, *overrides)
    for part in parts:
        assert part in found, f"{part!r} is not in: {found}"
    assert not (tmp_path / "run").exists(), "nothing was written before the refusal"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


# -- the teacher's folder


def no_config(folder: Path) -> tuple[str, ...]:
    (folder / "config.json").unlink()
    return ("holds no config.json", "save_pretrained")


def truncated_config(folder: Path) -> tuple[str, ...]:
    (folder / "config.json").write_text("{")
    return ("config.json is not valid JSON",)


def adapter(folder: Path) -> tuple[str, ...]:
    (folder / "config.json").rename(folder / "adapter_config.json")
    return ("holds no config.json", "merge the adapter")


def no_weights(folder: Path) -> tuple[str, ...]:
    (folder / "model.safetensors").unlink()
    return ("neither model.safetensors nor model.safetensors.index.json", "fetch it again")


def truncated_shard(folder: Path) -> tuple[str, ...]:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return ("model.safetensors is not a complete safetensors file", "again")


def foreign_file(folder: Path) -> tuple[str, ...]:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    return ("model.safetensors is not a complete safetensors file",)


def foreign_model(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", intermediate_size=160)
    return ("aren't those that config.json describes", "mlp.gate_proj.weight: (192, 64), expected (160, 64)")


def a_layer_too_few(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", num_hidden_layers=5)
    return ("tensors are missing, such as model.layers.4.",)


def missing_shard(folder: Path) -> tuple[str, ...]:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    return ("model-00002-of-00002.safetensors is missing", "incomplete")


def unknown_family(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", model_type="gpt2")
    return (
        "model_type='gpt2' is not in the axis table",
        "llama (Llama)",
        "gpt_oss (gpt-oss)",
        "architecture.table=FILE.yaml",
    )


def quantized(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    return ("quantised (gptq)", "bfloat16 original")


def quantized_by_name(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", quantization_config="gptq")
    return ("quantised (gptq)",)


def unknown_activation(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", hidden_act="bogus")
    return ("config.json: transformers refuses it", "bogus", "correct it")


def unknown_rope(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", rope_parameters={"rope_type": "bogus", "rope_theta": 1e4})
    return ("config.json", "bogus")


def deep_config(folder: Path) -> tuple[str, ...]:
    (folder / "config.json").write_text("[" * 100_000)
    return ("config.json is not valid JSON",)


def generation_end_is_text(folder: Path) -> tuple[str, ...]:
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    return ("generation_config.json: eos_token_id='2' must be a number", "correct it")


def generation_is_a_list(folder: Path) -> tuple[str, ...]:
    (folder / "generation_config.json").write_text("[1]")
    return ("generation_config.json: transformers refuses it", "correct it")


def truncated_generation(folder: Path) -> tuple[str, ...]:
    (folder / "generation_config.json").write_text('{"eos')
    return ("generation_config.json", "correct it")


def tokenizer_config_is_a_list(folder: Path) -> tuple[str, ...]:
    (folder / "tokenizer_config.json").write_text("[]")
    return ("no usable tokenizer", str(folder))


def empty_tokenizer(folder: Path) -> tuple[str, ...]:
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return ("no usable tokenizer", str(folder))


def tokenizer_larger_than_the_model(folder: Path) -> tuple[str, ...]:
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {**content["added_tokens"][0], "id": 512, "content": "<new>"}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], token]}))
    return ("its tokenizer gives ids up to 512, but config.json says vocab_size=512", "resize")


def illegal_heads(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "config.json", num_key_value_heads=3)
    return ("num_attention_heads=4 must be a multiple of num_key_value_heads=3",)


def no_tokenizer(folder: Path) -> tuple[str, ...]:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return ("no usable tokenizer", str(folder))


def damaged_tokenizer(folder: Path) -> tuple[str, ...]:
    (folder / "tokenizer.json").write_text("{")
    return ("no usable tokenizer", str(folder))


@pytest.mark.parametrize(
    "spoil",
    [no_config, truncated_config, adapter, no_weights, truncated_shard, foreign_file, foreign_model, a_layer_too_few,
     missing_shard, unknown_family, quantized, illegal_heads, no_tokenizer, damaged_tokenizer, quantized_by_name,
     unknown_activation, unknown_rope, deep_config, generation_end_is_text, generation_is_a_list, truncated_generation,
     tokenizer_config_is_a_list, empty_tokenizer, tokenizer_larger_than_the_model],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_a_spoilt_teacher_is_refused_before_anything_is_written(
    spoil: Callable[[Path], tuple[str, ...]], teacher: Path, run: Run, tmp_path: Path
) -> None:
    parts = spoil(teacher)
    before = fingerprint_path(teacher)
    assert_refused_at_once(run, tmp_path, (str(teacher), *parts), f"teacher.path={teacher}")
    assert fingerprint_path(teacher) == before


def test_a_broken_chat_template_is_named_before_any_shard(teacher: Path, run: Run, tmp_path: Path) -> None:
    (teacher / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content ")
    found = refusal(run, f"teacher.path={teacher}")
    assert f"teacher.path={teacher}: its chat template can't be used (TemplateSyntaxError" in found
    assert "mend chat_template.jinja" in found
    assert not list((tmp_path / "run").rglob("shard-*"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("teacher.path=./nowhere", ("teacher.path=./nowhere does not exist", "a hub id, or embedded:NAME")),
        ("teacher.path=embedded:nope", ("embedded:nope: no such embedded resource", "tiny", "smollm2-135m-instruct")),
        ("data.train=[{path: 'embedded:nope'}]", ("embedded:nope: no such embedded resource", "tiny-train")),
        ("distill.init_from=nowhere", ("distill.init_from=nowhere is no folder", "Hugging Face folder")),
        ("prune.hidden_size=80", ("prune.hidden_size=80 must be within 1 and the teacher's 64", "nearest: 64")),
        ("prune.num_hidden_layers=5", ("prune.num_hidden_layers=5 must be within 1 and the teacher's 4",)),
        (
            "prune.hidden_size=36",
            ("prune.hidden_size=36 must be a multiple of shape.multiple_of=16", "nearest: 32 or 48"),
        ),
        (
            "prune.num_attention_heads=3",
            ("prune.num_attention_heads=3 must be", "num_key_value_heads=2", "nearest: 2 or 4"),
        ),
        ("prune.removed_layers=[4]", ("prune.removed_layers=[4] must be distinct layers within 0 and 3",)),
        ("prune.removed_layers=[0,1]", ("prune.num_hidden_layers=3 contradicts prune.removed_layers",)),
        ("prune.max_parameters=1000", ("prune.max_parameters=1,000", "shape.max_width_pruning")),
        ("prune.max_parameters=1e12", ("prune.max_parameters=1,000,000,000,000",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    override: str, parts: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    assert_refused_at_once(run, tmp_path, parts, override)


def test_a_prune_that_changes_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    nothing = ("prune.num_hidden_layers=null", "prune.intermediate_size=null")
    assert_refused_at_once(run, tmp_path, ("prune.* leaves the teacher as it is", "prune.max_parameters"), *nothing)


# -- nothing of a model runs


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_never_opened(name: str, teacher: Path, run: Run, tmp_path: Path) -> None:
    (teacher / "model.safetensors").unlink()
    trap = tmp_path / "executed"
    (teacher / name).write_bytes(pickle.dumps(Payload(trap)))
    parts = (name, "a pickle, which can run code", "convert it where you trust it")
    assert_refused_at_once(run, tmp_path, parts, f"teacher.path={teacher}")
    assert_refused_at_once(run, tmp_path, parts, f"teacher.path={teacher}", "teacher.trust_remote_code=true")
    assert not trap.exists()


def test_a_pickle_beside_the_weights_is_neither_read_nor_carried_along(teacher: Path, run: Run, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "x.pkl"):
        (teacher / name).write_bytes(pickle.dumps(Payload(trap)))
    run(f"teacher.path={teacher}")
    assert not trap.exists()
    for folder in ("prune", "export"):
        assert not [
            f.name for f in (tmp_path / "run" / folder).iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")
        ]


def with_remote_code(teacher: Path, trap: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n"
    model = code + "from transformers import LlamaConfig, LlamaForCausalLM\n"
    (teacher / "own.py").write_text(
        model + "class OwnConfig(LlamaConfig):\n    pass\nclass Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit_json(teacher / "config.json", auto_map=auto)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run_unless_trusted(where: str, teacher: Path, run: Run, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    with_remote_code(teacher, trap)
    if where != "config.json":
        edit_json(teacher / "config.json", auto_map=...)
        auto = {"AutoTokenizer": ["own.Own", "own.Own"]}
        edit_json(teacher / where, auto_map=auto, tokenizer_class="Own")
        with pytest.raises(CompressError):
            run(f"teacher.path={teacher}")
        assert not trap.exists()
        return
    parts = ("auto_map names Python code", "nothing of it was", "teacher.trust_remote_code=true")
    assert_refused_at_once(run, tmp_path, parts, f"teacher.path={teacher}")
    assert not trap.exists()
    run(f"teacher.path={teacher}", "teacher.trust_remote_code=true", "stage=tokenize")
    run(f"teacher.path={teacher}", "teacher.trust_remote_code=true", "stage=score")
    assert trap.exists(), "asked for, the model's own class is used: the trap does work"


# -- teacher and student


@pytest.fixture
def student(finished_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_source / "prune", tmp_path / "student"))


def permuted_vocabulary(folder: Path) -> tuple[str, ...]:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    (a, one), (b, two) = list(vocab.items())[300:302]
    vocab[a], vocab[b] = two, one
    path.write_text(json.dumps(content))
    return ("the tokenizers of teacher", "differ in 2 tokens", "Logits are compared id by id")


def other_merges(folder: Path) -> tuple[str, ...]:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:0]
    path.write_text(json.dumps(content))
    return ("one vocabulary but split text differently", "use the teacher's tokenizer files")


def other_end(folder: Path) -> tuple[str, ...]:
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    return ("eos_token_id of the tokenizers differs",)


def student_without_weights(folder: Path) -> tuple[str, ...]:
    (folder / "model.safetensors").unlink()
    return ("holds neither model.safetensors nor", "fetch it again")


def student_of_another_teacher(folder: Path) -> tuple[str, ...]:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:400].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", vocab_size=400)
    return ("distill.init_from=", "says vocab_size=400", "resize the embedding")


def student_cut_off(folder: Path) -> tuple[str, ...]:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return ("model.safetensors is not a complete safetensors file",)


@pytest.mark.parametrize(
    "spoil",
    [
        permuted_vocabulary,
        other_merges,
        other_end,
        student_without_weights,
        student_of_another_teacher,
        student_cut_off,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_student_that_does_not_fit_its_teacher_is_refused_before_any_work(
    spoil: Callable[[Path], tuple[str, ...]], student: Path, run: Run, tmp_path: Path
) -> None:
    assert_refused_at_once(run, tmp_path, (str(student), *spoil(student)), f"distill.init_from={student}")


# -- text


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", "", ("data.train[0]", "is empty", "give it text")),
        ("blank.jsonl", "\n\n \n", ("data.train[0]", "is empty")),
        ("empty.txt", "", ("data.train[0]", "is empty")),
        ("blank.txt", " \n\n \n", ("data.train[0]", "blank.txt")),
        ("none.jsonl", '{"text": ""}\n{"text": ""}\n', ("no token to learn from", "text of no tokens: 2")),
        ("short.jsonl", '{"text": "a"}\n', ("data.train[0]", "no token to learn from")),
        ("keys.jsonl", '{"body": "a b c"}\n', ("data.train[0]", "line 1", "text_key='text'", "its keys are body")),
        ("type.jsonl", '{"text": 3}\n', ("data.train[0]", "line 1", "a int under text_key='text'")),
        ("list.jsonl", '["a"]\n', ("data.train[0]", "line 1", "a list, but a record must be an object")),
        ("bad.jsonl", '{"text": "a b c"}\n{"text"\n', ("bad.jsonl line 2: not valid JSON", "mend or delete the line")),
        ("text.csv", "a,b\n", ("data.train[0].path", "text.csv: files must be .jsonl, .json, .parquet, .txt")),
        ("half.parquet", "PAR1xxxx", ("half.parquet is not a complete parquet file",)),
    ],
)  # fmt: skip
def test_text_that_cannot_be_trained_on_is_named(
    name: str, content: str, parts: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    append_eos = "data.append_eos=false"  # an end token would make a second token of a one-token text
    found = refusal(run, f"data.train=[{{path: {path}}}]", append_eos)
    for part in (str(path), *parts):
        assert part in found, f"{part!r} is not in: {found}"
    assert not (tmp_path / "run" / "tokens" / "manifest.json").exists()
    assert not (tmp_path / "run" / "score").exists()
    write_rows(tmp_path / "good.jsonl", [{"text": "The river carries the letter. " * 5}] * 60)
    run(f"data.train=[{{path: {tmp_path / 'good.jsonl'}}}]", append_eos, "stage=tokenize")  # what it asked for works


def test_documents_of_no_tokens_are_counted_and_left_out(run: Run, tmp_path: Path) -> None:
    rows = [{"text": "The river carries the letter. " * 5}, {"text": ""}, {"text": None}] * 40
    write_rows(tmp_path / "some.jsonl", rows)
    run(f"data.train=[{{path: {tmp_path / 'some.jsonl'}}}]", "stage=tokenize")
    [report] = json.loads((tmp_path / "run" / "tokens" / "report.json").read_text())["train"]
    assert report["documents"] == 40
    assert report["dropped"] == {"text of no tokens": 80}


def test_a_window_without_targets_is_refused_before_scoring(run: Run, tmp_path: Path) -> None:
    """Most rows are made of documents of one token, which is never a target; the source as a whole has targets."""
    filler = {"text": "a"}
    real = {"text": "The river carries the letter under the bridge. " * 20}
    write_rows(tmp_path / "mixed.jsonl", [real] + [filler] * 500)
    settings = (
        f"data.train=[{{path: {tmp_path / 'mixed.jsonl'}}}]", "data.append_eos=false",
        "distill.global_batch_size=1", "distill.micro_batch_size=1",
    )  # fmt: skip
    found = refusal(run, *settings)
    assert re.search(r"distill step \d+ of 64 would have no loss token \(\d+ such", found)
    assert "distill.global_batch_size" in found
    assert (tmp_path / "run" / "tokens" / "manifest.json").exists()
    assert not (tmp_path / "run" / "score").exists(), "known from the index, so said before the scoring"


# -- numbers


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before(run: Run, tmp_path: Path) -> None:
    run("stage=tokenize")
    run("stage=score")
    run("stage=prune")
    wild = ("distill.learning_rate=1e30", "distill.warmup_steps=0", "distill.checkpoint_steps=1", "stage=distill")
    with pytest.raises(NumericalError) as caught:
        run(*wild)
    found = str(caught.value)
    failed = re.search(r"distill step (\d+): loss (nan|inf|[\d.e+]+), gradient norm (nan|inf)", found)
    assert failed
    assert f"step {int(failed[1]) - 1} is kept" in found
    assert "Lower distill.learning_rate=1e+30" in found
    kept = checkpoint.steps(tmp_path / "run" / "distill" / "checkpoints")
    assert int(failed[1]) >= 2
    assert kept[-1] == int(failed[1]) - 1
    assert checkpoint.newest(tmp_path / "run" / "distill" / "checkpoints") is not None
    assert not (tmp_path / "run" / "distill" / "manifest.json").exists()
    assert json.loads((tmp_path / "run" / "distill" / "error.json").read_text())["error"] == found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_weights_are_found_at_the_first_step(value: float, student: Path, run: Run, tmp_path: Path) -> None:
    tensors = load_file(student / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"distill step 1: .*look at the teacher's and the student's weights"):
        run(f"distill.init_from={student}")
    assert not checkpoint.steps(tmp_path / "run" / "distill" / "checkpoints")
    assert not (tmp_path / "run" / "export").exists()


def test_more_logits_than_there_are_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill.objectives\[0\].k=513 must be within 1 and vocab_size=512"):
        run("distill.objectives=[{objective: bild, k: 513}]")
    assert not (tmp_path / "run").exists()


def test_a_poisoned_teacher_is_found_while_scoring(teacher: Path, run: Run, tmp_path: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="finite"):
        run(f"teacher.path={teacher}")
    assert not (tmp_path / "run" / "score" / "manifest.json").exists()


# -- the machine: full disks, kills, two writers


def assert_all_whole(run_dir: Path) -> None:
    """Whatever lies under a final name can be read to its end."""
    for file in run_dir.rglob("*"):
        if file.suffix == ".safetensors" and not any(part.startswith(".") for part in file.relative_to(run_dir).parts):
            load_file(file)
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_a_full_disk_is_named_leaves_nothing_half_written_and_costs_nothing_but_the_wait(
    finished_source: Path, run: Run, tmp_path: Path
) -> None:
    """By the kernel's limit on a file's size: the student's weights don't fit, then a checkpoint doesn't."""
    for kilobytes, folder in ((200, "prune"), (700, "distill")):
        with (
            full_disk_after(kilobytes * 1024),
            pytest.raises(ArtifactError, match=rf"{folder}\S*: the disk is full \(.*run the same command again"),
        ):
            run()
        assert not (tmp_path / "run" / folder / "manifest.json").exists()
        assert "the disk is full" in json.loads((tmp_path / "run" / folder / "error.json").read_text())["error"]
        assert_all_whole(tmp_path / "run")
        left = {file.name for file in (tmp_path / "run" / folder).rglob("*")}
        assert left <= {"started.json", "error.json", "checkpoints", "metrics.jsonl"}
    run()
    ours = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert ours == (finished_source / "export" / "model.safetensors").read_bytes()


def test_a_file_system_that_fills_up_in_any_stage_is_named(run: Run, finished: Path) -> None:
    """ENOSPC of a real file system, for each stage: copy what is done to a disk too small for the next."""
    disk = finished.parent / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        done = disk / "run"
        done.mkdir()
        for stage, folder in (("tokenize", "tokens"), ("score", "score"), ("prune", "prune"), ("distill", "distill"),
                              ("export", "export"), ("evaluate", "evaluate")):  # fmt: skip
            free = shutil.disk_usage(disk).free
            filler = disk / "filler"
            with filler.open("wb") as handle:
                handle.write(b"x" * (free - 3 * 4096))  # a page for each of the lock, the folder, and little else
            with pytest.raises(ArtifactError, match=rf"{disk}\S*: the disk is full"):
                run(f"stage={stage}", f"run_dir={done}")
            assert not (done / folder / "manifest.json").exists()
            assert_all_whole(done)
            filler.unlink()
            run(f"stage={stage}", f"run_dir={done}")
        ours = (done / "export" / "model.safetensors").read_bytes()
        assert ours == (finished / "export" / "model.safetensors").read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.002)


STEPS = 20  # time enough to hit them
LONG = (f"distill.num_tokens={STEPS * 512}", "distill.checkpoint_steps=1")


@pytest.fixture(scope="session")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import _run

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    _run(cache, folder, LONG)
    return folder


def same_model(one: Path, two: Path) -> bool:
    names = sorted(f.name for f in one.iterdir() if f.name != "manifest.json")
    assert names == sorted(f.name for f in two.iterdir() if f.name != "manifest.json")
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    spawn: Spawn, run: Run, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL in score, in a checkpoint's writing and in export, each time the next command goes on; and while one
    process trains, a second one is kept out."""
    folder = tmp_path / "run"
    checkpoints = folder / "distill" / "checkpoints"
    moments: list[Callable[[], bool]] = [
        lambda: (folder / "score" / "started.json").exists(),
        lambda: bool(list(checkpoints.glob(".step_*"))) and len(list(checkpoints.glob("step_*"))) >= 2,
        lambda: (folder / "export" / "started.json").exists(),
    ]
    for number, moment in enumerate(moments):
        process = spawn(*LONG)
        if number == 1:
            wait_for(lambda: (folder / "distill" / "metrics.jsonl").exists(), process)
            found = refusal(run, *LONG)
            assert f"{folder / 'distill'} is being written by process {process.pid} " in found
            assert "another name= or run_dir=" in found
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "export" / "manifest.json").exists()
    run(*LONG)
    assert same_model(folder / "export", undisturbed / "export")
    assert same_model(folder / "prune", undisturbed / "prune")
    rows = [json.loads(line) for line in (folder / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    left = [p.name for p in folder.rglob(".*") if not p.name.endswith((".lock", ".lease"))]
    assert not left, "what the killed runs left behind was removed"


@pytest.mark.parametrize("name", ["SIGTERM", *[pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGINT")]])
def test_a_signal_saves_says_so_and_the_same_command_goes_on_to_the_same_bits(
    spawn: Spawn, run: Run, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    metrics = folder / "distill" / "metrics.jsonl"
    rare = (LONG[0], "distill.checkpoint_steps=1000")  # only the signal saves
    process = spawn(*rare, "distill.async_checkpoint=true")  # which a signal waits for
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    for _ in range(1 if name == "SIGINT" else 3):  # Slurm and torchrun both send it
        process.send_signal(signal.Signals[name])
        time.sleep(0.05)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    said = re.search(rf"compress: {name}: step (\d+) of {STEPS} is saved; the same command goes on", output)
    assert said, output
    assert checkpoint.steps(folder / "distill" / "checkpoints") == [int(said[1])]
    assert 3 <= int(said[1]) < STEPS
    assert name in json.loads((folder / "distill" / "error.json").read_text())["error"]
    run(*rare)
    assert same_model(folder / "export", undisturbed / "export")
    assert not (folder / "distill" / "error.json").exists()


def test_no_module_of_ours_unpickles() -> None:
    forbidden = re.compile(r"import pickle|pickle\.load|torch\.load\(|allow_pickle\s*=\s*True|unsafe_load")
    for file in (REPOSITORY / "compress").rglob("*.py"):
        assert not forbidden.search(file.read_text()), file


def test_only_the_pipeline_imports_stages() -> None:
    """Stages don't know each other, and what they are built from knows none of them."""
    stages = {stage.value for stage in STAGES}
    for file in (REPOSITORY / "compress").rglob("*.py"):
        if file.stem in ("stages", "pipeline", "__main__", "__init__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names} if node.module == "compress" else {node.module or ""}
                assert not stages & {name.removeprefix("compress.") for name in names}, file

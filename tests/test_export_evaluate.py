"""The exported folder is the trained student, and the figures are those of an independent computation."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress import checkpoint, evaluate
from compress.errors import ArtifactError, ConfigError, NumericalError
from compress.tokens import TokenBatch, TokenSet


def trained(run_dir: Path) -> Any:
    """The student with the parameters of the newest checkpoint, by way of the pruned folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(run_dir / "prune", dtype=torch.float32).eval()
    found = checkpoint.newest(run_dir / "distill" / "checkpoints")
    assert found is not None
    checkpoint.load(found[0], {f"model/model.{name}": p.data for name, p in model.named_parameters()})
    return model


def test_the_export_loads_strictly_and_says_what_the_trained_student_says(finished: Path, run: Run) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(finished / "export", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    student = trained(finished)
    pruned = load_file(finished / "prune" / "model.safetensors")
    exported = load_file(finished / "export" / "model.safetensors")
    assert exported.keys() == pruned.keys(), "a tied head is stored once"
    for name, parameter in student.named_parameters():
        assert torch.equal(exported[name], parameter.to(torch.bfloat16)), name
    assert any(not torch.equal(exported[name], pruned[name].to(torch.bfloat16)) for name in exported), "it did learn"
    shutil.rmtree(finished / "export")
    shutil.rmtree(finished / "evaluate")
    run("export.dtype=float32", "stage=export")
    ids = torch.arange(60)[None] * 7 % student.config.vocab_size
    again = AutoModelForCausalLM.from_pretrained(finished / "export").eval()
    assert again.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, student(ids).logits)

    report = json.loads((finished / "export" / "report.json").read_text())
    facts = json.loads((finished / "prune" / "report.json").read_text())
    assert report["contract"]["num_parameters"] == facts["student"]["num_parameters"]
    assert report["contract"]["engines"] == facts["contract"]["engines"]
    last = json.loads((finished / "distill" / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["step"] == last["step"]


def test_every_other_file_of_the_teacher_comes_along_and_the_umask_decides_who_reads(
    teacher: Path, run: Run, tmp_path: Path
) -> None:
    extra = {
        "LICENSE": "terms", "NOTICE.txt": "notice", "USE_POLICY.md": "policy", "chat_template.jinja": None,
        "generation_config.json": None, "tokenizer.json": None, "tokenizer_config.json": None,
        "additional_chat_templates/tool.jinja": "{{ messages }}",
    }  # fmt: skip
    for name, content in extra.items():
        if content is not None:
            (teacher / name).parent.mkdir(exist_ok=True)
            (teacher / name).write_text(content)
    (teacher / "model.gguf").write_bytes(b"the weights again")
    generation = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.3, "do_sample": True}))
    old = os.umask(0o027)
    try:
        run(f"teacher.path={teacher}")
    finally:
        os.umask(old)
    for folder in (tmp_path / "run" / "prune", tmp_path / "run" / "export"):
        for name in extra:
            assert (folder / name).read_bytes() == (teacher / name).read_bytes(), name
        assert not (folder / "model.gguf").exists()
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.rglob("*") if file.is_file()}
        assert set(modes.values()) == {oct(0o640)}, modes
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith(
            "<|im_start|>"
        )


def independent(model: Any, teacher: Any, batches: list[TokenBatch]) -> dict[str, float]:
    """The same figures the plain way: full logits, one document at a time, alone, in float64."""
    loss = kl = agreement = 0.0
    count = 0
    for batch in batches:
        for row in range(len(batch.input_ids)):
            starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True):
                ids = batch.input_ids[row, start:stop][None]
                mask = batch.loss_mask[row, start : stop - 1]
                if not mask.any():
                    continue
                q, p = (m(ids).logits[0, :-1].double().log_softmax(-1)[mask] for m in (model, teacher))
                label = ids[0, 1:][mask]
                loss -= q.gather(1, label[:, None]).sum().item()
                kl += (p.exp() * (p - q)).sum().item()
                agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
                count += len(label)
    return {
        "loss": loss / count, "perplexity": math.exp(loss / count), "kl_to_teacher": kl / count,
        "top1_agreement": agreement / count, "num_tokens": count,
    }  # fmt: skip


@torch.inference_mode()
def test_the_figures_are_those_of_full_logits_of_each_document_alone(
    finished_source: Path, teacher_source: Path
) -> None:
    metrics = json.loads((finished_source / "evaluate" / "metrics.json").read_text())
    folders = {"teacher": teacher_source, "pruned": finished_source / "prune", "distilled": finished_source / "export"}
    models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for n, f in folders.items()}
    tokens = TokenSet.open(finished_source / "tokens" / "validation" / "validation")
    wanted = 1024 // 64
    assert tokens.num_sequences > wanted, "so that choosing matters"
    batches = [tokens.batch([i * tokens.num_sequences // wanted]) for i in range(wanted)]
    for name, model in models.items():
        expected = independent(model, models["teacher"], batches)
        found = metrics[name]["sets"]["validation"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, key)
        assert metrics[name]["parameters"] == sum(p.numel() for p in model.parameters())
        weights = folders[name] / "model.safetensors"
        assert metrics[name]["weights_bytes"] == weights.stat().st_size


def test_metrics_json_has_the_form_of_the_design(finished_source: Path) -> None:
    metrics = json.loads((finished_source / "evaluate" / "metrics.json").read_text())
    assert metrics.keys() == {"teacher", "pruned", "distilled", "excess_loss", "gap_closed"}
    loss = {}
    for name in ("teacher", "pruned", "distilled"):
        assert {"parameters", "weights_bytes", "sets"} <= metrics[name].keys()
        assert metrics[name]["sets"].keys() == {"validation"}
        assert {"loss", "perplexity", "kl_to_teacher", "top1_agreement"} <= metrics[name]["sets"]["validation"].keys()
        loss[name] = metrics[name]["sets"]["validation"]["loss"]
    assert metrics["teacher"]["sets"]["validation"]["kl_to_teacher"] == 0
    assert metrics["teacher"]["sets"]["validation"]["top1_agreement"] == 1
    assert metrics["excess_loss"] == {"validation": loss["distilled"] - loss["teacher"]}
    gap = loss["pruned"] - loss["teacher"]
    expected = (loss["pruned"] - loss["distilled"]) / gap if gap > 0 else None
    assert metrics["gap_closed"] == {"validation": expected}
    assert all(metrics[name]["tokens_per_second"] > 0 for name in ("teacher", "distilled"))


@pytest.mark.parametrize(
    ("teacher", "pruned", "distilled", "share"),
    [(2.0, 4.0, 2.5, 0.75), (2.0, 4.0, 4.0, 0.0), (2.0, 4.0, 5.0, -0.5), (2.0, 4.0, 1.0, 1.5), (2.0, 2.0, 1.0, None),
     (3.0, 2.0, 2.5, None)],
)  # fmt: skip
def test_gap_closed_is_a_share_of_a_gap_that_there_is(
    teacher: float, pruned: float, distilled: float, share: float | None
) -> None:
    assert evaluate._share(pruned - distilled, pruned - teacher) == share


def test_several_sets_each_get_their_figures(run: Run, finished: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(cache / "tiny" / "calibration.jsonl", tmp_path / "other.jsonl")
    for folder in ("tokens", "score", "prune", "distill", "export", "evaluate"):
        shutil.rmtree(finished / folder)
    sets = "data.validation=[{path: 'embedded:tiny-validation', name: one}, {path: other.jsonl}]"
    run(sets, "evaluate.max_tokens=null")
    metrics = json.loads((finished / "evaluate" / "metrics.json").read_text())
    for part in (
        metrics["teacher"]["sets"],
        metrics["distilled"]["sets"],
        metrics["excess_loss"],
        metrics["gap_closed"],
    ):
        assert list(part) == ["one", "other"]
    for name in ("one", "other"):
        tokens = TokenSet.open(finished / "tokens" / "validation" / name)
        assert metrics["teacher"]["sets"][name]["num_tokens"] == tokens.loss_tokens.sum(), "null means all of it"


def test_a_damaged_export_or_table_is_named(run: Run, finished: Path) -> None:
    metrics = finished / "evaluate" / "metrics.json"
    metrics.write_text("{}")
    with pytest.raises(ArtifactError, match=r"metrics\.json lacks .*delete .*run its stage again"):
        run()
    shutil.rmtree(finished / "evaluate")
    weights = finished / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=rf"{finished / 'export'}"):
        run("stage=evaluate")
    assert not metrics.exists()


def test_an_earlier_step_is_never_exported_as_the_last_one(finished_source: Path, finished: Path, run: Run) -> None:
    shutil.rmtree(finished / "export")
    shutil.rmtree(finished / "evaluate")
    assert checkpoint.steps(finished / "distill" / "checkpoints") == [6, 8]
    [shard] = (finished / "distill" / "checkpoints" / "step_00000008").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"ended at step 8, .* whole checkpoint is of step 6\. Delete .*export\.step=6"
    ):
        run("stage=export")
    assert not (finished / "export" / "config.json").exists()
    (finished / "distill" / "manifest.json").unlink()  # as the message says
    run()
    ours = (finished / "export" / "model.safetensors").read_bytes()
    assert ours == (finished_source / "export" / "model.safetensors").read_bytes()


def test_a_model_whose_loss_is_not_finite_has_no_figures(run: Run, finished: Path) -> None:
    shutil.rmtree(finished / "evaluate")
    weights = finished / "export" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NumericalError, match=r"the loss of distilled .* is nan; set compute_dtype=float32"):
        run("stage=evaluate")
    assert not (finished / "evaluate" / "metrics.json").exists()


ITEM = '{"question": "x", "choices": ["a", "b"], "label": 0}'


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not there; give a jsonl"), ("", "is empty; give a jsonl"), ("{", "line 1: not valid JSON"),
     ("[1]", "line 1: not an object with question"), ('{"question": "x"}', "line 1: not an object with question"),
     (f"{ITEM}\n\n{{", "line 3: not valid JSON"), (ITEM.replace("0", "2"), "label=2 is no index of its 2 choices"),
     (ITEM.replace("0", '"a"'), "label='a' is no index"), (ITEM.replace('["a", "b"]', '"a"'), "choices is no list")],
)  # fmt: skip
def test_a_task_without_its_data_is_refused_before_any_work(
    content: str | None, said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))  # its import takes 10 s and isn't needed
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"evaluate\.lm_eval_path=\S*items\.jsonl.*{said}"):
        run("evaluate.lm_eval=true", f"evaluate.lm_eval_path={path}")
    assert not (tmp_path / "run").exists()


def test_lm_eval_that_is_not_installed_is_said_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval=true needs lm-eval: pip install"):
        run("evaluate.lm_eval=true")
    assert not (tmp_path / "run").exists()

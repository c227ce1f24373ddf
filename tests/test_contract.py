"""What a student is held to before its stage is done: it passes whole, and fails for one wrong number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import VARIANTS, make_batch, make_model, save_model, student_sizes
from safetensors.torch import load_file, save_file
from test_slicing import keep

from compress.architecture import shape_of
from compress.compensation import compensated_weights
from compress.contract import check_student, engine_report
from compress.errors import ArtifactError, NumericalError
from compress.families import Shape
from compress.folders import read_model
from compress.slicing import slice_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_student_passes(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(variant, dtype=dtype)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, student_sizes(variant))
    replaced = compensated_weights(model, [make_batch()], kept)
    shape = slice_checkpoint(info, tmp_path / "student", kept, replaced=replaced)
    report = check_student(tmp_path / "student", info, kept, replaced)
    assert report["strict_load"]
    assert report["logits_difference"] < 1e-4
    assert set(report["engines"]) == {"transformers", "vllm", "llama_cpp", "tensorrt_llm"}
    assert read_model(tmp_path / "student").shape == shape
    if replaced:
        with pytest.raises(ArtifactError, match="logits differ from the masked teacher's"):
            check_student(tmp_path / "student", info, kept, None)  # not the weights that were put in


# tensor, how it is spoilt
SPOILT = [
    ("model.layers.1.mlp.down_proj.weight", "a column of another unit"),
    ("model.layers.0.self_attn.q_proj.weight", "heads in another order"),
    ("model.norm.weight", "channels in another order"),
]


@pytest.mark.parametrize(("name", "how"), SPOILT)
def test_one_wrong_unit_fails(name: str, how: str, tmp_path: Path) -> None:
    model = make_model("llama", dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, student_sizes("llama"))
    slice_checkpoint(info, tmp_path / "student", kept)
    check_student(tmp_path / "student", info, kept, None)
    path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(path)
    if how.startswith("a column"):
        tensors[name][:, 3] = tensors[name][:, 4]
    else:
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"logits differ from the masked teacher's by \d.*stage=selftest"):
        check_student(tmp_path / "student", info, kept, None)


def test_missing_and_further_tensors_and_rows_fail(tmp_path: Path) -> None:
    model = make_model("llama", tied=True, dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, student_sizes("llama"))
    slice_checkpoint(info, tmp_path / "student", kept)
    path = tmp_path / "student" / "model.safetensors"
    whole = load_file(path)

    def with_tensors(**changes: torch.Tensor) -> None:
        save_file({n: t for n, t in {**whole, **changes}.items() if t.numel()}, path, {"format": "pt"})

    embedding = whole["model.embed_tokens.weight"]
    for changes, message in (
        ({"model.norm.weight": torch.zeros(0)}, "1 tensors are missing, such as model.norm.weight"),
        ({"extra": torch.ones(1)}, "1 are unknown, such as extra"),
        ({"lm_head.weight": embedding + 1}, "tie_word_embeddings=true, but lm_head.weight is stored"),
        ({"model.embed_tokens.weight": embedding[:90].clone()}, r"\(90, 36\), expected \(97, 36\)"),
    ):
        with_tensors(**changes)
        with pytest.raises(Exception, match=message):
            check_student(tmp_path / "student", info, kept, None)
    with_tensors(**{"model.norm.weight": whole["model.norm.weight"] * float("nan")})
    with pytest.raises(NumericalError, match="not finite"):
        check_student(tmp_path / "student", info, kept, None)


LLAMA = Shape(4096, 14336, 32, 32, 8, 0, 0, 128, 128256, False)


@pytest.mark.parametrize(
    ("change", "family", "engine", "runs", "why"),
    [
        ({}, "llama", "vllm", "yes", ""),
        ({}, "llama", "llama_cpp", "yes", ""),
        ({}, "llama", "tensorrt_llm", "yes", ""),
        ({"head_dim": 60}, "llama", "vllm", "no", "head_dim=60 is no multiple of 8"),
        ({"head_dim": 264}, "llama", "vllm", "no", "head_dim=264 is more than 256"),
        ({"head_dim": 72}, "llama", "tensorrt_llm", "no", "head_dim=72 is none of 32, 48"),
        ({"hidden_size": 4112}, "llama", "llama_cpp", "unquantised only", "hidden_size=4112 is no multiple of 32"),
        ({"intermediate_size": 14464}, "llama", "llama_cpp", "slower", "intermediate_size=14464 is no multiple of 256"),
        ({}, "inhouse", "vllm", "no", "model_type=inhouse is not among those"),
    ],
)
def test_engines_say_what_they_ask_for(change: dict[str, int], family: str, engine: str, runs: str, why: str) -> None:
    found = engine_report(family, replace(LLAMA, **change))[engine]
    assert found["runs"] == runs
    assert why in "; ".join(found["why"])
    assert all("(" in reason for reason in found["why"] if "model_type" not in reason), "with its source"


def test_tensor_parallel_sizes_divide_the_heads() -> None:
    assert engine_report("llama", LLAMA)["vllm"]["tensor_parallel"] == [1, 2, 4, 8, 16]
    uneven = replace(LLAMA, num_attention_heads=28, num_key_value_heads=4)
    assert engine_report("qwen2", uneven)["vllm"]["tensor_parallel"] == [1, 2, 4]


def test_the_report_of_a_pruned_tiny_model_says_it(finished: Path) -> None:
    contract = json.loads((finished / "prune" / "report.json").read_text())["contract"]
    assert contract["logits_difference"] < 1e-4
    assert contract["num_parameters"] == sum(
        t.numel() for t in load_file(finished / "prune" / "model.safetensors").values()
    )
    assert shape_of(make_model("llama").config).head_dim == 10  # the tiny variants are not what engines ask for
    assert engine_report("llama", shape_of(make_model("llama").config))["vllm"]["runs"] == "no"

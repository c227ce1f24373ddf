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
from transformers.models.llama.modeling_llama import LlamaMLP

from compress.architecture import shape_of
from compress.compensation import compensated_weights
from compress.contract import check_student, describe_export, engine_report
from compress.errors import ArtifactError, NumericalError
from compress.families import Shape
from compress.folders import read_model
from compress.slicing import slice_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_student_passes(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(variant, dtype=dtype)
    info = read_model(save_model(tmp_path / "teacher", model))
    sizes = student_sizes(variant)
    if "num_experts" in sizes and dtype == torch.bfloat16:
        sizes["hidden_size"] = 40  # 36 wouldn't run
    kept = keep(model, sizes)
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


def test_a_tied_head_that_is_stored_too_fails(tmp_path: Path) -> None:
    model = make_model("llama", tied=True, dtype=torch.float32)
    save_model(tmp_path / "teacher", model)
    path = tmp_path / "teacher" / "model.safetensors"
    whole = load_file(path)
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    info = read_model(tmp_path / "teacher")  # a teacher may have it
    kept = keep(model, student_sizes("llama"))
    slice_checkpoint(info, tmp_path / "student", kept)
    check_student(tmp_path / "student", info, kept, None)
    path = tmp_path / "student" / "model.safetensors"
    whole = load_file(path)
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    for check in (lambda: check_student(path.parent, info, kept, None), lambda: describe_export(path.parent)):
        with pytest.raises(ArtifactError, match=r"lm_head.weight is stored, but tie_word_embeddings=true"):
            check()


# dtype, sizes of the student, what is wrong
UNALIGNED = [
    (torch.bfloat16, {"moe_intermediate_size": 20}, "moe_intermediate_size=20 is no multiple of 8, 16 bytes"),
    (torch.bfloat16, {"hidden_size": 36, "moe_intermediate_size": 16}, "hidden_size=36 is no multiple of 8, 16 bytes"),
    (torch.float32, {"moe_intermediate_size": 20}, None),
]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("dtype", "sizes", "wrong"), UNALIGNED)
def test_experts_that_no_kernel_multiplies_fail(
    variant: str, dtype: torch.dtype, sizes: dict[str, int], wrong: str | None, tmp_path: Path
) -> None:
    model = make_model(variant, dtype=dtype)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, sizes)
    slice_checkpoint(info, tmp_path / "student", kept)
    streamed = check_student(tmp_path / "student", info, kept, None, whole=False)["engines"]["transformers"]
    if wrong is None:
        assert streamed["runs"] == "yes"
        assert check_student(tmp_path / "student", info, kept, None)["engines"]["transformers"] == streamed
        return
    assert streamed["runs"] == "no"
    assert any(wrong in reason for reason in streamed["why"])
    with pytest.raises(ArtifactError, match=rf"in bfloat16 .*{wrong}.* Set shape.multiple_of=16"):
        check_student(tmp_path / "student", info, kept, None)


def test_a_student_that_fails_by_its_own_code_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, student_sizes("llama"))
    slice_checkpoint(info, tmp_path / "student", kept)

    def refuse(self: object, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype == torch.bfloat16:
            raise TypeError("no such kernel")
        return hidden

    monkeypatch.setattr(LlamaMLP, "forward", refuse)
    with pytest.raises(ArtifactError, match=r"in bfloat16 \(no such kernel\)\. Check that the teacher runs"):
        check_student(tmp_path / "student", info, kept, None)


LLAMA = Shape(4096, 14336, 32, 32, 8, 0, 0, 128, 128256, False)


QWEN2 = Shape(3584, 18944, 28, 28, 4, 0, 0, 128, 152064, False)


@pytest.mark.parametrize(
    ("shape", "family", "engine", "runs", "why"),
    [
        (LLAMA, "llama", "vllm", "yes", ""),
        (LLAMA, "llama", "llama_cpp", "yes", ""),
        (LLAMA, "llama", "tensorrt_llm", "yes", ""),
        (replace(LLAMA, head_dim=60), "llama", "vllm", "no", "head_dim=60 is no multiple of 8"),
        (replace(LLAMA, head_dim=264), "llama", "vllm", "no", "head_dim=264 is more than 256"),
        (replace(LLAMA, head_dim=72), "llama", "tensorrt_llm", "no", "head_dim=72 is none of 32, 48"),
        (replace(LLAMA, hidden_size=4112), "llama", "llama_cpp", "unquantised only", "hidden_size=4112 is no multiple"),
        (replace(LLAMA, intermediate_size=14464), "llama", "llama_cpp", "slower", "intermediate_size=14464 is no mult"),
        (LLAMA, "inhouse", "vllm", "not known", "model_type=inhouse is not among those"),
        (replace(LLAMA, head_dim=60), "inhouse", "vllm", "no", "head_dim=60 is no multiple of 8"),
        (QWEN2, "qwen2", "vllm", "yes", ""),
        (QWEN2, "qwen2", "llama_cpp", "yes", ""),
        (replace(QWEN2, hidden_size=3072), "qwen2", "vllm", "no", "width=3584 and hidden_size=3072 are not equal"),
        (replace(QWEN2, num_attention_heads=24), "qwen2", "vllm", "no", "query_width=3072 and hidden_size=3584"),
        (replace(QWEN2, hidden_size=3072, num_attention_heads=24), "qwen2", "vllm", "yes", ""),
        (replace(QWEN2, hidden_size=3072), "olmo2", "vllm", "no", "query_width=3584 and hidden_size=3072"),
        (replace(QWEN2, hidden_size=3072), "qwen3", "vllm", "yes", ""),
        (replace(QWEN2, hidden_size=3072), "qwen3", "llama_cpp", "yes", ""),
        *((replace(QWEN2, hidden_size=3072), family, "llama_cpp", "no", "query_width=3584 and hidden_size=3072")
          for family in ("qwen2", "phi3", "olmo2")),
        (replace(QWEN2, hidden_size=3072), "qwen2", "tensorrt_llm", "yes", ""),
        (replace(QWEN2, hidden_size=3072), "phi3", "tensorrt_llm", "not known", "width=3584 and hidden_size=3072"),
    ],
)  # fmt: skip
def test_engines_say_what_they_ask_for(shape: Shape, family: str, engine: str, runs: str, why: str) -> None:
    found = engine_report(family, shape, None, 2)[engine]
    assert found["runs"] == runs
    assert why in "; ".join(found["why"])
    assert all("(" in reason for reason in found["why"] if "model_type" not in reason), "with its source"


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "layer_types", "engine", "runs"),
    [
        ("gpt_oss", [S, F, S, F], "llama_cpp", "yes"),
        ("gpt_oss", [S, F, S], "llama_cpp", "yes"),
        ("gpt_oss", [F, S, F], "llama_cpp", "no"),
        ("gpt_oss", [S, S, F], "llama_cpp", "no"),
        ("gpt_oss", [S, S, F], "vllm", "yes"),  # it goes by layer_types
        ("gemma2", [S, F, S, F], "llama_cpp", "yes"),
        ("gemma2", [S, F, F], "llama_cpp", "no"),
        ("gemma3_text", [S, S, S, S, S, F, S], "llama_cpp", "yes"),
        ("gemma3_text", [S, S, S, S, F, S, S], "llama_cpp", "no"),
        ("qwen2", [F, F, F], "llama_cpp", "yes"),
        ("qwen2", [F, F, S], "llama_cpp", "no"),
    ],
)
def test_an_engine_with_a_fixed_pattern_wants_it_kept(
    family: str, layer_types: list[str], engine: str, runs: str
) -> None:
    found = engine_report(family, LLAMA, layer_types, 2)[engine]
    assert found["runs"] == runs
    assert any("layer_types: layer" in reason for reason in found["why"]) == (runs == "no")


def test_the_report_goes_by_the_kinds_of_attention_that_were_kept(tmp_path: Path) -> None:
    model = make_model("gemma2", dtype=torch.float32)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = keep(model, {"num_hidden_layers": 3})
    for layers, wrong in (([0, 1, 2], False), ([0, 2, 3], True)):
        folder = tmp_path / "".join(map(str, layers))
        slice_checkpoint(info, folder, {**kept, "layers": torch.tensor(layers)})
        report = describe_export(folder)["engines"]["llama_cpp"]
        assert any("layer_types: layer 1 is sliding_attention" in reason for reason in report["why"]) == wrong


def test_tensor_parallel_sizes_divide_the_heads() -> None:
    assert engine_report("llama", LLAMA, None, 2)["vllm"]["tensor_parallel"] == [1, 2, 4, 8, 16]
    uneven = replace(LLAMA, num_attention_heads=28, num_key_value_heads=4)
    assert engine_report("qwen2", uneven, None, 2)["vllm"]["tensor_parallel"] == [1, 2, 4]


def test_the_report_of_a_pruned_tiny_model_says_it(finished: Path) -> None:
    contract = json.loads((finished / "prune" / "report.json").read_text())["contract"]
    assert contract["logits_difference"] < 1e-4
    assert contract["num_parameters"] == sum(
        t.numel() for t in load_file(finished / "prune" / "model.safetensors").values()
    )
    assert shape_of(make_model("llama").config).head_dim == 10  # the tiny variants are not what engines ask for
    assert engine_report("llama", shape_of(make_model("llama").config), None, 2)["vllm"]["runs"] == "no"

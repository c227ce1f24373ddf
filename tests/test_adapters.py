"""A LoRA adapter is sliced along with its teacher: the adapted student is the adapted teacher, masked. Real PEFT."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, Run
from families import logits, make_batch, make_model, save_model, student_sizes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compress.adapters import CONFIG, WEIGHTS, read_adapter, slice_adapter
from compress.architecture import shape_of, with_sizes
from compress.config import load_config
from compress.errors import ArtifactError, CompressError, ConfigError
from compress.folders import read_model
from compress.importance import estimate_importance
from compress.masking import masked
from compress.models import load_model
from compress.pipeline import expectations
from compress.settings import Stage
from compress.slicing import select, slice_checkpoint


def adapt(model: PreTrainedModel, folder: Path, **settings: Any) -> PreTrainedModel:
    """Save an adapter whose every tensor is random and return the model with it merged."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        *((variant, {}) for variant in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox")),
        ("llama", {"target_modules": ["embed_tokens", "o_proj", "down_proj"]}),
        ("llama", {"use_rslora": True, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 5}}),
        ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1, 2, 4]}),
        ("llama", {"target_modules": ["layers.0.self_attn.q_proj", "layers.4.self_attn.q_proj"]}),
        ("llama", {"target_modules": r".*layers\.(2|3)\.self_attn\.(q|k)_proj"}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["up_proj"]}),
    ],
)
def test_the_adapted_student_is_the_adapted_teacher_masked(
    variant: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(variant).eval()
    folder = save_model(tmp_path / "teacher", model)
    info, importance, batch = read_model(folder), estimate_importance(model, [make_batch()]), make_batch(seed=1)
    kept = select(importance, with_sizes(info.shape, student_sizes(variant)), [1, 3])  # so that numbers change
    merged = adapt(model, tmp_path / "adapter", **settings)
    slice_checkpoint(info, tmp_path / "student", kept)
    slice_adapter(tmp_path / "adapter", tmp_path / "sliced", info, kept)
    student = load_model(tmp_path / "student", torch.float64).eval()
    plain = logits(student, batch)
    loaded = PeftModel.from_pretrained(student, tmp_path / "sliced")
    assert {n.replace(".default", "") for n in loaded.state_dict() if "lora_" in n} == {
        n for n in load_file(tmp_path / "sliced" / WEIGHTS) if "lora_" in n
    }, "strictly: nothing missing, nothing made up"
    with masked(merged, kept):
        expected = logits(merged, batch)
    found = logits(loaded.merge_and_unload().eval(), batch)
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.std())), (found - expected).abs().max()
    assert not torch.allclose(found, plain, atol=1e-2), "the adapter does something"


def test_an_adapter_comes_along_through_prune_and_export(teacher: Path, run: Run, tmp_path: Path) -> None:
    model = load_model(teacher, torch.float32)
    adapt(model, tmp_path / "in house")
    run(f"teacher.path={teacher}", f"prune.adapters=['{tmp_path / 'in house'}']")
    for place in ("prune", "export"):
        folder = tmp_path / "run" / place / "adapters" / "in house"
        assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] is None
        adapted = PeftModel.from_pretrained(load_model(tmp_path / "run" / place, torch.float32), folder)
        assert adapted.peft_config["default"].r == 3
    assert not list((tmp_path / "run" / "prune").glob("adapter_*")), (
        "the student's own folder has no adapter of its own"
    )


def no_config(folder: Path) -> tuple[str, ...]:
    (folder / CONFIG).unlink()
    return (f"holds no {CONFIG}", "save_pretrained")


def pickled(folder: Path) -> tuple[str, ...]:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    return ("is a pickle, which isn't read here", "safe_serialization=True")


def truncated(folder: Path) -> tuple[str, ...]:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    return ("is not a complete safetensors file",)


def set_key(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return change


def other_kind(folder: Path) -> tuple[str, ...]:
    set_key(peft_type="IA3")(folder)
    return ("peft_type=IA3 can't be sliced, only LORA",)


def dora(folder: Path) -> tuple[str, ...]:
    set_key(use_dora=True)(folder)
    return ("use_dora=True: its magnitudes are norms over channels that go", "merge it into the teacher")


def numbered_pattern(folder: Path) -> tuple[str, ...]:
    set_key(rank_pattern={"model.layers.1.self_attn.q_proj": 5})(folder)
    return ("rank_pattern names layers by number",)


def another_model(folder: Path) -> tuple[str, ...]:
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, folder / WEIGHTS)
    return ("q_proj.lora_A is [3, 47], where the teacher", "asks for ['rank', 48]", "is it of another model?")


def a_layer_too_many(folder: Path) -> tuple[str, ...]:
    tensors = load_file(folder / WEIGHTS)
    save_file({n.replace("layers.4.", "layers.5."): t for n, t in tensors.items()}, folder / WEIGHTS)
    return ("it adapts model.layers.5.", "which the teacher", "doesn't have")


def foreign_tensor(folder: Path) -> tuple[str, ...]:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.model.norm.lora_magnitude_vector": torch.ones(3)}, folder / WEIGHTS)
    return ("lora_magnitude_vector is none of LoRA's factors",)


@pytest.mark.parametrize(
    "spoil",
    [
        no_config,
        pickled,
        truncated,
        other_kind,
        dora,
        numbered_pattern,
        another_model,
        a_layer_too_many,
        foreign_tensor,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_an_adapter_that_cannot_be_sliced_is_refused(spoil: Callable[[Path], tuple[str, ...]], tmp_path: Path) -> None:
    model = make_model()
    info = read_model(save_model(tmp_path / "teacher", model))
    adapt(model, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter", info)["r"] == 3
    parts = spoil(tmp_path / "adapter")
    with pytest.raises((ConfigError, ArtifactError)) as caught:
        read_adapter(tmp_path / "adapter", info)
    for part in (str(tmp_path / "adapter"), *parts):
        assert part in str(caught.value), caught.value


def test_refused_before_anything_is_written(teacher: Path, run: Run, tmp_path: Path) -> None:
    adapt(make_model(), tmp_path / "adapter")
    for settings, said in (
        (f"prune.adapters=[{tmp_path / 'none'}]", "none is no folder; give one that peft"),
        (f"prune.adapters=[{tmp_path / 'adapter'}]", "is it of another model"),
        (f"prune.adapters=[{tmp_path / 'adapter'},{tmp_path / 'adapter'}]", "must differ"),
    ):
        with pytest.raises(CompressError, match=said):
            run(f"teacher.path={teacher}", settings)
        assert not (tmp_path / "run").exists()


def test_an_adapter_of_removed_layers_alone_is_refused(tmp_path: Path) -> None:
    model = make_model().eval()
    folder = save_model(tmp_path / "teacher", model)
    info, importance = read_model(folder), estimate_importance(model, [make_batch()])
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[2])
    kept = select(importance, with_sizes(shape_of(model.config), {"num_hidden_layers": 4}), [2])
    with pytest.raises(ConfigError, match="every layer that it adapts is removed"):
        slice_adapter(tmp_path / "adapter", tmp_path / "sliced", info, kept)
    shutil.rmtree(tmp_path / "adapter")


def test_leaving_an_adapter_out_asks_for_no_other_search(teacher: Path, cache: Path, tmp_path: Path) -> None:
    adapt(load_model(teacher, torch.float32), tmp_path / "adapter", target_modules=["q_proj"])
    settings = [*FAST, f"cache_dir={cache}", "prune.max_parameters=40000", "search.num_candidates=2"]
    plain, adapted = (
        expectations(load_config(*settings, f"teacher.path={teacher}", f"prune.adapters=[{adapters}]"))
        for adapters in ("", tmp_path / "adapter")
    )
    assert plain[Stage.search] == adapted[Stage.search]
    assert plain[Stage.prune]["fingerprint"] != adapted[Stage.prune]["fingerprint"]

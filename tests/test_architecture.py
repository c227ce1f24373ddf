"""The table against transformers, folders against the table, shapes against the rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families import VARIANTS, axes_of, make_model, save_model, student_sizes
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from compress.architecture import (
    check_shape,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    shape_of,
    student_config,
    taps,
    tensor_shapes,
    with_sizes,
)
from compress.depth import final_norm
from compress.errors import ArchitectureError, ArtifactError, CompressError, ConfigError
from compress.families import FAMILIES, Family
from compress.folders import read_model, teacher_folder

MODELS = [(variant, tied) for variant in VARIANTS for tied in (False, True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, three heads-groups of two, several shards."""
    return save_model(tmp_path_factory.mktemp("llama") / "m", make_model(dtype=torch.float32), max_shard_size="60KB")


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_the_table_is_what_transformers_saves(variant: str, tied: bool, tmp_path: Path) -> None:
    """Every tensor of a checkpoint and no other, in its sizes; a tied head is in none."""
    model = make_model(variant, tied)
    family = FAMILIES[model.config.model_type]
    written = load_file(save_model(tmp_path / "m", model) / "model.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in written.items()}
    assert tensor_shapes(family.rows(model.config), shape_of(model.config)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_of_the_tiny_models_are_pairwise_distinct(variant: str) -> None:
    shape = shape_of(make_model(variant).config)
    sizes = [size for name, size in vars(shape).items() if name != "tied" and size]
    sizes += [shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim]
    if variant.startswith("gpt_neox"):  # as many key-value heads, and as wide as the hidden size, by its nature
        sizes = [size for size in sizes if size not in (shape.hidden_size, shape.num_attention_heads)]
    elif shape.num_experts:  # five of each; their sizes never stand for one another in one tensor
        sizes.remove(shape.num_experts)
    assert len(set(sizes)) == len(sizes)


# What the rows of each family lean on in transformers' own config class. A release that renames, drops or defaults a
# field otherwise fails here, before a user's model does.
FIELDS = {
    "llama": "attention_bias mlp_bias head_dim",
    "mistral": "head_dim sliding_window",
    "qwen2": "layer_types use_sliding_window max_window_layers",
    "qwen3": "attention_bias head_dim layer_types use_sliding_window max_window_layers",
    "gemma2": "attention_bias head_dim layer_types query_pre_attn_scalar final_logit_softcapping sliding_window",
    "gemma3_text": "attention_bias head_dim layer_types query_pre_attn_scalar final_logit_softcapping sliding_window",
    "phi3": "sliding_window rope_parameters original_max_position_embeddings",
    "olmo2": "attention_bias rope_parameters",
    "gpt_neox": "attention_bias use_parallel_residual rope_parameters",
    "mixtral": "head_dim sliding_window num_local_experts num_experts_per_tok",
    "qwen3_moe": "attention_bias num_experts moe_intermediate_size num_experts_per_tok norm_topk_prob mlp_only_layers "
                 "decoder_sparse_step",
    "gpt_oss": "attention_bias head_dim layer_types num_local_experts num_experts_per_tok",
}  # fmt: skip
WITH_LAYER_TYPES = {"qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_still_has_the_config_fields_that_the_table_relies_on(model_type: str) -> None:
    family, config = FAMILIES[model_type], CONFIG_MAPPING[model_type]()
    for name in (*family.prunable, "vocab_size"):
        assert isinstance(getattr(config, family.field(name) or ""), int), name
    assert isinstance(config.tie_word_embeddings, bool)
    for row in family.table.values():
        assert row.switch is None or isinstance(getattr(config, row.switch), bool)
    for name in FIELDS[model_type].split():
        assert hasattr(config, name), name
    if not family.locked:
        assert shape_of(CONFIG_MAPPING[model_type](head_dim=24)).head_dim == 24, "an explicit head_dim must survive"
    assert (getattr(config, "layer_types", None) is not None) == (model_type in WITH_LAYER_TYPES)
    for field, value in family.only.items():
        assert getattr(config, field) == value, "its own default is what the rows describe"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_divisibility_rule_is_the_one_of_transformers(model_type: str) -> None:
    sizes = {"hidden_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    try:
        CONFIG_MAPPING[model_type](**sizes)
        refused = False
    except Exception as error:
        refused = "multiple" in str(error) or "divisible" in str(error)
    family = FAMILIES[model_type]
    assert refused == (family.hidden_divisible_by_heads or family.locked)


def test_taps_are_the_layer_norms_and_the_two_output_projections() -> None:
    two = ("model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")
    more = ("model.layers.*.pre_feedforward_layernorm", "model.layers.*.post_feedforward_layernorm")
    norms = {"gemma2": two + more, "gemma3_text": two + more, "olmo2": (two[1], more[1])}
    for name, family in FAMILIES.items():
        found = taps(family)
        if name == "gpt_neox":
            assert found.hidden == tuple(norm.replace("model", "gpt_neox", 1) for norm in two)
            assert found.intermediate == "gpt_neox.layers.*.mlp.dense_4h_to_h"
            assert found.query_heads == "gpt_neox.layers.*.attention.dense"
            continue
        assert found.hidden == norms.get(name, two), name
        assert found.intermediate == (None if family.has_experts else "model.layers.*.mlp.down_proj")
        assert found.query_heads == "model.layers.*.self_attn.o_proj"


def renamed(family: Family, names: dict[str, str]) -> Family:
    def rename(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    return replace(family, table={rename(name): row for name, row in family.table.items()})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_norms_are_known_by_what_they_hold_and_not_by_their_names(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms called ln_1, ln_2, ... and a last one called ln_last are tapped as any other; biases of norms are none."""
    family = FAMILIES[model_type]
    original = taps(family)
    assert family.final_norm == {"gpt_neox": "gpt_neox.final_layer_norm"}.get(model_type, "model.norm")
    names = {name: f"{family.layers}*.ln_{place}" for place, name in enumerate(original.hidden)}
    names[family.final_norm] = family.final_norm.rpartition(".")[0] + ".ln_last"
    private = renamed(family, names)
    assert taps(private) == replace(original, hidden=tuple(names[name] for name in original.hidden))
    monkeypatch.setitem(FAMILIES, model_type, private)
    variant = next(name for name, (kind, _) in VARIANTS.items() if kind == model_type)
    model = make_model(variant)
    model.base_model.ln_last = torch.nn.Identity()
    assert final_norm(model) is model.base_model.ln_last


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_num_parameters_is_that_of_the_real_model(variant: str, tied: bool, tmp_path: Path) -> None:
    info = read_model(save_model(tmp_path / "m", make_model(variant, tied)))
    for sizes in ({}, *axes_of(variant).values()):
        real = make_model(variant, tied, **{info.family.field(name): size for name, size in sizes.items()})
        shape = with_sizes(info.shape, sizes)
        assert shape_of(real.config) == shape
        assert num_parameters(info, shape) == sum(p.numel() for p in real.parameters())
        embedding = sum(m.weight.numel() for m in (real.get_input_embeddings(), real.get_output_embeddings()))
        assert num_embedding_parameters(info, shape) == embedding / (2 if tied else 1)
        active = num_active_parameters(info, shape)
        if not shape.num_experts:
            assert active == num_parameters(info, shape)
            continue
        chosen = real.config.num_experts_per_tok
        experts = sum(p.numel() for n, p in real.named_parameters() if ".experts." in n)
        assert active == num_parameters(info, shape) - experts * (shape.num_experts - chosen) // shape.num_experts


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "DELETE"}))

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, {"format": "pt"})

    return edit


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return edit


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def no_weights(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "adapter": (adapter, "merge the adapter"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "other family": (edit_config(model_type="gpt2"), r"'gpt2' is not in the axis table; there are llama"),
    "no family": (edit_config(model_type="DELETE"), "model_type=None"),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "remote code": (edit_config(auto_map={"AutoModel": "x.Y"}), "teacher.trust_remote_code=true"),
    "a size as text": (edit_config(hidden_size="48"), "hidden_size"),
    "no layer": (edit_config(num_hidden_layers=0), "num_hidden_layers=0 must be at least 1"),
    "heads and groups": (edit_config(num_key_value_heads=4), "num_attention_heads=6 must be a multiple"),
    "heads and hidden": (edit_config(hidden_size=50), "multiple of the number of attention heads"),
    "another size": (edit_config(intermediate_size=70), r"gate_proj.weight: \(72, 48\), expected \(70, 48\)"),
    "a layer more": (edit_config(num_hidden_layers=6), r"9 tensors are missing, such as model.layers.5"),
    "a layer less": (edit_config(num_hidden_layers=4), r"9 are unknown, such as model.layers.4"),
    "truncated": (truncate, "not a complete safetensors file"),
    "shard missing": (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "is missing"),
    "foreign tensor": (edit_shard(lambda t: t.update(extra=torch.ones(1))), "disagree on 1 tensors, such as extra"),
    "tensor gone": (
        edit_shard(lambda t: t.pop("model.embed_tokens.weight")),
        "disagree on 1 tensors, such as model.emb",
    ),
    "8 bits": (
        edit_shard(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int8)})),
        "I8, one of",
    ),
    "outside the folder": (
        edit_index(lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        "no .safetensors file",
    ),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "stale single file": (lambda f: save_file({}, f / "model.safetensors"), "delete the one that is stale"),
    "pickle": (only_pickle, r"pytorch_model.bin, a pickle.*save_pretrained"),
    "nothing": (no_weights, "neither model.safetensors"),
    "tied but another head": (edit_config(tie_word_embeddings=True), "tie_word_embeddings to false"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_with_its_reason(case: str, llama: Path, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[case]
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    read_model(folder)
    spoil(folder)
    with pytest.raises((ArtifactError, ArchitectureError), match=message) as raised:
        read_model(folder)
    assert str(folder) in str(raised.value)


def test_what_is_harmless_is_accepted(llama: Path, tmp_path: Path) -> None:
    trusted = Path(shutil.copytree(llama, tmp_path / "trusted"))
    edit_config(auto_map={"AutoModel": "x.Y"})(trusted)
    read_model(trusted, trust_remote_code=True)

    tied = save_model(tmp_path / "tied", make_model(tied=True))
    expected = read_model(tied)
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # the same, stored twice
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)  # as old Llama checkpoints have
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    assert read_model(tied).tensors == expected.tensors

    old = save_model(tmp_path / "old", make_model("llama", num_key_value_heads=6, head_dim=8))
    edit_config(num_key_value_heads="DELETE", head_dim="DELETE", tie_word_embeddings="DELETE")(old)
    assert read_model(old).shape == shape_of(make_model("llama", num_key_value_heads=6, head_dim=8).config)


SHAPES: list[tuple[str, dict[str, int], int, str]] = [
    ("llama", {"hidden_size": 49}, 1, r"prune.hidden_size=49 must be within 1 and the teacher's 48; nearest: 48"),
    ("llama", {"num_hidden_layers": 0}, 1, r"prune.num_hidden_layers=0 must be within 1 .* nearest: 1"),
    (
        "llama",
        {"hidden_size": 40},
        4,
        r"prune.hidden_size=40 must be a multiple of shape.multiple_of=4 and, for Llama in transformers 5, "
        r"of num_attention_heads=6; nearest: 36 or 48",
    ),
    ("mistral", {"hidden_size": 37}, 4, r"hidden_size=37 must be a multiple of shape.multiple_of=4; nearest: 36 or 40"),
    ("qwen3", {"intermediate_size": 70}, 16, r"prune.intermediate_size=70 must be .*=16; nearest: 64 or 72"),
    ("qwen2", {"num_attention_heads": 4}, 1, r"num_attention_heads=4 must be 1 to 2 .*heads=3; nearest: 3 or 6"),
    ("qwen2", {"num_key_value_heads": 2}, 1, r"num_attention_heads=6 must be 1 to 2 .*heads=2; nearest: 4"),
    (
        "llama",
        {"hidden_size": 45, "num_attention_heads": 3, "num_key_value_heads": 3},
        2,
        r"hidden_size=45 .* nearest: 42 or 48",
    ),
    (
        "gpt_neox",
        {"hidden_size": 40},
        1,
        r"hidden_size=40 with num_attention_heads=6: .* neither is pruned alone; give "
        r"prune.hidden_size=60 or prune.num_attention_heads=4 with it",
    ),
    ("gpt_neox", {"num_attention_heads": 4}, 1, r"hidden_size=60 with num_attention_heads=4: .* prune.hidden_size=40"),
    ("qwen3_moe", {"num_experts": 1}, 1, r"num_experts=1 is fewer than the num_experts_per_tok=2 .* keep 2 at least"),
    (
        "qwen3_moe",
        {"moe_intermediate_size": 20},
        16,
        r"size=20 must be a multiple .* nearest: 16 or 26",
    ),
    (
        "qwen3_moe",
        {"intermediate_size": 20},
        1,
        r"size=20: a Qwen3-MoE model has none; it has hidden_size",
    ),
    ("llama", {"num_experts": 2}, 1, r"num_experts=2: a Llama model has none; it has hidden_size, intermediate_size"),
]


@pytest.mark.parametrize(("variant", "sizes", "multiple_of", "message"), SHAPES)
def test_an_illegal_shape_names_value_rule_and_remedy(
    variant: str, sizes: dict[str, int], multiple_of: int, message: str, tmp_path: Path
) -> None:
    info = read_model(save_model(tmp_path / "m", make_model(variant)))
    with pytest.raises(ConfigError, match=message):
        check_shape(info, with_sizes(info.shape, sizes), multiple_of)


@pytest.mark.parametrize("variant", VARIANTS)
def test_legal_shapes_pass_and_transformers_builds_them(variant: str, tmp_path: Path) -> None:
    info = read_model(save_model(tmp_path / "m", make_model(variant)))
    check_shape(info, info.shape, multiple_of=1024)  # the teacher's own sizes are always fine
    shape = with_sizes(info.shape, student_sizes(variant))
    check_shape(info, shape, multiple_of=4)
    config = student_config(info.config, info.family, shape, range(3))
    assert shape_of(CONFIG_MAPPING[info.family.model_type].from_dict(config)) == shape


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("./model", "does not exist"),
        ("a/b/c", "does not exist"),
        ("some-owner/some-model", "could not be fetched"),
    ],
)
def test_a_teacher_that_is_nowhere(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=f"teacher.path={path} .*{message}"):
        teacher_folder(path, None, tmp_path)


def test_a_teacher_is_a_folder_or_embedded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        teacher_folder(str(tmp_path / "file"), None, tmp_path)
    with pytest.raises(CompressError, match="no such embedded resource"):
        teacher_folder("embedded:nothing", None, tmp_path)
    assert teacher_folder(str(tmp_path), None, tmp_path) == tmp_path
    assert read_model(teacher_folder("embedded:tiny", None, tmp_path / "cache")).shape.num_hidden_layers == 4

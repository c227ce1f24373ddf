"""The table against transformers, folders against the table, shapes against the rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families import SIZES, VARIANTS, make_model, save_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from compress.architecture import (
    FAMILIES,
    check_shape,
    num_parameters,
    shape_of,
    student_config,
    taps,
    tensor_shapes,
    with_sizes,
)
from compress.errors import ArchitectureError, ArtifactError, CompressError, ConfigError
from compress.folders import read_model, teacher_folder

MODELS = [(variant, tied) for variant in VARIANTS for tied in (False, True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, three heads-groups of two, several shards."""
    return save_model(tmp_path_factory.mktemp("llama") / "m", make_model(dtype=torch.float32), max_shard_size="60KB")


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_the_table_is_the_state_dict_of_transformers(variant: str, tied: bool) -> None:
    model = make_model(variant, tied)
    family = FAMILIES[model.config.model_type]
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head only once
    assert tensor_shapes(family.rows(model.config), shape_of(model.config)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_of_the_tiny_models_are_pairwise_distinct(variant: str) -> None:
    config = make_model(variant).config
    sizes = [
        *SIZES.values(),
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    ]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_still_has_the_config_fields_that_the_table_relies_on(model_type: str) -> None:
    family, config = FAMILIES[model_type], CONFIG_MAPPING[model_type]()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert isinstance(getattr(config, name), int), name
    assert isinstance(config.vocab_size, int)
    assert isinstance(config.tie_word_embeddings, bool)
    assert all(isinstance(getattr(config, switch), bool) for switch in family.switches.values())
    assert shape_of(CONFIG_MAPPING[model_type](head_dim=24)).head_dim == 24, "an explicit head_dim must survive"
    windowed = hasattr(config, "use_sliding_window")
    assert (getattr(config, "layer_types", None) is not None) == windowed == (model_type in ("qwen2", "qwen3"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_divisibility_rule_is_the_one_of_transformers(model_type: str) -> None:
    sizes = {"hidden_size": 50, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    try:
        CONFIG_MAPPING[model_type](**sizes)
        refused = False
    except Exception as error:
        refused = "multiple" in str(error)
    assert refused == FAMILIES[model_type].hidden_divisible_by_heads


def test_taps_are_the_layer_norms_and_the_two_output_projections() -> None:
    for family in FAMILIES.values():
        found = taps(family)
        assert found.hidden == ("model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")
        assert found.intermediate == "model.layers.*.mlp.down_proj"
        assert found.query_heads == "model.layers.*.self_attn.o_proj"


@pytest.mark.parametrize(("variant", "tied"), MODELS)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"hidden_size": 36, "num_hidden_layers": 2}, {"intermediate_size": 8, "num_attention_heads": 3}],
)
def test_num_parameters_is_that_of_the_real_model(
    variant: str, tied: bool, sizes: dict[str, int], tmp_path: Path
) -> None:
    info = read_model(save_model(tmp_path / "m", make_model(variant, tied)))
    real = make_model(variant, tied, **sizes)
    shape = with_sizes(info.shape, sizes)
    assert shape_of(real.config) == shape
    assert num_parameters(info, shape) == sum(p.numel() for p in real.parameters())


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
    "other family": (edit_config(model_type="gpt_neox"), r"'gpt_neox' is not in the axis table; there are llama"),
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
    shape = with_sizes(info.shape, {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2})
    check_shape(info, shape, multiple_of=4)
    config = student_config(info.config, info.family, shape, range(5))
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

"""The axis table is right, family by family: permuting, dropping and slicing do to the logits what they must."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path

import pytest
import torch
from families import VARIANTS, logits, make_batch, make_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import FAMILIES, Shape, num_parameters, shape_of, with_sizes
from compress.artifacts import open_tensors
from compress.errors import ConfigError
from compress.folders import read_model
from compress.importance import Importance
from compress.models import load_model
from compress.slicing import check_kept, kept_shape, select, slice_checkpoint, slice_state_dict

STUDENT = {
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # one of two query heads in each of two of three groups
    "num_key_value_heads": 2,
}
AXES = {
    "hidden": {"hidden_size": 36},
    "intermediate": {"intermediate_size": 40},
    "query_heads": {"num_attention_heads": 3},
    "key_value_heads": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "layers": {"num_hidden_layers": 3},
    "all": STUDENT,
}
MODELS = [(variant, tied) for variant in VARIANTS for tied in (False, True)]


def random_importance(shape: Shape, seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)

    def scores(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    layers = shape.num_hidden_layers
    return Importance(
        hidden_D=scores(shape.hidden_size),
        intermediate_LF=scores(layers, shape.intermediate_size),
        query_heads_LH=scores(layers, shape.num_attention_heads),
        key_value_heads_LG=scores(layers, shape.num_key_value_heads),
        block_influence_L=scores(layers),
        num_sequences=1,
        num_tokens=1,
        sequence_aggregation="mean",
        batch_aggregation="l2",
    )


def keep(model: PreTrainedModel, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    shape = shape_of(model.config)
    return select(random_importance(shape, seed), with_sizes(shape, sizes))


class NormOverKept(nn.Module):
    """A norm whose mean runs over the channels that the student has; the others are zero."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm, self.channels = norm, channels

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.channels + self.norm.variance_epsilon)
        return self.norm.weight * (wide * scale).to(hidden.dtype)


def masked(model: PreTrainedModel, kept: dict[str, Tensor]) -> PreTrainedModel:
    """The teacher with everything that isn't kept silenced in place, by hand and not by the table."""
    model = copy.deepcopy(model)
    shape = shape_of(model.config)
    silent = torch.ones(shape.hidden_size, dtype=torch.bool)
    silent[kept["hidden"]] = False
    channels = len(kept["hidden"])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, silent] = 0
        model.model.norm = NormOverKept(model.model.norm, channels)
        for position, number in enumerate(kept["layers"].tolist()):
            layer = model.model.layers[number]
            unit = torch.ones(shape.intermediate_size, dtype=torch.bool)
            unit[kept["intermediate"][position]] = False
            layer.mlp.down_proj.weight[:, unit] = 0
            head = torch.ones(shape.num_attention_heads, dtype=torch.bool)
            head[kept["query_heads"][position]] = False
            layer.self_attn.o_proj.weight[:, head.repeat_interleave(shape.head_dim)] = 0
            for writer in (layer.mlp.down_proj, layer.self_attn.o_proj):
                writer.weight[silent] = 0
                if writer.bias is not None:
                    writer.bias[silent] = 0
            layer.input_layernorm = NormOverKept(layer.input_layernorm, channels)
            layer.post_attention_layernorm = NormOverKept(layer.post_attention_layernorm, channels)
    return without_layers(model, kept["layers"].tolist())


def without_layers(model: PreTrainedModel, kept_layers: list[int]) -> PreTrainedModel:
    """The other decoder layers removed as modules; the config has kinds of attention by position, so they move too."""
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in kept_layers)
    model.config.num_hidden_layers = len(kept_layers)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[number] for number in kept_layers]
    return model


def student_in_memory(model: PreTrainedModel, kept: dict[str, Tensor]) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    shape = kept_shape(shape_of(config), kept)
    for name in STUDENT:
        setattr(config, name, getattr(shape, name))
    config.head_dim = shape.head_dim
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in kept["layers"].tolist()]
    student = type(model)(config).to(next(model.parameters()).dtype).eval()
    family = FAMILIES[config.model_type]
    student.load_state_dict(slice_state_dict(model.state_dict(), family, shape_of(model.config), kept))
    return student


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.std() > 0.1, "a test of equal logits says nothing when they are all alike"
    torch.testing.assert_close(
        one, other, rtol=1e-5, atol=1e-4
    )  # norms compute in float32; a wrong axis is off by 0.1 and more


@pytest.mark.parametrize(("variant", "tied"), MODELS)
@pytest.mark.parametrize("axis", ["hidden", "intermediate", "key_value_heads", "query_heads"])
def test_permuting_an_axis_leaves_the_logits_alone(variant: str, tied: bool, axis: str) -> None:
    model, batch = make_model(variant, tied), make_batch()
    shape = shape_of(model.config)
    layers, group = shape.num_hidden_layers, shape.group_size
    generator = torch.Generator().manual_seed(1)

    def shuffled(rows: int, count: int) -> Tensor:
        return torch.rand((rows, count), generator=generator).argsort(-1)

    # Indices that aren't sorted: slicing is an index-select, so a permutation is a slice that keeps everything.
    groups = torch.arange(shape.num_key_value_heads).expand(layers, -1)
    inside = torch.arange(group).expand(layers, shape.num_key_value_heads, -1)
    if axis == "key_value_heads":
        groups = shuffled(layers, shape.num_key_value_heads)
    if axis == "query_heads":
        inside = torch.rand((layers, shape.num_key_value_heads, group), generator=generator).argsort(-1)
    order = {
        "layers": torch.arange(layers),
        "hidden": torch.arange(shape.hidden_size),
        "intermediate": torch.arange(shape.intermediate_size).expand(layers, -1),
        "key_value_heads": groups,
        "query_heads": (groups[..., None] * group + inside).flatten(1),
    }
    if axis == "hidden":
        order["hidden"] = shuffled(1, shape.hidden_size)[0]
    if axis == "intermediate":
        order["intermediate"] = shuffled(layers, shape.intermediate_size)
    permuted = student_in_memory(model, order)
    moved = [n for n, p in permuted.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert moved, "nothing was permuted"
    assert_same(logits(model, batch), logits(permuted, batch))


@pytest.mark.parametrize(("variant", "tied"), MODELS)
@pytest.mark.parametrize("axis", AXES)
def test_slicing_equals_masking(variant: str, tied: bool, axis: str) -> None:
    model, batch = make_model(variant, tied), make_batch()
    kept = keep(model, AXES[axis])
    expected = logits(masked(model, kept), batch)
    assert (expected - logits(model, batch)).abs().max() > 0.1, "the mask changed nothing"
    assert_same(expected, logits(student_in_memory(model, kept), batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_layers_equals_removing_modules(variant: str, tmp_path: Path) -> None:
    model, batch = make_model(variant), make_batch()
    kept = keep(model, {"num_hidden_layers": 3})
    slice_checkpoint(save_model(tmp_path / "teacher", model), tmp_path / "student", kept)
    student = load_model(tmp_path / "student", torch.float64)
    assert_same(logits(without_layers(model, kept["layers"].tolist()), batch), logits(student, batch))


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_a_sliced_checkpoint_reloads_strictly_as_the_masked_teacher(variant: str, tied: bool, tmp_path: Path) -> None:
    model, batch = make_model(variant, tied), make_batch()
    kept = keep(model, STUDENT)
    teacher = save_model(tmp_path / "teacher", model)
    shape = slice_checkpoint(teacher, tmp_path / "student", kept)
    student = load_model(tmp_path / "student", torch.float64)  # no tensor missing, unexpected or of another size
    assert read_model(tmp_path / "student").shape == shape == shape_of(student.config)
    assert sum(p.numel() for p in student.parameters()) == num_parameters(read_model(teacher), shape)
    assert_same(logits(masked(model, kept), batch), logits(student, batch))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("teacher", "student"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {*STUDENT, "head_dim", "layer_types", "max_window_layers"}


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_packed_documents_equal_each_document_alone(variant: str, tied: bool, tmp_path: Path) -> None:
    """Of teacher and student, with documents shorter and longer than the sliding window."""
    model = make_model(variant, tied)
    for tested in (model, student_in_memory(model, keep(model, STUDENT))):
        lengths = [3, 9, 1, 17]
        tokens = sum(lengths)
        batch = make_batch(1, tokens, seed=3)
        batch.position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = logits(tested, batch)
        start = 0
        for length in lengths:
            alone = tested(input_ids=batch.input_ids[:, start : start + length], use_cache=False).logits
            assert_same(packed[:, start : start + length], alone.detach())
            start += length


def test_layers_keep_their_own_kind_of_attention(tmp_path: Path) -> None:
    model = make_model("qwen2-window")  # full, full, sliding, sliding, sliding
    kept = keep(model, {})
    kept = {axis: (index if axis == "hidden" else index[[0, 2, 4]]) for axis, index in kept.items()}
    teacher = save_model(tmp_path / "teacher", model)
    for given in (True, False):  # older files leave layer_types out
        content = json.loads((teacher / "config.json").read_text())
        if not given:
            del content["layer_types"]
            (teacher / "config.json").write_text(json.dumps(content))
        slice_checkpoint(teacher, tmp_path / f"student{given}", kept)
        config = json.loads((tmp_path / f"student{given}" / "config.json").read_text())
        assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
        assert config["max_window_layers"] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_dim_that_followed_from_the_sizes_is_kept(variant: str, tmp_path: Path) -> None:
    """Older config.json files leave head_dim to hidden_size / heads, which is another number in the student."""
    model, batch = make_model(variant, head_dim=8), make_batch()
    teacher = save_model(tmp_path / "teacher", model)
    content = json.loads((teacher / "config.json").read_text())
    if model.config.model_type != "qwen3":  # whose default is 128
        del content["head_dim"]
    (teacher / "config.json").write_text(json.dumps(content))
    kept = keep(model, STUDENT)
    assert slice_checkpoint(teacher, tmp_path / "student", kept).head_dim == 8
    assert_same(logits(masked(model, kept), batch), logits(load_model(tmp_path / "student", torch.float64), batch))


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_source_and_student_change_nothing(tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", tied, torch.bfloat16)
    kept = keep(model, STUDENT)
    slice_checkpoint(save_model(tmp_path / "one", model), tmp_path / "from-one", kept)
    many = save_model(tmp_path / "many", model, max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    limit = 12_000
    slice_checkpoint(many, tmp_path / "from-many", kept, max_shard_bytes=limit)
    shards = sorted((tmp_path / "from-many").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        with open_tensors(shard) as reader:
            assert sum(reader.get_tensor(n).numel() * 2 for n in reader.keys()) <= limit  # noqa: SIM118
    one = load_model(tmp_path / "from-one", torch.bfloat16).state_dict()
    other = load_model(tmp_path / "from-many", torch.bfloat16).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    info = read_model(tmp_path / "from-many")
    assert {tensor.dtype for tensor in info.tensors.values()} == {"BF16"}
    index = json.loads((tmp_path / "from-many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * num_parameters(info, info.shape)


def test_the_teachers_other_files_come_along(tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", make_model())
    along = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE", "README.md"]
    for name in along:
        (teacher / name).write_text(name)
    (teacher / "additional_chat_templates").mkdir()
    (teacher / "additional_chat_templates" / "rag.jinja").write_text("x")
    stays = ["pytorch_model.bin", "evil.pt", "modeling.py", "params.json", "consolidated.safetensors", ".hidden"]
    for name in [*stays, "pytorch_model.bin.index.json", "manifest.json"]:
        (teacher / name).write_text("no")
    (teacher / "original").mkdir()
    (teacher / "original" / "weights.pth").write_text("no")
    linked = teacher / "tokenizer_config.json"
    (tmp_path / "blob").write_text("linked")
    linked.symlink_to(tmp_path / "blob")  # as in the hub's cache
    kept = keep(make_model(), STUDENT)
    slice_checkpoint(teacher, tmp_path / "student", kept)
    names = {p.relative_to(tmp_path / "student").as_posix() for p in (tmp_path / "student").rglob("*") if p.is_file()}
    extra = {"additional_chat_templates/rag.jinja", "tokenizer_config.json"}
    assert names == {"config.json", "model.safetensors", *along, *extra}
    assert not (tmp_path / "student" / "tokenizer_config.json").is_symlink()
    assert stat.S_IMODE((tmp_path / "student" / "model.safetensors").stat().st_mode) & stat.S_IRGRP
    slice_checkpoint(teacher, tmp_path / "trusted", kept, trust_remote_code=True)
    assert (tmp_path / "trusted" / "modeling.py").exists()
    assert not (tmp_path / "trusted" / "evil.pt").exists()


def test_select_keeps_the_best_and_equally_many_heads_in_each_group() -> None:
    shape = shape_of(make_model().config)
    importance = random_importance(shape)
    kept = select(importance, with_sizes(shape, STUDENT))
    check_kept(kept, shape)
    assert kept["layers"].tolist() == sorted(importance.block_influence_L.argsort()[2:].tolist())
    dropped = torch.ones(shape.hidden_size, dtype=torch.bool)
    dropped[kept["hidden"]] = False
    assert importance.hidden_D[dropped].max() <= importance.hidden_D[kept["hidden"]].min()
    for position, layer in enumerate(kept["layers"].tolist()):
        for head, group in zip(kept["query_heads"][position], kept["key_value_heads"][position], strict=True):
            pair = importance.query_heads_LH[layer, 2 * group : 2 * group + 2]
            assert head == 2 * group + pair.argmax()
        groups = importance.key_value_heads_LG[layer].argsort(descending=True)[:2]
        assert kept["key_value_heads"][position].tolist() == sorted(groups.tolist())
    assert select(importance, with_sizes(shape, STUDENT), removed_layers=[0, 4])["layers"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("axis", "index", "message"),
    [
        ("hidden", torch.tensor([3, 1]), "ascending"),
        ("hidden", torch.tensor([1, 1]), "ascending"),
        ("hidden", torch.tensor([1, 48]), "within 0 and the teacher's 47"),
        ("hidden", torch.tensor([1.0]), "int64"),
        ("layers", torch.tensor([0]), "rows for 1 kept layers"),
        ("query_heads", torch.tensor([[0, 1]] * 3), "equally many"),
        ("query_heads", torch.tensor([[0, 2, 4]] * 3), "equally many"),
    ],
)
def test_kept_that_no_student_can_have_is_refused(axis: str, index: Tensor, message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        check_kept({**keep(model, STUDENT), axis: index}, shape_of(model.config))

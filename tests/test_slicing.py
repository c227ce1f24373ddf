"""The axis table is right, family by family: permuting, dropping and slicing do to the logits what they must."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, VARIANTS, axes_of, logits, make_batch, make_model, save_model, student_sizes
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from compress import slicing
from compress.architecture import num_parameters, shape_of, with_sizes
from compress.artifacts import open_tensors
from compress.errors import ConfigError
from compress.folders import read_model
from compress.models import load_model
from compress.selftest import permutation, random_importance
from compress.slicing import check_kept, select, slice_checkpoint

MODELS = [(variant, tied) for variant in VARIANTS for tied in (False, True)]
CUTS = [(variant, axis) for variant in VARIANTS for axis in axes_of(variant)]


def keep(model: PreTrainedModel, sizes: dict[str, int]) -> dict[str, Tensor]:
    shape = shape_of(model.config)
    return select(random_importance(shape), with_sizes(shape, sizes))


class NormOverKept(nn.Module):
    """A norm whose mean runs over the channels that the student has; the others are zero."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, hidden: Tensor) -> Tensor:
        norm, kept = self.norm, self.kept
        result = torch.zeros_like(hidden)
        if isinstance(norm, nn.LayerNorm):
            result[..., kept] = F.layer_norm(
                hidden[..., kept], (len(kept),), norm.weight[kept], norm.bias[kept], norm.eps
            )
            return result
        wide = hidden[..., kept].to(torch.float32)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if type(norm).__name__.startswith("Gemma"):
            result[..., kept] = (wide * (1 + norm.weight[kept].float())).to(hidden.dtype)
        else:
            result[..., kept] = norm.weight[kept] * wide.to(hidden.dtype)
        return result


class RouterOverKept(nn.Module):
    """A router that knows only the kept experts."""

    def __init__(self, router: Any, kept: Tensor, model_type: str) -> None:
        super().__init__()
        self.router, self.kept, self.model_type = router, kept, model_type

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.flatten(0, -2), self.router.weight, getattr(self.router, "bias", None))
        gone = torch.ones(logits.shape[-1], dtype=torch.bool)
        gone[self.kept] = False
        logits = logits.masked_fill(gone, -torch.inf)
        if self.model_type == "gpt_oss":
            top, index = logits.topk(self.router.top_k, dim=-1)
            return logits, top.softmax(-1), index
        top, index = logits.float().softmax(-1).topk(self.router.top_k, dim=-1)
        if self.model_type == "mixtral" or self.router.norm_topk_prob:
            top = top / top.sum(-1, keepdim=True)
        return logits, top if self.model_type == "mixtral" else top.to(logits.dtype), index


def complement(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone


def masked(model: PreTrainedModel, kept: dict[str, Tensor]) -> PreTrainedModel:
    """The teacher with everything that isn't kept silenced in place, by hand and not by the table."""
    model = copy.deepcopy(model)
    shape, base, kind = shape_of(model.config), model.base_model, model.config.model_type
    hidden, silent = kept["hidden"], complement(kept["hidden"], shape.hidden_size)
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[:, silent] = 0
        if kind.startswith("gemma"):
            embedding.embed_scale = torch.tensor(float(len(hidden)) ** 0.5)
        for name in ("norm", "final_layer_norm"):
            if hasattr(base, name):
                setattr(base, name, NormOverKept(getattr(base, name), hidden))
        for position, number in enumerate(kept["layers"].tolist()):
            layer: Any = base.layers[number]
            attention = layer.attention if kind == "gpt_neox" else layer.self_attn
            out = attention.dense if kind == "gpt_neox" else attention.o_proj
            head = complement(kept["query_heads"][position], shape.num_attention_heads)
            out.weight[:, head.repeat_interleave(shape.head_dim)] = 0
            writers = [out]
            if kind == "olmo2":  # its norms run over all heads of a projection
                dim = torch.arange(shape.head_dim)
                heads, groups = (
                    (kept[axis][position][:, None] * shape.head_dim + dim).flatten()
                    for axis in ("query_heads", "key_value_heads")
                )
                attention.q_norm = NormOverKept(attention.q_norm, heads)
                attention.k_norm = NormOverKept(attention.k_norm, groups)
            if "experts" in kept:
                mask_experts(layer.mlp, position, kept, silent, kind)
            else:
                down = layer.mlp.dense_4h_to_h if kind == "gpt_neox" else layer.mlp.down_proj
                down.weight[:, complement(kept["intermediate"][position], shape.intermediate_size)] = 0
                writers.append(down)
            for writer in writers:
                writer.weight[silent] = 0
                if writer.bias is not None:
                    writer.bias[silent] = 0
            for name, norm in list(layer.named_children()):
                if name.endswith("layernorm"):
                    setattr(layer, name, NormOverKept(norm, hidden))
    return without_layers(model, kept["layers"].tolist())


def mask_experts(mlp: Any, position: int, kept: dict[str, Tensor], silent: Tensor, kind: str) -> None:
    experts, chosen = mlp.experts, kept["experts"][position]
    name = "router" if kind == "gpt_oss" else "gate"
    setattr(mlp, name, RouterOverKept(getattr(mlp, name), chosen, kind))
    width = experts.down_proj.shape[1 if kind == "gpt_oss" else 2]
    for place, expert in enumerate(chosen.tolist()):
        gone = complement(kept["expert_intermediate"][position, place], width)
        if kind == "gpt_oss":
            experts.down_proj[expert, gone] = 0
            experts.down_proj[expert, :, silent] = 0
            experts.down_proj_bias[expert, silent] = 0
        else:
            experts.down_proj[expert, :, gone] = 0
            experts.down_proj[expert, silent] = 0


def without_layers(model: PreTrainedModel, kept_layers: list[int]) -> PreTrainedModel:
    """The other decoder layers removed as modules; the config has kinds of attention by position, so they move too."""
    model.base_model.layers = nn.ModuleList(model.base_model.layers[number] for number in kept_layers)
    model.config.num_hidden_layers = len(kept_layers)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[number] for number in kept_layers]
    return model


def student_of(model: PreTrainedModel, kept: dict[str, Tensor], folder: Path) -> PreTrainedModel:
    """The student by way of the two folders, strictly loaded."""
    slice_checkpoint(save_model(folder / "teacher", model), folder / "student", kept)
    return load_model(folder / "student", torch.float64).eval()


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.std() > 0.1, "a test of equal logits says nothing when they are all alike"
    torch.testing.assert_close(
        one, other, rtol=1e-5, atol=1e-4
    )  # norms compute in float32; a wrong axis is off by 0.1 and more


PERMUTED = [
    (variant, axis)
    for variant in VARIANTS
    for axis in ("hidden", "intermediate", "key_value_heads", "query_heads", "experts", "expert_intermediate")
    if (axis in axes_of(variant) or axis in ("hidden", "query_heads"))
    and not (axis == "query_heads" and variant.startswith("gpt_neox"))  # one head a group: key_value_heads moves them
]


@pytest.mark.parametrize(("variant", "axis"), [*PERMUTED, ("gpt_neox", "key_value_heads")])
def test_permuting_an_axis_leaves_the_logits_alone(
    variant: str, axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model(variant), make_batch()
    order = permutation(shape_of(model.config), axis)
    monkeypatch.setattr(slicing, "check_kept", lambda *_: None)  # which wants them ascending
    permuted = student_of(model, order, tmp_path)
    moved = [n for n, p in permuted.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert moved, "nothing was permuted"
    assert_same(logits(model, batch), logits(permuted, batch))


@pytest.mark.parametrize(("variant", "axis"), CUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_slicing_equals_masking(variant: str, tied: bool, axis: str, tmp_path: Path) -> None:
    model, batch = make_model(variant, tied), make_batch()
    kept = keep(model, axes_of(variant)[axis])
    expected = logits(masked(model, kept), batch)
    assert (expected - logits(model, batch)).abs().max() > 0.1, "the mask changed nothing"
    assert_same(expected, logits(student_of(model, kept, tmp_path), batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_layers_equals_removing_modules(variant: str, tmp_path: Path) -> None:
    model, batch = make_model(variant), make_batch()
    kept = keep(model, {"num_hidden_layers": 3})
    student = student_of(model, kept, tmp_path)
    assert_same(logits(without_layers(model, kept["layers"].tolist()), batch), logits(student, batch))


@pytest.mark.parametrize(("variant", "tied"), MODELS)
def test_a_sliced_checkpoint_reloads_strictly_as_the_masked_teacher(variant: str, tied: bool, tmp_path: Path) -> None:
    model, batch = make_model(variant, tied), make_batch()
    kept = keep(model, student_sizes(variant))
    teacher = save_model(tmp_path / "teacher", model)
    shape = slice_checkpoint(teacher, tmp_path / "student", kept)
    student = load_model(tmp_path / "student", torch.float64)  # no tensor missing, unexpected or of another size
    assert read_model(tmp_path / "student").shape == shape == shape_of(student.config)
    assert sum(p.numel() for p in student.parameters()) == num_parameters(read_model(teacher), shape)
    assert_same(logits(masked(model, kept), batch), logits(student, batch))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("teacher", "student"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    sizes = {*student_sizes(variant), "num_local_experts", "head_dim", "layer_types", "max_window_layers"}
    assert changed <= sizes | ({"intermediate_size"} if variant in ("mixtral", "gpt_oss") else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_each_document_alone(variant: str, tmp_path: Path) -> None:
    """Of teacher and student, with documents shorter and longer than the sliding window."""
    model = make_model(variant)
    for tested in (model, student_of(model, keep(model, student_sizes(variant)), tmp_path)):
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


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "mixtral", "qwen3_moe"])
def test_a_head_dim_that_followed_from_the_sizes_is_kept(variant: str, tmp_path: Path) -> None:
    """Older config.json files leave head_dim to hidden_size / heads, which is another number in the student."""
    model, batch = make_model(variant, head_dim=8), make_batch()
    teacher = save_model(tmp_path / "teacher", model)
    content = json.loads((teacher / "config.json").read_text())
    if model.config.model_type != "qwen3":  # whose default is 128
        del content["head_dim"]
    (teacher / "config.json").write_text(json.dumps(content))
    kept = keep(model, student_sizes(variant))
    assert slice_checkpoint(teacher, tmp_path / "student", kept).head_dim == 8
    assert_same(logits(masked(model, kept), batch), logits(load_model(tmp_path / "student", torch.float64), batch))


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_source_and_student_change_nothing(tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", tied, torch.bfloat16)
    kept = keep(model, DENSE)
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
    kept = keep(make_model(), DENSE)
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
    scores = importance.width()
    kept = select(importance, with_sizes(shape, DENSE))
    check_kept(kept, shape)
    assert kept["layers"].tolist() == sorted(importance.block_influence_L.argsort()[2:].tolist())
    dropped = torch.ones(shape.hidden_size, dtype=torch.bool)
    dropped[kept["hidden"]] = False
    assert scores["hidden"][dropped].max() <= scores["hidden"][kept["hidden"]].min()
    for position, layer in enumerate(kept["layers"].tolist()):
        for head, group in zip(kept["query_heads"][position], kept["key_value_heads"][position], strict=True):
            pair = scores["query_heads"][layer, 2 * group : 2 * group + 2]
            assert head == 2 * group + pair.argmax()
        groups = scores["key_value_heads"][layer].argsort(descending=True)[:2]
        assert kept["key_value_heads"][position].tolist() == sorted(groups.tolist())
    assert select(importance, with_sizes(shape, DENSE), removed_layers=[0, 4])["layers"].tolist() == [1, 2, 3]


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
        check_kept({**keep(model, DENSE), axis: index}, shape_of(model.config))


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox"])
def test_an_embedding_larger_than_a_shard_is_written_in_blocks_to_the_same_bytes(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and untied; readable by the library, and by everybody the umask lets."""
    monkeypatch.setattr("compress.slicing._BLOCK_BYTES", 1000)
    model = make_model(variant, vocab_size=301)
    info = read_model(save_model(tmp_path / "teacher", model))
    kept = select(random_importance(info.shape), with_sizes(info.shape, student_sizes(variant)))
    slice_checkpoint(info, tmp_path / "whole", kept)
    slice_checkpoint(info, tmp_path / "blocks", kept, max_shard_bytes=4000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "blocks" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == whole.keys()
    for name, tensor in whole.items():
        path = tmp_path / "blocks" / index[name]
        assert torch.equal(load_file(path)[name], tensor), name
        assert path.stat().st_mode == (tmp_path / "blocks" / "config.json").stat().st_mode
    with safe_open(tmp_path / "blocks" / index[info.family.embedding], "pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert list(reader.keys()) == [info.family.embedding]

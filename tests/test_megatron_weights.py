"""Hugging Face tensors as Megatron-Core's and back, bit for bit, whole and in every rank's part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VARIANTS, make_model, save_model
from torch import Tensor

from compress.errors import ArchitectureError
from compress.folders import read_model
from compress.megatron.weights import EMBEDDING, WHOLE, FolderReader, Place, WeightMap, plain_name

FITTING = ("llama", "llama-biases", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")


def _folder(tmp_path: Path, variant: str, tied: bool = False, **sizes: int) -> Path:
    return save_model(tmp_path / variant, make_model(variant, tied, torch.float32, **sizes), "20KB")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", FITTING)
def test_there_and_back_is_bit_for_bit(tmp_path: Path, variant: str, tied: bool) -> None:
    info = read_model(_folder(tmp_path, variant, tied), False)
    names, read = WeightMap.of(info), FolderReader(info)
    stored = {name: read(name, (slice(None),) * len(entry.shape)) for name, entry in info.tensors.items()}
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in stored.items()}
    for name in names.names():
        for piece, start, rows in names.unpacked(name, names.local(name, read)):
            back[piece][start : start + len(rows)] = rows
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("variant", FITTING)
@pytest.mark.parametrize("ranks", [3, 6])
def test_the_ranks_parts_are_the_whole(tmp_path: Path, variant: str, ranks: int) -> None:
    """Also where there are two ranks for each of the three key-value heads."""
    info = read_model(_folder(tmp_path, variant), False)
    names, read = WeightMap.of(info), FolderReader(info)
    split = 0
    for name in names.names():
        whole, packed = names.local(name, read), names.packed(name)
        parts = [names.local(name, read, Place(rank, ranks)) for rank in range(ranks)]
        if packed.shared is None:
            assert all(torch.equal(part, whole) for part in parts), name
        elif packed.packing == "halves":  # each rank has its gates above its ups
            halves = [torch.cat(half) for half in zip(*(part.chunk(2) for part in parts), strict=True)]
            assert torch.equal(torch.cat(halves), whole), name
        else:
            assert torch.equal(torch.cat(parts, packed.shared), whole), name
        split += packed.shared is not None
    assert split >= 3


def test_groups_of_heads_lie_side_by_side(tmp_path: Path) -> None:
    """As the reference's table says: query heads of a group, its key, its value."""
    folder = _folder(tmp_path, "llama")
    info = read_model(folder, False)
    names, read = WeightMap.of(info), FolderReader(info)
    q, k, v = (read(f"model.layers.1.self_attn.{one}_proj.weight", (slice(None), slice(None))) for one in "qkv")
    expected: list[Tensor] = []
    for group in range(3):
        expected += [q[20 * group : 20 * group + 20], k[10 * group : 10 * group + 10], v[10 * group : 10 * group + 10]]
    assert torch.equal(names.local("decoder.layers.1.self_attention.linear_qkv.weight", read), torch.cat(expected))


def test_only_a_ranks_own_stretch_is_read(tmp_path: Path) -> None:
    info = read_model(_folder(tmp_path, "qwen3_moe"), False)
    names, folder = WeightMap.of(info), FolderReader(info)
    asked: list[tuple[str, int]] = []

    def read(name: str, stretches: tuple[slice, ...]) -> Tensor:
        found = folder(name, stretches)
        asked.append((name, found.numel()))
        return found

    attention, expert = "decoder.layers.0.self_attention.", "decoder.layers.2.mlp.experts.local_experts.4."
    for name in (
        EMBEDDING,
        f"{attention}linear_qkv.weight",
        f"{attention}linear_proj.weight",
        f"{expert}linear_fc1.weight",
    ):
        asked.clear()
        part = names.local(name, read, Place(1, 3))
        assert sum(count for _, count in asked) == part.numel()
    assert {name for name, _ in asked} == {
        "model.layers.2.mlp.experts.4.gate_proj.weight",
        "model.layers.2.mlp.experts.4.up_proj.weight",
    }


def test_padding_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    info = read_model(_folder(tmp_path, "llama"), False)
    names, read = WeightMap.of(info), FolderReader(info)
    whole = names.local(EMBEDDING, read, WHOLE)
    padded = torch.cat([whole, torch.ones(31, whole.shape[1])])
    [(name, start, rows)] = names.unpacked(EMBEDDING, padded)
    assert (name, start) == ("model.embed_tokens.weight", 0)
    assert torch.equal(rows, whole)


@pytest.mark.parametrize(
    "variant", sorted(VARIANTS.keys() - {*FITTING, "mistral-window", "qwen2-window", "phi3-window"})
)
def test_what_has_no_place_is_refused_by_name(tmp_path: Path, variant: str) -> None:
    info = read_model(_folder(tmp_path, variant), False)
    if variant in ("qwen3-biases", "qwen3_moe-normed"):  # their tensors have places; model.py looks at the rest
        assert WeightMap.of(info).table
        return
    with pytest.raises(ArchitectureError, match=r"has no place for; use distill\.engine=torch"):
        WeightMap.of(info)


def test_transformer_engines_names_are_known() -> None:
    layer = "decoder.layers.7."
    assert plain_name(f"{layer}self_attention.linear_qkv.layer_norm_weight") == f"{layer}input_layernorm.weight"
    assert plain_name(f"{layer}mlp.linear_fc1.layer_norm_weight") == f"{layer}pre_mlp_layernorm.weight"
    experts = f"{layer}mlp.experts."
    assert plain_name(f"{experts}linear_fc2.weight12") == f"{experts}local_experts.12.linear_fc2.weight"
    assert plain_name(f"{layer}mlp.linear_fc2.weight") == f"{layer}mlp.linear_fc2.weight"

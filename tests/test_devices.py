"""Which device a rank takes and which attention packed sequences get there: chosen by plain values, tried on a CPU.

What a GPU itself does with them isn't tried: there is none.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import VARIANTS, logits, make_batch, make_model
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.devices import attention_on, place_of, set_attention, usable_attention
from compress.errors import ConfigError
from compress.families import family_of_config
from compress.settings import CompressConfig, Device

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "num_gpus", "local_rank", "expected"),
    [
        (Device.auto, 0, 5, "cpu"),
        (Device.cpu, 8, 3, "cpu"),
        (Device.auto, 8, 0, "cuda:0"),
        (Device.auto, 8, 7, "cuda:7"),
        (Device.cuda, 1, 0, "cuda:0"),
    ],
)
def test_each_rank_of_a_node_has_a_gpu_of_its_own(
    choice: Device, num_gpus: int, local_rank: int, expected: str
) -> None:
    assert place_of(choice, num_gpus, local_rank) == expected


def test_more_ranks_than_gpus_are_refused() -> None:
    for choice in (Device.auto, Device.cuda):
        with pytest.raises(ConfigError, match=r"LOCAL_RANK=2: .* sees 2 here; start 2 ranks a node .*device=cpu"):
            place_of(choice, 2, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.device=cuda: torch .* sees no GPU here; .* cluster.device=auto"):
        run("cluster.device=cuda")
    assert not (tmp_path / "run" / "tokens").exists()


EVERYTHING = {"flash_attention_3", "flash_attention_2", "flex_attention"}
LONG = 32768


@pytest.mark.parametrize(
    ("usable", "dtype", "micro_batch_size", "length", "expected"),
    [
        (EVERYTHING, torch.bfloat16, 1, LONG, "flash_attention_3"),
        (EVERYTHING - {"flash_attention_3"}, torch.bfloat16, 1, LONG, "flash_attention_2"),
        # of two sequences transformers' flash attention lets documents leak, and it knows no float32
        (EVERYTHING, torch.bfloat16, 2, LONG, "flex_attention"),
        (EVERYTHING, torch.float32, 1, LONG, "flex_attention"),
        ({"flex_attention"}, torch.bfloat16, 1, 64, "flex_attention"),
        ({"flash_attention_2"}, torch.bfloat16, 2, 4096, None),
        (set(), torch.float32, 4, 4096, None),
    ],
)
def test_packed_sequences_get_an_attention_without_a_matrix_on_a_gpu(
    usable: set[str], dtype: torch.dtype, micro_batch_size: int, length: int, expected: str | None
) -> None:
    assert attention_on("cuda", usable, dtype, micro_batch_size, length) == expected
    assert attention_on("cpu", usable, dtype, micro_batch_size, length) is None


def test_a_long_sequence_is_refused_where_its_mask_would_be_a_matrix() -> None:
    config = replace(CompressConfig(), data=replace(CompressConfig().data, sequence_length=8192))
    shorter = replace(config, data=replace(config.data, sequence_length=4096))
    flexible, dropping = make_model(dtype=torch.bfloat16), make_model(dtype=torch.bfloat16, attention_dropout=0.1)
    with pytest.raises(ConfigError, match=re.escape("data.sequence_length=8192 is more than 4096: packed on a GPU")):
        set_attention(dropping, GPU, torch.bfloat16, config)
    assert dropping.config._attn_implementation == "sdpa"
    set_attention(dropping, GPU, torch.bfloat16, shorter)
    assert dropping.config._attn_implementation == "sdpa"
    set_attention(dropping, torch.device("cpu"), torch.bfloat16, config)
    assert dropping.config._attn_implementation == "sdpa"
    set_attention(flexible, GPU, torch.bfloat16, config)
    assert flexible.config._attn_implementation == "flex_attention"
    with pytest.raises(ConfigError, match=r"take distill.micro_batch_size=1 and .*, for flash_attention_2, or data.s"):
        attention_on("cuda", {"flash_attention_2"}, torch.bfloat16, 2, 8192)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_attention_is_told_the_positions_by_which_flash_attention_tells_documents_apart(variant: str) -> None:
    """Where masks are made outside of transformers' code it might not be, and flash attention isn't usable."""
    model, batch = make_model(variant, dtype=torch.float32), make_batch(1, 20)
    model.config.attn_logit_softcapping = None  # which torch's own attention, called here, doesn't know
    told = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        told.append(options["position_ids"])
        return sdpa_attention_forward(module, query, key, value, mask, **{**options, "softcap": None})

    ALL_ATTENTION_FUNCTIONS.register("listening", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("listening", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("listening")
    logits(model, batch)
    assert len(told) == model.config.num_hidden_layers
    assert all(torch.equal(positions, batch.position_ids) for positions in told)
    assert "flex_attention" in usable_attention(model)
    if family_of_config(model.config).needs_packed_masks:
        assert usable_attention(model) == {"flex_attention"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_flex_attention_keeps_packed_documents_apart(variant: str) -> None:
    """As torch's attention with a mask does: its forward, compiled for a CPU; it has a backward on GPUs only."""
    model, batch = make_model(variant, dtype=torch.float32), make_batch(2, 20)
    expected = logits(model, batch)
    set_attention(model, GPU, torch.float32, CompressConfig())
    assert model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)

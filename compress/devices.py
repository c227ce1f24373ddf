"""Which device a rank trains on, and what that asks of attention.

No GPU has run any of it. The choices are made by functions of plain values, which the tests cover on a CPU; that what
computes is where it should be is tried with a pretended device (tests/test_pretended_device.py).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_flex_attn_available,
)

from compress.errors import ConfigError
from compress.families import family_of_config
from compress.settings import CompressConfig, Device

CPU = torch.device("cpu")
DENSE_TOKENS = 4096  # of a sequence whose attention mask is a matrix: 16 M entries for each sequence
_FLASH = ("flash_attention_3", "flash_attention_2")


def place_of(choice: Device, num_gpus: int, local_rank: int) -> str:
    """`cpu` or `cuda:N`: each rank of a node has a GPU of its own. Raises ConfigError where there are too few."""
    if choice is Device.cpu or (choice is Device.auto and not num_gpus):
        return "cpu"
    if not num_gpus:
        raise ConfigError(
            f"cluster.device=cuda: torch {torch.__version__} sees no GPU here; start it on a node with GPUs, with a "
            "torch built for them (nvidia-smi and torch.cuda.is_available() say which of the two is missing), or set "
            "cluster.device=auto"
        )
    if local_rank >= num_gpus:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: each rank takes a GPU of its own, and torch sees {num_gpus} here; start "
            f"{num_gpus} ranks a node (cluster.ranks_per_node={num_gpus}), or set cluster.device=cpu"
        )
    return f"cuda:{local_rank}"


def device_of(choice: Device) -> torch.device:
    """This rank's device for cluster.device, which becomes torch's current one. Its GPU branch was not run here."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(place_of(choice, num_gpus, int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def backend() -> str:
    """Who carries the ranks' tensors: gloo those of the CPU, which are all that `parallel.Ranks` sends, and NCCL those
    of GPUs. NCCL was not run here."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done, so that it can be timed. Its GPU branch was not run here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_states() -> dict[str, Tensor]:
    """Where the random numbers of each kind of device are that this process draws from. A GPU's were not tried here."""
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **gpu}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Go on from `random_states`, or a part of them."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def attention_on(
    device_type: str,
    usable: Collection[str],
    dtype: torch.dtype,
    micro_batch_size: int,
    sequence_length: int,
    stage: str = "distill",
) -> str | None:
    """Which of transformers' kinds of attention packed sequences are to have; None for transformers' own choice.

    transformers tells packed documents apart for flash attention only in a batch of one sequence, and lets them leak
    into each other in a larger one; FlexAttention, and the matrix that the other kinds have, tell them apart in any.

    Args:
        usable: what is installed, and what the model's code can do with packed sequences (`usable_attention`).
        stage: whose micro-batches they are.

    Raises:
        ConfigError: for a sequence too long to have a matrix on a GPU.
    """
    if device_type == "cpu":
        return None
    for kind in _FLASH:
        if kind in usable and micro_batch_size == 1 and dtype in (torch.bfloat16, torch.float16):
            return kind
    if "flex_attention" in usable:
        return "flex_attention"
    if sequence_length > DENSE_TOKENS:
        flash = [kind for kind in _FLASH if kind in usable]
        remedy = f"{stage}.micro_batch_size=1 and compute_dtype=bfloat16, for {flash[0]}" if flash else (
            "a model and a torch that FlexAttention works with (attention_dropout must be 0)"
        )  # fmt: skip
        raise ConfigError(
            f"data.sequence_length={sequence_length} is more than {DENSE_TOKENS}: packed on a GPU it would need "
            f"attention masks of {sequence_length} x {sequence_length}; take {remedy}, or data.sequence_length="
            f"{DENSE_TOKENS}, or cluster.device=cpu"
        )
    return None


def usable_attention(model: PreTrainedModel) -> set[str]:
    """The kinds of attention beside transformers' default that are installed and keep this model's packed documents
    apart."""
    found = set()
    # Where masks are given from outside, flash attention would see neither them nor the positions; and gpt_oss' sinks
    # need a kernel of their own.
    if (
        model._supports_flash_attn
        and not family_of_config(model.config).needs_packed_masks
        and getattr(model, "_compatible_flash_implementations", None) is None
    ):
        installed = (is_flash_attn_3_available(), is_flash_attn_2_available())
        found |= {kind for kind, there in zip(_FLASH, installed, strict=True) if there}
    if (
        model._supports_flex_attn
        and is_torch_flex_attn_available()
        and not getattr(model.config, "attention_dropout", 0)
    ):
        found.add("flex_attention")
    return found


def set_attention(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, config: CompressConfig, stage: str = "distill"
) -> None:
    """Give a model, in place, the attention that the packed sequences of a stage's micro-batches need on the device.
    Raises ConfigError."""
    size = getattr(config, stage).micro_batch_size
    kind = attention_on(device.type, usable_attention(model), dtype, size, config.data.sequence_length, stage)
    if kind is not None:
        model.set_attn_implementation(kind)

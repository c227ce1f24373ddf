"""Tiny models of every family in the axis table: all tensors random (norms aren't 1, biases aren't 0), all sizes
pairwise distinct, so that no wrong axis, order or norm can hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from compress.step import packed_masks
from compress.tokens import TokenBatch

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,  # query heads 60 wide, key-value heads 30
    "vocab_size": 97,
}
WINDOW = 6
EXPERTS = {"num_experts_per_tok": 2}

# name -> model_type and what is switched on, or of another size
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    # Small caps, so that tanh bends the scores and logits of a tiny model too.
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                          "query_pre_attn_scalar": 7}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 7}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": WINDOW, "partial_rotary_factor": 0.4}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 60, "num_key_value_heads": None, "head_dim": None}),
    "gpt_neox-serial": ("gpt_neox", {"hidden_size": 60, "num_key_value_heads": None, "head_dim": None,
                                     "use_parallel_residual": False, "attention_bias": False}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 5, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 5, "moe_intermediate_size": 26}),
    "qwen3_moe-normed": ("qwen3_moe", {**EXPERTS, "num_experts": 5, "moe_intermediate_size": 26,
                                       "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "num_local_experts": 5, "sliding_window": WINDOW, "swiglu_limit": 1.5,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}  # fmt: skip
# Switches of phi3 of which transformers asks hidden_size // num_attention_heads // 2 factors, whatever head_dim is.
LONGROPE: dict[str, Any] = {
    "head_dim": 8,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}
DENSE = {
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # one of two query heads in each of two of three groups
    "num_key_value_heads": 2,
}


def student_sizes(variant: str) -> dict[str, int]:
    """Every axis of the variant cut, to sizes that are legal for its family."""
    model_type = VARIANTS[variant][0]
    sizes = dict(DENSE)
    if model_type == "gpt_neox":  # hidden and heads are locked together
        del sizes["num_key_value_heads"]
        return {**sizes, "hidden_size": 20}
    if model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        del sizes["intermediate_size"]
        return {**sizes, "num_experts": 3, "moe_intermediate_size": 16}
    return sizes


def axes_of(variant: str) -> dict[str, dict[str, int]]:
    """What to cut to test each axis alone, and all of them."""
    sizes = student_sizes(variant)
    heads = {"num_attention_heads": 4} if "num_key_value_heads" in sizes else {}
    alone = {
        "hidden": ["hidden_size"],
        "intermediate": ["intermediate_size"],
        "key_value_heads": ["num_key_value_heads"],
        "experts": ["num_experts"],
        "expert_intermediate": ["moe_intermediate_size"],
        "layers": ["num_hidden_layers"],
    }
    found = {axis: {n: sizes[n] for n in names} for axis, names in alone.items() if set(names) <= set(sizes)}
    if VARIANTS[variant][0] == "gpt_neox":
        del found["hidden"]
        found["hidden and heads"] = {n: sizes[n] for n in ("hidden_size", "num_attention_heads")}
    else:
        found["query_heads"] = {"num_attention_heads": 3}
        found["key_value_heads"] |= heads
    return {**found, "all": sizes}


def make_model(
    variant: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: Any
) -> PreTrainedModel:
    """A model of the variant in eval mode; float64 everywhere but inside transformers' norms and rotary tables."""
    model_type, switches = VARIANTS[variant]
    special = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    given = {name: size for name, size in {**SIZES, **switches, **sizes}.items() if size is not None}
    if "sliding_window" in switches:
        given["sliding_window"] = switches["sliding_window"]
    config = CONFIG_MAPPING[model_type](**given, **special, pad_token_id=None, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                noise = noise / 2 + (0 if model_type.startswith("gemma") else 1)  # Gemma's norms add 1 themselves
            elif parameter.dim() == 3:  # all experts
                noise = noise * 1.5 / parameter.shape[1 if model_type == "gpt_oss" else 2] ** 0.5
            elif parameter.dim() == 2 and "embed" not in name and not name.endswith("bias"):
                noise = noise * 1.5 / parameter.shape[1] ** 0.5
            parameter.copy_(noise)
    return model


def save_model(folder: Path, model: PreTrainedModel, max_shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_batch(sequences: int = 4, tokens: int = 20, seed: int = 0, padded: bool = False) -> TokenBatch:
    """Packed documents, some of them longer than WINDOW; `padded`: rows end in up to half padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, SIZES["vocab_size"], (sequences, tokens), generator=generator)
    lengths = torch.full((sequences,), tokens)
    if padded:
        lengths = torch.randint(tokens // 2, tokens, (sequences,), generator=generator)
    at = torch.arange(tokens).expand(sequences, -1)
    starts = torch.rand((sequences, tokens), generator=generator) < 0.12
    starts[:, 0] = True
    starts |= at == lengths[:, None]
    position_ids = at - torch.where(starts, at, 0).cummax(1).values
    valid = at < lengths[:, None]
    loss_mask = torch.zeros_like(valid)
    loss_mask[:, :-1] = (valid & ~starts)[:, 1:]
    return TokenBatch(input_ids, position_ids, loss_mask, valid)


def rows(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    return batch.rows(start, stop)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """(B, T, V), packed documents isolated, as every stage runs a model."""
    masks = packed_masks(model, batch.position_ids)
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False)
    return output.logits

"""Tiny models of every family in the axis table: all tensors random (norms aren't 1, biases aren't 0), all sizes
pairwise distinct, so that no wrong axis, order or norm can hide."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

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

# name -> model_type and what is switched on
VARIANTS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
}


def make_model(
    variant: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int
) -> PreTrainedModel:
    """A model of the variant in eval mode; float64 everywhere but inside transformers' norms and rotary tables."""
    model_type, switches = VARIANTS[variant]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 128}
    config = CONFIG_MAPPING[model_type](**{**SIZES, **sizes, **switches, **special}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                noise = 1 + noise / 2
            elif parameter.dim() == 2 and "embed" not in name:
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
    return TokenBatch(*(tensor[start:stop] for tensor in vars(batch).values()))


@torch.no_grad()
def logits(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    """(B, T, V), packed documents isolated, as every stage runs a model."""
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
    return output.logits

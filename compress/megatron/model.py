"""Megatron-Core's GPT model of a Hugging Face folder: its config, its layers, its weights.

What the installed Megatron-Core knows is asked of its own dataclasses: keywords that it lacks are left out where they
say what would happen anyway, and refused where they would not.
"""

# B sequences, T tokens (of this rank's part of them), H query heads, G key-value heads, h head_dim, D hidden

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.architecture import ModelInfo
from compress.errors import ArchitectureError
from compress.megatron.layout import Groups, Layout, layers_of_stages, padded_vocabulary
from compress.megatron.weights import FolderReader, Read, WeightMap, plain_name


def has_transformer_engine() -> bool:
    """Whether layers of Transformer Engine can be had."""
    return importlib.util.find_spec("transformer_engine") is not None


def check_buildable(info: ModelInfo) -> WeightMap:
    """Raise ArchitectureError for what Megatron-Core's GPT model can't be, saying why. Imports nothing of it."""
    names, config = WeightMap.of(info), info.parsed
    problems = []
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act={activation!r} (silu is known)")
    biases = {name.rpartition(".")[0].rpartition(".")[2] for name in names.table if name.endswith(".bias")}
    if biases and biases not in ({"linear_qkv"}, {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}):
        problems.append(f"biases in {', '.join(sorted(biases))} alone (it has them in query, key and value, or in all)")
    if (
        float(getattr(config, "logits_scaling", None) or 1) != 1
        or float(getattr(config, "logit_scale", None) or 1) != 1
    ):
        problems.append("a scale of the logits")
    for field in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, field, None):
            problems.append(f"{field}={getattr(config, field)}")
    kind = rope_parameters(config)["rope_type"]
    if kind not in ("default", "linear", "llama3", "yarn"):
        problems.append(f"rope_type={kind!r} (default, linear, llama3 and yarn are known)")
    if problems:
        raise ArchitectureError(
            f"{info.folder}: Megatron-Core's GPT model has no {'; no '.join(problems)}; use distill.engine=torch"
        )
    return names


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """A model's rotary settings, as transformers 5 keeps them."""
    found: Mapping[str, Any] = config.rope_parameters
    return found


def sliding_window(config: Any) -> int | None:
    """Tokens that some layer looks back at most; None where all look at everything before."""
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)


def only_known(cls: type, **settings: Any) -> dict[str, Any]:
    """The settings that a dataclass of the installed Megatron-Core has fields for."""
    known = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in settings.items() if key in known}


def transformer_config(names: WeightMap, config: Any, layout: Layout, dtype: torch.dtype, recompute: bool) -> Any:
    """Megatron-Core's TransformerConfig of a Hugging Face config, in a layout."""
    from megatron.core.transformer import TransformerConfig

    shape = names.shape
    mixture: dict[str, Any] = {}
    if shape.num_experts:
        # Normed over the chosen ones a softmax over all of them is one over the chosen: Megatron-Core's other order.
        normed = bool(getattr(config, "norm_topk_prob", True))
        mixture = {
            "num_moe_experts": shape.num_experts, "moe_ffn_hidden_size": shape.moe_intermediate_size,
            "moe_router_topk": config.num_experts_per_tok, "moe_router_pre_softmax": not normed,
            "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": 1,
        }  # fmt: skip
    biases = {name for name in names.table if name.endswith(".bias")}
    stages = layers_of_stages(shape.num_hidden_layers, layout.pipeline)
    uneven: dict[str, Any] = {}
    if len(set(stages)) > 1:
        pieces = [["decoder"] * count for count in stages]
        pieces[0].insert(0, "embedding")
        pieces[-1].append("loss")
        uneven = {"pipeline_model_parallel_layout": pieces}
    settings: dict[str, Any] = {
        "num_layers": shape.num_hidden_layers, "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads, "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim, "ffn_hidden_size": shape.intermediate_size or shape.moe_intermediate_size,
        "normalization": "RMSNorm", "layernorm_epsilon": config.rms_norm_eps, "gated_linear_unit": True,
        "activation_func": F.silu, "add_bias_linear": any("linear_proj" in name for name in biases),
        "add_qkv_bias": any("linear_qkv" in name for name in biases),
        "qk_layernorm": any("q_layernorm" in name for name in names.table),
        "hidden_dropout": 0.0, "attention_dropout": float(getattr(config, "attention_dropout", 0.0) or 0.0),
        "softmax_scale": _rope_factor(config) ** 2 * shape.head_dim**-0.5,
        "tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context, "sequence_parallel": layout.sequence,
        "params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16,
        "perform_initialization": False, "use_cpu_initialization": False, "calculate_per_token_loss": True,
        "attention_softmax_in_fp32": True, "bias_activation_fusion": False, "bias_dropout_fusion": False,
        "masked_softmax_fusion": False, "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
        "persist_layer_norm": has_transformer_engine(), "deallocate_pipeline_outputs": True,
    }  # fmt: skip
    if recompute:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(**only_known(TransformerConfig, **settings, **mixture, **uneven))


def _rope(config: Any) -> tuple[Tensor, float]:
    """(inverse frequencies, what cosine and sine are multiplied by), as transformers reckons them."""
    kind = rope_parameters(config)["rope_type"]
    if kind == "default":
        parameters = rope_parameters(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)


def _rope_factor(config: Any) -> float:
    return _rope(config)[1]


class Norm(nn.RMSNorm):
    """torch's RMSNorm, which Megatron-Core's own choice refuses under sequence parallelism: there each rank has other
    tokens, so that the weight's gradient is summed over the ranks, as it is for a parameter marked so."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(nn.Module):
    """Attention of packed documents, each as if it were alone, where Transformer Engine isn't there.

    Megatron-Core's own knows no packed sequences and no context parallelism. Here the mask is given, and ranks that
    share a sequence gather each other's keys and values.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.config, self.scale, self.groups = config, softmax_scale, pg_collection

    def forward(
        self,
        query_THh: Tensor,
        key_TGh: Tensor,
        value_TGh: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """(T, B, H h) of (T, B, H, h): attention_mask (B, 1, T, all tokens) is True where a token looks."""
        assert attention_bias is None
        assert packed_seq_params is None
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if self.config.context_parallel_size > 1:
            key_TGh, value_TGh = (
                gather_from_sequence_parallel_region(one.contiguous(), group=self.groups.cp)
                for one in (key_TGh, value_TGh)
            )
        query, key, value = (one.permute(1, 2, 0, 3) for one in (query_THh, key_TGh, value_TGh))
        dropout = self.config.attention_dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return found.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing of it is saved."""
        return {}


def layer_specs(config: Any, num_layers: int) -> Any:
    """Transformer Engine's layers where it is installed, else Megatron-Core's with our attention and norms."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    arguments = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": False, "qk_layernorm": config.qk_layernorm}
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**arguments)
        return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=TENorm)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(**arguments, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=Norm)


def build(
    info: ModelInfo, groups: Groups, dtype: torch.dtype, recompute: bool = False, read: Read | None = None
) -> Any:
    """This rank's part of the model of a folder, with its weights, of which no more is read.

    Its forward gives the last hidden states (B, T, D), after the last norm, instead of logits: the head runs chunk by
    chunk inside the objective. T is of this rank's share of the tokens where sequence_parallel splits them.
    """
    from megatron.core.models.gpt import GPTModel

    names, layout = check_buildable(info), groups.layout
    _mend()
    config = transformer_config(names, info.parsed, layout, dtype, recompute)
    stages = layers_of_stages(info.shape.num_hidden_layers, layout.pipeline)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_specs(config, stages[groups.stage]),
        vocab_size=padded_vocabulary(info.shape.vocab_size, layout.tensor),
        max_sequence_length=info.parsed.max_position_embeddings,
        pre_process=groups.is_first,
        post_process=groups.is_last,
        share_embeddings_and_output_weights=info.shape.tied,
        position_embedding_type="rope",
        rotary_percent=float(rope_parameters(info.parsed).get("partial_rotary_factor", 1.0)),
    )
    model.rotary_pos_emb.inv_freq = _rope(info.parsed)[0].to(torch.cuda.current_device())
    fill(model, names, groups, FolderReader(info) if read is None else read)
    if groups.is_last:
        model.output_layer.forward = _through
    return model


def _mend() -> None:
    """Megatron-Core 0.16 asks for a name in every router that it defines with Transformer Engine alone."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _through(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """In the place of the output head's forward: the last hidden states go on as they are."""
    return hidden, None


@torch.no_grad()
def fill(model: Any, names: WeightMap, groups: Groups, read: Read) -> None:
    """Every parameter of this rank's part from a checkpoint; rows of a padded vocabulary are 0."""
    for name, parameter in model.named_parameters():
        part = names.local(global_name(model, name, groups), read, groups.place).to(parameter.dtype)
        if len(part) < len(parameter):
            part = torch.cat([part, part.new_zeros(len(parameter) - len(part), *part.shape[1:])])
        parameter.copy_(part)


def global_name(model: Any, name: str, groups: Groups) -> str:
    """A parameter's `plain_name` with the numbers of the whole model's layer and expert."""
    parts = plain_name(name).split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        per_rank = model.config.num_moe_experts // groups.layout.expert
        parts[at] = str(groups.place.expert_rank * per_rank + int(parts[at]))
    return ".".join(parts)


def head_weight(model: Any) -> Tensor:
    """The output head's rows on this rank of the last stage; tied, the embedding's."""
    weight: Tensor | None = (
        model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    )
    return model.output_layer.weight if weight is None else weight

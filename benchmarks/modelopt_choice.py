"""What NVIDIA's ModelOpt makes of a Llama within a parameter budget: its scores, its search, its pruned weights.

Run by benchmarks/criteria.py in an environment of its own (nvidia-modelopt 0.43.0, megatron-core 0.16.1: the last pair
that takes plain torch layers), which lacks this project:

    python -m benchmarks.modelopt_choice --teacher DIR --tokens FILE --output DIR --max-parameters 1e8

ModelOpt itself does all the choosing: `mtp.prune(mode="mcore_minitron")` scores by activation magnitude (L2 over the
batch, mean over the sequence) and block influence in one forward loop, enumerates its grid, takes the ten largest
candidates within the budget and keeps the one with the best score. Its command line scores by MMLU, where a model of
135 M is at chance; here `score_func` is minus the loss on the selection set, the very figure the table compares by.
`--divisors default` are ModelOpt's own (hidden 256, MLP 512, layers 2); `fine` lets it use every layer count, MLPs that
are multiples of 32 and only hidden sizes that transformers can load with this number of heads.

megatron-core asks for CUDA in a handful of places; `cuda_means_cpu` answers them, and changes nothing else.
"""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import write_result

DIVISORS = {"default": {}, "fine": {"ffn_hidden_size_divisor": 32, "num_layers_divisor": 1}}
MICRO_BATCH = 4


def cuda_means_cpu() -> Any:
    """Let megatron-core build and run on the CPU. Returns a mode that must stay alive."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import random
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")

    def on_cpu(value: Any) -> Any:
        is_cuda = str(value).startswith("cuda") if isinstance(value, str | torch.device) else False
        return cpu if is_cuda else value

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(on_cpu(value) for value in args)
            return func(*args, **kwargs)

    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    gather: Any = dist.all_gather_into_tensor

    def gather_scalar(output: Any, single: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(output, single.reshape(1) if single.dim() == 0 else single, *args, **kwargs)

    dist.all_gather_into_tensor = gather_scalar  # type: ignore[assignment]  # gloo refuses a tensor without dimensions
    mode = Mode()
    mode.__enter__()
    return mode


def register_rms_norm() -> None:
    """ModelOpt 0.43 knows LayerNorm only; torch's RMSNorm has the same weight to cut."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from torch import nn

    class DynamicRMSNorm(_DynamicLayerNorm):  # type: ignore[misc]
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.register({nn.RMSNorm: "nn.RMSNorm"})(DynamicRMSNorm)


def megatron_model(config: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from torch.nn.functional import silu

    settings = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        layernorm_epsilon=config["rms_norm_eps"],
        normalization="RMSNorm",
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rope_parameters"]["rope_theta"],
        share_embeddings_and_output_weights=True,
        parallel_output=False,
    )


_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_WHOLE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}


def to_megatron(weights: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face names to Megatron-Core's: query, key and value of a group side by side, gate above up."""
    import torch

    head, groups = config["head_dim"], config["num_key_value_heads"]
    state = {theirs: weights[ours] for ours, theirs in _WHOLE.items()}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        state |= {theirs + name: weights[ours + key] for key, name in _LAYER.items()}
        parts = [weights[f"{ours}self_attn.{p}_proj.weight"].view(groups, -1, config["hidden_size"]) for p in "qkv"]
        state[f"{theirs}self_attention.linear_qkv.weight"] = torch.cat(parts, 1).flatten(0, 1)
        gate_up = [weights[f"{ours}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        state[f"{theirs}mlp.linear_fc1.weight"] = torch.cat(gate_up)
    assert (
        head * (config["num_attention_heads"] + 2 * groups)
        == state[f"{theirs}self_attention.linear_qkv.weight"].shape[0]
    )
    return state


def to_hugging_face(state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    head, groups = config["head_dim"], config["num_key_value_heads"]
    queries = config["num_attention_heads"] // groups * head
    weights = {ours: state[theirs] for ours, theirs in _WHOLE.items()}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        weights |= {ours + key: state[theirs + name] for key, name in _LAYER.items()}
        qkv = state[f"{theirs}self_attention.linear_qkv.weight"].view(groups, queries + 2 * head, -1)
        for part, rows in zip("qkv", qkv.split([queries, head, head], 1), strict=True):
            weights[f"{ours}self_attn.{part}_proj.weight"] = rows.flatten(0, 1)
        gate, up = state[f"{theirs}mlp.linear_fc1.weight"].chunk(2)
        weights |= {f"{ours}mlp.gate_proj.weight": gate, f"{ours}mlp.up_proj.weight": up}
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def mean_loss(model: Any, ids: Any) -> float:
    """Next-token cross-entropy, nats per token, of rows that are each one text (megatron-core packs on GPUs only)."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    with torch.no_grad():
        for ids_BT in ids.split(MICRO_BATCH):
            logits_BTV = forward(model, ids_BT)[:, :-1].float()
            total += F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def forward(model: Any, ids_BT: Any) -> Any:
    import torch

    length = ids_BT.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # True is hidden from attention
    return model(ids_BT, torch.arange(length).expand_as(ids_BT), mask)


def check_import(model: Any, teacher: Path, ids_BT: Any) -> float:
    """The largest difference of a logit between Megatron's model and the Hugging Face one it was made from."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        return float((reference(ids_BT, use_cache=False).logits - forward(model, ids_BT)).abs().max())


def prune(
    model: Any, calibration: Any, selection: Any, max_parameters: float, fine: bool, work: Path
) -> dict[str, Any]:
    """Let ModelOpt prune `model` in place; returns what it went by and what it found."""
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher, get_mcore_minitron_config

    divisors = dict(DIVISORS["fine" if fine else "default"])
    if fine:  # hidden sizes that divide by the heads, as transformers 5 asks
        divisors["hidden_size_divisor"] = math.lcm(model.config.num_attention_heads, 16)
    seen: dict[str, Any] = {}
    best: Callable[..., Any] = MCoreMinitronSearcher.search_best_arch_by_params

    @functools.wraps(best)
    def remembering(searcher: Any) -> Any:
        chosen = best(searcher)
        [found] = searcher.top_k_candidates_per_constraint.values()
        seen["candidates"] = [{**c.ss_config, "num_parameters": c.params, "score": c.score} for c in found]
        seen["layers_by_importance"] = [layer - 1 for layer in searcher.sorted_layers]
        seen["chosen"] = chosen
        return chosen

    MCoreMinitronSearcher.search_best_arch_by_params = remembering

    def forward_loop(target: Any) -> None:
        for ids_BT in calibration.split(MICRO_BATCH):
            forward(target, ids_BT)

    mtp.prune(
        model,
        mode=[("mcore_minitron", get_mcore_minitron_config(**divisors))],
        constraints={"params": max_parameters},
        dummy_input=None,
        config={
            "forward_loop": forward_loop,
            "score_func": lambda target: -mean_loss(target, selection),
            "checkpoint": str(work / "modelopt-scores.pth"),
        },
    )
    return {"divisors": divisors, **seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a Llama in a Hugging Face folder")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with calibration and selection, (B, T)")
    parser.add_argument("--output", type=Path, required=True, help="the pruned model's folder, with choice.json")
    parser.add_argument("--max-parameters", type=float, required=True)
    parser.add_argument("--divisors", choices=tuple(DIVISORS), default="default")
    options = parser.parse_args()

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep = cuda_means_cpu()
    register_rms_norm()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = json.loads((options.teacher / "config.json").read_text())
    tokens = {name: ids.long() for name, ids in load_file(options.tokens).items()}
    weights = {name: tensor.float() for file in sorted(options.teacher.glob("*.safetensors"))
               for name, tensor in load_file(file).items()}  # fmt: skip
    model = megatron_model(config).eval()
    missing, unexpected = model.load_state_dict(to_megatron(weights, config), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    difference = check_import(model, options.teacher, tokens["selection"][:1])
    assert difference < 1e-3, f"Megatron's logits are off by {difference}"
    teacher_loss = mean_loss(model, tokens["selection"])
    facts = prune(model, tokens["calibration"], tokens["selection"], options.max_parameters,
                  options.divisors == "fine", options.tokens.parent)  # fmt: skip
    found = model.config
    student = {
        **config,
        "hidden_size": found.hidden_size,
        "intermediate_size": found.ffn_hidden_size,
        "num_attention_heads": found.num_attention_heads,
        "num_hidden_layers": found.num_layers,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    result = {name: tensor.to(torch.bfloat16) for name, tensor in to_hugging_face(state, student).items()}
    save_file(result, options.output / "model.safetensors", {"format": "pt"})
    (options.output / "config.json").write_text(json.dumps(student, indent=2) + "\n")
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    write_result(
        options.output / "choice.json",
        {
            "sizes": {name: student[name] for name in sizes},
            "num_parameters": sum(tensor.numel() for tensor in result.values()),
            "import_logit_difference": difference,
            "teacher_loss": teacher_loss,
            "pruned_loss": mean_loss(model, tokens["selection"]),
            **facts,
        },
    )
    del keep


if __name__ == "__main__":
    main()

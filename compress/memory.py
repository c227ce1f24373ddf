"""What a distillation step holds in memory, by arithmetic: on each rank, part by part, at the moments when it is most.

Weights, moments, gradients and gathered copies follow from the axis table. What autograd keeps of a layer is counted on
fake tensors, which have sizes and no data, so that it is right for every family. No weights are read.
"""

# B sequences of a micro-batch, T tokens, N loss tokens, C tokens of the head's chunk, V vocabulary, D student hidden
# E teacher hidden; P parameters

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from compress.architecture import ModelInfo, num_parameters, parse_config, student_config
from compress.families import Shape
from compress.objectives.chunked import rows_per_product, tokens_per_chunk

MASTER_BYTES, MOMENT_BYTES = 4, 8  # a parameter: float32 weight, AdamW's two moments
GRADIENT_BYTES = 4  # reduced in float32


@dataclass(frozen=True)
class Layout:
    """How a step is spread: `num_ranks` share every parameter by FSDP2; a micro-batch is one rank's."""

    num_ranks: int
    micro_batch_size: int
    sequence_length: int
    recompute: bool = False  # a layer keeps its input alone and is run again in the backward
    compute_bytes: int = 2
    on_cpu: bool = False
    gloo: bool = False  # the ranks' reductions go through it
    moment_bytes: int = MOMENT_BYTES  # of the optimizer, a parameter
    teacher_runs: bool = True  # else it is cached, or the student's own earlier word


def saved_bytes(
    info: ModelInfo, shape: Shape, micro_batch_size: int, sequence_length: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """What autograd keeps of one decoder layer in a training forward, in bytes; the mean over the kinds of layers."""
    if shape.num_experts and dtype == torch.float32:  # the grouped kernels' shapes are known in bfloat16 only
        return 2 * saved_bytes(info, shape, micro_batch_size, sequence_length)
    few = {1: 0, 3: 0}
    for layers in few:
        tiny = replace(shape, num_hidden_layers=layers)
        config = parse_config(student_config(info.config, info.family, tiny, range(layers)), "the student's config")
        config.vocab_size, config.pad_token_id = 8, None
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            kept: dict[int, tuple[int, torch.Tensor]] = {}

            def keep(
                tensor: torch.Tensor, own: set[int] = own, kept: dict[int, tuple[int, torch.Tensor]] = kept
            ) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes(), tensor
                return tensor

            ids_BT = torch.zeros(micro_batch_size, sequence_length, dtype=torch.long)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model.base_model(input_ids=ids_BT, use_cache=False)
            few[layers] = sum(size for size, _ in kept.values())
    return (few[3] - few[1]) // 2


def step_memory(teacher: ModelInfo, student: Shape, layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes of one rank at each moment of a step, part by part; the largest total is what the rank needs.

    Allocator overhead and library workspaces aren't in it.
    """
    ranks, item = layout.num_ranks, layout.compute_bytes
    whole, layer, root = split(teacher, student)
    teacher_whole, teacher_layer, teacher_root = split(teacher, teacher.shape) if layout.teacher_runs else (0, 0, 0)
    tokens = layout.micro_batch_size * layout.sequence_length
    vocabulary, hidden = student.vocab_size, student.hidden_size
    dtype = torch.float32 if item == 4 else torch.bfloat16
    saved = saved_bytes(teacher, student, layout.micro_batch_size, layout.sequence_length, dtype)
    states = {
        "student: float32 weights": MASTER_BYTES * whole // ranks,
        "student: the optimizer's moments": layout.moment_bytes * whole // ranks,
        "teacher: weights": item * teacher_whole // ranks,
    }
    gradients = {"student: float32 gradients": GRADIENT_BYTES * whole // ranks}
    if ranks == 1:  # their memory stays, and every unit keeps what its forward made of it until its backward is done
        states |= gradients
        gathered = {"student: weights in the compute dtype": item * whole}
    else:  # the roots (embedding, last norm, head) stay, layers come and go
        gathered = {
            "gathered: embedding and head of both": item * (root + teacher_root),
            "gathered: a layer": item * layer,
        }
    roots = item * (root + (teacher_root if ranks > 1 else 0))
    kept = {"gathered: embedding and head": roots}
    if layout.recompute:
        activations = {"activations: inputs of the layers": student.num_hidden_layers * tokens * hidden * item}
        running = {"activations: the layer being run": saved}
    else:
        activations, running = {"activations": student.num_hidden_layers * saved}, {}
    ends = {
        "final hidden states": tokens * (2 * item * hidden + 4 * hidden + item * teacher.shape.hidden_size),
    }
    chunk = min(tokens_per_chunk(vocabulary, item), tokens)
    head = vocabulary * hidden
    # One product is the gradient, two are added in their own dtype, the sum of more is kept in float32.
    products = item if item == 4 or tokens <= chunk else 2 * item + (4 if tokens > 2 * chunk else 0)
    of_teacher = min(chunk, rows_per_product(item)) if layout.on_cpu else chunk
    loss = {
        "loss: logits of a chunk": (chunk + of_teacher) * vocabulary * item,
        "loss: softmax in float32": (0 if layout.on_cpu else 3 * chunk * vocabulary * 4),
        "loss: gradient of the head": head * products,
        "loss: gradient of the hidden states": tokens * hidden * item,
    }
    reducing = GRADIENT_BYTES if ranks > 1 else 0  # beside the gradients that it ends in
    cloned = reducing if layout.gloo else 0  # gloo has no reduce-scatter: it adds up a copy of the whole
    backward = {
        "gradients: the head's": head * item,
        "gradients: a layer's, and being reduced": layer * (item + 2 * reducing + cloned),
        "gathered: a layer ahead": item * layer if ranks > 1 else 0,
    }
    reduced = {"gradients: embedding and head, being reduced": root * (item + reducing + cloned)}
    return {
        "the teacher's forward": {
            **states,
            "gathered: the teacher's": item * (teacher_root + 2 * teacher_layer) if ranks > 1 else 0,
        },
        "the loss": {**states, **gathered, **activations, **ends, **loss},
        "the last layer's backward": {**states, **gathered, **activations, **running, **ends, **backward},
        "the end of the backward": {**states, **gradients, **kept, **reduced},
    }


def split(info: ModelInfo, shape: Shape) -> tuple[int, int, int]:
    """Parameters of all, of one layer, and of what is outside the layers."""
    whole = num_parameters(info, shape)
    one = num_parameters(info, replace(shape, num_hidden_layers=1))
    layer = (whole - one) // max(1, shape.num_hidden_layers - 1)
    return whole, layer, whole - shape.num_hidden_layers * layer

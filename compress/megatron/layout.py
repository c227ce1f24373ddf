"""How ranks share Megatron-Core's models: which layouts are legal, and the process groups of one."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from compress.errors import ConfigError
from compress.families import Shape
from compress.megatron.weights import Place
from compress.parallel import Ranks


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension of parallelism, by the keys of `cluster` without `_parallel`."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def model_ranks(self) -> int:
        """That one model takes."""
        return self.tensor * self.pipeline * self.context


def installed() -> str | None:
    """The version of megatron-core that is installed; None for none. Imports nothing of it."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-core")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "unknown"


def check_layout(layout: Layout, world: int, shapes: dict[str, Shape], sequence_length: int) -> None:
    """Raise ConfigError for a layout that these models (by what they are called in messages), their text or the number
    of ranks don't fit: Megatron-Core's own assertions, before any long work and by our keys."""
    tensor, pipeline, context, expert = layout.tensor, layout.pipeline, layout.context, layout.expert
    if world % layout.model_ranks:
        raise ConfigError(
            f"cluster.tensor_parallel={tensor} x cluster.pipeline_parallel={pipeline} x cluster.context_parallel="
            f"{context} = {layout.model_ranks} ranks share a model, which must divide the {world} ranks of the stage "
            "(WORLD_SIZE); start a multiple, or lower one of them"
        )
    if layout.sequence and tensor == 1:
        raise ConfigError(
            "cluster.sequence_parallel=true splits what tensor-parallel ranks would all hold, and "
            "cluster.tensor_parallel=1; raise it, or set cluster.sequence_parallel=false"
        )
    if (world // pipeline) % expert:
        raise ConfigError(
            f"cluster.expert_parallel={expert} must divide the {world // pipeline} ranks of a pipeline stage "
            f"(WORLD_SIZE={world} over cluster.pipeline_parallel={pipeline}); choose one of "
            f"{_divisors(world // pipeline)}"
        )
    pieces = (2 * context if context > 1 else 1) * (tensor if layout.sequence else 1)
    if sequence_length % pieces:
        raise ConfigError(
            f"data.sequence_length={sequence_length} must be a multiple of {pieces}, into which "
            f"cluster.context_parallel={context} (two pieces a rank) and cluster.sequence_parallel="
            f"{str(layout.sequence).lower()} cut a sequence; nearest: {-(-sequence_length // pieces) * pieces}"
        )
    for name, shape in shapes.items():
        _check_shape(layout, name, shape)


def _check_shape(layout: Layout, name: str, shape: Shape) -> None:
    tensor, pipeline, expert = layout.tensor, layout.pipeline, layout.expert
    groups, layers = shape.num_key_value_heads, shape.num_hidden_layers
    if groups % tensor and tensor % groups:
        legal = [n for n in range(1, shape.num_attention_heads + 1)
                 if shape.num_attention_heads % n == 0 and (groups % n == 0 or n % groups == 0)]  # fmt: skip
        raise ConfigError(
            f"cluster.tensor_parallel={tensor} neither divides nor is a multiple of the {name}'s num_key_value_heads="
            f"{groups}; choose one of {', '.join(map(str, legal))}"
        )
    uneven = [field for field in ("num_attention_heads", "intermediate_size") if getattr(shape, field) % tensor]
    if uneven:
        raise ConfigError(
            f"cluster.tensor_parallel={tensor} must divide the {name}'s {uneven[0]}={getattr(shape, uneven[0])}; "
            f"choose another, or prune to a multiple of it (shape.tensor_parallel={tensor})"
        )
    if layers < pipeline:
        raise ConfigError(
            f"cluster.pipeline_parallel={pipeline} is more than the {name}'s {layers} layers; {layers} at most"
        )
    if shape.num_experts % expert:
        raise ConfigError(
            f"cluster.expert_parallel={expert} must divide the {name}'s num_experts={shape.num_experts}; choose one of "
            f"{_divisors(shape.num_experts)}"
        )
    if expert > 1 and not shape.num_experts:
        raise ConfigError(f"cluster.expert_parallel={expert}: the {name} has no experts; set it to 1")
    if shape.num_experts and tensor > 1 and not layout.sequence:
        raise ConfigError(
            f"cluster.tensor_parallel={tensor} with the {name}'s experts needs cluster.sequence_parallel=true in "
            "Megatron-Core; set it"
        )


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def layers_of_stages(num_layers: int, stages: int) -> list[int]:
    """How many layers each pipeline stage has: as equal as can be, the last ones, which also have the head, fewer."""
    each, more = divmod(num_layers, stages)
    return [each + (stage < more) for stage in range(stages)]


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding where tensor-parallel ranks share it equally."""
    return math.ceil(vocab_size / tensor) * tensor


@dataclass(frozen=True)
class Groups:
    """This rank's place in a layout, inside of `process_groups`."""

    layout: Layout
    place: Place
    stage: int  # of the pipeline
    data: Ranks  # of those that have the same part of the model and other sequences
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data_and_context: dist.ProcessGroup
    context: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pipeline - 1


@contextlib.contextmanager
def process_groups(layout: Layout, seed: int = 0) -> Iterator[Groups]:
    """Megatron-Core's process groups of a layout, over the ranks that can already talk to each other.

    Sequences are dealt to data-parallel ranks; of expert-parallel ranks each has its own ones too, as of Megatron-Core.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
    )
    try:
        model_parallel_cuda_manual_seed(seed)  # what dropout draws
        yield Groups(
            layout=layout,
            place=Place(
                parallel_state.get_tensor_model_parallel_rank(),
                layout.tensor,
                parallel_state.get_expert_model_parallel_rank(),
                layout.expert,
            ),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            data=Ranks(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            data_and_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
            context=parallel_state.get_context_parallel_group(),
        )
    finally:
        parallel_state.destroy_model_parallel()

"""Where the computation runs: the process group, FSDP2, and the compute dtype.

The student always lives under `fully_shard`, at one process on a mesh of one, so that more ranks change the mesh and
not the step.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compress.attention import blocks_are_faster, use_blocked_attention
from compress.devices import CPU, backend
from compress.errors import ConfigError, DistributedError
from compress.models import decoder_layers
from compress.routing import routers_of

log = logging.getLogger(__name__)
T = TypeVar("T")
Fill = Callable[[int | None], None]  # gives a layer its weights, by its number; None: what is outside of the layers


@functools.cache
def _measured_dtype() -> torch.dtype:
    """bfloat16 where one of its products is faster than float32's, which on a CPU depends on AMX or AVX512-BF16."""
    left, right = torch.randn(512, 1024), torch.randn(1024, 1024)
    seconds = dict.fromkeys((torch.bfloat16, torch.float32), math.inf)
    for _ in range(12):  # in turns, and the best of many: a busy machine disturbs some of them, not all
        for dtype in seconds:
            one, other = left.to(dtype), right.to(dtype)
            start = time.perf_counter()
            one @ other
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if ratio > 1 else torch.float32
    log.info("compute_dtype=auto: a bfloat16 product is %.1fx float32's speed here, so %s", ratio, str(chosen)[6:])
    return chosen


def resolve_dtype(choice: str, device: torch.device = CPU) -> torch.dtype:
    """The dtype of activations and products for compute_dtype=auto|bfloat16|float32; master weights stay float32."""
    if choice == "auto":
        return _measured_dtype() if device.type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, choice)
    return found


def available_bytes() -> int:
    """Memory that this process may still take: what is free, within its control group and its own limits."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    for limit in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(soft - _data_bytes())
    return max(0, min(found))


def free_bytes(device: torch.device) -> int:
    """`available_bytes`, of a device; a GPU was not asked here."""
    return available_bytes() if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def _data_bytes() -> int:
    """VmData of this process, which RLIMIT_DATA and RLIMIT_AS count: reserved, whether or not it is resident."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Ranks:
    """The processes of a launcher. Work is dealt out as cards are, and what they found is added in the ranks' order."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def mine(self, items: Iterable[T]) -> Iterator[T]:
        return itertools.islice(items, self.rank, None, self.size)

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors, in float64, on every rank; all ranks call it with the same shapes."""
        if self.size == 1:
            return [[tensor.double() for tensor in tensors]]
        flat = torch.cat([tensor.double().cpu().flatten() for tensor in tensors])
        everyones = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(everyones, flat)
        sizes = [tensor.numel() for tensor in tensors]
        return [
            [part.view(tensor.shape) for part, tensor in zip(one.split(sizes), tensors, strict=True)]
            for one in everyones
        ]

    def in_order(self, rows: Tensor) -> Tensor:
        """A row of what was found for each item that `mine` dealt out, of all ranks, in the items' order; float64.

        Added up they are what one process finds, bit for bit.
        """
        counts = [int(found) for [found] in self.gather([torch.tensor(len(rows))])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyones = [found for [found] in self.gather([padded])]
        return torch.stack(everyones, 1).flatten(0, 1)[: sum(counts)]

    def agree(self, text: str) -> str:
        """The first rank's answer, on every rank; at most 64 ASCII characters."""
        if self.size == 1:
            return text
        letters = torch.zeros(64, dtype=torch.uint8)
        letters[: len(text)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        return bytes(letters.tolist()).rstrip(b"\0").decode()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sums([torch.tensor(float(flag))])[0])

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Over the ranks, in float64."""
        return [torch.stack(found).sum(0) for found in zip(*self.gather(tensors), strict=True)]


ALONE = Ranks()


def agreed_dtype(choice: str, ranks: Ranks, device: torch.device = CPU) -> torch.dtype:
    """`resolve_dtype` by the first rank's measurement, on every rank."""
    found: torch.dtype = getattr(torch, ranks.agree(str(resolve_dtype(choice, device)).removeprefix("torch.")))
    return found


def launched() -> Ranks:
    """What the launcher's environment says (torchrun, srun with its variables); alone without one."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def check_interface(variable: str) -> None:
    """Raise DistributedError where GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME asks for an interface that isn't here.

    gloo takes names, commas between them. NCCL takes beginnings of names, of which one has to fit: = before them makes
    them whole names, ^ before that leaves them out.
    """
    asked, there = os.environ.get(variable, ""), [name for _, name in socket.if_nameindex()]
    if variable == "GLOO_SOCKET_IFNAME":
        absent = [name for name in asked.split(",") if asked and name not in there]
    else:
        listed = asked.removeprefix("^")
        words = [word.partition(":")[0] for word in listed.removeprefix("=").split(",") if word]
        exact = listed.startswith("=")
        fitting = [name for name in there if any(name == w if exact else name.startswith(w) for w in words)]
        left = [name for name in there if name not in fitting] if asked.startswith("^") else fitting
        absent = [asked] if words and not left else []
    if absent:
        raise DistributedError(
            f"{variable}={asked}: no network interface here fits {' or '.join(absent)}; there are {', '.join(there)}. "
            "Name one that joins the nodes (launch/env.sh), or leave the variable out"
        )


def meet(patience: timedelta = dist.default_pg_timeout) -> dist.Store:
    """Where the launched ranks leave word for each other. Raises DistributedError where they don't find together."""
    port = os.environ.get("MASTER_PORT")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise DistributedError(
                f"MASTER_PORT={port} is in use on this node, the first rank's; give another one, such as "
                f"MASTER_PORT={int(port or 0) + 1} (torchrun: --master-port), or end the process that listens there"
            ) from error
        ranks = launched()
        raise DistributedError(
            f"rank {ranks.rank} of {ranks.size} found no way to the first one, MASTER_ADDR="
            f"{os.environ.get('MASTER_ADDR')} MASTER_PORT={port} ({reason}); start all ranks by torchrun, or set both "
            "on every node, and see that this address and port can be reached from it"
        ) from error
    return store


@contextlib.contextmanager
def joined(store: dist.Store | None = None) -> Iterator[Ranks]:
    """The launched ranks, which can talk to each other (gloo) inside the block. `store`: that they have met in."""
    ranks = launched()
    own = ranks.size > 1 and not dist.is_initialized()
    if own:
        check_interface("GLOO_SOCKET_IFNAME")
        if "nccl" in backend():
            check_interface("NCCL_SOCKET_IFNAME")
        try:
            dist.init_process_group(
                backend(), store=meet() if store is None else store, rank=ranks.rank, world_size=ranks.size
            )
        except RuntimeError as error:
            raise DistributedError(
                f"rank {ranks.rank} of {ranks.size} can't talk to the others by gloo ({str(error).splitlines()[0]}); "
                "if a rank ended, its own message says why; else name the network in GLOO_SOCKET_IFNAME (launch/env.sh)"
            ) from error
    try:
        yield ranks
    finally:
        if own:
            dist.destroy_process_group()


def refuse_several_ranks(what: str = "this stage") -> None:
    """Raise ConfigError under a launcher that started more than one process."""
    world = launched().size
    if world > 1:
        raise ConfigError(
            f"WORLD_SIZE={world}: {what} runs in one process in this version, only stage=score, "
            "stage=search, stage=distill and stage=evaluate in several; start it without torchrun, or with 1 rank"
        )


def check_layout(shard_ranks: int | None, world: int) -> int:
    """How many of `world` ranks share a model. Raises ConfigError where the others can't be copies of those."""
    share = world if shard_ranks is None else shard_ranks
    if world % share:
        legal = ", ".join(str(count) for count in range(1, world + 1) if world % count == 0)
        raise ConfigError(
            f"cluster.shard_ranks={share} must divide the {world} ranks of the stage (WORLD_SIZE); set one of "
            f"{legal}, or null for all, or start another number"
        )
    return share


def shared_by(shard_ranks: int | None, world: int) -> int | None:
    """cluster.shard_ranks for a stage that may have fewer ranks than training: then all of them share a model."""
    return None if shard_ranks is not None and shard_ranks > world else shard_ranks


@contextlib.contextmanager
def device_mesh(shard_ranks: int | None, device: torch.device = CPU) -> Iterator[tuple[Ranks, DeviceMesh]]:
    """The launched ranks, which can talk to each other inside the block, and the mesh of their devices: (shard,), or
    (replicate, shard) where a model is shared by some of them only. One process needs no launcher."""
    share = check_layout(shard_ranks, launched().size)
    if launched().size == 1:
        with single_process_mesh(device) as mesh:
            yield ALONE, mesh
        return
    with joined() as ranks:
        copies = ranks.size // share
        shape, names = ((copies, share), ("replicate", "shard")) if copies > 1 else ((share,), ("shard",))
        yield ranks, init_device_mesh(device.type, shape, mesh_dim_names=names)


@contextlib.contextmanager
def single_process_mesh(device: torch.device = CPU) -> Iterator[DeviceMesh]:
    """A device mesh of one process, over a process group that exists only inside the block."""
    refuse_several_ranks()
    own = not dist.is_initialized()
    if own:
        check_interface("GLOO_SOCKET_IFNAME")
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    finally:
        if own:
            dist.destroy_process_group()


def check_compiler(key: str) -> None:
    """Raise ConfigError, naming the setting, where torch.compile has no C++ compiler to work with."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not torch.cuda.is_available() and not any(name and shutil.which(name) for name in names):
        raise ConfigError(f"{key}=true needs a C++ compiler (g++ or clang++, or CXX=); install one or set it false")


def recompute_layers(model: PreTrainedModel) -> None:
    """Each decoder layer keeps its input alone and runs again in the backward, in place (arXiv 1604.06174)."""
    for layer in decoder_layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile each decoder layer, in place, on its first call: they share one graph, so under a minute in all."""
    if blocks_are_faster():
        use_blocked_attention(model)
    for layer in decoder_layers(model):
        layer.compile()


def _filled(_layer: int | None) -> None:
    """For a model that has its weights."""


def shard(
    step_module: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, compute_dtype: torch.dtype, fill: Fill = _filled
) -> None:
    """FSDP2 in place: one unit per decoder layer, the rest (embedding, norm, head) with the root.

    Parameters must be float32: they are the master weights. Gradients are accumulated and reduced in float32. The
    routers of a mixture are units of their own, which the compute dtype doesn't concern. `fill`
    (`streaming.streamed_model`) gives each layer its weights just before it is split, so that of a model that is shared
    no rank holds more than its part and one whole unit.
    """
    mixed = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if mixed else None, reduce_dtype=torch.float32 if mixed else None
    )
    routers = routers_of(step_module) if mixed else []
    # At one rank a second gather in the backward is a copy for nothing: keep what the forward gathered.
    for number, layer in enumerate(layers):
        fill(number)
        inside = set(layer.modules())
        for router in (one for one in routers if one in inside):
            fully_shard(router, mesh=mesh, reshard_after_forward=False)
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, reshard_after_forward=mesh.size() > 1, shard_placement_fn=_split(mesh)
        )
    fill(None)
    fully_shard(step_module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() == 1:
        taken: set[nn.Parameter] = set()
        units: list[Any] = [*routers, *layers, step_module]
        for unit in units:
            parameters = [parameter for parameter in unit.parameters() if parameter not in taken]
            taken.update(parameters)
            if hasattr(unit, "set_custom_reduce_scatter"):
                unit.set_custom_reduce_scatter(_NothingToReduce(parameters))


def _split(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dimension the ranks share a parameter: the first, unless that would leave some of them no expert of
    a mixture: FSDP2 gives these an empty one, and gathers it, so that 8 experts on 64 ranks would be sent 8 times."""
    ranks = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard | None:
        experts = parameter.ndim == 3 and parameter.shape[0] % ranks != 0
        return Shard(1) if experts and parameter.shape[1] % ranks == 0 else None

    return place


def shard_frozen(model: PreTrainedModel, mesh: DeviceMesh, fill: Fill = _filled) -> None:
    """A model that isn't trained, in place: each layer, and the embedding where the head has weights of its own, is
    gathered for its forward and let go after it. `fill` as for `shard`.

    The head stays whole on every rank, since losses read it between forwards, and the last norm with it.
    """
    several = mesh.size() > 1
    for number, layer in enumerate(decoder_layers(model)):
        fill(number)
        if several:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, shard_placement_fn=_split(mesh))
    fill(None)
    embedding: Any = model.get_input_embeddings()
    if several and embedding.weight is not model.get_output_embeddings().weight:
        fully_shard(embedding, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def gathered_once(model: nn.Module | None) -> Iterator[None]:
    """Inside the block what `shard_frozen` has split stays gathered from its first forward on; whole on every rank."""
    units = [] if model is None else [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


class _NothingToReduce:
    """One unit's reduce-scatter over a single rank: FSDP2 asks for an input and an output of the same size in turn and
    copies one to the other, which are the same memory here. A twentieth of a CPU's step, and a unit's gradients.

    The memory stays from step to step, since taking it from the system again costs a CPU as much as filling it; unless
    the unit's parameters still have the gradients of the last one, to be added to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._input: Tensor | None = None
        self._kept: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        wanted = tuple(size), dtype, device
        given, self._input = self._input, None
        if given is not None and _form(given) == wanted:
            return given
        free = all(parameter.grad is None for parameter in self._parameters)
        if self._kept is None or not free or _form(self._kept) != wanted:
            self._kept = torch.empty(*size, dtype=dtype, device=device)
        self._input = self._kept
        return self._input

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        if output_tensor is not input_tensor:
            output_tensor.copy_(input_tensor)


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.dtype, tensor.device

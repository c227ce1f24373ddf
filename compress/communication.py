"""What the ranks of a training step send each other, by arithmetic, and how long that takes at stated links.

FSDP2 gathers a unit's parameters in the compute dtype before they are used and reduces its gradients in float32, once a
step; HSDP adds the copies' gradients up after that. `parallel.shard` and `parallel.shard_frozen` say which units there
are and when each lets go. The sums of losses and the gradient's norm, some bytes each, aren't in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from compress.architecture import ModelInfo, num_embedding_parameters
from compress.families import Shape
from compress.memory import GRADIENT_BYTES, Layout, split


class Kind(StrEnum):
    gather = "all-gather"
    scatter = "reduce-scatter"
    reduce = "all-reduce"


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step, over `num_ranks` ranks: their tensors, as wholes, have `num_bytes` together,
    and that of the largest unit has `largest`."""

    what: str
    kind: Kind
    num_ranks: int
    num_bytes: int
    largest: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives as many, along a ring."""
        rounds = 2 if self.kind is Kind.reduce else 1
        return rounds * self.num_bytes * (self.num_ranks - 1) / self.num_ranks


@dataclass(frozen=True)
class Links:
    """Bytes a second and GPU, each way: to the others of its node, and to other nodes."""

    gpus_per_node: int
    local: float
    network: float

    def seconds(self, collectives: Sequence[Collective], share: int) -> float:
        """Of a step, if nothing else went on meanwhile. `share`: neighbouring ranks that share a model.

        A ring through several nodes goes over all of their GPUs' network cards side by side, so that its speed is that
        of a node's cards together, or of its links where these are slower; the copies' rings share the cards.
        """
        total = 0.0
        for one in collectives:
            apart = share if one.kind is Kind.reduce else 1  # from one rank of a ring to the next
            cards = max(1, self.gpus_per_node // apart)
            within = one.num_ranks * apart <= self.gpus_per_node
            total += one.sent / (self.local if within else min(self.local, self.network * cards))
        return total


def step_collectives(
    teacher: ModelInfo, student: Shape, layout: Layout, micro_batches: int, copies: int = 1, whole_window: bool = False
) -> list[Collective]:
    """Those of one step of `micro_batches` micro-batches a rank, in which `layout.num_ranks` ranks share a model.

    A layer of the student is gathered for every forward but where the backward before has left it, and for every
    backward; what is outside of the layers once. A layer of the teacher for every forward, or once in a `whole_window`.
    """
    share, item = layout.num_ranks, layout.compute_bytes
    whole, layer, root = split(teacher, student)
    routers = student.num_hidden_layers * student.num_experts * student.hidden_size if item < GRADIENT_BYTES else 0
    inside = whole - root - routers
    found = []

    def add(what: str, kind: Kind, ranks: int, num_bytes: int, largest: int) -> None:
        if ranks > 1 and num_bytes:
            found.append(Collective(what, kind, ranks, num_bytes, largest))

    if layout.teacher_runs:
        theirs, their_layer, their_root = split(teacher, teacher.shape)
        lookup = 0 if teacher.shape.tied else num_embedding_parameters(teacher, teacher.shape) // 2
        times = 1 if whole_window else micro_batches
        add("teacher: layers", Kind.gather, share, times * item * (theirs - their_root), item * their_layer)
        add("teacher: embedding", Kind.gather, share, times * item * lookup, item * lookup)
    add("student: layers", Kind.gather, share, (micro_batches + 1) * item * inside, item * layer)
    add("student: routers", Kind.gather, share, GRADIENT_BYTES * routers, GRADIENT_BYTES * routers)
    add("student: embedding and head", Kind.gather, share, item * root, item * root)
    largest = GRADIENT_BYTES * max(layer, root)
    add("student: gradients", Kind.scatter, share, GRADIENT_BYTES * whole, largest)
    add("student: gradients of copies", Kind.reduce, copies, GRADIENT_BYTES * whole // share, largest // share)
    return found

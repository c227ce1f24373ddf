"""The routers of a mixture of experts: computed in float32, listened to while training, and balanced.

transformers computes a router in the dtype of the rest; in bfloat16 rounding often decides between two experts.
"""

# N tokens of a micro-batch, D hidden, L layers, E experts, K experts of a token

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
DEAD_STEPS = 20  # without a token on any rank, after which an expert is called dead
Said = tuple[Tensor, Tensor]  # a router's logits (N, E) and its choice (N, K)


def routers_of(model: nn.Module) -> list[Any]:
    """The router of each mixture, from the first layer to the last; none in a dense model."""
    return [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "weight")]


def in_float32(model: nn.Module) -> list[Any]:
    """The model's routers, whose weights, product and softmax are in float32 from now on, or in float64 in a proof.

    Their weights keep the values of the dtype that they had. In place; a second time changes nothing.
    """
    routers = routers_of(model)
    for router in routers:
        if not hasattr(router, "heard"):
            router.heard = None
            router.register_forward_pre_hook(_cast_input)
            router.register_forward_hook(_hear)
        for parameter in router.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return routers


def _cast_input(router: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(hidden.to(router.weight.dtype) for hidden in inputs)


def _hear(router: Any, _inputs: Any, output: tuple[Tensor, ...]) -> None:
    if router.heard is not None:
        logits_NE, _, index_NK = output
        router.heard.append((logits_NE, index_NK))


@contextlib.contextmanager
def hearing(routers: Sequence[Any]) -> Iterator[list[Said]]:
    """Fill what it yields, a layer after the other, by the model's forward inside the block; graphs go along."""
    heard: list[Said] = []
    for router in routers:
        router.heard = heard
    try:
        yield heard
    finally:
        for router in routers:
            router.heard = None


@torch.no_grad()
def tally(heard: Sequence[Said], valid_N: Tensor) -> Tensor:
    """(2, L, E), float64: how many of the tokens chose each expert, and the sum of the probabilities that they gave it;
    padding doesn't count."""
    found = []
    for logits_NE, index_NK in heard:
        chosen_E = torch.bincount(index_NK[valid_N].flatten(), minlength=logits_NE.shape[1])
        found.append(torch.stack([chosen_E.double(), _probabilities(logits_NE, valid_N).sum(0, dtype=torch.float64)]))
    return torch.stack(found, 1).cpu()


def _probabilities(logits_NE: Tensor, valid_N: Tensor) -> Tensor:
    return torch.softmax(logits_NE[valid_N].float(), -1)


@dataclass(frozen=True)
class ExpertLoad:
    """What the routers did with the tokens of a global batch, of all ranks."""

    counts_LE: Tensor  # choices, K of each token
    probability_LE: Tensor  # sums over the tokens
    num_tokens: int

    @property
    def balance_loss(self) -> float:
        """E * sum over the experts of (share of the tokens that chose it) * (mean probability), mean over the layers:
        Switch Transformer (arXiv 2101.03961, equations 4 to 6), K where the load is even."""
        loss_L = (self.counts_LE * self.probability_LE).sum(1) / self.num_tokens**2
        return self.counts_LE.shape[1] * loss_L.mean().item()

    def figures(self) -> dict[str, float]:
        """Of the layer that is worst: its busiest expert's load over the mean load; experts of all layers that no token
        chose; the balance loss."""
        ratio_L = self.counts_LE.amax(1) / self.counts_LE.mean(1)
        return {
            "max_load_ratio": ratio_L.max().item(),
            "num_dead": int((self.counts_LE == 0).sum()),
            "balance_loss": self.balance_loss,
        }


class Balance:
    """The balance loss as a term of the loss, `weight` times `ExpertLoad.balance_loss`.

    It is a product of two means, of which the share of tokens isn't differentiated, and not a sum over tokens: of each
    micro-batch by itself it would depend on the split. So the shares are those of the step before, over all ranks, and
    constant in a step; then it is a sum over tokens, and its gradient is the same for every split. The first step has
    none. The shares belong to the checkpoint: `state`.
    """

    def __init__(self, weight: float, routers: Sequence[Any]) -> None:
        self.weight, self._top_k = weight, routers[0].top_k
        self.counts_LE = torch.zeros(len(routers), routers[0].weight.shape[0], dtype=torch.float64)
        self.factor_LE = self.counts_LE

    def begin(self, num_tokens: int, num_ranks: int) -> None:
        """A global batch of so many tokens starts. FSDP2 averages over the ranks what is a sum."""
        layers, experts = self.counts_LE.shape
        share_LE = self._top_k * self.counts_LE / self.counts_LE.sum(1, keepdim=True).clamp_min(1)
        self.factor_LE = share_LE * (self.weight * experts * num_ranks / (layers * num_tokens))

    def loss(self, heard: Sequence[Said], valid_N: Tensor) -> Tensor:
        """A micro-batch's part, to be differentiated."""
        parts = [
            (_probabilities(logits_NE, valid_N).sum(0) * factor_E.to(logits_NE)).sum()
            for (logits_NE, _), factor_E in zip(heard, self.factor_LE, strict=True)
        ]
        return torch.stack(parts).sum()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"balance/counts": self.counts_LE}


def warn_of_dead(idle_LE: Tensor, counts_LE: Tensor) -> Tensor:
    """For how many steps each expert has had no token, with this one; says which have just been so for DEAD_STEPS."""
    idle_LE = (idle_LE + 1).masked_fill(counts_LE > 0, 0)
    dead = (idle_LE == DEAD_STEPS).nonzero().tolist()
    if dead:
        names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:5])
        log.warning(
            "distill: %d experts had no token for %d steps: %s%s; set distill.balance_loss, such as 0.001, or keep "
            "fewer by prune.num_experts", len(dead), DEAD_STEPS, names, ", ..." if len(dead) > 5 else "",
        )  # fmt: skip
    return idle_LE

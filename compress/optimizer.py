"""Optimizers over local shards.

AdamW is elementwise, so each rank steps the shard it owns as a plain tensor: no DTensor dispatch. Muon needs whole
matrices, each of which one rank puts together: `muon.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from compress.muon import Muon, group_of


class LocalOptimizer:
    """AdamW, or Muon for the layers' matrices with AdamW for the rest, on the local part of every parameter.

    Args:
        named_parameters: (name, DTensor or plain parameter), float32; the names key the state in checkpoints.
        muon: train two-dimensional weights under `.layers.` by Muon (orthogonalised momentum). Embedding, head, norms
            and biases always train by AdamW.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        muon: bool,
        learning_rate: float,
        muon_learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.local = {name: nn.Parameter(local_part(p.detach())) for name, p in self.parameters.items()}
        self._group = group_of(self.parameters.values())
        matrices = [n for n, p in self.parameters.items() if muon and p.ndim == 2 and ".layers." in n]
        rest = [n for n in self.parameters if n not in set(matrices)]
        groups = [
            {"params": [self.local[n] for n in rest if self.parameters[n].ndim >= 2], "weight_decay": weight_decay},
            {"params": [self.local[n] for n in rest if self.parameters[n].ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            shards, wholes = ([parts[n] for n in matrices] for parts in (self.local, self.parameters))
            self.optimizers.append(Muon(shards, wholes, muon_learning_rate, weight_decay))
        self.set_learning_rates(learning_rate, muon_learning_rate)

    def set_learning_rates(self, learning_rate: float, muon_learning_rate: float) -> None:
        """Of AdamW and of Muon, which step() multiplies by its factor."""
        self._base = [learning_rate, muon_learning_rate][: len(self.optimizers)]

    def step(self, factor: float, max_gradient_norm: float) -> tuple[float, float]:
        """Clip the global gradient norm, update at `factor` times the learning rates, free the gradients.

        Returns (gradient norm before clipping, learning rate of AdamW). A norm that is not finite is returned before
        anything changes: the caller decides.
        """
        for name, parameter in self.parameters.items():
            self.local[name].grad = None if parameter.grad is None else local_part(parameter.grad)
        norm = self._over_ranks(nn.utils.get_total_norm([p.grad for p in self.local.values() if p.grad is not None]))
        rate = self._base[0] * factor
        if not torch.isfinite(norm):
            return norm.item(), rate
        nn.utils.clip_grads_with_norm_(self.local.values(), max_gradient_norm, norm)
        for optimizer, base in zip(self.optimizers, self._base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
        for name, parameter in self.parameters.items():
            parameter.grad = self.local[name].grad = None
        return norm.item(), rate

    def _over_ranks(self, norm: Tensor) -> Tensor:
        """The norm of all shards from this rank's."""
        if self._group is None:
            return norm
        square = norm.double().square()
        dist.all_reduce(square, group=self._group)
        return square.sqrt().to(norm.dtype)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor under `parameter name/state name`, sharded as its parameter; made when there is none yet.

        A checkpoint is loaded into these tensors in place.
        """
        found: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for name, local in self.local.items():
                if not any(local is p for group in optimizer.param_groups for p in group["params"]):
                    continue
                state = optimizer.state[local]
                if not state:  # as the first step() of each would: step count 0, moments 0
                    if isinstance(optimizer, torch.optim.AdamW):
                        state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
                        state["exp_avg"], state["exp_avg_sq"] = (
                            torch.zeros_like(local),
                            torch.zeros_like(local),
                        )
                    else:
                        state["momentum_buffer"] = torch.zeros_like(local)
                for key, value in state.items():
                    found[f"{name}/{key}"] = split_like(value, self.parameters[name])
        return found


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, split over the ranks as `parameter` is; scalars stay as they are."""
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

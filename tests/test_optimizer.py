"""The optimizers give torch's numbers, on any number of ranks; the schedule is what its docstring says."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from compress.optimizer import LocalOptimizer
from compress.parallel import shard, single_process_mesh
from compress.schedules import learning_rate_factor


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return (hidden @ self.embed.weight.T).square().mean()


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Net()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(ids)
        return result


def _optimizer(module: nn.Module, muon: bool = False, weight_decay: float = 0.1) -> LocalOptimizer:
    return LocalOptimizer(
        module.named_parameters(),
        muon=muon,
        learning_rate=0.01,
        muon_learning_rate=0.02,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        weight_decay=weight_decay,
    )


@pytest.mark.parametrize("muon", [False, True])
def test_sharded_equals_plain_torch(muon: bool) -> None:
    """Three steps under fully_shard against torch's optimizers and clipping on an ordinary module, bit for bit."""
    ids = torch.arange(10)[None]
    plain = _Wrapped()
    matrices = [p for n, p in plain.named_parameters() if muon and ".layers." in n and p.ndim == 2]
    rest = [p for p in plain.parameters() if not any(p is m for m in matrices)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)]
    if matrices:
        reference.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1))
    norms = []
    for _ in range(3):
        plain(ids).backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
        for optimizer in reference:
            optimizer.step()
            optimizer.zero_grad()
    with single_process_mesh() as mesh:
        module = _Wrapped()
        shard(module, module.model.layers, mesh, torch.float32)
        ours = _optimizer(module, muon)
        for expected in norms:
            module(ids).backward()
            norm, rate = ours.step(1.0, 0.5)
            assert norm == pytest.approx(expected, rel=1e-6)
            assert rate == 0.01
        for (name, mine), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-6, atol=1e-7, msg=name)


def test_gradients_at_one_rank_are_plain_ones() -> None:
    """Two backwards add up and a third after a reset begins anew: no unit's gradients share memory with a later one."""
    plain = _Wrapped()
    with single_process_mesh() as mesh:
        module = _Wrapped()
        shard(module, module.model.layers, mesh, torch.float32)
        for ids in (torch.arange(10)[None], torch.arange(3)[None], None, torch.arange(5)[None]):
            for one in (plain, module):
                if ids is None:
                    one.zero_grad()
                else:
                    one(ids).backward()
            for (name, mine), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
                assert (mine.grad is None) == (theirs.grad is None)
                if theirs.grad is not None:
                    assert torch.equal(mine.grad.full_tensor(), theirs.grad), name


_SHAPES = ((5, 7), (8, 3), (6, 6), (1, 4), (2, 9))


class _Matrices(nn.Module):
    """Matrices of many sizes, none of which three ranks divide evenly, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in _SHAPES])
        self.bias = nn.Parameter(torch.randn(5))


def _gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in _Wrapper().named_parameters()}


class _Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Matrices()


def _train_on_ranks(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = _Wrapper()
    fully_shard(module, mesh=mesh)
    ours = _optimizer(module, muon=True)
    norms = []
    for step in range(3):
        for name, parameter in module.named_parameters():
            parameter.grad = distribute_tensor(_gradients(step)[name], mesh, parameter.placements)
        norms.append(ours.step(1.0, 1e9)[0])
    found = {name: parameter.full_tensor() for name, parameter in module.named_parameters()}
    found |= {name: value.full_tensor() for name, value in ours.state().items() if "momentum" in name}
    if dist.get_rank() == 0:
        save_file({**found, "norms": torch.tensor(norms)}, folder / "ranks.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_muon_on_several_ranks_is_torchs_on_one(size: int, tmp_path: Path) -> None:
    """Three steps: weights and momentum bit for bit, also where a rank holds no row of a matrix; the norm of all."""
    plain = _Wrapper()
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    reference = [
        torch.optim.AdamW([plain.model.bias], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
    ]
    norms = []
    for step in range(3):
        for name, parameter in plain.named_parameters():
            parameter.grad = _gradients(step)[name]
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 1e9))
        for optimizer in reference:
            optimizer.step()
    on_ranks(size, _train_on_ranks, tmp_path)
    found = load_file(tmp_path / "ranks.safetensors")
    torch.testing.assert_close(found["norms"], torch.stack(norms), rtol=1e-6, atol=0)
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter), name
        if parameter.ndim == 2:
            assert torch.equal(found[f"{name}/momentum_buffer"], reference[1].state[parameter]["momentum_buffer"]), name


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    module = _Wrapped()
    ours = _optimizer(module)
    before = [p.clone() for p in module.parameters()]
    module(torch.arange(4)[None]).backward()
    next(module.parameters()).grad.fill_(math.inf)
    norm, _ = ours.step(1.0, 1.0)
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_state_made_ahead_equals_state_after_a_step() -> None:
    """A checkpoint is loaded into state(): before the first step it must have the same names and shapes as later."""
    for muon in (False, True):
        fresh, stepped = _Wrapped(), _Wrapped()
        ahead = _optimizer(fresh, muon).state()
        optimizer = _optimizer(stepped, muon)
        stepped(torch.arange(4)[None]).backward()
        optimizer.step(1.0, 1.0)
        later = optimizer.state()
        assert {k: (v.shape, v.dtype) for k, v in ahead.items()} == {k: (v.shape, v.dtype) for k, v in later.items()}
        assert len(later) == sum(
            1 if muon and ".layers." in n and p.ndim == 2 else 3 for n, p in stepped.named_parameters()
        )


def test_schedule() -> None:
    factors = [learning_rate_factor(step, 50, 8, 0.1) for step in range(50)]
    assert all(a < b for a, b in pairwise(factors[:9])), "warm-up rises"
    assert factors[0] > 0, "the first step trains"
    assert max(factors) == factors[8] == 1.0
    assert all(a > b for a, b in pairwise(factors[8:])), "then it falls"
    assert factors[-1] == pytest.approx(0.1)
    assert factors[29] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 21 / 41)))

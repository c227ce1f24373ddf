"""The reductions of `reductions.py` as one compiled kernel each, which reads every activation once.

torch's compiler runs in a process of its own, `python -m compress.kernels FOLDER DTYPE NAME...`, since it takes a third
of a small model's memory; this one only loads what came out (benchmarks/scoring.py: time and memory of a pass).
"""

# B sequences, T tokens, N tokens of a batch, D hidden, X units

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.reductions import BLOCKED, Reductions, angle_sum


def compiled(dtype: torch.dtype, aggregations: tuple[str, ...]) -> Reductions:
    """Kernels for activations of this dtype on a CPU, of any size; half a minute. Batches with padding go in blocks.

    Raises ConfigError when torch can't compile them, which needs a C++ compiler.
    """
    kernels = _load(dtype, tuple(sorted(aggregations)))

    def aggregate(values_BTX: Tensor, valid_BT: Tensor | None, aggregation: str) -> Tensor:
        if valid_BT is not None:
            return BLOCKED.aggregate(values_BTX, valid_BT, aggregation)
        return kernels[aggregation](values_BTX.contiguous())

    def angles(before_ND: Tensor, after_ND: Tensor) -> float:
        return kernels["angles"](before_ND.contiguous(), after_ND.contiguous()).item()

    return Reductions(aggregate, angles)


@functools.cache
def _load(dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Callable[..., Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compress.kernels", folder, str(dtype).removeprefix("torch."), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
            raise ConfigError(
                f"score.compile=true: torch's compiler failed ({reason}); set it false, or mend the C++ compiler"
            )
        return {name: _loaded(Path(folder) / f"{name}.pt2") for name in (*names, "angles")}


def _loaded(package: Path) -> Callable[..., Tensor]:
    # What torch._inductor.aoti_load_package wraps; that module alone takes 80 MB.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)  # type: ignore[attr-defined]
    return lambda *tensors: loader.run([*tensors])[0]


def _in_float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean(values_BTX: Tensor) -> Tensor:
    return _in_float(values_BTX).abs().mean(1)


def l2(values_BTX: Tensor) -> Tensor:
    return _in_float(values_BTX).square().sum(1).sqrt()


def variance(values_BTX: Tensor) -> Tensor:
    values_BTX = _in_float(values_BTX)
    return (values_BTX - values_BTX.mean(1, keepdim=True)).square().mean(1)


def angles(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    one_ND, other_ND = _in_float(before_ND), _in_float(after_ND)
    lengths = [values_ND.square().sum(-1).sqrt() for values_ND in (one_ND, other_ND, one_ND - other_ND)]
    return angle_sum(*lengths)


class _Module(nn.Module):
    """A function as torch.export wants it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def _compile(folder: Path, dtype: torch.dtype, names: list[str]) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    kernels: dict[str, tuple[Callable[..., Tensor], Any]] = {
        name: (globals()[name], (torch.rand(4, 512, 96).to(dtype),)) for name in names
    }
    kernels["angles"] = (angles, (torch.rand(2048, 96).to(dtype), torch.rand(2048, 96).to(dtype)))
    for name, (function, example) in kernels.items():
        shapes = (tuple(dict.fromkeys(range(tensor.ndim), dynamic) for tensor in example),)
        program = torch.export.export(_Module(function), example, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))


if __name__ == "__main__":
    _compile(Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3:])

"""Lets megatron-core 0.16 to 0.19 run on a CPU with gloo, for tests alone; nothing where there is a GPU.

It says "cuda" in some dozens of places, each of which is answered with the CPU. No arithmetic is changed. `python
tests/megatron_on_cpu.py ARGUMENTS` is `python -m compress ARGUMENTS` so.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_kept: list[Any] = []


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, str) and value.startswith("cuda")
    return CPU if named or (isinstance(value, torch.device) and value.type == "cuda") else value


class _CudaMeansCpu(TorchFunctionMode):
    """Literal device="cuda", .cuda(), and checks of .type()."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.to:
            args = tuple(_on_cpu(argument) for argument in args)
        return function(*args, **kwargs)


class _Stream:
    """What waits for nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return _Stream() if event is None else event

    def synchronize(self) -> None:
        pass


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's FusedAdam in plain torch: AdamW with its step in the group, without which Megatron-Core's
    distributed optimizer saves what it can't load."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, adam_w_mode: bool = True, **_: Any,
    ) -> None:  # fmt: skip
        assert adam_w_mode
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            one, two = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["exp_avg"].lerp_(gradient, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - one ** group["step"]))


def install() -> None:
    """Once in a process, before a model is built."""
    if torch.cuda.is_available() or _kept:
        return
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_, **__: _Stream()  # type: ignore[assignment,return-value]
    # Counts of tokens for each expert, which are made plain numbers only on their way from a GPU.
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        import megatron.core.optimizer as optimizers
        from megatron.core.optimizer import distrib_optimizer as sharing

        if optimizers.USING_PYTORCH_OPTIMIZER:
            optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = FusedAdam, False
            sharing.Adam, sharing.HAVE_APEX_OR_TE, sharing.USING_APEX_OPTIMIZER = FusedAdam, True, True
    mode = _CudaMeansCpu()
    mode.__enter__()
    _kept.append(mode)


if __name__ == "__main__":
    install()
    from compress.__main__ import main

    sys.exit(main())

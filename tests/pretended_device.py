"""`python pretended_device.py SETTINGS...`: `python -m compress` with its device_of saying `pretended`.

A device that torch takes for one of its accelerators and whose tensors lie in the machine's memory, behind a wrapper
that computes what it is asked, backward passes and collectives too, and refuses what CUDA refuses: operands on two
devices, but for numbers and for indices of a look-up. So what is left behind on the CPU is found without a GPU. What it
doesn't pretend: kernels of its own, streams, NCCL, FlexAttention and the memory that is free.

The last line of the output: how many matrix products were computed here, on the CPU, and there.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_LOOKUPS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::copy_", "aten::_to_copy")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
products: Counter[str] = Counter()


class _There(Tensor):
    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> _There:
        found: _There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Tensors that are made on the device have no operand of it that would tell."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor(numbers, device=) makes a tensor where no dispatch mode hears of it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in tensors if isinstance(one, _There)]
    if name in _PRODUCTS:
        products["there" if there else "here"] += 1
    if there and name not in _COPIES:
        _check_operands(function, args, kwargs, tensors)
    to_there = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type == NAME
    if to_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(Tensor, _inner, (args, kwargs))
    if name == "aten::histc":  # of whole numbers, which CUDA counts and a CPU doesn't
        inner_args = (inner_args[0].float(), *inner_args[1:])
    result = function(*inner_args, **inner_kwargs)
    if name == "aten::copy_":  # to wherever it was
        return args[0]
    if not (bool(there) if to_there is None else to_there):
        return result
    known = {id(one.inner): one for one in there}  # of what is changed in place
    return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else _There(one), result)


def _check_operands(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    name = function._schema.name
    for tensor in tensors:
        number = tensor.dim() == 0
        index = name in _LOOKUPS and tensor is not args[0] and tensor.dtype in (torch.int64, torch.bool)
        if not isinstance(tensor, _There) and not number and not index:
            raise RuntimeError(f"{name}: operands on {NAME} and on the CPU, of {tuple(tensor.shape)}")
    arguments = function._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    changed = [given.get(one.name) for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    if not all(isinstance(one, _There) for one in tree_leaves(changed)):
        raise RuntimeError(f"{name}: changes a tensor on the CPU by one on {NAME}")


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, _There) else tensor


class _Stream:
    """A stream and an event: nothing goes on beside anything else."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def record_event(self, _event: Any = None) -> _Stream:
        return self

    def record(self, _stream: Any = None) -> _Stream:
        return self


class _Module:
    """What torch and FSDP2 ask of a device's module."""

    Stream = Event = _Stream

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, _seed: int) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def current_stream(self, _device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, _stream: Any) -> Any:
        return contextlib.nullcontext()


def _pretend() -> None:
    """Before the device is first used."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # as with CUDA, tied weights stay tied when they move
    torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # whose operations come in larger pieces
    # The memory of what FSDP2 has gathered is kept: a wrapper has none of its own.
    _fsdp_param.free_storage = _fsdp_param.alloc_storage = lambda tensor: None  # type: ignore[assignment]
    from compress import devices, parallel

    devices.device_of = lambda choice: torch.device(NAME, 0)
    devices.attention_on = lambda *_: None
    parallel.backend = lambda: f"cpu:gloo,{NAME}:gloo"  # type: ignore[attr-defined]
    parallel.free_bytes = lambda device: parallel.available_bytes()


def main(settings: list[str]) -> None:
    _pretend()
    from compress.config import load_config
    from compress.pipeline import run

    torch.set_num_threads(1)
    # In this thread: another one dies where a saved layer is run again.
    with _Everywhere(), _Literals(), torch.autograd.set_multithreading_enabled(False):
        run(load_config(*settings))
    print(json.dumps({place: products[place] for place in ("here", "there")}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1:])

"""compress: score, prune, distil and prove a smaller language model.

The parts for notebooks, without Hydra: `load_config("recipe=tiny")`, `run(config)`, `estimate_importance`, `select`,
`slice_checkpoint`, `distillation_loss`. They are imported on first use, since torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load_config": "config",
    "run": "pipeline",
    "estimate_importance": "importance",
    "select": "slicing",
    "slice_checkpoint": "slicing",
    "distillation_loss": "objectives",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compress.{_HOME[name]}"), name)

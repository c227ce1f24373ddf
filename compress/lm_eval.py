"""One multiple-choice task from a local file through lm-eval's Python interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from compress.embedded import resolve
from compress.multiple_choice import PROMPT
from compress.settings import CompressConfig


def multiple_choice(
    config: CompressConfig, folder: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy on the first evaluate.lm_eval_items rows of a jsonl of {question, choices, label}.

    Returns {task: {accuracy, accuracy_normalized (by the choices' length), standard_error, num_items}}.
    """
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    items = Path(resolve(config.evaluate.lm_eval_path, Path(config.cache_dir).expanduser())).expanduser()
    task: dict[str, Any] = {
        "task": items.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(items)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT.replace("{", "{{").replace("}", "}}"),
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    arguments = {"pretrained": str(folder), "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=[task],
        limit=config.evaluate.lm_eval_items,
        batch_size=8,
        verbosity="ERROR",
    )
    found = results["results"][items.stem]
    return {
        items.stem: {
            "accuracy": found["acc,none"],
            "accuracy_normalized": found["acc_norm,none"],
            "standard_error": found["acc_stderr,none"],
            "num_items": results["n-samples"][items.stem]["effective"],
        }
    }

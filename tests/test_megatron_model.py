"""Megatron-Core's model of a folder computes what the Hugging Face one does, in every layout, packed documents too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import on_ranks
from families import make_batch, make_model, save_model

from compress.step import trunk

pytest.importorskip("megatron.core", reason="megatron-core isn't installed: pip install -e '.[megatron]'")
Case = tuple[str, dict[str, Any]]  # a folder, and the layout


def _as_hugging_face(cases: Sequence[Case]) -> None:
    """The last hidden states on every rank of the last stage. One process for many cases: most of it is imports."""
    import megatron_on_cpu

    megatron_on_cpu.install()
    for folder, layout in cases:
        try:
            _compare(Path(folder), layout)
        except Exception as error:
            raise AssertionError(f"{Path(folder).name} in {layout}") from error


def _compare(folder: Path, layout: dict[str, Any]) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from compress.folders import read_model
    from compress.megatron.batches import inputs_of, whole_sequences
    from compress.megatron.layout import Layout, process_groups
    from compress.megatron.model import build

    batch = make_batch(padded=True)
    with process_groups(Layout(**layout)) as groups, torch.no_grad():
        model = build(read_model(folder, False), groups, torch.float32).eval()

        def step(batches: Any, part: Any) -> Any:
            return part(**inputs_of(next(batches), groups)), lambda hidden, non_loss_data: hidden

        found = get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter([batch, batch]), model=[model], num_microbatches=2,
            seq_length=batch.input_ids.shape[1], micro_batch_size=len(batch.input_ids), forward_only=True,
            collect_non_loss_data=True,
        )  # fmt: skip
        assert len(found) == (2 if groups.is_last else 0)
        for hidden in found:
            ours, theirs = whole_sequences(hidden, groups), torch.load(folder / "expected.pt", weights_only=True)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6 * float(theirs.abs().max()))


def _folder(tmp_path: Path, variant: str, tied: bool = False, **sizes: Any) -> str:
    model = make_model(variant, tied, torch.float32, **sizes)
    folder = save_model(tmp_path / "-".join([variant, *sizes]), model)
    with torch.no_grad():
        torch.save(trunk(model, make_batch(padded=True)), folder / "expected.pt")
    return str(folder)


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def test_every_family_and_rotary_scaling_on_one_rank(tmp_path: Path) -> None:
    variants = ("llama-biases", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "qwen3_moe-normed")
    cases = [_folder(tmp_path, variant) for variant in variants]
    cases += [_folder(tmp_path / name, "llama", rope_parameters=parameters) for name, parameters in SCALED.items()]
    on_ranks(1, _as_hugging_face, [(case, {}) for case in cases])


EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 98}


def test_layouts_of_two_ranks(tmp_path: Path) -> None:
    dense = _folder(tmp_path, "llama", **EVEN)
    mixture = _folder(tmp_path, "qwen3_moe", **EVEN, num_experts=4)
    tied = _folder(tmp_path, "qwen3", tied=True)  # three key-value heads, 97 ids
    on_ranks(
        2,
        _as_hugging_face,
        [
            (dense, {"tensor": 2}),
            (dense, {"tensor": 2, "sequence": True}),
            (dense, {"pipeline": 2}),  # of five layers
            (dense, {"context": 2}),
            (tied, {"pipeline": 2}),
            (mixture, {"expert": 2}),
            (mixture, {"tensor": 2, "sequence": True, "expert": 2}),
        ],
    )


def test_layouts_of_four_ranks(tmp_path: Path) -> None:
    dense = _folder(tmp_path, "llama", **EVEN)
    shared = _folder(tmp_path, "qwen3", tied=True, num_attention_heads=4, num_key_value_heads=2)
    mixture = _folder(tmp_path, "qwen3_moe", **EVEN, num_experts=4)
    on_ranks(
        4,
        _as_hugging_face,
        [
            (dense, {"tensor": 2, "pipeline": 2}),
            (shared, {"tensor": 4}),  # two ranks for each key-value head, 97 ids over four
            (shared, {"tensor": 2, "pipeline": 2, "sequence": True}),
            (dense, {"tensor": 2, "sequence": True, "context": 2}),
            (mixture, {"pipeline": 2, "expert": 2}),
        ],
    )

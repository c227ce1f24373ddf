"""Mixtures of experts in training: routers in float32, the load of every expert, the balance loss, on any split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import on_ranks
from families import VARIANTS, make_batch, make_model, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from compress.importance import experts_of
from compress.models import cast_weights, decoder_layers, load_model
from compress.objectives.terms import Term
from compress.parallel import launched, shard, single_process_mesh
from compress.routing import DEAD_STEPS, Balance, ExpertLoad, routers_of, warn_of_dead
from compress.step import StepLoss, StudentModule, accumulate_gradients, trunk
from compress.teacher import Teacher
from compress.tokens import TokenBatch

MIXTURES = [name for name, (model_type, _) in VARIANTS.items() if model_type in ("mixtral", "qwen3_moe", "gpt_oss")]
TERMS = [Term("forward_kl")]
SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3}  # what bfloat16's kernels take
MIXTRAL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3}


def small(variant: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    own = SIZES if VARIANTS[variant][0] == "qwen3_moe" else MIXTRAL
    model = make_model(variant, dtype=torch.float32, seed=seed, **{**own, **sizes})
    model.set_experts_implementation("grouped_mm")
    return model


def watch(model: PreTrainedModel) -> tuple[list[dict[str, Any]], list[torch.dtype]]:
    """Of each call of a router, and of each call of the experts the dtype that they are given."""
    seen: list[dict[str, Any]] = []
    given: list[torch.dtype] = []

    def hook(router: Any, inputs: Any, output: Any) -> None:
        bias = getattr(router, "bias", torch.zeros(len(router.weight))).detach().clone()
        weight = router.weight.detach().clone()
        seen.append({"weight": weight, "bias": bias, "input": inputs[0].detach(), "logits": output[0]})

    for router in routers_of(model):
        router.register_forward_hook(hook)
    for layer in decoder_layers(model):
        experts_of(layer).register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].dtype))
    return seen, given


@pytest.mark.parametrize("variant", MIXTURES)
def test_routers_compute_in_float32_while_the_rest_computes_in_bfloat16(variant: str, tmp_path: Path) -> None:
    """The student's from its float32 master weights, the teacher's from what its folder holds, to the bit."""
    save_model(tmp_path / "teacher", small(variant, seed=1).bfloat16())
    teacher = load_model(tmp_path / "teacher", torch.bfloat16)
    model = small(variant, seed=2)
    masters = [router.weight.detach().clone() for router in routers_of(model)]
    held = [router.weight.detach().float() for router in routers_of(teacher)]
    with single_process_mesh() as mesh:
        student = StudentModule(model)
        shard(student, decoder_layers(model), mesh, torch.bfloat16)
        watched = watch(teacher), watch(model)
        accumulate_gradients(student, Teacher(teacher), [make_batch()], TERMS)
        for (seen, given), weights in zip(watched, (held, masters), strict=True):
            assert given == [torch.bfloat16] * 3, "the rest is in bfloat16"
            for call, weight in zip(seen, weights, strict=True):
                assert call["weight"].dtype == call["logits"].dtype == torch.float32
                assert torch.equal(call["weight"], weight)
                product = call["input"].double() @ weight.double().T + call["bias"].double()
                assert (call["logits"].double() - product).abs().max() < 1e-4
        assert not torch.equal(masters[0], masters[0].bfloat16().float()), "rounding would have been seen"
        for router in routers_of(model):
            assert router.weight.grad.dtype == torch.float32
            assert router.weight.grad.full_tensor().norm() > 0


def test_a_cast_model_and_one_loaded_in_the_dtype_say_the_same(tmp_path: Path) -> None:
    """What an export checks, and what a search compares by: also where the folder holds more than bfloat16."""
    save_model(tmp_path / "model", small("qwen3_moe"))
    loaded, cast = load_model(tmp_path / "model", torch.bfloat16), load_model(tmp_path / "model", torch.float32)
    cast_weights(cast, torch.bfloat16)
    batch = make_batch()
    with torch.inference_mode():
        assert torch.equal(trunk(loaded, batch), trunk(cast, batch))
    for router in routers_of(loaded):
        assert router.weight.dtype == torch.float32
        assert torch.equal(router.weight, router.weight.bfloat16().float())


# -- load and balance


def rig(model: PreTrainedModel, layer: int = 1) -> None:
    """The first expert of a layer is never among the two that are chosen: of a pair v, -v one is above its 0."""
    router = routers_of(model)[layer]
    with torch.no_grad():
        one_D, other_D = router.weight[1].clone(), router.weight[3].clone()
        router.weight.copy_(torch.stack([0 * one_D, one_D, -one_D, other_D, -other_D]))


def learner() -> PreTrainedModel:
    model = small("qwen3_moe", seed=2)
    rig(model)
    return model


def parts_of(batch: TokenBatch, size: int, ranks: int = 1, rank: int = 0) -> list[TokenBatch]:
    share = len(batch.input_ids) // ranks
    return [batch.rows(start, start + size) for start in range(rank * share, (rank + 1) * share, size)]


def two_steps(size: int, weight: float, dtype: torch.dtype = torch.float32) -> tuple[StepLoss, dict[str, Tensor]]:
    """The same global batch twice, without an update: in the second the shares of the step before are its own."""
    ranks = launched()
    teacher, model = Teacher(small("qwen3_moe", seed=1).to(dtype)), learner()
    student = StudentModule(model)
    balance = Balance(weight, student.routers) if weight else None
    shard(student, decoder_layers(model), init_device_mesh("cpu", (ranks.size,)), dtype)
    parts = parts_of(make_batch(8, padded=True), size, ranks.size, ranks.rank)
    for _ in range(2):
        for parameter in student.parameters():
            parameter.grad = None
        found = accumulate_gradients(student, teacher, parts, TERMS, ranks, balance=balance)
    return found, {name: p.grad.full_tensor().clone() for name, p in student.named_parameters()}


def write_steps(folder: Path, sizes: list[int], dtype: torch.dtype = torch.float32) -> None:
    for size in sizes:
        found, gradients = two_steps(size, 0.5, dtype)
        assert found.experts is not None
        facts = torch.tensor([found.loss, found.experts.balance_loss], dtype=torch.float64)
        name = f"{size}-{launched().size}-{launched().rank}.safetensors"
        save_file({**gradients, "counts": found.experts.counts_LE, "facts": facts}, folder / name)


@pytest.mark.slow
def test_load_and_balance_are_the_same_for_every_split(tmp_path: Path) -> None:
    """Over micro-batches and ranks, with padding, and with an expert that no token of any of them chooses."""
    on_ranks(1, write_steps, tmp_path, [8, 1, 4])
    on_ranks(2, write_steps, tmp_path, [1, 4])
    whole = load_file(tmp_path / "8-1-0.safetensors")
    valid = int(make_batch(8, padded=True).valid_mask.sum())
    assert valid < make_batch(8).valid_mask.sum()
    assert whole["counts"].sum(1).tolist() == [2 * valid] * 3
    assert (whole["counts"] == 0).nonzero().tolist() == [[1, 0]]
    others = [path for path in tmp_path.glob("*.safetensors") if path.name != "8-1-0.safetensors"]
    assert len(others) == 2 + 2 * 2
    for path in others:
        split = load_file(path)
        assert torch.equal(split.pop("counts"), whole["counts"]), path.name
        torch.testing.assert_close(split.pop("facts"), whole["facts"], rtol=1e-6, atol=0)
        for name, gradient in split.items():
            assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), (path.name, name)


@pytest.mark.slow
def test_routers_that_are_units_of_their_own_are_reduced_over_the_ranks(tmp_path: Path) -> None:
    """In bfloat16 too two ranks accumulate and reduce what one accumulates, micro-batch by micro-batch."""
    for size in (1, 2):
        on_ranks(size, write_steps, tmp_path, [4], torch.bfloat16)
    whole, split = (load_file(tmp_path / f"4-{size}-0.safetensors") for size in (1, 2))
    assert torch.equal(split["counts"], whole["counts"])
    for name, gradient in split.items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(dtype: torch.dtype) -> None:
    on_ranks(1, check_dead_expert, dtype)


def check_dead_expert(dtype: torch.dtype) -> None:
    _, gradients = two_steps(4, 0.0, dtype)
    for name in ("gate_up_proj", "down_proj"):
        gradient = gradients[f"model.model.layers.1.mlp.experts.{name}"]
        assert bool((gradient[0] == 0).all())
        assert all(bool(gradient[expert].norm() > 0) for expert in range(1, 5))


@pytest.mark.slow
def test_the_balance_loss_is_transformers_own(tmp_path: Path) -> None:
    """Layer by layer, as the paper has it; its gradient too, where the step before had the same load."""
    on_ranks(1, check_against_transformers)


def check_against_transformers() -> None:
    batch, model = make_batch(8, padded=True), learner()
    seen, _ = watch(model)
    trunk(model, batch)
    losses = [
        load_balancing_loss_func((call["logits"],), num_experts=5, top_k=2, attention_mask=batch.valid_mask)
        for call in seen
    ]
    expected = torch.stack(losses).mean()
    expected.backward()
    (plain, without), (found, gradients) = two_steps(4, 0.0), two_steps(4, 0.5)
    assert found.experts is not None
    assert plain.experts is not None
    assert found.experts.balance_loss == pytest.approx(expected.item(), rel=1e-6)
    assert plain.experts.balance_loss == found.experts.balance_loss
    assert found.loss == pytest.approx(plain.loss + 0.5 * expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # the head
            continue
        added = gradients[f"model.{name}"] - without[f"model.{name}"]
        scale = max(without[f"model.{name}"].norm(), parameter.grad.norm())
        assert (added - 0.5 * parameter.grad).norm() <= 1e-5 * scale, name


def test_the_figures_are_of_the_worst_layer() -> None:
    counts_LE = torch.tensor([[5.0, 5.0, 5.0, 5.0], [16.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    figures = ExpertLoad(counts_LE, torch.full((2, 4), 2.5, dtype=torch.float64), 10).figures()
    assert figures == {"max_load_ratio": 3.2, "num_dead": 2, "balance_loss": 2.0}


def test_an_expert_that_stays_dead_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    counts_LE, idle_LE = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.zeros(())
    with caplog.at_level(logging.WARNING):
        for step in range(1, 3 * DEAD_STEPS):
            counts_LE[1, 0] = float(step != 5)  # once without a token is no death
            idle_LE = warn_of_dead(idle_LE, counts_LE)
            assert len(caplog.records) == (step >= DEAD_STEPS), step
    assert "1 experts had no token for 20 steps: 1 of layer 0; set distill.balance_loss" in caplog.text

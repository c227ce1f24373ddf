"""The gradient of a global batch is the same for every split into micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from compress.objectives.chunked import SparseSignal
from compress.objectives.terms import Term
from compress.parallel import launched, shard, single_process_mesh
from compress.step import StudentModule, accumulate_gradients
from compress.teacher import Teacher
from compress.tokens import TokenBatch

SIZES = {"vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def _model(hidden: int, layers: int, seed: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=40, num_hidden_layers=layers, tie_word_embeddings=tied, **SIZES
    )
    return LlamaForCausalLM(config)


def _batch() -> TokenBatch:
    """Eight packed rows with ragged masks; row 5 has no loss token at all."""
    torch.manual_seed(3)
    ids = torch.randint(0, 61, (8, 12))
    starts = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]]).expand(8, 12).bool()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]).expand(8, 12)
    mask = torch.rand(8, 12) < torch.linspace(0.2, 1, 8)[:, None]
    mask &= ~torch.roll(starts, -1, 1)
    mask[:, -1] = False
    mask[5] = False
    return TokenBatch(ids, positions, mask, torch.ones_like(mask))


def _part(batch: TokenBatch, rows: slice) -> TokenBatch:
    return batch.rows(rows.start, rows.stop)


def _gradients(tied: bool, size: int, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    batch = _batch()
    with single_process_mesh() as mesh:
        teacher = Teacher(_model(32, 3, seed=1, tied=tied).to(dtype))
        student = StudentModule(_model(16, 2, seed=2, tied=tied))
        shard(student, student.model.model.layers, mesh, dtype)
        parts = [_part(batch, slice(i, i + size)) for i in range(0, 8, size)]
        found = accumulate_gradients(student, teacher, parts, [Term("forward_kl")])
        assert found.num_tokens == int(batch.loss_mask.sum())
        return found.loss, {n: p.grad.full_tensor().clone() for n, p in student.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradient_is_the_same_for_every_split(tied: bool, size: int) -> None:
    loss, gradients = _gradients(tied, 8, torch.float32)
    split_loss, split = _gradients(tied, size, torch.float32)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (split[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


TERMS = [
    Term("forward_kl"),
    Term("cross_entropy", weight=0.3),
    Term("bild", weight=0.2, temperature=3.0, squared=True, k=4),
    Term("span_relation", weight=5.0),
]
SPLITS = [(size, ranks) for ranks in (1, 2) for size in (1, 2, 4, 8) if size * ranks <= 8]  # accumulated 8 / both times


def _write_split(folder: Path, size: int, masked: bool) -> None:
    """This rank's micro-batches of the eight rows, and what came out of all ranks' together."""
    ranks, batch = launched(), _batch()
    if masked:  # as far as the first of two ranks is concerned: nothing to learn
        batch.loss_mask[:4] = False
    share = 8 // ranks.size
    starts = range(ranks.rank * share, (ranks.rank + 1) * share, size)
    teacher, student = Teacher(_model(32, 3, seed=1, tied=True)), StudentModule(_model(16, 2, seed=2, tied=True))
    shard(student, student.model.model.layers, init_device_mesh("cpu", (ranks.size,)), torch.float32)
    parts = [_part(batch, slice(start, start + size)) for start in starts]
    found = accumulate_gradients(student, teacher, parts, TERMS, ranks)
    gradients = {name: p.grad.full_tensor().clone() for name, p in student.named_parameters()}
    facts = torch.tensor([found.loss, *found.terms, float(found.num_tokens)], dtype=torch.float64)
    save_file({**gradients, "facts": facts}, folder / f"{masked}-{size}-{ranks.size}-{ranks.rank}.safetensors")


def _write_splits(folder: Path) -> None:
    for masked in (False, True):
        for size, ranks in SPLITS:
            if ranks == launched().size:
                _write_split(folder, size, masked)


@pytest.mark.slow
def test_every_split_over_micro_batches_accumulation_and_ranks_is_one_gradient(tmp_path: Path) -> None:
    """Eight sequences, ragged masks, one rank with nothing to learn; several terms with counts of their own."""
    for size in (1, 2):
        on_ranks(size, _write_splits, tmp_path)
    for masked in (False, True):
        whole = load_file(tmp_path / f"{masked}-8-1-0.safetensors")
        assert whole["facts"][-1] == (_batch().loss_mask[4:] if masked else _batch().loss_mask).sum()
        others = [path for path in tmp_path.glob(f"{masked}-*") if path.name != f"{masked}-8-1-0.safetensors"]
        assert len(others) == 3 + 2 * 3
        for path in others:
            split = load_file(path)
            torch.testing.assert_close(split.pop("facts"), whole["facts"], rtol=1e-6, atol=0)
            for name, gradient in split.items():
                assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), (path.name, name)


def test_bfloat16_accumulates_in_float32() -> None:
    """Micro-batches' gradients differ by bfloat16 rounding of each, not by a bfloat16 running sum."""
    _, exact = _gradients(True, 8, torch.float32)
    _, split = _gradients(True, 1, torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in split.values())
    for name, gradient in exact.items():
        assert (split[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_the_memory_of_gradients_is_used_again_but_never_under_one_that_is_there() -> None:
    """At one rank: freed gradients leave their memory to the next step's, and unfreed ones are added to."""
    batch = _batch()
    with single_process_mesh() as mesh:
        teacher, student = Teacher(_model(32, 3, seed=1, tied=True)), StudentModule(_model(16, 2, seed=2, tied=True))
        shard(student, student.model.model.layers, mesh, torch.bfloat16)

        def step(rows: slice) -> list[torch.Tensor]:
            accumulate_gradients(student, teacher, [_part(batch, rows)], [Term("forward_kl")])
            return [p.grad.to_local() for p in student.parameters()]

        def free() -> None:
            for parameter in student.parameters():
                parameter.grad = None

        one = [gradient.clone() for gradient in step(slice(0, 4))]
        free()
        other = [gradient.clone() for gradient in step(slice(4, 8))]
        for both, first, second in zip(step(slice(0, 4)), one, other, strict=True):  # nobody freed the last ones
            torch.testing.assert_close(both, first + second)
        free()
        places = [gradient.data_ptr() for gradient in step(slice(0, 4))]
        free()
        for place, gradient, expected in zip(places, step(slice(4, 8)), other, strict=True):
            assert gradient.data_ptr() == place
            assert torch.equal(gradient, expected)


def test_gradient_equals_the_textbook_on_a_plain_model() -> None:
    """The whole step, sharded and chunked, against autograd on full logits of unwrapped models."""
    batch = _batch()
    teacher, student = _model(32, 3, seed=1, tied=True), _model(16, 2, seed=2, tied=True)
    arguments = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    log_p = torch.log_softmax(teacher(**arguments).logits[batch.loss_mask], -1).detach()
    log_q = torch.log_softmax(student(**arguments).logits[batch.loss_mask], -1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss.backward()
    ours, gradients = _gradients(True, 2, torch.float32)
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert (gradients[f"model.{name}"] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_asking_the_teacher_about_everything_first_changes_nothing() -> None:
    """Nor does what it holds: the gradient is bit for bit that of asking in between."""
    batch, found = _batch(), []
    for whole_window in (False, True):
        student = StudentModule(_model(16, 2, seed=2, tied=True))
        teacher = Teacher(_model(32, 3, seed=1, tied=True))
        parts = [_part(batch, slice(i, i + 2)) for i in range(0, 8, 2)]
        loss = accumulate_gradients(student, teacher, parts, TERMS, whole_window=whole_window)
        found.append((loss.loss, [p.grad for p in student.parameters()]))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_the_teacher_gets_no_gradient_and_no_state() -> None:
    student = StudentModule(_model(16, 2, seed=2, tied=True))
    teacher = Teacher(_model(32, 3, seed=1, tied=True))
    accumulate_gradients(student, teacher, [_batch()], [Term("forward_kl")])
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert {n for n, _ in student.named_parameters()} == {f"model.{n}" for n, _ in student.model.named_parameters()}


def _padded(model: LlamaForCausalLM, rows: int) -> LlamaForCausalLM:
    """The same model with as many random rows more in its vocabulary, the first of them always the same."""
    generator, size = torch.Generator().manual_seed(7), SIZES["vocab_size"]
    model.resize_token_embeddings(int(size) + rows, mean_resizing=False)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight[int(size) :] = torch.randn(8, weight.shape[1], generator=generator)[:rows]
    return model


@pytest.mark.parametrize(("ours", "theirs"), [(3, 0), (0, 3), (5, 2)])
def test_rows_of_padding_count_for_nothing(ours: int, theirs: int) -> None:
    """Both models, padded to different sizes: the loss is that over common rows, what is beyond gets no gradient."""
    common = min(ours, theirs)
    found = []
    for mine, other in ((ours, theirs), (common, common)):
        teacher = Teacher(_padded(_model(32, 3, seed=1, tied=True), other))
        model = _padded(_model(16, 2, seed=2, tied=False), mine)
        loss = accumulate_gradients(StudentModule(model), teacher, [_batch()], TERMS)
        found.append((loss.terms, {name: p.grad for name, p in model.named_parameters()}))
    (padded, gradients), (plain, expected) = found
    assert padded == pytest.approx(plain, rel=1e-6)
    rows = SIZES["vocab_size"] + common
    for name, gradient in gradients.items():
        assert gradient is not None
        assert not gradient[rows:].any() or "layers" in name, name
        part = gradient if "layers" in name else gradient[:rows]
        torch.testing.assert_close(part, expected[name])


def test_a_cached_teacher_s_vocabulary_bounds_the_student_s() -> None:
    """Rows of padding that only the student has count for nothing, for the text's own labels too."""
    batch, rows = _batch(), int(SIZES["vocab_size"])
    count = int(batch.loss_mask.sum())
    ids_NK = torch.randint(rows, (count, 3), generator=torch.Generator().manual_seed(0))
    signal = SparseSignal("sample", ids_NK, torch.full((count, 3), 1 / 3), torch.ones(count), rows)
    terms, found = [Term("forward_kl"), Term("cross_entropy")], []
    for more in (0, 4):
        student = StudentModule(_padded(_model(16, 2, seed=2, tied=False), more))
        loss, sums, _ = student(batch, signal, terms, [1.0, 1.0])
        found.append(sums)
        loss.backward()
        gradient = student.model.lm_head.weight.grad
        assert gradient is not None
        assert not gradient[rows:].any()
    torch.testing.assert_close(found[0], found[1])

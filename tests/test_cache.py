"""The cached teacher: what is drawn is unbiased, what is stored comes back by content, and a run on it is a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import cache as stage
from compress import distill
from compress.config import load_config
from compress.errors import ArtifactError, CompressError, ConfigError, NumericalError
from compress.models import OutputHead
from compress.objectives.chunked import DenseSignal, Signal, SparseSignal, Targets, chunked_loss
from compress.objectives.terms import Term
from compress.phases import phases_of
from compress.settings import CompressConfig
from compress.signals import Form, Said, SignalCache, draw, keys_of, pack, say, shard_facts, unpack
from compress.teacher import CachedTeacher
from compress.tokens import SequenceOrder, TokenBatch, TokenSet
from compress.training import phase_orders

SMALL = ("cache.sequences_per_shard=8", "teacher.mode=cached")
WHOLE = ("cache.kind=top_k", "cache.k=512", "distill.objectives=[{objective: top_k_kl, k: 512}]")


def _random(tokens: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, OutputHead]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, 8, generator=generator) for size in (tokens, vocabulary))
    return hidden, OutputHead(weight)


def _said(seed: int, hidden: torch.Tensor, head: OutputHead, form: Form) -> SparseSignal:
    """As a cache would give it back."""
    record = pack(say(hidden, head, form, seed, b"0123456789abcdef"), form)
    back = unpack(np.frombuffer(record, dtype=np.uint8), len(hidden), form)
    return SparseSignal(form.kind, back.ids_NK, back.probabilities_NK, back.entropy_N)


# -- drawing and packing


@pytest.mark.parametrize("vocabulary", [2, 61, 256, 257, 1000])
def test_ids_are_drawn_as_often_as_their_weights_say(vocabulary: int) -> None:
    """Every id's count lies within 5 standard deviations; a weight of 0, first, last or a whole block, never comes."""
    weights = torch.rand(1, -(-vocabulary // 256) * 256, generator=torch.Generator().manual_seed(1)) ** 3
    weights[:, vocabulary:] = 0
    if vocabulary > 2:
        weights[:, [0, vocabulary - 1]] = 0
    if vocabulary > 512:
        weights[:, :256] = 0
    uniforms = torch.rand(1, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniforms[0, :2] = torch.tensor([0.0, 1 - 2**-53])
    counts = torch.bincount(draw(weights.view(1, -1, 256), uniforms)[0], minlength=weights.shape[1]).double()
    p = weights[0].double() / weights.sum()
    assert not counts[p == 0].any()
    assert ((counts - 200_000 * p).abs() <= 5 * (200_000 * p * (1 - p)).sqrt() + 3).all()


@pytest.mark.parametrize("kind", ["sample", "top_k"])
@pytest.mark.parametrize(("size", "vocabulary"), [(1, 1), (1, 2), (12, 61), (7, 257), (12, 128_256), (40, 300_000)])
def test_what_is_packed_comes_back(kind: str, size: int, vocabulary: int) -> None:
    size = min(size, vocabulary) if kind == "top_k" else size
    form = Form(kind, size, vocabulary)
    hidden, head = _random(5, vocabulary)
    said = say(hidden, head, form, 3, b"0123456789abcdef")
    back = unpack(np.frombuffer(pack(said, form), dtype=np.uint8), 5, form)
    p = (hidden @ head.weight_VD.T).softmax(-1)
    assert torch.equal(back.entropy_N, said.entropy_N)
    torch.testing.assert_close(back.entropy_N, torch.special.entr(p).sum(-1), rtol=1e-3, atol=1e-4)
    if kind == "top_k":
        torch.testing.assert_close(back.probabilities_NK, p.gather(-1, back.ids_NK))
        largest = p.topk(size).values.sort(-1).values
        torch.testing.assert_close(back.probabilities_NK.sort(-1).values, largest)
        assert all(len(set(row)) == size for row in back.ids_NK.tolist())
        return
    for drawn, ids, probabilities in zip(said.ids_NK, back.ids_NK, back.probabilities_NK, strict=True):
        expected = torch.bincount(drawn, minlength=vocabulary) / size
        found = torch.zeros(vocabulary).index_add_(0, ids, probabilities)
        torch.testing.assert_close(found, expected)
        used = ids[probabilities > 0].tolist()
        assert used == sorted(set(used)), "an id is kept once, with its count"


def test_a_sample_depends_on_seed_and_content_alone() -> None:
    form = Form("sample", 12, 500)
    hidden, head = _random(6, 500)
    one, again, other_seed, other_key = (
        say(hidden, head, form, seed, key).ids_NK for seed, key in [(0, b"a"), (0, b"a"), (1, b"a"), (0, b"b")]
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other_seed)
    assert not torch.equal(one, other_key)


def test_a_banned_token_is_harmless_and_a_poisoned_logit_is_not() -> None:
    hidden, head = _random(4, 300)
    form = Form("sample", 12, 300)
    for value, finite in ((-torch.inf, True), (torch.nan, False), (torch.inf, False)):
        bias = torch.zeros(300)
        bias[5] = value
        said = say(hidden, OutputHead(head.weight_VD, bias_V=bias), form, 0, b"a")
        assert bool(said.entropy_N.isfinite().all()) == finite
        if finite:
            assert not (said.ids_NK == 5).any()


def test_bytes_a_token_for_a_large_vocabulary() -> None:
    """12 draws of the 128,256 ids of Llama 3: at most 11 bits of counts, 12 x 17 of ids and 32 of entropy."""
    form = Form("sample", 12, 128_256)
    torch.manual_seed(0)
    flat = say(torch.zeros(64, 8), OutputHead(torch.randn(128_256, 8)), form, 0, b"a")
    assert len(pack(flat, form)) <= 64 * 31, "nearly all ids distinct, the worst case"
    head = torch.zeros(128_256, 1)
    head[7] = 50
    peaked = say(torch.ones(64, 1), OutputHead(head), form, 0, b"a")
    assert len(pack(peaked, form)) <= 64 * 8, "one id says it all"


# -- unbiasedness


def _gradients(signal: Signal, student: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    student, head = student.clone().requires_grad_(), head.clone().requires_grad_()
    none = torch.zeros(len(student), dtype=torch.int64)
    loss, _ = chunked_loss(student, OutputHead(head), signal, Targets(none, none.bool()), [Term("forward_kl")])
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, [student, head])]).double()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_of_a_sample_is_its_formula(temperature: float, chunk: int | None) -> None:
    """Value and gradients against autograd, in the path of its own (temperature 1) and in the general one."""
    form = Form("sample", 7, 90)
    signal = _said(0, *_random(8, 90, seed=1), form)
    hidden, student_head = _random(8, 90, seed=2)
    inputs = [hidden.double().requires_grad_(), student_head.weight_VD.double().requires_grad_()]
    none = torch.zeros(8, dtype=torch.int64)
    term = Term("forward_kl", temperature=temperature)
    loss, sums = chunked_loss(
        inputs[0], OutputHead(inputs[1]), signal, Targets(none, none.bool()), [term], [0.3], chunk_tokens=chunk
    )
    log_q = (inputs[0] @ inputs[1].T / temperature).log_softmax(-1)
    taken = (signal.probabilities_NK.double() * log_q.gather(-1, signal.ids_NK)).sum()
    expected = -taken - signal.entropy_N.double().sum()
    torch.testing.assert_close(sums[0], expected.detach())
    theirs = torch.autograd.grad(0.3 * expected, inputs)
    for mine, other in zip(torch.autograd.grad(loss, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_gradient_is_unbiased_and_its_error_falls_as_the_root_of_the_draws() -> None:
    """In 20 fixed directions the mean over caches lies within 4 standard errors of the dense gradient; the error of a
    mean of M caches is 1 / sqrt(M) of one's, and so is that of M times as many draws."""
    teacher, teacher_head = _random(6, 90, seed=1)
    student, student_head = _random(6, 90, seed=2)
    dense = _gradients(DenseSignal(teacher, teacher_head), student, student_head.weight_VD)
    directions = torch.randn(20, len(dense), generator=torch.Generator().manual_seed(5)).double()

    def errors(draws: int, caches: int, first: int) -> torch.Tensor:
        form = Form("sample", draws, 90)
        seeds = range(first, first + caches)
        found = [_gradients(_said(s, teacher, teacher_head, form), student, student_head.weight_VD) for s in seeds]
        return torch.stack(found) - dense

    few = errors(12, 400, 0)
    along = few @ directions.T
    assert (along.mean(0).abs() <= 4 * along.std(0) / 400**0.5).all()

    def size(errors: torch.Tensor) -> float:
        return float(errors.norm(dim=1).square().mean().sqrt())

    assert size(few.view(16, 25, -1).mean(1)) == pytest.approx(size(few) / 5, rel=0.2)
    assert size(errors(108, 50, 10_000)) == pytest.approx(size(few) / 3, rel=0.1)


def test_the_loss_is_unbiased_too() -> None:
    """Cross-entropy against the draws less the stored entropy: the mean over caches is the KL."""
    teacher, teacher_head = _random(6, 90, seed=1)
    student, student_head = _random(6, 90, seed=2)
    none = torch.zeros(6, dtype=torch.int64)

    def loss(signal: Signal) -> float:
        targets = Targets(none, none.bool())
        return float(chunked_loss(student, student_head, signal, targets, [Term("forward_kl")])[0])

    form = Form("sample", 12, 90)
    found = torch.tensor([loss(_said(seed, teacher, teacher_head, form)) for seed in range(300)]).double()
    expected = loss(DenseSignal(teacher, teacher_head))
    assert abs(found.mean() - expected) <= 4 * found.std() / 300**0.5


# -- the stage


def _config(cache: Path, run_dir: Path, *overrides: str) -> CompressConfig:
    return load_config(*FAST, f"run_dir={run_dir}", f"cache_dir={cache}", *SMALL, *overrides)


@pytest.fixture(scope="module")
def cached_source(cache: Path, finished_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and student of the finished run, and caches of them: look, don't touch."""
    folder = tmp_path_factory.mktemp("cached") / "run"
    for name in ("tokens", "score", "prune"):
        shutil.copytree(finished_source / name, folder / name)
    stage.run(_config(cache, folder), folder)
    return folder


@pytest.fixture
def cached(cached_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached_source, tmp_path / "run"))


def _drawn(config: CompressConfig, run_dir: Path) -> tuple[TokenSet, SequenceOrder]:
    """The training tokens, and the order of the only phase."""
    data = TokenSet.open(run_dir / "tokens" / "train")
    [order] = phase_orders(config, data, phases_of(config))
    return data, order


def _files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "index.json"}


def test_every_drawn_sequence_is_there_once_and_the_report_adds_up(cached_source: Path, cache: Path) -> None:
    data, order = _drawn(_config(cache, cached_source), cached_source)
    found = SignalCache(cached_source / "cache")
    assert found.indices.tolist() == list(dict.fromkeys(order.indices(0, order.num_sequences_total).tolist()))
    report = json.loads((cached_source / "cache" / "report.json").read_text())
    assert report["loss_tokens"] == data.loss_tokens[found.indices].sum()
    size = sum(f.stat().st_size for f in (cached_source / "cache").iterdir() if f.name != "report.json")
    assert report["bytes"] == size
    assert report["bytes_per_token"] == pytest.approx(size / report["loss_tokens"])
    assert 1 <= report["mean_distinct_ids"] <= 12


def test_the_same_signal_for_every_batch_size_and_order(cached_source: Path, cache: Path) -> None:
    """Reading: row by row what any batch says. Writing: another micro-batch and shard size, the same samples."""
    data, order = _drawn(_config(cache, cached_source), cached_source)
    teacher = CachedTeacher(SignalCache(cached_source / "cache"))
    indices = order.indices(0, 12)
    whole = teacher.signal(data.batch(indices))
    parts = [teacher.signal(data.batch(indices[i : i + 1])) for i in range(12)]
    shuffled = teacher.signal(data.batch(indices[::-1]))
    for name in ("ids_NK", "probabilities_NK", "entropy_N"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert torch.equal(torch.cat([getattr(p, name) for p in parts[::-1]]), getattr(shuffled, name))
    assert len(whole.ids_NK) == int(data.batch(indices).loss_mask.sum())
    torch.testing.assert_close(whole.probabilities_NK.sum(-1), torch.ones(len(whole.ids_NK)))


def test_how_it_was_written_changes_no_sample(cached_source: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(cached_source / "tokens", other / "tokens")
    stage.run(_config(cache, other, "cache.micro_batch_size=1", "cache.sequences_per_shard=5"), other)
    data, order = _drawn(_config(cache, other), other)
    one, two = (
        SignalCache(folder / "cache").read(data.batch(order.indices(0, 16))) for folder in (cached_source, other)
    )
    # The trunk's products round by how many rows they have; a draw on the very edge of two ids may fall elsewhere.
    same = (one.ids_NK == two.ids_NK).all(-1) & (one.probabilities_NK == two.probabilities_NK).all(-1)
    assert same.float().mean() > 0.995
    torch.testing.assert_close(one.entropy_N, two.entropy_N, rtol=1e-4, atol=1e-5)


def test_keys_are_of_content(cached_source: Path) -> None:
    batch = TokenSet.open(cached_source / "tokens" / "train").batch([0, 1, 0])
    first, second, third = keys_of(batch)
    assert first == third != second
    for name in ("input_ids", "position_ids", "loss_mask"):
        changed = getattr(batch, name).clone()
        changed[0, 3] = ~changed[0, 3] if changed.dtype == torch.bool else changed[0, 3] + 1
        assert keys_of(dataclasses.replace(batch, **{name: changed}))[0] != first
    changed = dataclasses.replace(batch, valid_mask=~batch.valid_mask)
    assert keys_of(changed)[0] == first, "what the model isn't given doesn't count"


@pytest.mark.slow
def test_a_killed_stage_goes_on_to_the_same_bytes(
    spawn: Callable[..., subprocess.Popen[str]], cache: Path, finished: Path
) -> None:
    folder, longer = finished / "cache", ("distill.num_tokens=16384", "cache.micro_batch_size=1")
    for later in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / later)
    process = spawn(*SMALL, *longer, "stage=cache")
    while not list(folder.glob("shard-*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = {f.name: f.stat().st_mtime_ns for f in folder.glob("shard-*.safetensors")}
    assert not (folder / "index.json").exists(), "it was killed before the end"
    config = _config(cache, finished, *longer)
    stage.run(config, finished)
    assert all((folder / name).stat().st_mtime_ns == at for name, at in made.items()), "whole shards were kept"
    again = _files(folder)
    shutil.rmtree(folder)
    stage.run(config, finished)
    assert _files(folder) == again
    assert len(again) > 20


def test_shards_of_other_settings_are_made_anew(cached: Path, cache: Path, cached_source: Path) -> None:
    stage.run(_config(cache, cached, "cache.num_samples=3", "cache.sequences_per_shard=4"), cached)
    made = [shard_facts(file) or {} for file in (cached / "cache").glob("shard-*.safetensors")]
    assert {(facts["made_by"]["size"], facts["sums"]["loss_tokens"] > 0) for facts in made} == {(3, True)}
    stage.run(_config(cache, cached), cached)
    assert _files(cached / "cache") == _files(cached_source / "cache"), "and nothing is left of the others"


def test_a_poisoned_teacher_is_named_with_sequence_and_token(cached: Path, cache: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    data, order = _drawn(_config(cache, cached), cached)
    # The embedding of a token that isn't in the first sequences.
    batch = data.batch(order.distinct())
    token = next(t for t in range(512) if not (batch.input_ids[:5] == t).any() and (batch.input_ids == t).any())
    row = int((batch.input_ids == token).any(1).nonzero()[0])
    tensors["model.embed_tokens.weight"][token] = torch.nan
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(cached / "cache")
    with pytest.raises(NumericalError) as caught:
        stage.run(_config(cache, cached, f"teacher.path={teacher}"), cached)
    assert row >= 5
    assert f" of training sequence {order.distinct()[row]} (" in str(caught.value)
    assert not (cached / "cache" / "index.json").exists()


def test_the_token_that_is_not_finite_is_named_by_its_place_in_the_sequence() -> None:
    mask = torch.tensor([[True] * 4, [False, True, False, True]])
    batch = TokenBatch(mask.long(), mask.long(), mask, mask)
    none = torch.zeros(2, 0)
    said = Said(none.long(), none, torch.tensor([0.5, torch.nan]))
    with pytest.raises(NumericalError, match=r"not finite at token 3 of training sequence 77 \(1 such in it\)"):
        stage._check_finite(said, batch, 1, 77)


# -- refusals


def _refusal(config: CompressConfig, run_dir: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        distill.run(config, run_dir)
    assert not (run_dir / "distill").exists(), "refused before training"
    return str(caught.value)


def test_a_cache_of_another_teacher_tokenizer_or_text_is_refused(cached: Path, cache: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    save_file({n: t * 1.01 for n, t in tensors.items()}, teacher / "model.safetensors", metadata={"format": "pt"})
    found = _refusal(_config(cache, cached, f"teacher.path={teacher}"), cached)
    assert f"{cached / 'cache'} is a cache of another teacher" in found
    assert "run stage=cache again" in found
    index = cached / "cache" / "index.json"
    content = json.loads(index.read_text())
    for what, said in (("tokenizer", "another tokenizer"), ("tokens", "other text")):
        changed = {**content, "made_from": {**content["made_from"], what: "0" * 64}}
        index.write_text(json.dumps(changed))
        assert f"is a cache of {said}" in _refusal(_config(cache, cached), cached)


def test_a_cache_of_fewer_sequences_is_refused_and_of_more_is_taken(cached: Path, cache: Path) -> None:
    longer = _config(cache, cached, "distill.num_tokens=16384")
    assert "sequences that training will draw" in _refusal(longer, cached)
    stage.check(_config(cache, cached, "distill.num_tokens=2048"), cached)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_shard_is_refused(damage: str, cached: Path, cache: Path) -> None:
    path = cached / "cache" / "shard-00001.safetensors"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if damage == "cut" else content[:-7] + b"\0\1" + content[-5:])
    found = _refusal(_config(cache, cached), cached)
    assert f"{path} is {'missing' if damage == 'gone' else 'cut short or changed'}" in found
    assert "run stage=cache again" in found
    path.unlink(missing_ok=True)
    stage.run(_config(cache, cached), cached)
    assert path.read_bytes() == content, "the remedy mends it"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format_version": 2}, "has format_version 2, this release reads 1"),
        ({"shards": []}, "is no index of a teacher's signals"),
        (None, "is missing; run stage=cache"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(
    content: dict[str, Any] | None, said: str, cached: Path, cache: Path
) -> None:
    index = cached / "cache" / "index.json"
    if content is None:
        index.unlink()
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), **content}))
    assert said in _refusal(_config(cache, cached), cached)


def test_a_sequence_that_is_not_there_is_named(cached_source: Path) -> None:
    batch = TokenSet.open(cached_source / "tokens" / "train").batch([0])
    batch.input_ids[0, 0] += 1
    with pytest.raises(ArtifactError, match=r"nothing of a sequence .* other text; delete the folder"):
        CachedTeacher(SignalCache(cached_source / "cache")).signal(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("distill.objectives=[{objective: reverse_kl}]",), "distill.objectives[0].objective=reverse_kl can't be had "
         "from teacher.mode=cached with cache.kind=sample, which serves forward_kl, cross_entropy; take one of them, "
         "or teacher.mode=online"),
        (("distill.objectives=[{objective: cross_entropy}, {objective: top_k_kl}]",), "cache.kind=top_k"),
        (("cache.kind=top_k",), "distill.objectives[0].objective=forward_kl can't be had from"),
        (("distill.objectives=[{temperature: 2}]",), "distill.objectives[0].temperature=2 can't be had from"),
        (("distill.objectives=[{temperature_end: 0.5}]",), "temperature_end=0.5 can't be had from teacher.mode=cached"),
        (("cache.kind=top_k", "distill.objectives=[{objective: top_k_kl, k: 9}]"), "k=9 is not cache.k=64"),
        (("cache.num_samples=0",), "cache.num_samples=0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_serve_is_refused_with_the_settings(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(*FAST, *SMALL, *settings)
    assert said in str(caught.value)


def test_what_a_cache_can_serve_is_taken() -> None:
    terms = "distill.objectives=[{objective: forward_kl}, {objective: cross_entropy, temperature: 2}]"
    config = load_config(*FAST, *SMALL, terms)
    assert [term.objective for term in config.distill.objectives] == ["forward_kl", "cross_entropy"]
    assert (
        load_config(*FAST, *SMALL, "cache.kind=top_k", "distill.objectives=[{objective: top_k_kl}]").cache.kind
        == "top_k"
    )


def test_a_student_without_the_padding_that_is_cached_is_refused_before_anything_is_written(
    run: Run, teacher_source: Path, tmp_path: Path
) -> None:
    padded = Path(shutil.copytree(teacher_source, tmp_path / "padded"))
    model = AutoModelForCausalLM.from_pretrained(padded)
    model.resize_token_embeddings(528)
    model.save_pretrained(padded)
    with pytest.raises(ConfigError, match=r"distill.init_from=.*vocab_size=512 is less than the 528 of the cached"):
        run(*SMALL, f"teacher.path={padded}", f"distill.init_from={teacher_source}")
    assert not (tmp_path / "run").exists()


def test_a_k_above_the_vocabulary_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"cache.k=513 must be within 1 and vocab_size=512 of the teacher"):
        run(*SMALL, "cache.kind=top_k", "cache.k=513", "distill.objectives=[{objective: top_k_kl}]")
    assert not (tmp_path / "run").exists()


# -- a run on it


def test_a_whole_run_on_a_cache(
    run: Run, finished: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the online run's tokens, scores and student; a second time everything is skipped; status has its row."""
    caplog.set_level("INFO", "compress")
    for later in ("distill", "export", "evaluate"):
        shutil.rmtree(finished / later)
    run(*SMALL)
    started = [line for line in caplog.messages if line.endswith(": starting")]
    assert started == ["cache: starting", "distill: starting", "export: starting", "evaluate: starting"]
    assert any("bytes a token" in line for line in caplog.messages)
    rows = [json.loads(line) for line in (finished / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[-1]["loss"] < rows[0]["loss"]
    caplog.clear()
    run(*SMALL)
    assert "cache: done before, skipped" in caplog.text
    assert "starting" not in caplog.text
    capsys.readouterr()
    run(*SMALL, "stage=status")
    assert "cache" in capsys.readouterr().out
    run("stage=status")
    assert " cache " not in capsys.readouterr().out
    run(*SMALL, "cache.k=7")  # not of this kind
    with pytest.raises(ArtifactError, match=r"cache.num_samples was 12, is now 20"):
        run(*SMALL, "cache.num_samples=20")
    with pytest.raises(ArtifactError, match=r"teacher.mode was cached, is now online"):
        run()
    with pytest.raises(ConfigError, match=r"stage=cache needs teacher\.mode=cached"):
        run("stage=cache")


def test_the_teachers_weights_are_not_read_while_training(
    cached: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    load = distill.streamed_model
    monkeypatch.setattr(distill, "streamed_model", lambda path, *a: opened.append(Path(path)) or load(path, *a))
    distill.run(_config(cache, cached), cached)
    assert opened == [cached / "prune"]


def test_a_damaged_cache_is_refused_before_pruning(run: Run, cached: Path) -> None:
    shutil.rmtree(cached / "cache")
    run(*SMALL, "stage=cache")
    shutil.rmtree(cached / "prune")
    path = cached / "cache" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cut short or changed"):
        run(*SMALL)
    assert not (cached / "prune").exists()


def test_a_cache_of_the_whole_vocabulary_trains_as_online(cached: Path, cache: Path, tmp_path: Path) -> None:
    """`top_k_kl` with k = vocabulary, whose cached probabilities are all there are: every step's loss and gradient, and
    what validation says, which asks the teacher itself."""
    validated = ("distill.validate_steps=4", "distill.validate_tokens=512")
    online = Path(shutil.copytree(cached, tmp_path / "online"))
    stage.run(_config(cache, cached, *WHOLE), cached)
    distill.run(_config(cache, cached, *WHOLE, *validated), cached)
    distill.run(_config(cache, online, *WHOLE, *validated, "teacher.mode=online"), online)
    for name, count in (("loss", 8), ("gradient_norm", 8), ("kl_to_teacher", 2)):
        ours, theirs = (
            [row[name] for row in map(json.loads, (folder / "distill" / "metrics.jsonl").open()) if name in row]
            for folder in (cached, online)
        )
        assert len(ours) == count
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_sequence_without_loss_tokens_keeps_an_empty_record() -> None:
    form = Form("sample", 12, 90)
    said = say(torch.zeros(0, 8), OutputHead(torch.zeros(90, 8)), form, 0, b"a")
    back = unpack(np.frombuffer(pack(said, form), dtype=np.uint8), 0, form)
    assert back.ids_NK.shape == (0, 12)
    assert back.entropy_N.shape == (0,)

"""The plan's figures are those of real models, of what torch's tracker sees, and of what it refuses nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import make_model
from transformers import AutoModelForCausalLM

from benchmarks.communication import LLAMA_8B
from compress import plan
from compress.architecture import ModelInfo, num_parameters, shape_of, with_sizes
from compress.capture import listening, recording
from compress.communication import Collective, Kind, Links
from compress.config import load_config
from compress.errors import ConfigError
from compress.families import family_of
from compress.memory import Layout, saved_bytes, step_memory
from compress.step import trunk
from compress.tokens import TokenBatch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A folder with nothing but the config.json of Llama-3.1-8B."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def planned(recipe: str, teacher: Path, *settings: str) -> plan.Plan:
    return plan.make_plan(load_config(f"recipe={recipe}", "stage=plan", f"teacher.path={teacher}", *settings))


def test_the_published_shapes_have_the_published_sizes(llama_8b: Path) -> None:
    """Llama-3.1-8B has 8.03 B parameters, Minitron-4B-Width 4.51 B, Depth 4.54 B (arXiv 2408.11796, table 1)."""
    for recipe, expected in (("llama31_8b_to_4b_width", 4.51e9), ("llama31_8b_to_4b_depth", 4.54e9)):
        found = planned(recipe, llama_8b, "cluster=h100", "cluster.num_nodes=8", "distill.recompute=true")
        assert num_parameters(found.teacher, found.teacher.shape) == pytest.approx(8.03e9, rel=1e-3)
        assert num_parameters(found.teacher, found.student) == pytest.approx(expected, rel=2e-3)


def test_work_is_that_of_a_forward_and_a_backward(llama_8b: Path) -> None:
    """2 FLOP a parameter and token: within a few per cent at a length where attention hardly counts."""
    short = ("cluster=h100", "cluster.num_nodes=8", "data.sequence_length=64")
    found = planned("llama31_8b_to_4b_width", llama_8b, *short)
    matrices = [8.03e9 - 128256 * 4096, 4.51e9 - 128256 * 3072]
    assert found.flops_per_token == pytest.approx(2 * matrices[0] + 6 * matrices[1], rel=0.01)
    again = planned("llama31_8b_to_4b_width", llama_8b, *short, "distill.recompute=true")
    assert again.flops_per_token - found.flops_per_token == pytest.approx(2 * matrices[1], rel=0.01)
    assert found.seconds == pytest.approx(94e9 * found.flops_per_token / (64 * 989e12 * 0.4))
    windowed = planned("llama31_8b_to_4b_width", llama_8b, *short, "teacher.whole_window=true")
    states = windowed.memory["the loss"]["teacher: final states of the whole window"]
    assert states == 1152 // 64 * 64 * 4096 * 2, "a rank's of the global batch"
    assert windowed.memory["the teacher's forward"]["gathered: the teacher's"] == pytest.approx(2 * 8.03e9, rel=1e-3)


def test_a_shared_teacher_is_gathered_once_a_step_where_its_memory_is_there(llama_8b: Path) -> None:
    """Not where a rank has a single micro-batch, nor where nobody shares it; else less is sent for it."""
    several = ("cluster=h100", "cluster.num_nodes=2", "distill.recompute=true", "distill.micro_batch_size=1",
               "distill.global_batch_size=64")  # fmt: skip

    def gathered(*settings: str) -> tuple[bool, float, int]:
        made = planned("llama31_8b_to_4b_width", llama_8b, *several, *settings)
        return made.gathers_once, sum(o.sent for o in made.collectives if o.what == "teacher: layers"), made.peak[1]

    once, always, never = gathered(), gathered("teacher.whole_window=true"), gathered("teacher.whole_window=false")
    assert once == always
    assert (once[0], never[0]) == (True, False)
    assert 4 * once[1] == never[1], "four micro-batches"
    assert once[2] > never[2]
    enough = int(never[2] / 0.9) + 1
    assert gathered(f"cluster.memory_bytes={enough}") == never
    assert gathered(f"cluster.memory_bytes={int(once[2] / 0.9)}") == never, "so tight that reckoning might be wrong"
    assert gathered(f"cluster.memory_bytes={int(once[2] / 0.9 / 0.85) + 2}") == once
    assert not gathered("distill.global_batch_size=16")[0]
    assert not gathered("cluster.shard_ranks=1", "cluster.memory_bytes=800GiB")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma2", "phi3", "olmo2", "gpt_neox", "mixtral"])
def test_what_a_layer_saves_is_what_a_real_forward_of_packed_documents_keeps(variant: str, dtype: torch.dtype) -> None:
    """Counted on real tensors of a real model, storage by storage, without the weights."""
    model = make_model(variant)
    config = {**model.config.to_dict(), "model_type": model.config.model_type, "pad_token_id": 90}
    info = ModelInfo(Path("tiny"), config, family_of(config, "tiny"), shape_of(model.config), {})
    positions_BT = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    every_BT = torch.ones(2, 24, dtype=torch.bool)
    batch = TokenBatch(torch.zeros(2, 24, dtype=torch.long), positions_BT, every_BT, every_BT)
    totals = []
    for layers in (2, 4):
        small = make_model(variant, num_hidden_layers=layers).to(dtype).train()
        own = {p.untyped_storage().data_ptr() for p in small.parameters()}
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, Any] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = trunk(small, batch)
        totals.append(sum(size for size, _ in kept.values()))
        del output
    real = (totals[1] - totals[0]) / 2
    # How many tokens an expert gets is known only when it runs; everything else to the byte.
    assert saved_bytes(info, info.shape, 2, 24, dtype) == pytest.approx(real, rel=0.1 if info.shape.num_experts else 0)


def test_a_student_from_elsewhere_and_another_source_are_planned(
    run: Run, finished_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stage=plan", f"distill.init_from={finished_source / 'prune'}")
    assert "3 │" in capsys.readouterr().out
    open_sizes = ("prune.num_hidden_layers=2", "prune.intermediate_size=null")
    run("stage=plan", *open_sizes, f"prune.source={finished_source / 'prune'}")
    assert "96 │" in capsys.readouterr().out.replace(" 96  │", "96 │"), "the source's MLP, not the teacher's"


def test_every_part_shrinks_with_what_it_is_shared_by() -> None:
    model = make_model("llama")
    config = {**model.config.to_dict(), "model_type": "llama"}
    info = ModelInfo(Path("tiny"), config, family_of(config, "tiny"), shape_of(model.config), {})
    student = with_sizes(info.shape, {"intermediate_size": 40})

    def peak(**changes: Any) -> int:
        found = step_memory(info, student, replace(Layout(4, 2, 64), **changes))
        return max(sum(parts.values()) for parts in found.values())

    assert peak(num_ranks=8) < peak() < peak(num_ranks=2)
    assert peak(micro_batch_size=1) < peak() < peak(sequence_length=128)
    assert peak(recompute=True) < peak()
    assert peak(moment_bytes=4) == peak() - 4 * num_parameters(info, student) // 4
    halves, wholes = (
        step_memory(info, student, Layout(1, 2, 64, compute_bytes=size))["the loss"]["activations"] for size in (2, 4)
    )
    assert wholes > 1.5 * halves, "float32 activations take twice as much, but for what is float32 anyway"


def test_states_that_terms_compare_are_counted(teacher_source: Path) -> None:
    """What a real forward records of both models, here the same one twice, at every token."""
    terms = ("distill.objectives=[{},{objective: hidden_cosine, layers: [[0,0],[-1,2]]},{objective: minilm_value},"
             "{objective: minilm_attention, layers: [[1,3]]},{objective: embedding_mse}]")  # fmt: skip
    settings = (terms, f"distill.init_from={teacher_source}", "distill.micro_batch_size=2", "compute_dtype=float32")
    found = planned("tiny", teacher_source, "data.sequence_length=64", *settings)
    config = load_config("recipe=tiny", *settings)
    model = AutoModelForCausalLM.from_pretrained(teacher_source)
    mask, size = torch.ones(2, 64, dtype=torch.bool), 0
    batch = TokenBatch(torch.ones(2, 64, dtype=torch.long), torch.arange(64).expand(2, 64), mask, mask)
    for to_teacher in (False, True):
        with recording(model, listening(config.distill.objectives, to_teacher), mask) as recorded:
            trunk(model, batch)
        size += sum(state.nbytes for state in recorded.states_ND.values())
        for one in recorded.attention.values():
            size += sum(value.nbytes for value in vars(one).values() if isinstance(value, torch.Tensor))
    assert size > 0
    assert found.memory["the loss"]["states that terms compare"] == size


def test_what_cannot_fit_is_refused_with_what_would(llama_8b: Path) -> None:
    settings = ("cluster=h100", "distill.global_batch_size=128", "distill.micro_batch_size=4", "distill.num_tokens=1B")
    with pytest.raises(ConfigError) as caught:
        planned("llama31_8b_to_4b_width", llama_8b, *settings)
    said = str(caught.value)
    assert "on each of 8 GPUs at" in said
    assert "90% of 80.0 GiB" in said
    assert "it would fit with distill.micro_batch_size=1 or with distill.recompute=true" in said
    fits = planned(
        "llama31_8b_to_4b_width", llama_8b, *settings, "distill.recompute=true", "distill.micro_batch_size=1"
    )
    assert fits.peak[1] <= 0.9 * 80 * 2**30


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("cluster.gpus_per_node=8",), "cluster.memory_bytes must be set for 8 GPUs, such as 80GiB"),
        (("cluster=h100", "cluster.peak_flops=null"), "cluster.peak_flops must be set for GPUs"),
        (("cluster=h100", "cluster.num_nodes=7"), "distill.global_batch_size=1152 is no multiple of 56 ranks"),
        (("cluster=h100", "prune.hidden_size=3000"), "prune.hidden_size=3000 must be a multiple of"),
        (("cluster=h100", "cluster.efficiency=1.5"), "cluster.efficiency=1.5 must be within 0 and 1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(settings: tuple[str, ...], said: str, llama_8b: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        planned("llama31_8b_to_4b_width", llama_8b, *settings)


def test_the_stage_prints_tables_reads_no_weights_and_writes_nothing(
    llama_8b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.pipeline import run

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    settings = ("cluster=h100", "cluster.num_nodes=8", "cluster.price_per_gpu_hour=2.5", "distill.recompute=true")
    run(load_config("recipe=llama31_8b_to_4b_width", "stage=plan", f"teacher.path={llama_8b}", *settings))
    shown = capsys.readouterr().out
    request = "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --time="
    for part in ("4,512,746,496", "GPU-hours", "money at 2.5", request, "GiB"):
        assert part in shown, shown
    assert sorted(tmp_path.rglob("*")) == before


def test_layouts_are_compared_and_the_configured_one_is_planned(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer is sent between those that share it, a gradient between copies too; fewer sharing take more memory."""
    from compress.pipeline import run

    settings = ("cluster=h100", "cluster.num_nodes=8", "distill.recompute=true")
    everyone, of_a_node = (
        planned("llama31_8b_to_4b_width", llama_8b, *settings, f"cluster.shard_ranks={share}") for share in ("null", 8)
    )
    assert (everyone.layout.num_ranks, everyone.copies, of_a_node.layout.num_ranks, of_a_node.copies) == (64, 1, 8, 8)
    assert of_a_node.peak[1] > everyone.peak[1]
    student = num_parameters(everyone.teacher, everyone.student)
    sent = {one.what: one for one in of_a_node.collectives}
    assert sent["student: gradients"].num_bytes == 4 * student
    assert sent["student: gradients of copies"].num_bytes == 4 * student // 8
    assert sent["student: gradients of copies"].sent == pytest.approx(2 * 4 * student / 8 * 7 / 8, rel=1e-6)
    assert "student: gradients of copies" not in {one.what for one in everyone.collectives}
    run(load_config("recipe=llama31_8b_to_4b_width", "stage=plan", f"teacher.path={llama_8b}", *settings))
    shown = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {line[1].split()[0]: line for line in shown if len(line) == 8 and line[1].split()[0].isdigit()}
    assert list(rows) == ["1", "8", "16", "32", "64"]
    assert "too much" in rows["1"][3]
    assert "(chosen)" in rows["64"][1]
    seconds = {share: float(line[5].split()[0]) for share, line in rows.items()}
    assert seconds["8"] < seconds["64"], "a node's own links are the faster ones"
    with pytest.raises(ConfigError, match=r"cluster\.shard_ranks=7 must divide the 64 ranks"):
        planned("llama31_8b_to_4b_width", llama_8b, *settings, "cluster.shard_ranks=7")


def test_links_between_nodes_are_shared_by_the_rings_that_go_through_them() -> None:
    """By hand: a gather of 8e9 bytes over 16 GPUs of two nodes, and the all-reduce of 8 copies, a GPU of each node."""
    links = Links(gpus_per_node=8, local=400e9, network=50e9)
    gather = Collective("", Kind.gather, 16, 8 * 10**9, 0)
    assert gather.sent == 7.5e9
    assert links.seconds([gather], 16) == pytest.approx(7.5e9 / 400e9), "eight cards side by side"
    reduce = Collective("", Kind.reduce, 8, 8 * 10**9, 0)
    assert reduce.sent == 14e9
    assert links.seconds([reduce], 8) == pytest.approx(14e9 / 50e9), "each of eight rings has a card"
    assert links.seconds([replace(gather, num_ranks=8)], 8) == pytest.approx(7e9 / 400e9)


def test_a_budget_is_planned_by_its_largest_shape(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("stage=plan", "prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.max_parameters=160K")
    assert "the student is the largest of the budget's legal shapes" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1])
def test_recomputing_layers_gives_the_same_gradients(number: int) -> None:
    from compress.parallel import recompute_layers

    ids = torch.arange(40).reshape(2, 20)
    gradients = []
    for recompute in (False, True):
        model = make_model(("llama", "gemma2")[number]).train()
        if recompute:
            recompute_layers(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, one in gradients[0].items():
        assert torch.equal(one, gradients[1][name]), name


def test_recomputing_changes_memory_and_nothing_else(run: Run, finished_source: Path, tmp_path: Path) -> None:
    """Through the stages, under FSDP2: the same student, bit for bit; so it may be switched while a run goes on."""
    run("distill.recompute=true", "until=export")
    ours, theirs = (folder / "export" / "model.safetensors" for folder in (tmp_path / "run", finished_source))
    assert ours.read_bytes() == theirs.read_bytes()
    run("distill.recompute=false", "until=export")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama31_8b_to_4b_width", "llama31_8b_to_4b_depth"])
def test_the_8b_recipes_are_within_ten_per_cent_of_torchs_own_tracker(recipe: str) -> None:
    """FSDPMemTracker on fake tensors in a fake group of 64 ranks, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", "--worker", "tracker", recipe]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    planned_bytes = sum(size for part, size in found["parts"].items() if part != "moment")
    assert planned_bytes == pytest.approx(found["measured_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["llama31_8b_to_4b_width", "llama31_8b_to_4b_depth"])
def test_a_whole_step_of_the_8b_recipes_on_64_ranks_sends_what_the_plan_says(recipe: str) -> None:
    """The distill stage's own step on fake tensors in a fake group: teacher, two micro-batches, optimizer."""
    command = [sys.executable, "-m", "benchmarks.collectives", "--fake", recipe]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters_with_gradient"] == found["parameters"]
    assert list(found["collectives"]) == ["all-gather over 64", "reduce-scatter over 64"]
    for figures in found["collectives"].values():
        assert figures["bytes"] == figures["modelled_bytes"]
        assert figures["largest_bytes"] == figures["largest_modelled_bytes"]


def test_a_teacher_that_is_not_asked_costs_no_memory_and_no_work(tmp_path: Path) -> None:
    """From a cache, whose disk is counted instead; by the student's own earlier word, which needs neither."""
    terms = "distill.objectives=[{},{objective: cross_entropy}]"

    def made(*settings: str) -> plan.Plan:
        return plan.make_plan(load_config("recipe=tiny", "stage=plan", terms, "distill.micro_batch_size=1", *settings))

    online, cached, itself = (made(f"teacher.mode={mode}") for mode in ("online", "cached", "previous_self"))
    for other in (cached, itself):
        assert other.flops_per_token < online.flops_per_token
        assert all(not size for parts in other.memory.values() for name, size in parts.items() if "teacher: w" in name)
    assert [sum("cached" in name for name in one.disk) for one in (online, cached, itself)] == [0, 1, 0]

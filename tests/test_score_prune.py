"""The two stages on a run folder: what they write, and what they refuse before and after."""

from __future__ import annotations

import itertools
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import LONGROPE, SIZES, logits, make_batch, make_model, save_model
from safetensors.torch import load_file

from compress import prune, score
from compress.architecture import num_parameters, shape_of, uneven_size, with_sizes
from compress.artifacts import fingerprint_path
from compress.criteria import AGGREGATIONS
from compress.depth import rank_layers
from compress.errors import ArchitectureError, ArtifactError, ConfigError
from compress.folders import read_model
from compress.importance import estimate_importance
from compress.models import load_model
from compress.rules import check
from compress.scores import load_importance
from compress.settings import (
    CompressConfig,
    ComputeDtype,
    DataConfig,
    DepthCriterion,
    PruneConfig,
    ScoreConfig,
    ShapeConfig,
    SourceConfig,
    TeacherConfig,
)
from compress.slicing import kept_shape, select
from compress.tokens import Rows, TokenSet, write_index, write_shard

TOKENS = 16
DATA = DataConfig(train=[SourceConfig("t")], calibration=[SourceConfig("c")], validation=[SourceConfig("v")])


def write_tokens(folder: Path, sequences: int, vocab_size: int = SIZES["vocab_size"]) -> None:
    """Two sources with half of the sequences each."""
    for seed, source in enumerate(("00-a", "01-b")):
        batch = make_batch(sequences // 2, TOKENS, seed=seed)
        starts = (batch.position_ids == 0).numpy().astype(np.uint8)
        ids = batch.input_ids.numpy().astype(np.int32)
        rows = Rows(ids, starts, np.ones_like(starts), np.full(len(ids), TOKENS, dtype=np.int32))
        (folder / source).mkdir(parents=True)
        write_shard(folder / source / "shard-00000.safetensors", rows, {})
        write_index(folder / source, TOKENS, vocab_size, ["shard-00000.safetensors"])


def make_config(teacher: Path, **sections: Any) -> CompressConfig:
    config = CompressConfig(
        teacher=TeacherConfig(path=str(teacher)),
        compute_dtype=ComputeDtype.float32,
        score=ScoreConfig(num_sequences=6, depth_sequences=4, micro_batch_size=4),
        shape=ShapeConfig(multiple_of=4),
    )
    return replace(config, **sections)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    folder = save_model(tmp_path / "teacher", make_model(dtype=torch.float32))
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "run" / "tokens" / "calibration", 8)
    return tmp_path / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


SHAPE = PruneConfig(hidden_size=36, intermediate_size=40, num_hidden_layers=3)


def test_a_given_shape_end_to_end(teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=SHAPE)
    prune.preflight(config)
    score.run(config, run_dir)
    (run_dir / "prune").mkdir()
    (run_dir / "prune" / "started.json").write_text("{}")  # as the pipeline leaves it
    (run_dir / "prune" / "model-00007-of-00009.safetensors").write_text("of a killed attempt")
    prune.run(config, run_dir)

    model = load_model(teacher, torch.float32)
    tokens = TokenSet.open(run_dir / "tokens" / "calibration")
    chosen = [0, 1, 2, 4, 5, 6]  # 6 of 8, from both sources
    importance = estimate_importance(model, [tokens.batch(chosen)])
    stored = load_importance(
        run_dir / "score" / "importance.safetensors", shape_of(model.config), fingerprint_path(teacher)
    )
    for axis, scores in importance.width().items():
        torch.testing.assert_close(stored.width()[axis], scores)
    assert (stored.num_sequences, stored.num_tokens) == (6, 6 * TOKENS)
    assert read(run_dir / "score" / "report.json")["block_influence"] == stored.block_influence_L.tolist()

    student = load_model(run_dir / "prune", torch.float32)
    shape = shape_of(student.config)
    assert (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers) == (36, 40, 3)
    names = {p.name for p in (run_dir / "prune").iterdir()}
    expected = {"config.json", "model.safetensors", "kept.safetensors", "report.json", "LICENSE", "started.json"}
    assert names == expected | ({"generation_config.json"} & names)
    assert not [p for p in run_dir.iterdir() if p.name.startswith(".")], "nothing half-made is left"
    report = read(run_dir / "prune" / "report.json")
    kept = select(stored, shape)
    assert report["removed_layers"] == sorted(set(range(5)) - set(kept["layers"].tolist()))
    assert report["teacher"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert report["student"]["num_parameters"] == sum(p.numel() for p in student.parameters())
    assert report["choices"]["hidden_size"].startswith("given: prune.hidden_size=36; divisible by")
    assert report["choices"]["num_attention_heads"] == "the teacher's"
    assert report["choices"]["num_hidden_layers"].endswith("layers removed by block_influence")
    written = load_file(run_dir / "prune" / "kept.safetensors")
    assert {axis: index.tolist() for axis, index in written.items()} == {a: i.tolist() for a, i in kept.items()}
    assert kept_shape(shape_of(model.config), written) == shape
    first = logits(student, make_batch())
    prune.run(config, run_dir)  # again: the same, nothing in the way
    assert torch.equal(first, logits(load_model(run_dir / "prune", torch.float32), make_batch()))


def test_greedy_depth_end_to_end(teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=PruneConfig(num_hidden_layers=3))
    config.score.depth = [DepthCriterion.kl_greedy]
    score.run(config, run_dir)
    prune.run(config, run_dir)
    model, tokens = load_model(teacher, torch.float32), TokenSet.open(run_dir / "tokens" / "calibration")
    removal = rank_layers(model, [tokens.batch([0, 2, 4, 6])], 2, skip_share=score.SKIP_SHARE)
    greedy = read(run_dir / "score" / "report.json")["depth"]["kl_greedy"]
    assert greedy["removed"] == removal.removed
    assert greedy["cost"] == pytest.approx(removal.cost, rel=1e-4)
    report = read(run_dir / "prune" / "report.json")
    assert report["removed_layers"] == sorted(removal.removed[-1])
    assert report["choices"]["num_hidden_layers"].endswith("layers removed by kl_greedy")
    further = replace(config, prune=PruneConfig(num_hidden_layers=2))
    with pytest.raises(ConfigError, match="the scores say what to remove up to 2"):
        prune.run(further, run_dir)


EVERY = [
    *(f"activation:{batch}/{sequence}" for batch in AGGREGATIONS for sequence in AGGREGATIONS),
    "weighted_activation:l2/l2",
    "taylor",
    "weight_magnitude",
]


def test_all_criteria_side_by_side_and_each_can_be_pruned_by(
    teacher: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    depths = [d for d in DepthCriterion if not d.startswith("task")]
    config = make_config(teacher, prune=replace(SHAPE, width_criterion="taylor", depth_criterion=depths[4]))
    config.score.width, config.score.depth = EVERY, depths
    check(replace(config, data=DATA, distill=replace(config.distill, num_tokens=1e6)))
    score.run(config, run_dir)
    report = read(run_dir / "score" / "report.json")
    assert set(report["depth"]) == {*map(str, depths)}
    for axis, rows in report["rank_correlation"].items():
        assert set(rows) == set(EVERY)
        for name, row in rows.items():
            assert set(row) == set(EVERY) - {name}
            assert all(abs(value) <= 1 + 1e-9 for value in row.values()), axis
            assert row == pytest.approx({other: rows[other][name] for other in row})
        assert rows[EVERY[0]]["activation:l2/l2"] > 0.5, "two ways to say how large the same activations are"
    overlap = report["overlap_of_removed_layers"]
    assert set(overlap) == {*map(str, depths)}
    for name, row in overlap.items():
        for other, share in row.items():
            one, two = (set(report["depth"][criterion]["removed"][1]) for criterion in (name, other))
            assert share == len(one & two) / 2
    info = read_model(teacher)
    stored = load_importance(run_dir / "score" / "importance.safetensors", info.shape, fingerprint_path(teacher))
    students = set()
    for width, depth in zip(EVERY, itertools.cycle(depths), strict=False):
        config.prune.width_criterion, config.prune.depth_criterion = width, depth
        prune.run(config, run_dir)
        kept = load_file(run_dir / "prune" / "kept.safetensors")
        assert kept["hidden"].tolist() == stored.width(width)["hidden"].topk(36).indices.sort().values.tolist()
        removed = read(run_dir / "prune" / "report.json")["removed_layers"]
        assert removed == stored.depth(depth).of(2)
        students.add((tuple(kept["hidden"].tolist()), tuple(removed)))
    assert len(students) > 6


def test_layers_given_by_hand_are_the_ones_that_go(teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=PruneConfig(removed_layers=[4, 0]))
    score.run(config, run_dir)
    prune.run(config, run_dir)
    report = read(run_dir / "prune" / "report.json")
    assert report["removed_layers"] == [0, 4]
    assert report["choices"]["num_hidden_layers"] == "given: prune.removed_layers=[4, 0]"
    student, whole = load_model(run_dir / "prune", torch.float32), load_model(teacher, torch.float32)
    for name, parameter in student.model.layers[1].named_parameters():
        assert torch.equal(parameter, whole.model.layers[2].get_parameter(name))


@pytest.mark.parametrize("depth", [d for d in DepthCriterion if not d.startswith("task")])
def test_a_budget_end_to_end(teacher: Path, run_dir: Path, depth: DepthCriterion) -> None:
    total = read_model(teacher)
    budget = int(0.7 * num_parameters(total, total.shape))
    config = make_config(teacher, prune=PruneConfig(max_parameters=budget, num_attention_heads=6))
    config.score.depth = [depth]
    prune.preflight(config)
    score.run(config, run_dir)
    prune.run(config, run_dir)
    report = read(run_dir / "prune" / "report.json")
    student = load_model(run_dir / "prune", torch.float32)
    assert 0.9 * budget <= sum(p.numel() for p in student.parameters()) <= budget
    damages = [candidate["predicted_damage"] for candidate in report["candidates"]]
    assert damages == sorted(damages)
    assert len(damages) == min(20, report["num_candidates"]) >= 3
    best = report["candidates"][0]
    assert all(report["student"][name] == best[name] for name in ("hidden_size", "intermediate_size", "num_parameters"))
    assert report["student"]["num_attention_heads"] == 6
    assert report["choices"]["num_attention_heads"] == "given: prune.num_attention_heads=6"
    if depth.is_measured:
        assert report["student"]["num_hidden_layers"] >= 3, "half of five layers were scored"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 40}, "prune.hidden_size=40 must be a multiple"),
        ({"hidden_size": 96}, "within 1 and the teacher's 48"),
        ({}, "leaves the teacher as it is"),
        ({"num_hidden_layers": 5}, "leaves the teacher as it is"),
        ({"max_parameters": 10}, "prune.max_parameters=10 .* out of reach"),
        ({"removed_layers": [1, 1]}, r"prune.removed_layers=\[1, 1\] must be distinct"),
        ({"removed_layers": [5]}, "within 0 and 4"),
        ({"removed_layers": [0, 1, 2, 3, 4]}, "not all of them"),
        ({"removed_layers": [1], "num_hidden_layers": 3}, "contradicts"),
    ],
)
def test_preflight_refuses_a_bad_shape(settings: dict[str, Any], message: str, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        prune.preflight(make_config(teacher, prune=PruneConfig(**settings)))


def test_preflight_refuses_a_budget_that_no_config_of_the_teacher_fits(tmp_path: Path) -> None:
    """Before anything is tokenized: what only transformers' own config class knows of."""
    teacher = save_model(tmp_path / "longrope", make_model("phi3", dtype=torch.float32, **LONGROPE))
    settings = PruneConfig(max_parameters=60_000, hidden_size=48, num_attention_heads=3)
    with pytest.raises(ConfigError, match=r"transformers refuses it as a Phi-3 config: .*short_factor"):
        prune.preflight(make_config(teacher, prune=settings))


def _choices(teacher: Path, tensor_parallel: int, sizes: dict[str, int], **settings: Any) -> tuple[dict[str, str], Any]:
    """What the report says of the teacher's shape with `sizes`, and that shape."""
    info = read_model(teacher)
    shape = with_sizes(info.shape, sizes)
    importance = estimate_importance(load_model(teacher, torch.float32), [make_batch()])
    config = make_config(teacher, prune=PruneConfig(**settings))
    config.shape.tensor_parallel = tensor_parallel
    return prune._choices(config, info, importance, shape), shape


def test_every_rounding_of_a_size_has_its_sentence(teacher: Path) -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert _choices(teacher, 2, sizes, max_parameters=50_000)[0] == {
        name: f"best predicted within prune.max_parameters=50,000{rules}"
        for name, rules in {
            "hidden_size": "; a multiple of shape.multiple_of=4; divisible by num_attention_heads=4 as Llama asks",
            "intermediate_size": "; a multiple of shape.multiple_of=4; shared evenly by shape.tensor_parallel=2 ranks",
            "num_hidden_layers": "",
            "num_attention_heads": "; heads per group: 2 for each of num_key_value_heads=2; shared evenly by "
            "shape.tensor_parallel=2 ranks",
            "num_key_value_heads": "; shared evenly by shape.tensor_parallel=2 ranks",
        }.items()
    }
    found, _ = _choices(teacher, 4, sizes, max_parameters=50_000, intermediate_size=40)
    assert found["intermediate_size"] == "given: prune.intermediate_size=40"
    assert found["num_key_value_heads"].endswith("; each copied to 2 of shape.tensor_parallel=4 ranks")
    assert "copied" not in found["num_attention_heads"]


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_only_the_sizes_that_ranks_share_are_said_to_be_shared(variant: str, tmp_path: Path) -> None:
    """Those that `uneven_size` names once they don't divide; 7 ranks, so that one more head is no multiple either."""
    teacher = save_model(tmp_path / variant, make_model(variant, dtype=torch.float32))
    even = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 7)
    mlp = "moe_intermediate_size" if variant == "qwen3_moe" else "intermediate_size"
    found, shape = _choices(teacher, 7, {**even, mlp: 14}, max_parameters=50_000)
    assert uneven_size(shape, 7) is None
    for name, text in found.items():
        uneven = uneven_size(replace(shape, **{name: getattr(shape, name) + 1}), 7)
        assert ("tensor_parallel" in text) == (uneven is not None), name


def test_preflight_refuses_a_bad_teacher_and_lets_a_foreign_student_pass(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        prune.preflight(make_config(tmp_path / "nowhere", prune=SHAPE))
    config = make_config(teacher)
    config.distill.init_from = "elsewhere"
    prune.preflight(config)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        prune.preflight(make_config(teacher, prune=SHAPE))
    content = read(teacher / "config.json")
    (teacher / "config.json").write_text(json.dumps({**content, "model_type": "olmo"}))
    with pytest.raises(ArchitectureError, match="olmo"):
        prune.preflight(make_config(teacher, prune=SHAPE))


@pytest.mark.parametrize("key", ["num_sequences", "depth_sequences"])
def test_too_little_calibration_text_says_how_much_there_is(key: str, teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=SHAPE)
    config.score.depth = [DepthCriterion.kl_greedy]
    setattr(config.score, key, 9)
    with pytest.raises(
        ConfigError,
        match=rf"score.{key}=9, but data.calibration gives only 8 .* tokens are needed .* score.{key}=8",
    ):
        score.run(config, run_dir)
    assert not (run_dir / "score").exists()


def test_tokens_of_another_vocabulary_are_refused(teacher: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "run" / "tokens" / "calibration", 8, vocab_size=98)
    with pytest.raises(ConfigError, match=r"token ids up to 97, the teacher's vocab_size is 97"):
        score.run(make_config(teacher, prune=SHAPE), tmp_path / "run")


def test_a_teacher_that_changed_after_scoring_is_refused(teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=SHAPE)
    score.run(config, run_dir)
    save_model(teacher, make_model(dtype=torch.float32, seed=1))
    with pytest.raises(ArtifactError, match="scored on another teacher"):
        prune.run(config, run_dir)
    assert not (run_dir / "prune").exists()


def test_a_failed_prune_leaves_the_folder_as_it_was(teacher: Path, run_dir: Path) -> None:
    config = make_config(teacher, prune=SHAPE)
    score.run(config, run_dir)
    prune.run(config, run_dir)
    before = fingerprint_path(run_dir / "prune")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights don't fit: a full disk to the writer
    try:
        with pytest.raises(ArtifactError, match="disk is full"):
            prune.run(config, run_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fingerprint_path(run_dir / "prune") == before
    assert not [p for p in run_dir.iterdir() if p.name.startswith(".")]

"""The selftest holds for every built-in family, and finds a wrong row of a table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Command, Run
from families import VARIANTS, make_model, save_model

from compress import families, importance, selftest
from compress.architecture import shape_of, taps, tensor_shapes
from compress.errors import ArchitectureError
from compress.families import BUILT_IN, FAMILIES, add_families, read_table
from compress.selftest import check_family


@pytest.fixture(autouse=True)
def _built_in_again() -> object:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_property_holds_for_the_built_in_families(variant: str) -> None:
    config = make_model(variant).config.to_dict()
    results = check_family(FAMILIES[config["model_type"]], config)
    assert len(results) >= 8
    assert {name: problem for name, problem in results.items() if problem} == {}


# variant, what to write into the table, what must be found
WRONG = [
    ("phi3", {"model.layers.*.mlp.gate_up_proj.weight": "intermediate x 2, hidden"}, "intermediate"),
    ("phi3", {"model.layers.*.self_attn.qkv_proj.weight": "key_value_heads + key_value_heads + query_heads, hidden"},
     "heads"),
    ("gpt_neox", {"gpt_neox.layers.*.attention.query_key_value.weight":
                  "query_heads + query_heads + query_heads, hidden"}, "heads"),
    ("gpt_oss", {"model.layers.*.mlp.experts.gate_up_proj":
                 "experts, hidden, expert_intermediate + expert_intermediate"}, "expert"),
    ("gpt_oss", {"model.layers.*.mlp.router.bias": "head_dim"}, "tensors"),
    ("olmo2", {"model.layers.*.self_attn.q_norm.weight": "hidden"}, "tensors"),
    ("llama", {"model.layers.*.extra.weight": "hidden"}, "tensors"),
    ("gpt_oss", {}, "packed documents"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "rows", "found"), WRONG)
def test_a_wrong_row_is_found(variant: str, rows: dict[str, str], found: str, tmp_path: Path) -> None:
    config = make_model(variant).config.to_dict()
    name = config["model_type"]
    entry: dict[str, object] = {"base": name, "tensors": rows}
    if not rows:
        entry["needs_packed_masks"] = False
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({name: entry}))
    add_families(tmp_path / "table.yaml")
    results = check_family(FAMILIES[name], config)
    assert any(found in f"{prop} {problem}" for prop, problem in results.items() if problem), results


def test_a_private_family_is_described_by_a_file(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers knows Starcoder 2, the table doesn't: a page of yaml is all it takes."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["starcoder2"](
        hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=97, sliding_window=None, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    save_model(tmp_path / "teacher", AutoModelForCausalLM.from_config(config))
    with pytest.raises(ArchitectureError, match=r"'starcoder2' is not in the axis table.*architecture.table=FILE.yaml"):
        run("stage=selftest", f"teacher.path={tmp_path / 'teacher'}")
    layer = "model.layers.*."
    tensors = {
        "model.norm.bias": "hidden",
        f"{layer}input_layernorm.bias": "hidden",
        f"{layer}post_attention_layernorm.bias": "hidden",
        f"{layer}self_attn.q_proj.bias": "query_heads if use_bias",
        f"{layer}self_attn.k_proj.bias": "key_value_heads if use_bias",
        f"{layer}self_attn.v_proj.bias": "key_value_heads if use_bias",
        f"{layer}self_attn.o_proj.bias": "hidden if use_bias",
        f"{layer}mlp.c_fc.weight": "intermediate, hidden",
        f"{layer}mlp.c_fc.bias": "intermediate if use_bias",
        f"{layer}mlp.c_proj.weight": "hidden, intermediate",
        f"{layer}mlp.c_proj.bias": "hidden if use_bias",
    }
    entry = {
        "title": "In-house",
        "base": "mistral",
        "without": [".mlp."],
        "sizes": {"head_dim": None},
        "tensors": tensors,
    }
    (tmp_path / "inhouse.yaml").write_text(yaml.safe_dump({"starcoder2": entry}))
    run("stage=selftest", f"teacher.path={tmp_path / 'teacher'}", f"architecture.table={tmp_path / 'inhouse.yaml'}")
    shown = capsys.readouterr().out
    assert "In-house (starcoder2)" in shown
    assert "NO" not in shown


def test_scoring_that_hears_no_hidden_channel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "taps", lambda family: replace(taps(family), hidden=()))
    config = make_model().config.to_dict()
    problems = {name for name, problem in check_family(FAMILIES["llama"], config).items() if problem}
    assert problems == {"scoring gives every unit of every axis a score"}


def test_scoring_behind_another_norm_than_the_final_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(selftest.Trials):
        def __init__(self, model: Any, *rest: Any) -> None:
            super().__init__(model, *rest)
            self.norm = model.model.layers[0].input_layernorm

    monkeypatch.setattr(selftest, "Trials", Deaf)
    config = make_model().config.to_dict()
    problems = {name for name, problem in check_family(FAMILIES["llama"], config).items() if problem}
    assert problems == {"trying a model without a layer equals removing it"}


def test_the_example_in_the_docs_describes_a_model_that_can_be(tmp_path: Path) -> None:
    """Llama with one matrix for gate and up, norms over the queries' heads and a bias of theirs alone."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    blocks = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "families.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "inhouse.yaml").write_text(blocks[0])
    assert add_families(tmp_path / "inhouse.yaml") == ["inhouse"]
    model = make_model("llama-biases")
    for layer in model.model.layers:
        layer.mlp = Phi3MLP(model.config)
        layer.self_attn.q_norm = LlamaRMSNorm(model.config.head_dim)
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).bias = None
    family, shape = FAMILIES["inhouse"], shape_of(model.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(family.rows(model.config), shape) == expected
    assert family.field("num_key_value_heads") == "kv_heads"


BAD_TABLES = [
    ("- a list", "must hold model_type"),
    ("{", "not a readable YAML file"),
    ("mine: 3", "mine must be a mapping"),
    ("mine: {base: lama}", "mine.base=lama: no such family; known: llama"),
    ("mine: {base: llama, colour: red}", "mine.colour='red': the keys are title"),
    ("mine: {base: llama, tensors: {a.layers.*.x: hiden}}", "'hiden' is no axis; write AXIS, AXIS x NUMBER"),
    ("mine: {base: llama, without: [norm]}", "one norm outside of the layers lies on hidden"),
    ("mine: {base: llama, without: [layernorm]}", "a norm in the layers lies on hidden"),
    ("mine: {base: llama, tensors: {model.embed_norm.weight: hidden}}", "one norm outside .* \\(here 2\\)"),
    ("mine: {base: llama, without: [lm_head]}", "two tensors lie on vocabulary"),
    ("mine: {base: llama, without: [o_proj]}", "one matrix reads query_heads"),
    ("mine: {base: llama, sizes: {width: x}}", "mine.sizes: width: give SIZE: CONFIG_FIELD"),
    ("mine: !!python/object/apply:os.system ['touch hacked']", "not a readable YAML file"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TABLES)
def test_a_table_that_is_none_names_file_place_and_rule(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(ArchitectureError, match=message) as raised:
        read_table(tmp_path / "table.yaml", FAMILIES)
    assert str(tmp_path / "table.yaml") in str(raised.value)
    assert not (tmp_path / "hacked").exists()


def test_the_built_in_table_is_one_of_the_same_form() -> None:
    assert read_table(BUILT_IN) == {name: families.FAMILIES[name] for name in read_table(BUILT_IN)}
    assert json.dumps(list(FAMILIES)) == json.dumps(list(read_table(BUILT_IN)))


def test_the_command_line_shows_the_table_and_touches_nothing(command: Command, tmp_path: Path) -> None:
    result = command("recipe=tiny", "stage=selftest")
    assert result.returncode == 0, result.stderr
    assert "slicing everything equals masking" in result.stdout
    assert not list(tmp_path.iterdir())

"""Settings: whatever is typed wrong is answered with the key, the value, the rule and what to write instead."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import REPOSITORY, environment
from hydra import compose, initialize_config_dir

from compress.config import conf_dir, load_config, to_config
from compress.errors import ConfigError
from compress.settings import CompressConfig, Size, Stage, set_name


def leaves(node: type = CompressConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(node).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", hint


ONE_OF_EACH_TYPE = {hint: key for key, hint in leaves()}


def message(*overrides: str, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*overrides, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(("hint", "key"), ONE_OF_EACH_TYPE.items(), ids=ONE_OF_EACH_TYPE.values())
def test_a_wrong_type_is_answered_with_the_key_its_value_and_the_type(hint: Any, key: str) -> None:
    [plain, *others] = [part for part in getattr(hint, "__args__", ()) if part is not type(None)] or [hint]
    optional = not others and type(None) in getattr(hint, "__args__", ())
    plain = plain if optional else hint
    if plain is str:
        assert f"{key}=[1, 2] must be text" in message("recipe=tiny", f"{key}=[1,2]")
        return
    found = message("recipe=tiny", f"{key}=wrong")
    if hint in (Size, Size | None):
        assert found == f"{key}=wrong must be a number, such as 8e9, 8B or 80GiB"
        return
    assert found.startswith(f"{key}=wrong must be "), found
    if isinstance(plain, type) and issubclass(plain, StrEnum):
        assert all(choice in found for choice in plain)
    else:
        assert {bool: "true or false", int: "a whole number", float: "a number"}.get(plain, "a list of ") in found
    assert found.endswith(", or null") == optional


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prune.hidden_size=3e8", ("prune.hidden_size=300000000.0", "whole number, without point or exponent")),
        ("teacher.path=null", ("teacher.path=null must be text",)),
        ("data.train=a.jsonl", ("data.train=a.jsonl", "list of sources, such as [{path: my.jsonl}]")),
        ("data.train=[a.jsonl]", ("data.train[0]=a.jsonl", "{path: my.jsonl}")),
        ("data.train=[{path: a, weight: heavy}]", ("data.train: weight=heavy must be a number",)),
        ("data.train=[{path: a, wieght: 1}]", ("data.train: wieght: no such key; did you mean weight", "max_records")),
        ("data.train=[{weight: 1}]", ("data.train[0].path must be set", "data.train=[{path: my.jsonl}]")),
        ("data.train.0.path=x", ("data.train.0.path: a list is set as a whole", "data.train=[{path:")),
        ("prune.removed_layers=[1,x]", ("prune.removed_layers[1]=x must be a whole number",)),
        ("distill.objectives=[{objective: hidden_mse, layers: 5}]", ("layers=5 must be a list of [student, teacher]",)),
        ("distill.objectives=[{objective: hidden_mse, layers: [1]}]", ("distill.objectives", "int is not a List")),
        ("distill.objectives=[{objectiv: bild}]", ("distill.objectives: objectiv: no such key", "objective")),
        ("teacher=x", ("teacher=x must be a section", "trust_remote_code")),
        ("distill={num_tokens: 5, lr: 1}", ("distill.lr: no such key",)),
        ("seed=[", ("seed=[: the value can't be read", "close every bracket")),
        ("run_dir=~/x", ("run_dir=~/x: the value can't be read; put text in quotes, 'run_dir=\"~/x\"'",)),
        ("run_dir=${nope}", ("run_dir", "nope")),
        ("distill.num_token=3", ("distill.num_token: no such key", "did you mean distill.num_tokens", "--help")),
        ("num_tokens=3", ("num_tokens: no such key", "distill.num_tokens")),
        ("distil.num_tokens=3", ("distil.num_tokens: no such key", "distill.num_tokens")),
        ("+distill.num_tokens=3", ("+distill.num_tokens", "without '+'", "write distill.num_tokens=")),
        ("++distill.new=3", ("++distill.new", "without '+'")),
        ("+recipe=tiny", ("+recipe", "write recipe=")),
        ("~distill.num_tokens", ("~distill.num_tokens", "can't be taken out")),
        ("tiny", ("tiny: settings are written key=value",)),
    ],
)  # fmt: skip
def test_a_setting_of_the_wrong_form_is_answered_with_the_right_one(override: str, parts: tuple[str, ...]) -> None:
    found = message("recipe=tiny", override)
    assert all(part in found for part in parts), found


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("distill.learning_rate=nan", "distill.learning_rate=nan must be a positive number"),
        ("distill.learning_rate=0", "distill.learning_rate=0.0 must be a positive number"),
        ("distill.weight_decay=inf", "distill.weight_decay=inf"),
        ("distill.beta1=1", "distill.beta1=1.0 must be within"),
        ("distill.num_tokens=1023", "one step of distill.global_batch_size * data.sequence_length = 1024"),
        ("distill.num_tokens=2048.5", "distill.num_tokens=2048.5 must be a whole positive number"),
        ("distill.global_batch_size=6", "multiple of distill.micro_batch_size=4"),
        ("data.sequence_length=4", "data.sequence_length=4 must be at least 8"),
        ("threads=-1", "threads=-1 must be within 0"),
        ("data.workers=-1", "data.workers=-1 must be within 0"),
        ("seed=-1", "seed=-1 must be within"),
        ("export.step=0", "export.step=0 must be at least 1"),
        ("evaluate.max_tokens=nan", "evaluate.max_tokens=nan must be at least 1"),
        ("evaluate.generate_tokens=0", "evaluate.generate_tokens=0 must be at least 1"),
        ("shape.max_width_pruning=1", "shape.max_width_pruning=1.0"),
        ("prune.hidden_size=0", "prune.hidden_size=0 must be at least 1"),
        ("data.train=[]", "data.train is empty"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "data.train: weights [1.0, None]"),
        ("data.train=[{path: a, weight: -1}]", "data.train: weights [-1.0]"),
        ("data.validation=[{path: x/a.txt}, {path: y/a.jsonl}]", "data.validation: the names ['a', 'a'] must differ"),
        ("data.validation=[{path: a, name: b/c}]", "data.validation name='b/c'"),
        ("distill.objectives=[{k: 4}]", "distill.objectives[0].k=4 is not for forward_kl: it has no options; leave k"),
        ("distill.objectives=[{},{objective: bild, beta: 0.5}]", "objectives[1].beta=0.5 is not for bild: its options"),
        ("distill.objectives=[{layers: [[0,0]]}]", "distill.objectives[0].layers=[[0, 0]] is not for forward_kl"),
        ("distill.objectives=[{objective: hidden_mse, temperature: 2}]", "[0].temperature=2.0 is not for hidden_mse"),
        ("distill.objectives=[{objective: minilm_value, squared: true}]", "[0].squared=True is not for minilm_value"),
        ("distill.objectives=[{objective: hidden_mse, layers: [[1]]}]", "[0].layers=[[1]] must be [student, teacher]"),
        ("distill.objectives=[{objective: hidden_mse, layers: []}]", "[0].layers=[] must be [student, teacher] pairs"),
        ("name=a/b", "name=a/b becomes a folder"),
        ("run_dir=", "run_dir= is empty"),
        ("teacher.path=", "teacher.path= is empty"),
    ],
)
def test_a_broken_rule_is_answered_with_key_value_and_rule(override: str, rule: str) -> None:
    assert rule in message("recipe=tiny", override)


def test_objectives_inside_the_models_refuse_what_has_no_inside() -> None:
    terms = "distill.objectives=[{},{objective: hidden_cosine}]"
    assert "distill.compile=true can't be combined with hidden_cosine" in message(
        "recipe=tiny", terms, "distill.compile=true"
    )
    open_shape = ("prune.num_hidden_layers=null", "prune.intermediate_size=null", "prune.max_parameters=100k")
    search = ("search.num_candidates=2", "search.num_tokens=4096")
    found = message("recipe=tiny", terms, *open_shape, *search)
    assert "search.num_tokens=4096 distils candidates" in found
    assert "hidden_cosine" in found
    assert load_config("recipe=tiny", terms).distill.objectives[1].layers is None


def test_a_missing_recipe_or_setting_lists_what_there_is() -> None:
    found = message()
    assert "distill.num_tokens and teacher.path must be set" in found
    assert "tiny" in found
    assert "--config-dir" in found
    for name in ("tinny", "", "null", "tiny.yaml"):
        found = message(f"recipe={name}")
        assert f"recipe={name}: no such recipe" in found
        assert "tiny" in found
        assert "--config-dir DIR" in found
    assert "did you mean tiny" in message("recipe=tinny")
    assert "cluster=cloud: no such cluster; there are h100, local" in message("cluster=cloud", "recipe=tiny")


def test_a_folder_of_ones_own_recipes_is_searched_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny]\nname: mine\nteacher: {path: my-teacher}\n"
    )
    config = load_config("recipe=mine", "seed=3", config_dir=tmp_path)
    assert (config.name, config.teacher.path, config.seed) == ("mine", "my-teacher", 3)
    assert config.distill.num_tokens == 16384, "what it does not say comes from the recipe that it builds on"
    assert load_config("recipe=tiny", config_dir=tmp_path).teacher.path == "embedded:tiny"
    assert "mine" in message("recipe=mien", config_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("distill: {num_token: 5}", ("distill.num_token", "no such key", "distill.num_tokens")),
        ("distill: {num_tokens: many}", ("distill.num_tokens=many must be a number",)),
        ("data: {train: [{pth: x}]}", ("pth: no such key; did you mean path",)),
        ("teacher: {_target_: os.system}", ("_target_", "no such key")),
        ("extra: 1", ("extra", "no such key")),
    ],
)
def test_a_recipe_is_checked_like_the_command_line(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text(f"# @package _global_\n{text}\n")
    found = message("recipe=bad", config_dir=tmp_path)
    assert all(part in found for part in parts), found


@pytest.mark.parametrize("override", ["+distill.new=1", "+new=1", "++teacher.new.er=1", "+distill._target_=os.system"])
def test_a_key_that_hydra_lets_pass_is_refused_when_converting(override: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("config", overrides=["recipe=tiny", override])
    with pytest.raises(ConfigError, match=r"(new|_target_).*no such key"):
        to_config(composed)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "conf" / "recipe").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_that_ships_is_valid_and_short(file: Path) -> None:
    text = "[{path: my.jsonl}]"
    mine = [f"data.{split}={text}" for split in ("train", "calibration", "validation")]
    config = load_config(f"recipe={file.stem}", *(mine if "embedded:" not in file.read_text() else []))
    assert config.name == file.stem
    assert config.stage is Stage.all
    assert len({set_name(source) for source in config.data.validation}) == len(config.data.validation)
    assert len(file.read_text().splitlines()) <= 30, "a recipe is what differs from the defaults"


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = load_config("recipe=tiny", "distill.num_tokens=1e4", "name=a")
    assert load_config("recipe=tiny").distill.num_tokens == 16384, "one call's settings are not the next one's"
    assert first.run_dir == "runs/a"
    assert not list(tmp_path.iterdir())


WHERE = "from compress.config import conf_dir, load_config; print(conf_dir()); print(load_config('recipe=tiny').name)"


def test_the_wheel_holds_its_own_conf_and_nothing_else_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("compress", "conf", "launch", "pyproject.toml", "LICENSE", "README.md"):
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source / name)
    if not (source / "README.md").exists():
        (source / "README.md").write_text("x")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    files = [
        *(REPOSITORY / "compress").rglob("*.py"),
        *(REPOSITORY / "conf").rglob("*.yaml"),
        *(REPOSITORY / "launch").iterdir(),
    ]
    for file in files:
        inside = file.relative_to(REPOSITORY).as_posix()
        assert (inside if inside.startswith("compress/") else f"compress/{inside}") in names, inside
    assert any("LICENSE" in name for name in names)
    assert not [name for name in names if "test" in name.split("/")[0]]
    shutil.rmtree(source)
    process = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.split() == [str(site / "compress" / "conf"), "tiny"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("8B", 8e9), ("1.5m", 1.5e6), ("100M", 1e8), ("64k", 64e3), ("2T", 2e12), ("80GiB", 80 * 2**30), ("80 gb", 80e9),
     ("512MiB", 2**29), ("3e8", 3e8), ("1e2K", 1e5), ("300000000", 3e8), (".5G", 5e8)],
)  # fmt: skip
def test_sizes_are_written_as_people_write_them(written: str, meant: float) -> None:
    assert load_config("recipe=tiny", f"prune.max_parameters='{written}'").prune.max_parameters == meant
    assert load_config("recipe=tiny", f"distill.num_tokens='{written}'").distill.num_tokens == meant
    rounds = f"rounds=[{{prune: {{num_hidden_layers: 3}}, num_tokens: '{written}'}}]"
    found = load_config("recipe=tiny", "prune.num_hidden_layers=null", "prune.intermediate_size=null", rounds)
    assert found.rounds[0].num_tokens == meant


@pytest.mark.parametrize("written", ["8X", "B", "8 B B", "1..5G", "0x10", "8iB"])
def test_what_is_no_size_is_refused(written: str) -> None:
    said = f"prune.max_parameters={written} must be a number, such as 8e9, 8B or 80GiB"
    assert said in message("recipe=tiny", f"prune.max_parameters='{written}'")


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("[]", "is empty; give one term at least"),
        ("[{weight: -1}]", "distill.objectives[0].weight=-1.0 must be 0 or more"),
        ("[{weight: 0}]", "every weight is 0"),
        ("[{},{temperature: 0}]", "distill.objectives[1].temperature=0.0 must be a positive number"),
        ("[{temperature_end: nan}]", "temperature_end=nan must be a positive number"),
        ("[{k: 8}]", "k=8 is not for forward_kl: it has no options"),
        ("[{objective: skew_kl, beta: 0.5}]", "beta=0.5 is not for skew_kl: its options are skew"),
        ("[{objective: skew_kl, skew: 1}]", "skew=1.0 must be within 0 and 1, 1 excluded"),
        ("[{objective: bild, k: 1}]", "bild compares pairs; give 2 or more"),
        ("[{objective: top_k_kl, k: 0}]", "k=0 must be at least 1"),
        ("[{objective: dac_kl, lower_quantile: 0.9, upper_quantile: 0.5}]", "must be below upper_quantile=0.5"),
        ("[{objective: forward_ql}]", "must be one of forward_kl, reverse_kl"),
        ("[{wieght: 1}]", "no such key"),
        ("[{curve: wave}]", "must be one of constant, linear, cosine, wsd"),
        ("[{weight_end: 0.5, curve: constant}]", "curve=constant never reaches weight_end"),
    ],
)
def test_terms_of_the_loss_are_checked(terms: str, expected: str) -> None:
    found = message("recipe=tiny", f"distill.objectives={terms}")
    assert "distill.objectives" in found
    assert expected in found


def test_terms_with_schedules_and_options_are_read() -> None:
    terms = "[{objective: bild, k: 4, temperature: 3, weight: 1, weight_end: 0, curve: cosine}, {squared: true}]"
    one, two = load_config("recipe=tiny", f"distill.objectives={terms}").distill.objectives
    assert (one.objective, one.k, one.temperature, one.weight_end, one.curve) == ("bild", 4, 3.0, 0.0, "cosine")
    assert two.squared

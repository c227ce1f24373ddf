"""The command line and yaml to settings: Hydra composes; this converts, checks and nothing else.

A config from elsewhere is data: it is closed, so an unknown key is refused, and no value can name code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from compress.errors import ConfigError
from compress.rules import check
from compress.settings import (
    CompressConfig,
    DepthCriterion,
    PhaseConfig,
    RoundConfig,
    SiblingConfig,
    Size,
    SourceConfig,
    Stage,
    TermConfig,
)

GROUPS = ("recipe", "cluster")


def conf_dir() -> Path:
    """The folder of config.yaml and the recipes: in the installed package, else in the checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def _keys(node: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass, sections included."""
    found = []
    for f in fields(node):
        key = f"{prefix}{f.name}"
        found.append(key)
        default = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(default):
            found += _keys(default, f"{key}.")
    return found


def _check_override(override: str, known: list[str]) -> None:
    """Refuse keys that no dataclass has, before Hydra's own error, whose remedy (`+key=`) is not ours."""
    written = override.partition("=")[0]
    key = written.lstrip("+~")
    top = re.split(r"[./@]", key)[0]
    if top == "hydra":
        return
    if written.startswith("~"):
        raise ConfigError(f"{written}: keys can't be taken out; set {key}=VALUE, or leave it out for its default")
    if written.startswith("+"):
        near = f"; write {key}=" if key in known or key in GROUPS else _closest(key, known)
        raise ConfigError(f"{written}: the config is closed, so keys are set without '+'{near}")
    if top in GROUPS or key in known:
        return
    for name in known:
        if re.match(rf"{re.escape(name)}[.\[]\d", key):
            raise ConfigError(f"{key}: a list is set as a whole, such as {name}=[{{path: my.jsonl}}]")
    raise ConfigError(f"{key}: no such key{_closest(key, known)}. All keys: python -m compress --help")


def _closest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in near]
    return f"; did you mean {' or '.join(near[:3])}" if near else ""


def check_overrides(overrides: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Raise ConfigError for a setting of another form, an unknown key, or a recipe or cluster that isn't there."""
    known = _keys(CompressConfig)
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override}: settings are written key=value; python -m compress --help lists them")
        _check_override(override, known)
        group, _, value = override.partition("=")
        if group not in GROUPS:
            continue
        folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
        if not any((folder / f"{value}.yaml").is_file() for folder in folders):
            there = sorted({f.stem for folder in folders if folder.is_dir() for f in folder.glob("*.yaml")})
            raise ConfigError(
                f"{group}={value}: no such {group}{_closest(value, there)}; there are {', '.join(there) or 'none'}. "
                f"Your own go into DIR/{group}/NAME.yaml with --config-dir DIR"
            )


def load_config(*overrides: str, config_dir: str | Path | None = None) -> CompressConfig:
    """Compose `overrides` ("recipe=tiny", "distill.num_tokens=2048") like the command line; for notebooks and tests.

    Raises ConfigError for an unknown key or recipe, a wrong type, or a broken rule.
    """
    return to_config(compose_config(*overrides, config_dir=config_dir))


def compose_config(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """What Hydra makes of the settings, required ones possibly still missing. Raises ConfigError as `load_config`."""
    check_overrides(overrides, config_dir)
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        if GlobalHydra.instance().is_initialized():
            composed = compose("config", overrides=[*overrides])
        else:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                composed = compose("config", overrides=[*overrides, *extra])
    except Exception as error:  # Hydra and OmegaConf raise a dozen classes here, all of them about the settings
        raise ConfigError(_explain(error)) from error
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    _resolve_sizes(plain, CompressConfig)  # says what is no number; to_config replaces them
    return composed


def _explain(error: BaseException) -> str:
    """Key, value and rule of what Hydra or OmegaConf refused."""
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    found = next((e for e in chain if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if found is None:
        override = getattr(error, "override", None)  # one that Hydra's grammar can't parse
        if override:
            key, _, value = override.partition("=")
            return (
                f"{override}: the value can't be read; put text in quotes, '{key}=\"{value}\"', and close every bracket"
            )
        cause = str(chain[-1]).splitlines()[0] if len(chain) > 1 and str(chain[-1]) else ""
        return ": ".join(filter(None, [" ".join(str(error).partition("\nSee ")[0].split()), cause]))
    file = re.match(r"In '((?:recipe|cluster)/[^']+)'", str(error))
    return (f"{file[1]}.yaml: " if file else "") + _explain_key(found, str(error))


def _explain_key(found: OmegaConfBaseException, around: str) -> str:
    key = str(found.full_key)
    # OmegaConf knows a key inside a list's element only from there on; Hydra's message around it has the rest.
    outside = re.search(r"overrid(?:e|ing) '?([\w.]+)", around)
    in_round = bool(outside and outside[1] == "rounds" and key != "rounds")
    inside = is_dataclass(found.object_type) and (
        in_round or ("." not in key and found.object_type in (SourceConfig, RoundConfig, TermConfig, SiblingConfig))
    )
    if inside:
        key = f"{outside[1] if outside else 'data.*'}: {key}"
    elif outside and found.object_type is list and "." not in key:  # a list in an element of a list
        key = f"{outside[1]}: {key}"
    if isinstance(found, ConfigKeyError):
        names = [f.name for f in fields(found.object_type)] if inside and found.object_type else _keys(CompressConfig)
        return f"{key}: no such key{_closest(str(found.full_key), names)}; " + (
            f"there are {', '.join(names)}" if inside else "all keys: python -m compress --help"
        )
    hint = found.ref_type
    if is_dataclass(found.object_type):
        hint = get_type_hints(found.object_type).get(str(found.key))
    elif get_args(hint):
        [hint] = get_args(_required(hint))
    rule = _rule_of(hint)
    if isinstance(found, InterpolationKeyError | InterpolationResolutionError) or rule is None:
        return f"{key}: {str(found).splitlines()[0]}"
    value = "null" if found.value is None else found.value
    return f"{key}={value} must be {rule}"


def _required(hint: Any) -> Any:
    """The type without `| None`."""
    given = [part for part in get_args(hint) if part is not type(None)]
    return given[0] if len(given) == 1 and type(None) in get_args(hint) else hint


def _rule_of(hint: Any) -> str | None:
    """A setting's type in words."""
    plain = _required(hint)
    words = {
        int: "a whole number, without point or exponent",
        float: "a number",
        bool: "true or false",
        str: "text",
        Size: "a number, such as 8e9, 8B or 80GiB",
        Size | None: "a number, such as 8e9, 8B or 80GiB, or null",
        list[int]: "a list of whole numbers, such as [3,4]",
        list[str]: "a list of names, such as [activation,taylor]",
        list[DepthCriterion]: f"a list of {', '.join(DepthCriterion)}",
        list[SourceConfig]: "a list of sources, such as [{path: my.jsonl}]",
        list[list[int]]: "a list of [student, teacher] pairs of layers, such as [[-1,-1]]",
        list[PhaseConfig]: "a list of phases, such as [{}, {num_tokens: 1B, learning_rate: 1e-4}]",
        list[float]: "a list of numbers, such as [0.9,0.1]",
        list[RoundConfig]: "a list of rounds, such as [{prune: {num_hidden_layers: 28}}]",
        list[TermConfig]: "a list of terms, such as [{objective: forward_kl}]",
        list[SiblingConfig]: "a list of students, such as [{name: small, prune: {num_hidden_layers: 20}}]",
        SourceConfig: "a source, such as {path: my.jsonl}",
    }
    rule = words.get(plain)
    if rule is None and isinstance(plain, type) and issubclass(plain, StrEnum):
        rule = f"one of {', '.join(plain)}"
    elif rule is None and is_dataclass(plain):
        rule = f"a section; set its keys one by one: {', '.join(f.name for f in fields(plain))}"
    return f"{rule}, or null" if rule and plain is not hint else rule


def to_config(composed: DictConfig) -> CompressConfig:
    """Convert what Hydra composed, strictly: unknown keys (also by `+key=`) and wrong types are ConfigErrors."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
        assert isinstance(plain, dict)
        _resolve_sizes(plain, CompressConfig)
        if plain.get("stage") == Stage.plan:  # reckons without the text
            for split, number, source in _sources(plain):
                source["path"] = f"{split}-{number}.jsonl" if source.get("path") == MISSING else source.get("path")
        merged = OmegaConf.merge(OmegaConf.structured(CompressConfig), plain)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            recipes = ", ".join(sorted(file.stem for file in (conf_dir() / "recipe").glob("*.yaml")))
            first = sorted(missing)[0]
            remedy = f"or choose a recipe= that does: {recipes}, or your own with --config-dir"
            if "[" in first:
                remedy = f"such as {first.partition('[')[0]}=[{{path: my.jsonl}}]"
            raise ConfigError(f"{' and '.join(sorted(missing))} must be set; give a value, {remedy}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, CompressConfig)
    check(config)
    return config


def _sources(plain: dict[Any, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for split in ("train", "calibration", "validation"):
        for number, source in enumerate((plain.get("data") or {}).get(split) or ()):
            if isinstance(source, dict):
                yield split, number, source


_SIZE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf|-inf)\s*([a-z]*)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse_size(value: float | str, key: str) -> float:
    """The number behind `8B` (billion), `1.5M`, `80GiB`, `3e8`. Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{key}={value} must be a number, such as 8e9, 8B or 80GiB")
    return float(match[1]) * _UNITS[match[2].lower()]


def _resolve_sizes(plain: dict[Any, Any], kind: Any, prefix: str = "") -> None:
    """Replace what stands for a number by the number, in every section and list."""
    hints = get_type_hints(kind)
    for name, value in plain.items():
        hint, key = hints.get(name), f"{prefix}{name}"
        if isinstance(value, dict) and is_dataclass(hint):
            _resolve_sizes(value, hint, f"{key}.")
        elif isinstance(value, list) and is_dataclass(element := next(iter(get_args(hint)), None)):
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    _resolve_sizes(item, element, f"{key}[{number}].")
        elif hint in (Size, Size | None) and isinstance(value, float | int | str) and not isinstance(value, bool):
            plain[name] = value if value == MISSING or "${" in str(value) else parse_size(value, key)


ConfigStore.instance().store(name="schema", node=CompressConfig)

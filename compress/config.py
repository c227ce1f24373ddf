"""Every setting of a compression, typed. Hydra composes; this module converts, checks and nothing else.

A choice is an enum; there is no `_target_`, so a config from elsewhere is data. Cross-field rules that need no file are
in `check`; rules that need the teacher (shapes, tokenizers) are checked where the teacher is first read, before any
long work.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

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

from compress.criteria import parse_criterion
from compress.errors import ConfigError

if TYPE_CHECKING:
    Size = float
else:  # as it is written, `8e9`, `8B` or `80GiB`; to_config makes a number of it
    Size = float | int | str


class Stage(StrEnum):
    all = "all"
    tokenize = "tokenize"
    score = "score"
    search = "search"
    prune = "prune"
    distill = "distill"
    export = "export"
    evaluate = "evaluate"
    plan = "plan"
    status = "status"
    selftest = "selftest"


class LossOn(StrEnum):
    all = "all"
    response = "response"


class DepthCriterion(StrEnum):
    """What to remove by (`depth.py`): without a suffix each layer alone, or greedily, or a contiguous block."""

    block_influence = "block_influence"
    block_cosine = "block_cosine"
    loss = "loss"
    loss_greedy = "loss_greedy"
    loss_block = "loss_block"
    nmse = "nmse"
    nmse_greedy = "nmse_greedy"
    nmse_block = "nmse_block"
    kl = "kl"
    kl_greedy = "kl_greedy"
    kl_block = "kl_block"
    task = "task"
    task_greedy = "task_greedy"
    task_block = "task_block"

    @property
    def is_measured(self) -> bool:
        """Whether candidate models are run, up to score.max_removed_layers; else every number of layers is known."""
        return self not in (DepthCriterion.block_influence, DepthCriterion.block_cosine)


class ComputeDtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Optimizer(StrEnum):
    adamw = "adamw"
    muon = "muon"


@dataclass
class TeacherConfig:
    """The model to shrink: a Hugging Face folder, a hub id, or `embedded:NAME`."""

    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class SourceConfig:
    """One source of text: a .jsonl, .json, .parquet or .txt file (or glob), a folder or hub id that `datasets` reads,
    or `embedded:NAME`."""

    path: str = MISSING
    name: str | None = None  # of a validation set, in every table; none = the file's own name
    subset: str | None = None  # the `name` of a hub data set
    split: str = "train"
    text_key: str = "text"
    messages_key: str = "messages"  # records that have this key are conversations
    tools_key: str = "tools"
    weight: float | None = None  # share of the training tokens; none given anywhere = in proportion to size
    max_records: int | None = None


@dataclass
class DataConfig:
    sequence_length: int = 512
    loss_on: LossOn = LossOn.all
    append_eos: bool = True
    train: list[SourceConfig] = field(default_factory=list)
    calibration: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    records_per_shard: int = 4096
    workers: int = 0  # 0 = one per core; changes speed, never the result


@dataclass
class ArchitectureConfig:
    table: str | None = None  # a file of families of your own, beside the built-in ones (docs/families.md)


@dataclass
class ScoreConfig:
    """Criteria: the first of each list is what pruning goes by unless prune.*_criterion names another."""

    num_sequences: int = 64
    # KIND or KIND:BATCH/SEQUENCE; kinds activation, weighted_activation, taylor, weight_magnitude; Minitron's is first
    width: list[str] = field(default_factory=lambda: ["activation:l2/mean"])
    depth: list[DepthCriterion] = field(default_factory=lambda: [DepthCriterion.block_influence])
    depth_sequences: int = 12  # that loss, nmse and kl are measured on
    task_path: str = "embedded:piqa"  # jsonl of {question, choices, label}, for task, task_greedy and task_block
    task_items: int = 64
    max_removed_layers: int | None = None  # how far they go; none = as prune.* asks, else half of the layers
    stream: bool | None = None  # one layer in memory at a time; none = when the weights don't fit
    micro_batch_size: int = 4


@dataclass
class PruneConfig:
    """The student's shape, by Hugging Face size names; what is not given stays as the teacher's, unless a budget
    (`max_*`, `min_tokens_per_second`) is: then the best legal shape within all of it fills what is open."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None  # of one expert
    source: str | None = None  # the Hugging Face folder that is scored and pruned; none = the teacher itself
    max_parameters: Size | None = None
    max_non_embedding_parameters: Size | None = None
    max_active_parameters: Size | None = None  # of which a token meets only num_experts_per_tok experts
    max_bytes: Size | None = None  # weights in export.dtype, keys and values of shape.num_contexts contexts
    min_tokens_per_second: float | None = None  # of generation, measured here; needs search.num_candidates
    width_criterion: str | None = None  # of score.width; none = its first
    depth_criterion: DepthCriterion | None = None  # of score.depth; none = its first
    removed_layers: list[int] | None = None  # by hand, instead of the depth criterion
    compensate: bool = False  # kept MLP channels and heads absorb what the removed ones did, by least squares
    merge_heads: bool = False  # Minitron's residual merge: removed heads are folded into kept ones
    compensate_sequences: int = 128  # of calibration text, or as many as there are
    adapters: list[str] = field(default_factory=list)  # PEFT LoRA folders, sliced along into adapters/NAME


@dataclass
class ShapeConfig:
    multiple_of: int = 16
    min_budget_ratio: float = 0.9  # a budget's candidates use at least this share of it
    tensor_parallel: int = 1  # ranks of the serving engine that heads, MLP and expert widths must divide over
    context_tokens: int = 4096  # that prune.max_bytes holds keys and values for
    num_contexts: int = 1
    max_width_pruning: float = 0.5
    max_depth_pruning: float = 0.5


@dataclass
class SearchConfig:
    """Choosing among the shapes of a budget by measurement: cut, compare, distil the better half a little, repeat."""

    num_candidates: int = 0  # of the best predicted shapes, cut and measured; 0 = the best predicted is taken
    num_tokens: Size = 0.0  # of the first round's short distillation, each round twice the last; 0 = none
    num_sequences: int = 32  # that candidates are compared on
    judge: str | None = None  # the validation set these come from; none = the first
    continue_winner: bool = False  # distill goes on from the winner's trained weights instead of prune's


@dataclass
class DistillConfig:
    init_from: str | None = None  # a student pruned elsewhere; none = this run's prune folder
    num_tokens: Size = MISSING
    global_batch_size: int = 4  # sequences a step
    micro_batch_size: int = 4  # sequences a forward; changes memory, not the gradient
    temperature: float = 1.0
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = 4e-4
    muon_learning_rate: float = 0.01  # of the layers' matrices when optimizer=muon; the rest trains by AdamW
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 8
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_gradient_norm: float = 1.0
    recompute: bool = False  # a layer's activations are made again in the backward: less memory, a third more work
    compile: bool = False  # torch.compile per decoder layer: 1.3x on a CPU after half a minute, needs a C++ compiler
    checkpoint_steps: int = 16
    keep_checkpoints: int = 2
    log_steps: int = 1


@dataclass
class ExportConfig:
    step: int | None = None  # a kept step, also while training goes on; none = the last one of a finished distill
    dtype: ComputeDtype = ComputeDtype.bfloat16


@dataclass
class EvaluateConfig:
    max_tokens: Size | None = 32768.0  # of each validation set; none = all
    micro_batch_size: int = 4
    generate_tokens: int = 64  # for the speed figure
    lm_eval: bool = False
    lm_eval_items: int = 500
    lm_eval_path: str = "embedded:piqa"  # jsonl of {question, choices, label}


@dataclass
class ClusterConfig:
    """The machines that stage=plan reckons with; nothing here changes a result."""

    num_nodes: int = 1
    gpus_per_node: int = 0  # 0 = the CPU trains
    memory_bytes: Size | None = None  # of one GPU; none = what is free on this machine
    peak_flops: Size | None = None  # of one GPU in bfloat16, without sparsity, a second; none = measured here
    efficiency: float = 0.4  # share of it that a training step reaches
    price_per_gpu_hour: float | None = None


@dataclass
class RoundConfig:
    """One of several rounds of pruning and distilling; what it leaves out is as for a single one."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    num_tokens: Size | None = None  # none = distill.num_tokens
    learning_rate: float | None = None  # none = distill.learning_rate


@dataclass
class CompressConfig:
    name: str = "run"
    run_dir: str = "runs/${name}"
    cache_dir: str = "${oc.env:COMPRESS_CACHE,'~/.cache/compress'}"
    stage: Stage = Stage.all
    until: Stage | None = None  # the last one that stage=all runs; none = all of them
    seed: int = 0
    compute_dtype: ComputeDtype = ComputeDtype.auto
    threads: int = 0  # 0 = torch's own choice
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rounds: list[RoundConfig] = field(
        default_factory=list
    )  # in run_dir/round_1, ...; each prunes the last one's student
    round: int | None = None  # only this one of them, from 1


GROUPS = ("recipe", "cluster")
BUDGET = ("max_parameters", "max_non_embedding_parameters", "max_active_parameters", "max_bytes",
          "min_tokens_per_second")  # fmt: skip


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
        return " ".join(str(error).partition("\nSee ")[0].split())
    file = re.match(r"In '((?:recipe|cluster)/[^']+)'", str(error))
    return (f"{file[1]}.yaml: " if file else "") + _explain_key(found, str(error))


def _explain_key(found: OmegaConfBaseException, around: str) -> str:
    key = str(found.full_key)
    # OmegaConf knows a key inside a list's element only from there on; Hydra's message around it has the rest.
    outside = re.search(r"overrid(?:e|ing) '?([\w.]+)", around)
    in_round = bool(outside and outside[1] == "rounds" and key != "rounds")
    inside = is_dataclass(found.object_type) and (
        in_round or ("." not in key and found.object_type in (SourceConfig, RoundConfig))
    )
    if inside:
        key = f"{outside[1] if outside else 'data.*'}: {key}"
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
        list[RoundConfig]: "a list of rounds, such as [{prune: {num_hidden_layers: 28}}]",
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


_Rule = tuple[Callable[[Any], bool], str, str]  # what must hold of a value, in words, the keys


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


# Rules of one value each; null is always a choice where the type admits it.
_RULES: tuple[_Rule, ...] = (
    (
        lambda v: v >= 1,
        "must be at least 1",
        "data.records_per_shard score.num_sequences score.depth_sequences score.task_items score.micro_batch_size "
        "score.max_removed_layers shape.multiple_of shape.tensor_parallel prune.hidden_size prune.intermediate_size "
        "prune.num_hidden_layers prune.num_attention_heads prune.num_key_value_heads prune.num_experts "
        "prune.moe_intermediate_size prune.compensate_sequences shape.context_tokens shape.num_contexts "
        "search.num_sequences distill.global_batch_size distill.micro_batch_size distill.checkpoint_steps "
        "distill.keep_checkpoints distill.log_steps export.step evaluate.micro_batch_size evaluate.lm_eval_items "
        "evaluate.generate_tokens cluster.num_nodes",
    ),
    (lambda v: math.isfinite(v) and v >= 1, "must be at least 1, or null for all", "evaluate.max_tokens"),
    (
        lambda v: math.isfinite(v) and v >= 1,
        "must be a number of 1 or more, such as 100M",
        "prune.max_parameters prune.max_non_embedding_parameters prune.max_active_parameters prune.max_bytes",
    ),
    (lambda v: v >= 8, "must be at least 8 tokens", "data.sequence_length"),
    (lambda v: 0 <= v <= 1024, "must be within 0 (chosen for you) and 1024", "threads data.workers"),
    (lambda v: v >= 0, "must be 0 or more", "distill.warmup_steps search.num_candidates cluster.gpus_per_node"),
    (
        lambda v: 0 <= v < math.inf and v == int(v),
        "must be a whole number of tokens, or 0 for none",
        "search.num_tokens",
    ),
    (lambda v: 0 <= v < 2**63, "must be within 0 and 2**63 - 1", "seed"),
    (bool, "is empty; give a folder", "run_dir cache_dir"),
    (bool, "is empty; give a Hugging Face folder, a hub id, or embedded:NAME", "teacher.path"),
    (
        _positive,
        "must be a positive number",
        "distill.learning_rate distill.muon_learning_rate distill.temperature distill.max_gradient_norm "
        "distill.epsilon prune.min_tokens_per_second cluster.memory_bytes cluster.peak_flops "
        "cluster.price_per_gpu_hour",
    ),
    (lambda v: 0 <= v < math.inf, "must be 0 or more, and finite", "distill.weight_decay"),
    (lambda v: 0 <= v <= 1, "must be within 0 and 1", "distill.min_learning_rate_ratio"),
    (lambda v: 0 <= v < 1, "must be within 0 and 1, 1 excluded", "distill.beta1 distill.beta2"),
    (
        lambda v: 0 <= v < 1,
        "is a share: within 0 and 1, 1 excluded",
        "shape.max_width_pruning shape.max_depth_pruning",
    ),
    (lambda v: 0 < v <= 1, "must be within 0 and 1, 0 excluded", "shape.min_budget_ratio cluster.efficiency"),
    (
        lambda v: _positive(v) and v == int(v),
        "must be a whole positive number of tokens",
        "distill.num_tokens",
    ),
    (
        lambda v: v and "/" not in v and not v.startswith("."),
        "becomes a folder: it must be non-empty, without '/' or a leading '.'",
        "name",
    ),
)


def check(config: CompressConfig) -> None:
    """The rules between settings that need no file. Raises ConfigError with key, value, rule and remedy."""
    for holds, text, keys in _RULES:
        for key in keys.split():
            value = operator.attrgetter(key)(config)
            if value is not None and not holds(value):
                raise ConfigError(f"{key}={value} {text}")
    if config.until in (Stage.all, Stage.plan, Stage.status, Stage.selftest):
        raise ConfigError(
            f"until={config.until} is no stage to stop after; choose one from tokenize to evaluate, or null"
        )
    _check_batches(config)
    if config.rounds:
        _check_rounds(config)
    elif config.round is not None:
        raise ConfigError(
            f"round={config.round} chooses one of rounds, which is empty; give rounds=[...], or round=null"
        )
    else:
        _check_budget(config)
    if config.prune.merge_heads and config.prune.compensate:
        raise ConfigError(
            "prune.merge_heads=true can't be combined with prune.compensate=true, which is fitted to heads as they "
            "are; set one of the two to false"
        )
    names = [Path(path).name for path in config.prune.adapters]
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"prune.adapters: the folders' names {names} must differ, since each keeps its own")
    _check_criteria(config)
    for split in ("train", "calibration", "validation"):
        _check_sources(split, getattr(config.data, split))


def _check_budget(config: CompressConfig) -> None:
    prune, search = config.prune, config.search
    limits = [key for key in BUDGET if getattr(prune, key) is not None]
    if limits and prune.removed_layers is not None:
        raise ConfigError(
            f"prune.removed_layers={prune.removed_layers} can't be combined with prune.{limits[0]}="
            f"{getattr(prune, limits[0]):,.0f}, which chooses the layers; set one of the two to null"
        )
    if prune.min_tokens_per_second is not None and not search.num_candidates:
        raise ConfigError(
            f"prune.min_tokens_per_second={prune.min_tokens_per_second:g} is measured on candidates; set "
            "search.num_candidates, such as 8"
        )
    if search.num_candidates and not limits:
        raise ConfigError(
            f"search.num_candidates={search.num_candidates} searches within a budget; set one of "
            f"{', '.join(f'prune.{key}' for key in BUDGET)}, or search.num_candidates=0"
        )
    tokens_per_step = config.distill.global_batch_size * config.data.sequence_length
    if 0 < search.num_tokens < tokens_per_step:
        raise ConfigError(
            f"search.num_tokens={search.num_tokens:g} is less than one step of distill.global_batch_size * "
            f"data.sequence_length = {tokens_per_step} tokens; give it more, or 0 for no distillation"
        )
    if search.num_candidates and config.distill.init_from:
        raise ConfigError(
            f"search.num_candidates={search.num_candidates} finds the student's shape, and distill.init_from="
            f"{config.distill.init_from} has one already; set search.num_candidates=0, or distill.init_from=null"
        )
    if search.continue_winner and not (search.num_candidates and search.num_tokens):
        raise ConfigError(
            "search.continue_winner=true goes on from a winner that was distilled; set search.num_candidates and "
            "search.num_tokens, or it to false"
        )
    names = [set_name(source) for source in config.data.validation]
    if search.judge is not None and search.judge not in names:
        raise ConfigError(f"search.judge={search.judge} is none of the validation sets {names}; choose one of them")


def _check_rounds(config: CompressConfig) -> None:
    """Each round is a config of its own, and no later one may ask for more than an earlier one left."""
    count = len(config.rounds)
    if config.export.step is not None:
        raise ConfigError(
            f"export.step={config.export.step}: a round prunes the last step of the one before; set it null"
        )
    before_export = [Stage.tokenize, Stage.score, Stage.search, Stage.prune, Stage.distill]
    if config.round is None and (config.until in before_export or config.stage in before_export):
        key, value = ("stage", config.stage) if config.stage in before_export else ("until", config.until)
        raise ConfigError(
            f"{key}={value}: a round needs the export of the one before; choose one with round=1 and so on"
        )
    if config.round is not None and not 1 <= config.round <= count:
        raise ConfigError(f"round={config.round} must be within 1 and the {count} of rounds, or null for all")
    if config.prune != PruneConfig() or config.distill.init_from:
        raise ConfigError(
            "prune.* and distill.init_from belong to a single round; give them inside of rounds, or set rounds=[]"
        )
    for number, (one, two) in enumerate(itertools.pairwise(config.rounds), start=2):
        for key in (f.name for f in fields(PruneConfig)):
            before, after = getattr(one.prune, key), getattr(two.prune, key)
            sized = isinstance(before, int | float) and isinstance(after, int | float) and not isinstance(after, bool)
            grows = sized and after > before and key not in ("min_tokens_per_second", "compensate_sequences")
            if grows:
                raise ConfigError(
                    f"rounds: round {number} has prune.{key}={after:,.0f}, more than the {before:,.0f} of the round "
                    "before it; rounds go downwards"
                )
    for number in range(1, count + 1):
        try:
            check(round_config(config, number))
        except ConfigError as error:
            raise ConfigError(f"rounds: round {number}: {error}") from error


def round_config(config: CompressConfig, number: int) -> CompressConfig:
    """The config of one of config.rounds, from 1: a run of its own that prunes the student of the round before."""
    chosen = config.rounds[number - 1]
    before = None if number == 1 else f"{config.run_dir}/round_{number - 1}/export"
    adapters = chosen.prune.adapters
    if not adapters and before is not None:
        inherited = round_config(config, number - 1).prune.adapters
        adapters = [f"{before}/adapters/{Path(path).name}" for path in inherited]
    distill = replace(
        config.distill,
        num_tokens=config.distill.num_tokens if chosen.num_tokens is None else chosen.num_tokens,
        learning_rate=config.distill.learning_rate if chosen.learning_rate is None else chosen.learning_rate,
    )
    return replace(
        config,
        run_dir=f"{config.run_dir}/round_{number}",
        prune=replace(chosen.prune, source=chosen.prune.source or before, adapters=adapters),
        distill=distill,
        rounds=[],
        round=None,
    )


def _check_criteria(config: CompressConfig) -> None:
    wanted = config.prune.width_criterion
    _check_choice("width", [str(parse_criterion(text)) for text in config.score.width],
                  wanted and str(parse_criterion(wanted)))  # fmt: skip
    depth = config.prune.depth_criterion
    _check_choice("depth", [str(criterion) for criterion in config.score.depth], depth and str(depth))


def _check_choice(name: str, scored: list[str], wanted: str | None) -> None:
    if not scored or len(set(scored)) < len(scored):
        raise ConfigError(f"score.{name}={scored}: give one criterion at least, and each once")
    if wanted is not None and wanted not in scored:
        raise ConfigError(
            f"prune.{name}_criterion={wanted} is none of score.{name}={scored}; add it there, or choose one of them"
        )


def _check_batches(config: CompressConfig) -> None:
    distill, length = config.distill, config.data.sequence_length
    if distill.global_batch_size % distill.micro_batch_size:
        raise ConfigError(
            f"distill.global_batch_size={distill.global_batch_size} must be a multiple of "
            f"distill.micro_batch_size={distill.micro_batch_size}"
        )
    if distill.num_tokens < distill.global_batch_size * length:
        raise ConfigError(
            f"distill.num_tokens={distill.num_tokens} is less than one step of distill.global_batch_size * "
            f"data.sequence_length = {distill.global_batch_size * length} tokens; give it more, or a smaller batch"
        )


def _check_sources(split: str, sources: list[SourceConfig]) -> None:
    if not sources:
        raise ConfigError(f"data.{split} is empty; give at least one source, such as data.{split}=[{{path: my.jsonl}}]")
    weights = [s.weight for s in sources]
    if any(w is not None for w in weights) and not all(w is not None and _positive(w) for w in weights):
        raise ConfigError(f"data.{split}: weights {weights} must be positive for every source, or given for none")
    if split != "validation":
        return
    names = [set_name(s) for s in sources]
    if len(set(names)) != len(names):
        raise ConfigError(f"data.validation: the names {names} must differ; set name= on each source")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(
                f"data.validation name={name!r} becomes a folder: letters, digits, '-' and '_' only; set "
                "name= on this source"
            )


def set_name(source: SourceConfig) -> str:
    """The name of a validation set in folders and tables."""
    return source.name or Path(source.path.removeprefix("embedded:")).name.split(".")[0]


ConfigStore.instance().store(name="schema", node=CompressConfig)

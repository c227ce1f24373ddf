"""The rules between settings that need no file; each breach names the key, the value, the rule and the remedy.

Rules that need the teacher (shapes, tokenizers) are checked where the teacher is first read, before any long work.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from compress.criteria import parse_criterion
from compress.errors import ConfigError
from compress.settings import (
    BUDGET,
    CompressConfig,
    CorrectConfig,
    JobsConfig,
    ObjectiveName,
    Optimizer,
    PhaseConfig,
    PruneConfig,
    SearchConfig,
    SourceConfig,
    Stage,
    TeacherMode,
    TermConfig,
    set_name,
)
from compress.training_rules import check_training, is_positive

_BESIDE = (Stage.plan, Stage.status, Stage.selftest, Stage.doctor)  # what is asked of a run, beside its own stages
_JOB_COUNTS = ("num_nodes", "ranks_per_node", "cpus", "submissions")
_Rule = tuple[Callable[[Any], bool], str, str]  # what must hold of a value, in words, the keys


# Rules of one value each; null is always a choice where the type admits it.
_RULES: tuple[_Rule, ...] = (
    (
        lambda v: v >= 1,
        "must be at least 1",
        "data.records_per_shard score.num_sequences score.depth_sequences score.task_items score.micro_batch_size "
        "score.max_removed_layers shape.multiple_of shape.tensor_parallel prune.hidden_size prune.intermediate_size "
        "prune.num_hidden_layers prune.num_attention_heads prune.num_key_value_heads prune.num_experts "
        "prune.moe_intermediate_size prune.compensate_sequences shape.context_tokens shape.num_contexts "
        "search.num_sequences cache.num_samples cache.k cache.sequences_per_shard cache.micro_batch_size "
        "distill.global_batch_size distill.micro_batch_size distill.checkpoint_steps distill.keep_checkpoints "
        "distill.log_steps distill.validate_steps export.step evaluate.micro_batch_size evaluate.lm_eval_items "
        "evaluate.generate_tokens cluster.num_nodes cluster.shard_ranks "
        "cluster.ranks_per_node "
        + " ".join(f"cluster.jobs.{job.name}.{key}" for job in fields(JobsConfig) for key in _JOB_COUNTS),
    ),
    (lambda v: math.isfinite(v) and v >= 1, "must be at least 1, or null for all", "evaluate.max_tokens"),
    (
        lambda v: math.isfinite(v) and v >= 1,
        "must be a number of 1 or more, such as 100M",
        "prune.max_parameters prune.max_non_embedding_parameters prune.max_active_parameters prune.max_bytes",
    ),
    (lambda v: v >= 8, "must be at least 8 tokens", "data.sequence_length"),
    (lambda v: v >= 2, "must be at least 2, which a slope needs", "distill.stop_validations"),
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
        is_positive,
        "must be a positive number",
        "distill.learning_rate distill.muon_learning_rate distill.max_gradient_norm "
        "distill.epsilon distill.stop_slope prune.min_tokens_per_second cluster.memory_bytes cluster.peak_flops "
        "cluster.price_per_gpu_hour cluster.node_bandwidth cluster.network_bandwidth cluster.stall_seconds "
        "correct.learning_rate",
    ),
    (lambda v: 0 <= v < math.inf, "must be 0 or more, and finite", "distill.weight_decay distill.balance_loss"),
    (lambda v: 0 <= v <= 1, "must be within 0 and 1", "distill.min_learning_rate_ratio correct.min_gain"),
    (
        lambda v: 0 <= v < 1,
        "must be within 0 and 1, 1 excluded",
        "distill.beta1 distill.beta2 distill.decay_share distill.ema_decay",
    ),
    (
        lambda v: 0 <= v < 1,
        "is a share: within 0 and 1, 1 excluded",
        "shape.max_width_pruning shape.max_depth_pruning",
    ),
    (lambda v: 0 < v <= 1, "must be within 0 and 1, 0 excluded", "shape.min_budget_ratio cluster.efficiency"),
    (
        lambda v: is_positive(v) and v == int(v),
        "must be a whole positive number of tokens",
        "distill.num_tokens distill.validate_tokens correct.num_tokens correct.trial_tokens",
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
    if config.until in (Stage.all, *_BESIDE):
        raise ConfigError(
            f"until={config.until} is no stage to stop after; choose one from tokenize to evaluate, or null"
        )
    check_training(config)
    _check_correction(config)
    if config.siblings:
        _check_siblings(config)
    elif config.rounds:
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
    if search.num_distilled is not None and not 2 <= search.num_distilled <= search.num_candidates:
        raise ConfigError(
            f"search.num_distilled={search.num_distilled} must be within 2 and search.num_candidates="
            f"{search.num_candidates}, from which they are chosen; null distils them all"
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


def _check_siblings(config: CompressConfig) -> None:
    """Each sibling is a config of its own; they are distilled together."""
    if config.rounds:
        raise ConfigError("siblings and rounds can't be combined; give rounds to runs of their own, or set one to []")
    if config.prune != PruneConfig() or config.distill.init_from or config.export.step is not None:
        raise ConfigError(
            "prune.*, distill.init_from and export.step belong to a single student; give prune inside of siblings, or "
            "set siblings=[]"
        )
    if config.stage not in (Stage.all, *_BESIDE):
        raise ConfigError(
            f"stage={config.stage}: siblings run all their stages, those that are done skipped; leave it out, or stop "
            "after one with until="
        )
    if config.teacher.mode is TeacherMode.auto:
        raise ConfigError("teacher.mode=auto chooses for one student; set online or cached for siblings")
    names = [sibling.name for sibling in config.siblings]
    if len(set(names)) != len(names):
        raise ConfigError(f"siblings: the names {names} must differ; each has its own folder")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name) or name in ("tokens", "score", "correct", "cache"):
            raise ConfigError(
                f"siblings: name={name!r} becomes a folder beside tokens, score, correct and cache: letters, digits, "
                "'-' and '_' only"
            )
        try:
            check(sibling_config(config, name))
        except ConfigError as error:
            raise ConfigError(f"siblings: {name}: {error}") from error


def sibling_config(config: CompressConfig, name: str) -> CompressConfig:
    """The config of one of config.siblings: a run of its own."""
    [chosen] = [sibling for sibling in config.siblings if sibling.name == name]
    return replace(config, run_dir=f"{config.run_dir}/{name}", prune=chosen.prune, siblings=[])


def correction_config(config: CompressConfig, teacher: str, phases: int = 2) -> CompressConfig:
    """The config by which stage correct trains the teacher itself on the text: its trial, and then the rest too."""
    settings = config.correct
    assert settings.num_tokens is not None
    trial = _trial_tokens(config, settings.num_tokens)
    parts = [PhaseConfig(num_tokens=trial), PhaseConfig(num_tokens=settings.num_tokens - trial)]
    distill = replace(
        config.distill,
        init_from=teacher,
        phases=parts[:phases],
        objectives=[TermConfig(ObjectiveName.cross_entropy)],
        optimizer=Optimizer.adamw,
        learning_rate=settings.learning_rate,
        balance_loss=0.0,
        ema_decay=None,
        keep_best=False,
        validate_steps=None,
        stop_slope=None,
    )
    return replace(
        config,
        teacher=replace(config.teacher, mode=TeacherMode.online),
        prune=PruneConfig(),
        search=SearchConfig(),
        correct=CorrectConfig(),
        distill=distill,
        export=replace(config.export, step=None),
    )


def _trial_tokens(config: CompressConfig, num_tokens: float) -> float:
    """Whole steps, one at least where nothing is said."""
    step = config.distill.global_batch_size * config.data.sequence_length
    wanted = config.correct.trial_tokens
    return max(step, num_tokens / 10 // step * step) if wanted is None else wanted // step * step


def _check_correction(config: CompressConfig) -> None:
    settings = config.correct
    if settings.num_tokens is None:
        if settings != CorrectConfig():
            raise ConfigError("correct.* is set, but correct.num_tokens is null, which leaves the teacher as it is; "
                              "give it tokens, such as 100M, or leave the rest of correct.* out")  # fmt: skip
        return
    if config.teacher.mode is TeacherMode.previous_self:
        raise ConfigError(
            f"correct.num_tokens={settings.num_tokens:g} corrects a teacher, and teacher.mode=previous_self has none; "
            "set correct.num_tokens=null, or teacher.mode=online"
        )
    step = config.distill.global_batch_size * config.data.sequence_length
    trial = _trial_tokens(config, settings.num_tokens)
    if trial < step or settings.num_tokens - trial < step:
        raise ConfigError(
            f"correct.num_tokens={settings.num_tokens:g} must hold a trial (correct.trial_tokens="
            f"{settings.trial_tokens}) and what follows, each of one step of distill.global_batch_size * "
            f"data.sequence_length = {step} tokens at least; give it {max(trial, step) + step:g} or more"
        )


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


def _check_sources(split: str, sources: list[SourceConfig]) -> None:
    if not sources:
        raise ConfigError(f"data.{split} is empty; give at least one source, such as data.{split}=[{{path: my.jsonl}}]")
    weights = [s.weight for s in sources]
    if any(w is not None for w in weights) and not all(w is not None and is_positive(w) for w in weights):
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

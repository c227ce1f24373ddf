"""The stage table: what runs in which order, and which settings change what each stage makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from compress import (
    cache,
    correct,
    distill,
    evaluate,
    export,
    prune,
    score,
    search,
    tokenize,
)
from compress.errors import ConfigError
from compress.inputs import export_folder
from compress.parallel import check_layout, shared_by
from compress.settings import CompressConfig, PruneConfig, Stage, TeacherMode
from compress.training_rules import check_ranks


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """One row of the stage table.

    `reads` are the settings that change the result, by dotted key; what only changes speed, memory or logging (micro
    batches, workers, threads, checkpoint interval) is not among them.
    """

    run: Callable[[CompressConfig, Path], None]
    after: tuple[Stage, ...]
    reads: tuple[str, ...]
    folder: Callable[[CompressConfig], str]
    checkpoints: str = "checkpoints"  # in the folder


_TRAINING = (
    "num_tokens phases global_batch_size objectives optimizer learning_rate muon_learning_rate min_learning_rate_ratio "
    "learning_rate_curve decay_share "
    "warmup_steps compile stop_slope ema_decay weight_decay balance_loss beta1 beta2 epsilon max_gradient_norm"
)
TRAINING_KEYS = tuple(f"distill.{key}" for key in _TRAINING.split())
_LATER = "num_tokens phases stop_slope ema_decay min_learning_rate_ratio compile"  # not of a candidate's training
LATER_KEYS = tuple(f"distill.{key}" for key in _LATER.split())
_OWN_KEYS = "num_tokens phases objectives optimizer learning_rate muon_learning_rate stop_slope ema_decay balance_loss"
_CORRECTION_KEYS = tuple(key for key in TRAINING_KEYS if key.removeprefix("distill.") not in _OWN_KEYS.split())
# Adapters follow the cut: one that turns out to have lost every layer can be left out without another search.
_SEARCHED_KEYS = tuple(f"prune.{key.name}" for key in dataclasses.fields(PruneConfig) if key.name != "adapters")
STAGES: dict[Stage, StageEntry] = {
    Stage.tokenize: StageEntry(
        tokenize.run,
        (),
        ("data.sequence_length", "data.loss_on", "data.append_eos", "data.records_per_shard", "data.train",
         "data.calibration", "data.validation"),
        lambda _: "tokens",
    ),
    Stage.score: StageEntry(
        score.run,
        (Stage.tokenize,),
        ("compute_dtype", "score.num_sequences", "score.width", "score.depth", "score.depth_sequences",
         "score.task_path", "score.task_items", "score.max_removed_layers"),
        lambda _: "score",
    ),
    Stage.search: StageEntry(
        search.run,
        (Stage.tokenize, Stage.score),
        ("seed", "compute_dtype", *_SEARCHED_KEYS, "shape", "search.num_candidates", "search.num_distilled",
         "search.num_tokens", "search.num_sequences", "search.judge"),
        lambda _: "search",
    ),
    Stage.prune: StageEntry(
        prune.run, (Stage.score, Stage.search), ("compute_dtype", "prune", "shape"), lambda _: "prune"
    ),
    Stage.correct: StageEntry(
        functools.partial(correct.run, train=distill.run, export=export.run),
        (Stage.tokenize,),
        ("seed", "compute_dtype", "data.train[*].weight", "correct", "export.dtype", *_CORRECTION_KEYS),
        lambda _: "correct",
        "distill/checkpoints",
    ),
    Stage.cache: StageEntry(
        cache.run,
        (Stage.tokenize, Stage.correct),
        ("seed", "compute_dtype", "distill.phases", "cache.kind", "cache.num_samples", "cache.k",
         "cache.sequences_per_shard"),
        lambda _: "cache",
    ),
    Stage.distill: StageEntry(
        distill.run,
        (Stage.tokenize, Stage.prune, Stage.correct, Stage.cache),
        ("seed", "compute_dtype", "data.train[*].weight", "teacher.mode", "distill.init_from",
         "search.continue_winner", *TRAINING_KEYS),
        lambda _: "distill",
    ),
    Stage.export: StageEntry(export.run, (Stage.distill,), ("export",), export_folder),
    Stage.evaluate: StageEntry(
        evaluate.run,
        (Stage.tokenize, Stage.export),
        ("compute_dtype", "evaluate.max_tokens", "evaluate.generate_tokens", "evaluate.lm_eval",
         "evaluate.lm_eval_items", "evaluate.lm_eval_path"),
        evaluate.folder_name,
    ),
}  # fmt: skip


ON_RANKS = (Stage.score, Stage.search, Stage.distill, Stage.evaluate)  # the others are one process


def check_share(config: CompressConfig, stage: Stage, world: int) -> None:
    """Raise ConfigError where `world` ranks can't train together as the stage would have them: distill and search."""
    if stage not in (Stage.search, Stage.distill):
        return
    asked = config.cluster.shard_ranks
    check_layout(shared_by(asked, world) if stage is Stage.search else asked, world)
    check_ranks(config, world, stage)


def chosen_stages(config: CompressConfig) -> list[Stage]:
    """The stages of config.stage. Raises ConfigError for one alone that this config leaves out."""
    if config.stage is Stage.search and not config.search.num_candidates:
        raise ConfigError("stage=search needs search.num_candidates, such as 8, and a budget to search within")
    if config.stage is Stage.correct and config.correct.num_tokens is None:
        raise ConfigError("stage=correct needs correct.num_tokens, such as 100M")
    if config.stage is Stage.cache and config.teacher.mode is not TeacherMode.cached:
        raise ConfigError(f"stage=cache needs teacher.mode=cached, it is {config.teacher.mode}")
    if config.stage is not Stage.all:
        return [config.stage]
    order = list(STAGES)
    last = order.index(config.until) if config.until is not None else len(order)
    return [stage for stage in order[: last + 1] if stage not in left_out(config)]


def left_out(config: CompressConfig) -> set[Stage]:
    """A student pruned elsewhere needs neither scores nor pruning; without candidates there is nothing to search,
    without tokens nothing to correct, and a teacher that is asked online needs no cache."""
    elsewhere = {Stage.score, Stage.search, Stage.prune} if config.distill.init_from else set()
    online = set() if config.teacher.mode is TeacherMode.cached else {Stage.cache}
    as_it_is = {Stage.correct} if config.correct.num_tokens is None else set()
    return elsewhere | online | as_it_is | (set() if config.search.num_candidates else {Stage.search})


def run_dir_of(config: CompressConfig) -> Path:
    return Path(config.run_dir).expanduser()

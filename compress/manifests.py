"""What a stage leaves beside its work: is it done, was it done by these settings, who is at it now."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress import (
    checkpoint,
)
from compress.artifacts import (
    ERROR,
    FORMAT_VERSION,
    MANIFEST,
    STARTED,
    fingerprint,
    fingerprint_path,
    read_json,
    write_json,
)
from compress.embedded import resolve
from compress.errors import ArtifactError, CompressError, ConfigError, Interrupted
from compress.folders import tokenizer_fingerprint
from compress.inputs import teacher_of
from compress.lease import TakenOver, check_lease, run_lock
from compress.parallel import launched
from compress.phases import phase_settings
from compress.progress import about
from compress.settings import CacheKind, CompressConfig, Stage, set_name
from compress.sources import local_files
from compress.stages import LATER_KEYS, STAGES, TRAINING_KEYS, left_out, run_dir_of

log = logging.getLogger(__name__)


def run_stage(config: CompressConfig, run_dir: Path, stage: Stage, everything: dict[Stage, dict[str, Any]]) -> None:
    with books(config, run_dir, stage, everything) as wanted:
        if wanted:
            STAGES[stage].run(config, run_dir)


@contextlib.contextmanager
def books(
    config: CompressConfig, run_dir: Path, stage: Stage, everything: dict[Stage, dict[str, Any]]
) -> Iterator[bool]:
    """What is written before and after the stage's work, which is the block's; False when it was done meanwhile."""
    entry, expected = STAGES[stage], everything[stage]
    folder = run_dir / entry.folder(config)
    if not launched().is_main:  # the first rank keeps the books
        yield True
        return
    with run_lock(run_dir, folder.name):
        if is_done(config, stage, everything):  # another process finished it since we looked
            yield False
            return
        log.info("%s: starting", stage)
        began = time.monotonic()
        write_json(folder / STARTED, expected)
        kept = checkpoint.steps(folder / entry.checkpoints)
        before = read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        if before is not None:
            log.info("%s: it was done with fewer distill.phases, and goes on", stage)
            (folder / MANIFEST).unlink()
        (folder / ERROR).unlink(missing_ok=True)
        try:
            yield True
            check_lease(folder)
        except TakenOver:
            raise  # even a note of it would be a write
        except CompressError as error:
            with contextlib.suppress(ArtifactError):  # a full disk can't take the note either
                write_json(folder / ERROR, {"error": str(error), "time": time.time()})
            # What is mended next is most likely a setting, so a failure binds nobody; checkpoints do: they go on.
            now = checkpoint.steps(folder / entry.checkpoints)
            if not isinstance(error, Interrupted) and (now == kept if before else not now):
                (folder / STARTED).unlink(missing_ok=True)
                if before is not None:  # the appended phases failed at once: what there was is done as it was
                    write_json(folder / MANIFEST, before)
            raise
        seconds = time.monotonic() - began
        manifest = {**expected, "seconds": seconds, "versions": versions(), "config": plain_settings(config)}
        write_json(folder / MANIFEST, manifest)
        (folder / STARTED).unlink(missing_ok=True)
    log.info("%s: done in %s", stage, about(seconds))


def expectations(config: CompressConfig) -> dict[Stage, dict[str, Any]]:
    """What each stage's manifest must say for this config: its settings, its input files, and a fingerprint of both.

    A stage's fingerprint holds those of the stages before it, so all of them are known before anything runs.
    """
    cache_dir = Path(config.cache_dir).expanduser()
    teacher = teacher_of(config)
    plain = plain_settings(config)
    files: dict[Stage, dict[str, str]] = {stage: {} for stage in STAGES}
    files[Stage.tokenize]["the teacher's tokenizer"] = tokenizer_fingerprint(teacher)
    for split in ("train", "calibration", "validation"):
        for number, source in enumerate(getattr(config.data, split)):
            files[Stage.tokenize][f"the text of data.{split}[{number}]"] = _source_fingerprint(source.path, cache_dir)
            # What a file holds counts, and the name it goes by, but not where it lies; its weight is distill's.
            plain["data"][split][number] |= {"path": None, "name": set_name(source), "weight": None}
    plain["data"]["train[*]"] = {"weight": [source.weight for source in config.data.train]}
    teacher_fingerprint = fingerprint_path(teacher)
    for stage in (Stage.score, Stage.search, Stage.prune, Stage.correct, Stage.cache, Stage.distill, Stage.evaluate):
        files[stage]["the teacher's files"] = teacher_fingerprint
    if config.prune.source:
        source = Path(config.prune.source).expanduser()
        if not source.is_dir():
            raise ArtifactError(
                f"prune.source={source} is no folder; give the Hugging Face folder of what is to be pruned"
            )
        for stage in (Stage.score, Stage.search, Stage.prune):
            files[stage]["prune.source's files"] = fingerprint_path(source)
            plain["prune"]["source"] = None  # what it holds counts, not where it lies
    for number, adapter in enumerate(config.prune.adapters):
        if not Path(adapter).expanduser().is_dir():
            raise ArtifactError(f"prune.adapters={adapter} is no folder; give one that peft's save_pretrained wrote")
        files[Stage.prune][f"prune.adapters[{number}]"] = fingerprint_path(Path(adapter).expanduser())
    for stage, key, used in (
        (Stage.score, "score.task_path", any(criterion.startswith("task") for criterion in config.score.depth)),
        (Stage.evaluate, "evaluate.lm_eval_path", config.evaluate.lm_eval),
    ):
        section, _, name = key.partition(".")
        if used and (items := Path(resolve(plain[section][name], cache_dir)).expanduser()).is_file():
            files[stage][key] = fingerprint_path(items)  # where there is none preflight says so
        plain[section][name] = None  # what it holds counts, not where it lies
    plain["prune"]["adapters"] = [Path(adapter).name for adapter in config.prune.adapters]
    if config.architecture.table:
        for stage in (Stage.score, Stage.prune):
            files[stage]["architecture.table"] = fingerprint_path(Path(config.architecture.table).expanduser())
    if config.distill.init_from:
        student = Path(config.distill.init_from).expanduser()
        if not student.is_dir():
            raise ArtifactError(f"distill.init_from={student} is no folder; give the Hugging Face folder of a student")
        files[Stage.distill]["distill.init_from's files"] = fingerprint_path(student)
    result: dict[Stage, dict[str, Any]] = {}
    for stage, entry in STAGES.items():
        reads = entry.reads
        if stage is Stage.score and any(criterion.is_measured for criterion in config.score.depth):
            reads += ("prune.num_hidden_layers",)  # it says how far they go
        if stage in (Stage.search, Stage.prune) and config.prune.max_bytes is not None:
            reads += ("export.dtype",)
        if stage is Stage.search and config.prune.min_tokens_per_second is not None:
            reads += ("export.dtype",)
        if stage is Stage.search and config.search.num_tokens:
            reads += ("data.train[*].weight", *(key for key in TRAINING_KEYS if key not in LATER_KEYS))
        if stage is Stage.correct:
            reads += ("distill.validate_tokens",)  # that its trial is judged on
        if stage is Stage.distill and config.distill.stop_slope is not None:
            reads += ("distill.validate_steps", "distill.validate_tokens", "distill.stop_validations")
        settings = {key: _look_up(plain, key) for key in reads}
        if stage is Stage.distill:
            settings |= _phases_read(config)
        if stage is Stage.cache:
            settings |= _draws_read(config)
            del settings["cache.k" if config.cache.kind is CacheKind.sample else "cache.num_samples"]
        upstream = {
            before.value: result[before]["fingerprint"] for before in entry.after if before not in left_out(config)
        }
        facts = {"format_version": FORMAT_VERSION, "settings": settings, "files": files[stage], "upstream": upstream}
        result[stage] = {**facts, "fingerprint": fingerprint(facts)}
    return result


def _phases_read(config: CompressConfig) -> dict[str, Any]:
    """The phases in full: the first by the keys of a run of one, so that both say the same, and what makes the rest."""
    first, *rest = phase_settings(config)
    weights = first.pop("weights")
    length = first.pop("sequence_length")
    return {
        **{f"distill.{key}": value for key, value in first.items()},
        "data.train[*].weight": weights or [source.weight for source in config.data.train],
        "distill.phases": {
            "1": {"sequence_length": length}, **{str(number): phase for number, phase in enumerate(rest, start=2)}
        },
    }  # fmt: skip


def _draws_read(config: CompressConfig) -> dict[str, Any]:
    """What of each phase decides which sequences are drawn."""
    wanted = ("num_tokens", "global_batch_size", "sequence_length", "weights")
    phases = [{key: phase[key] for key in wanted} for phase in phase_settings(config)]
    return {"distill.phases": {str(number): phase for number, phase in enumerate(phases, start=1)}}


def _earlier(expected: dict[Stage, dict[str, Any]], stage: Stage) -> set[str]:
    """The stage's fingerprints before phases were appended: with only the first of them, the first two, ..."""
    found = set()
    phases = expected[Stage.distill]["settings"]["distill.phases"]
    for count in range(1, len(phases)):
        changed: dict[str, str] = {}
        for later in (Stage.cache, Stage.distill, Stage.export, Stage.evaluate):
            facts = {key: value for key, value in expected[later].items() if key != "fingerprint"}
            if later in (Stage.cache, Stage.distill):
                phases = facts["settings"]["distill.phases"]
                some = {number: phase for number, phase in phases.items() if int(number) <= count}
                facts["settings"] = {**facts["settings"], "distill.phases": some}
            facts["upstream"] = {**facts["upstream"], **{k: v for k, v in changed.items() if k in facts["upstream"]}}
            changed[later.value] = fingerprint(facts)
        found |= {changed[stage.value]} if stage.value in changed else set()
    return found


def is_done(config: CompressConfig, stage: Stage, everything: dict[Stage, dict[str, Any]]) -> bool:
    """True when the manifest is there and equal; False where phases were appended since, so that the stage goes on.

    Raises ArtifactError for a manifest, or half-done work, of other settings.
    """
    expected = everything[stage]
    folder = run_dir_of(config) / STAGES[stage].folder(config)
    for name, done in ((MANIFEST, True), (STARTED, False)):
        if (folder / name).exists() and (done or _has_work(folder)):
            found = read_manifest(folder / name)
            if found["fingerprint"] == expected["fingerprint"]:
                return done
            if found["fingerprint"] in _earlier(everything, stage):
                continue
            raise ArtifactError(
                f"{folder} was {'made' if done else 'begun'} with other settings: {_differences(found, expected)}. "
                f"Give this run another name=, or delete {folder} and the stages after it"
            )
    return False


def _has_work(folder: Path) -> bool:
    """Whether a begun stage has left anything that other settings would mix with."""
    return any(
        file.name not in (MANIFEST, STARTED, ERROR) and not file.name.startswith(".") for file in folder.iterdir()
    )


def read_manifest(path: Path) -> dict[str, Any]:
    found = read_json(path, "delete it and run its stage again")
    if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), str):
        raise ArtifactError(f"{path} is no manifest of this program; delete it and run its stage again")
    return found


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    lines = []
    for part, text in (("settings", "{} was {}, is now {}"), ("files", "{} changed"), ("upstream", "stage {} changed")):
        old, new = found.get(part) or {}, expected[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                for path, before, after in _leaves(key, old.get(key), new.get(key)):
                    lines.append(text.format(path, before, after))
    return "; ".join(lines) or "the format of the run folder changed"


def _leaves(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The differing values inside nested settings, by dotted key."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            leaf
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
            for leaf in _leaves(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [(key, old, new)]


def check_upstream(
    config: CompressConfig, chosen: list[Stage], todo: list[Stage], expected: dict[Stage, dict[str, Any]]
) -> None:
    """Every stage that will run has its inputs: done before with these settings, or earlier in this command."""
    for stage in todo:
        for before in STAGES[stage].after:
            if before in chosen or before in left_out(config):
                continue
            done = is_done(config, before, expected)
            if before is Stage.distill and config.export.step is not None:
                continue  # a kept step exports while training goes on
            if not done:
                folder = run_dir_of(config) / STAGES[before].folder(config)
                raise ConfigError(
                    f"stage={stage} reads {folder}, which isn't done; run stage={before} or stage=all first"
                )


def plain_settings(config: CompressConfig) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(v) for key, v in value.items()}
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.value if isinstance(value, Enum) else value

    plain: dict[str, Any] = convert(dataclasses.asdict(config))
    return plain


def _look_up(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value[part]
    return value


def _source_fingerprint(path: str, cache: Path) -> str:
    """Of the files behind a source; a hub id stands for itself (its revision is what `datasets` resolves)."""
    local = str(Path(resolve(path, cache)).expanduser())
    files = local_files(local)
    return fingerprint([[Path(file).name, fingerprint_path(Path(file))] for file in files]) if files else path


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors", "datasets", "tokenizers")}

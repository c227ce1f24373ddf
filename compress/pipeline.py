"""The stages in order, and what a run folder allows: run what is missing, skip what is done, refuse what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compress import (
    cache,
    checkpoint,
    distill,
    evaluate,
    export,
    plan,
    prune,
    score,
    search,
    selftest,
    steptest,
    teacher_choice,
    tokenize,
)
from compress.artifacts import (
    ERROR,
    FORMAT_VERSION,
    MANIFEST,
    STARTED,
    disk_errors,
    fingerprint,
    fingerprint_path,
    read_json,
    run_lock,
    write_json,
)
from compress.capture import check_terms
from compress.embedded import resolve
from compress.errors import ArtifactError, CompressError, ConfigError, Interrupted
from compress.estimate import estimate_seconds
from compress.families import Family, add_families
from compress.folders import read_config, read_model, tokenizer_fingerprint
from compress.inputs import source_of, student_of, teacher_of
from compress.models import check_same_tokenizer, check_usable, check_vocabulary
from compress.objectives.table import needs_hidden_states
from compress.parallel import check_compiler, launched, refuse_several_ranks
from compress.phases import phase_settings
from compress.progress import about
from compress.rules import round_config, sibling_config
from compress.settings import BUDGET, CompressConfig, PruneConfig, Stage, TeacherMode, set_name
from compress.sources import local_files
from compress.training import check_training_data
from compress.training_log import progress_line

log = logging.getLogger(__name__)


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


_TRAINING = (
    "num_tokens phases global_batch_size objectives optimizer learning_rate muon_learning_rate min_learning_rate_ratio "
    "learning_rate_curve decay_share "
    "warmup_steps compile stop_slope ema_decay weight_decay beta1 beta2 epsilon max_gradient_norm"
)
_TRAINING_KEYS = tuple(f"distill.{key}" for key in _TRAINING.split())
_LATER = "num_tokens phases stop_slope ema_decay min_learning_rate_ratio compile"  # not of a candidate's training
_LATER_KEYS = tuple(f"distill.{key}" for key in _LATER.split())
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
    Stage.cache: StageEntry(
        cache.run,
        (Stage.tokenize,),
        ("seed", "compute_dtype", "data.train[*].weight", "distill.num_tokens", "distill.phases",
         "distill.global_batch_size", "cache.kind", "cache.num_samples", "cache.k", "cache.sequences_per_shard"),
        lambda _: "cache",
    ),
    Stage.distill: StageEntry(
        distill.run,
        (Stage.tokenize, Stage.prune, Stage.cache),
        ("seed", "compute_dtype", "data.train[*].weight", "teacher.mode", "distill.init_from",
         "search.continue_winner", *_TRAINING_KEYS),
        lambda _: "distill",
    ),
    Stage.export: StageEntry(export.run, (Stage.distill,), ("export",), export.folder_name),
    Stage.evaluate: StageEntry(
        evaluate.run,
        (Stage.tokenize, Stage.export),
        ("compute_dtype", "evaluate.max_tokens", "evaluate.generate_tokens", "evaluate.lm_eval",
         "evaluate.lm_eval_items", "evaluate.lm_eval_path"),
        evaluate.folder_name,
    ),
}  # fmt: skip


def run(config: CompressConfig) -> None:
    """Run config.stage, or every stage in order; each is skipped when done and refused when done with other settings.

    Everything that can be refused is refused before the first stage starts. Raises CompressError.
    """
    if config.architecture.table:
        add_families(Path(config.architecture.table).expanduser())
    if config.rounds:
        _run_rounds(config)
        return
    if config.siblings:
        _run_siblings(config)
        return
    run_dir = _run_dir(config)
    if config.teacher.mode is TeacherMode.auto:
        config = _with_teacher_mode(config, run_dir)
    if config.stage is Stage.status:
        _print(status(config))
        return
    if config.stage is Stage.plan:
        _print_all(plan.run(config))
        return
    if config.stage is not Stage.score:
        refuse_several_ranks(f"stage={config.stage}")
    if config.stage is Stage.selftest:
        _print(selftest.run(config))
        table = steptest.run(config, run_dir)
        if table is not None:
            _print(table)
        return
    _check_places(config)
    chosen = _chosen(config)
    expected = expectations(config)
    todo = [stage for stage in chosen if not _is_done(config, stage, expected)]
    _check_upstream(config, chosen, todo, expected)
    if Stage.export in todo:
        export.preflight(config, run_dir, training=Stage.distill in todo)
    if set(todo) - {Stage.export}:
        prune.preflight(config)
        if Stage.score in todo:
            score.preflight(config)
        if Stage.search in todo:
            search.preflight(config)
        if Stage.cache in todo:
            cache.preflight(config)
        elif Stage.distill in todo and config.teacher.mode is TeacherMode.cached and Stage.tokenize not in todo:
            cache.check(config, run_dir)
        if Stage.evaluate in todo:
            evaluate.preflight(config)
        _check_models(config)
        if config.distill.compile and Stage.distill in todo:
            check_compiler("distill.compile")
        if config.score.compile and Stage.score in todo:
            check_compiler("score.compile")
    for stage in chosen:
        if stage not in todo:
            log.info("%s: done before, skipped (%s)", stage, run_dir / STAGES[stage].folder(config))
    if todo:
        estimated = estimate_seconds(config, todo)
        log.info("will run %s: about %s in all, into %s", ", ".join(todo), about(sum(estimated.values())), run_dir)
    for stage in todo:
        if stage is not Stage.tokenize and Stage.distill in todo[todo.index(stage) :]:
            check_training_data(config, run_dir)  # refuses data that can't be trained on before the scoring
        _run_stage(config, run_dir, stage, expected)
    if Stage.evaluate in chosen:
        _print(evaluate.table(config, run_dir))
    elif chosen[-1] is Stage.prune:
        print(f"pruned, untrained:  {student_of(config, run_dir)}", flush=True)
    if Stage.evaluate in chosen or Stage.export in chosen:
        pruned = student_of(config, run_dir)
        print(f"pruned, untrained:  {pruned}\ndistilled:          {run_dir / export.folder_name(config)}", flush=True)


def _with_teacher_mode(config: CompressConfig, run_dir: Path) -> CompressConfig:
    """teacher.mode=auto decided, once and for all of the run, as soon as its text is tokenized."""
    online = teacher_choice.with_mode(config, TeacherMode.online)
    path = run_dir / teacher_choice.FILE
    if not path.exists():
        if config.stage is Stage.all:
            run(dataclasses.replace(online, stage=Stage.tokenize, until=None))
        if config.stage not in (Stage.all, Stage.cache, Stage.distill) or not (run_dir / "tokens" / MANIFEST).exists():
            return online
        made = teacher_choice.choose(online, run_dir)
        log.info("teacher.mode=auto: %s, since %s", made["mode"], made["why"])
        write_json(path, made)
    mode = read_json(path, "delete it, and it is measured again").get("mode")
    if mode not in ("online", "cached"):
        raise ArtifactError(f"{path} says mode={mode!r}, which is neither online nor cached; delete it")
    return teacher_choice.with_mode(config, TeacherMode(mode))


def _run_rounds(config: CompressConfig) -> None:
    """The rounds one after the other, each a run of its own in run_dir/round_N, over the same tokens."""
    numbers = list(range(1, len(config.rounds) + 1))
    chosen = numbers if config.round is None else [config.round]
    if config.stage is Stage.selftest:
        run(round_config(config, chosen[0]))
        return
    if config.stage in (Stage.plan, Stage.status):
        if config.stage is Stage.plan:
            _print_all(plan.run_rounds([round_config(config, number) for number in numbers]))
        else:
            for number in chosen:
                _print(status(round_config(config, number)))
        return
    info = read_model(source_of(round_config(config, 1)), config.teacher.trust_remote_code)
    for number in numbers:  # what can be refused now, before the first one's long work
        one = round_config(config, number)
        adapters = one.prune.adapters if number == 1 else []
        first = dataclasses.replace(one, prune=dataclasses.replace(one.prune, source=None, adapters=adapters))
        info = prune.preflight_of(first, info)
    for number in chosen:
        one = round_config(config, number)
        log.info("round %d of %d", number, len(config.rounds))
        if one.prune.source and not Path(one.prune.source).expanduser().is_dir():
            raise ConfigError(
                f"round {number} prunes {one.prune.source}, which isn't there; run round={number - 1} up to export"
            )
        if number > 1:
            _link(_run_dir(one) / "tokens", _run_dir(round_config(config, 1)) / "tokens")
        run(one)


def _run_siblings(config: CompressConfig) -> None:
    """The siblings up to prune one after the other, distill together, then each to its end; tokens and score once."""
    members = [sibling_config(config, sibling.name) for sibling in config.siblings]
    if config.stage is not Stage.all:
        for one in members[:1] if config.stage is Stage.selftest else members:
            run(one)
        return
    order = [Stage.tokenize, Stage.score, Stage.search, Stage.prune]
    before = config.until if config.until in order else Stage.prune
    first = _run_dir(members[0])
    for one in members:
        for shared in ("tokens", "score") if one is not members[0] else ():
            _link(_run_dir(one) / shared, first / shared)
        log.info("sibling %s", _run_dir(one).name)
        run(dataclasses.replace(one, until=before))
    if config.until in order:
        return
    with contextlib.ExitStack() as stack:
        training = []
        for one in members:
            everything = expectations(one)
            for stage in (Stage.cache, Stage.distill):
                if stage in _left_out(one) or _is_done(one, stage, everything):
                    continue
                if stage is Stage.cache:
                    _run_stage(one, _run_dir(one), stage, everything)
                elif stack.enter_context(_books(one, _run_dir(one), stage, everything)):
                    training.append((one, _run_dir(one)))
        if training:
            distill.run_together(training)
    for one in members:
        run(one)


def _link(link: Path, target: Path) -> None:
    """A relative link to a folder of the same run, unless there is something already."""
    if target.exists() and not link.exists():
        with disk_errors(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another rank was first
                link.symlink_to(os.path.relpath(target, link.parent))


def _print_all(tables: Iterable[Table]) -> None:
    for found in tables:
        _print(found)


def _print(table: Table) -> None:
    """To standard output, where nothing else goes; in a file or a pipe as wide as a table needs."""
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _run_dir(config: CompressConfig) -> Path:
    return Path(config.run_dir).expanduser()


def _chosen(config: CompressConfig) -> list[Stage]:
    """The stages of config.stage. Raises ConfigError for one alone that this config leaves out."""
    if config.stage is Stage.search and not config.search.num_candidates:
        raise ConfigError("stage=search needs search.num_candidates, such as 8, and a budget to search within")
    if config.stage is Stage.cache and config.teacher.mode is not TeacherMode.cached:
        raise ConfigError(f"stage=cache needs teacher.mode=cached, it is {config.teacher.mode}")
    if config.stage is not Stage.all:
        return [config.stage]
    order = list(STAGES)
    last = order.index(config.until) if config.until is not None else len(order)
    return [stage for stage in order[: last + 1] if stage not in _left_out(config)]


def _left_out(config: CompressConfig) -> set[Stage]:
    """A student pruned elsewhere needs neither scores nor pruning; without candidates there is nothing to search, and
    a teacher that is asked online needs no cache."""
    elsewhere = {Stage.score, Stage.search, Stage.prune} if config.distill.init_from else set()
    online = set() if config.teacher.mode is TeacherMode.cached else {Stage.cache}
    return elsewhere | online | (set() if config.search.num_candidates else {Stage.search})


def _check_places(config: CompressConfig) -> None:
    """What a run writes must not lie in a folder that it fingerprints."""
    run_dir = _run_dir(config).resolve()
    models = {
        "teacher.path": teacher_of(config),
        "distill.init_from": config.distill.init_from,
        "prune.source": config.prune.source,
    }
    for key, folder in models.items():
        if folder and run_dir.is_relative_to(Path(folder).expanduser().resolve()):
            raise ConfigError(
                f"run_dir={config.run_dir} lies inside of {key}={folder}, which would then change while it is read; "
                "give a run_dir= outside of it"
            )


def _check_models(config: CompressConfig) -> None:
    """transformers takes the teacher, and a model from elsewhere (distill.init_from, prune.source) with its ids."""
    trust = config.teacher.trust_remote_code
    teacher = teacher_of(config)
    check_usable(teacher, trust)
    vocabulary = read_config(teacher, trust).shape.vocab_size
    for number, term in enumerate(config.distill.objectives):
        if term.k is not None and term.k > vocabulary:
            raise ConfigError(
                f"distill.objectives[{number}].k={term.k} must be within 1 and vocab_size={vocabulary} of the teacher "
                f"{teacher}"
            )
    if needs_hidden_states(config.distill.objectives):
        check_terms(config.distill.objectives, *_known_of(config))
    for key, folder in (("distill.init_from", config.distill.init_from), ("prune.source", config.prune.source)):
        if not folder:
            continue
        student = Path(folder).expanduser()
        read_model(student, trust)  # its files are whole, and fit its config
        try:
            check_usable(student, trust)
            check_same_tokenizer(teacher, student, trust)
            check_vocabulary(teacher, student, trust)
        except ConfigError as error:
            raise ConfigError(f"{key}={student}: {error}") from error


def _known_of(config: CompressConfig) -> tuple[list[Family], list[int | None]]:
    """Family and number of layers of (student, teacher), the student's as far as the settings say."""
    trust = config.teacher.trust_remote_code
    teacher = read_config(teacher_of(config), trust)
    elsewhere, prune = config.distill.init_from, config.prune
    student = read_config(Path(elsewhere).expanduser() if elsewhere else source_of(config), trust)
    count = student.shape.num_hidden_layers
    layers: int | None = count
    if not elsewhere and prune.removed_layers is not None:
        layers = count - len(prune.removed_layers)
    elif not elsewhere and (prune.num_hidden_layers or any(getattr(prune, key) is not None for key in BUDGET)):
        layers = prune.num_hidden_layers
    return [student.family, teacher.family], [layers, teacher.shape.num_hidden_layers]


def _run_stage(config: CompressConfig, run_dir: Path, stage: Stage, everything: dict[Stage, dict[str, Any]]) -> None:
    with _books(config, run_dir, stage, everything) as wanted:
        if wanted:
            STAGES[stage].run(config, run_dir)


@contextlib.contextmanager
def _books(
    config: CompressConfig, run_dir: Path, stage: Stage, everything: dict[Stage, dict[str, Any]]
) -> Iterator[bool]:
    """What is written before and after the stage's work, which is the block's; False when it was done meanwhile."""
    entry, expected = STAGES[stage], everything[stage]
    folder = run_dir / entry.folder(config)
    if not launched().is_main:  # the first rank keeps the books
        yield True
        return
    with run_lock(run_dir, folder.name):
        if _is_done(config, stage, everything):  # another process finished it since we looked
            yield False
            return
        log.info("%s: starting", stage)
        began = time.time()
        write_json(folder / STARTED, expected)
        kept = checkpoint.steps(folder / "checkpoints")
        before = _read_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        if before is not None:
            log.info("%s: it was done with fewer distill.phases, and goes on", stage)
            (folder / MANIFEST).unlink()
        (folder / ERROR).unlink(missing_ok=True)
        try:
            yield True
        except CompressError as error:
            with contextlib.suppress(ArtifactError):  # a full disk can't take the note either
                write_json(folder / ERROR, {"error": str(error), "time": time.time()})
            # What is mended next is most likely a setting, so a failure binds nobody; checkpoints do: they go on.
            now = checkpoint.steps(folder / "checkpoints")
            if not isinstance(error, Interrupted) and (now == kept if before else not now):
                (folder / STARTED).unlink(missing_ok=True)
                if before is not None:  # the appended phases failed at once: what there was is done as it was
                    write_json(folder / MANIFEST, before)
            raise
        seconds = time.time() - began
        manifest = {**expected, "seconds": seconds, "versions": _versions(), "config": _plain(config)}
        write_json(folder / MANIFEST, manifest)
        (folder / STARTED).unlink(missing_ok=True)
    log.info("%s: done in %s", stage, about(seconds))


def expectations(config: CompressConfig) -> dict[Stage, dict[str, Any]]:
    """What each stage's manifest must say for this config: its settings, its input files, and a fingerprint of both.

    A stage's fingerprint holds those of the stages before it, so all of them are known before anything runs.
    """
    cache_dir = Path(config.cache_dir).expanduser()
    teacher = teacher_of(config)
    plain = _plain(config)
    files: dict[Stage, dict[str, str]] = {stage: {} for stage in STAGES}
    files[Stage.tokenize]["the teacher's tokenizer"] = tokenizer_fingerprint(teacher)
    for split in ("train", "calibration", "validation"):
        for number, source in enumerate(getattr(config.data, split)):
            files[Stage.tokenize][f"the text of data.{split}[{number}]"] = _source_fingerprint(source.path, cache_dir)
            # What a file holds counts, and the name it goes by, but not where it lies; its weight is distill's.
            plain["data"][split][number] |= {"path": None, "name": set_name(source), "weight": None}
    plain["data"]["train[*]"] = {"weight": [source.weight for source in config.data.train]}
    teacher_fingerprint = fingerprint_path(teacher)
    for stage in (Stage.score, Stage.search, Stage.prune, Stage.cache, Stage.distill, Stage.evaluate):
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
            reads += ("data.train[*].weight", *(key for key in _TRAINING_KEYS if key not in _LATER_KEYS))
        if stage is Stage.distill and config.distill.stop_slope is not None:
            reads += ("distill.validate_steps", "distill.validate_tokens", "distill.stop_validations")
        settings = {key: _look_up(plain, key) for key in reads}
        if stage is Stage.distill:
            settings |= _phases_read(config)
        upstream = {
            before.value: result[before]["fingerprint"] for before in entry.after if before not in _left_out(config)
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


def _earlier(expected: dict[Stage, dict[str, Any]], stage: Stage) -> set[str]:
    """The stage's fingerprints before phases were appended: with only the first of them, the first two, ..."""
    found = set()
    phases = expected[Stage.distill]["settings"]["distill.phases"]
    for count in range(1, len(phases)):
        changed: dict[str, str] = {}
        for later in (Stage.distill, Stage.export, Stage.evaluate):
            facts = {key: value for key, value in expected[later].items() if key != "fingerprint"}
            if later is Stage.distill:
                some = {number: phase for number, phase in phases.items() if int(number) <= count}
                facts["settings"] = {**facts["settings"], "distill.phases": some}
            facts["upstream"] = {**facts["upstream"], **{k: v for k, v in changed.items() if k in facts["upstream"]}}
            changed[later.value] = fingerprint(facts)
        found |= {changed[stage.value]} if stage.value in changed else set()
    return found


def _is_done(config: CompressConfig, stage: Stage, everything: dict[Stage, dict[str, Any]]) -> bool:
    """True when the manifest is there and equal; False where phases were appended since, so that the stage goes on.

    Raises ArtifactError for a manifest, or half-done work, of other settings.
    """
    expected = everything[stage]
    folder = _run_dir(config) / STAGES[stage].folder(config)
    for name, done in ((MANIFEST, True), (STARTED, False)):
        if (folder / name).exists() and (done or _has_work(folder)):
            found = _read_manifest(folder / name)
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


def _read_manifest(path: Path) -> dict[str, Any]:
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


def _check_upstream(
    config: CompressConfig, chosen: list[Stage], todo: list[Stage], expected: dict[Stage, dict[str, Any]]
) -> None:
    """Every stage that will run has its inputs: done before with these settings, or earlier in this command."""
    for stage in todo:
        for before in STAGES[stage].after:
            if before in chosen or before in _left_out(config):
                continue
            done = _is_done(config, before, expected)
            if before is Stage.distill and config.export.step is not None:
                continue  # a kept step exports while training goes on
            if not done:
                folder = _run_dir(config) / STAGES[before].folder(config)
                raise ConfigError(
                    f"stage={stage} reads {folder}, which isn't done; run stage={before} or stage=all first"
                )


def _plain(config: CompressConfig) -> dict[str, Any]:
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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors", "datasets", "tokenizers")}


def status(config: CompressConfig) -> Table:
    """What is done, under way and left in the run folder; reads only."""
    run_dir = _run_dir(config)
    result = Table(title=str(run_dir), title_justify="left")
    for column in ("stage", "state", "detail", "time", "disk"):
        result.add_column(column, justify="right" if column in ("time", "disk") else "left")
    for stage, entry in STAGES.items():
        if stage in (Stage.search, Stage.cache) and stage in _left_out(config):
            continue
        folder = run_dir / entry.folder(config)
        state, detail, seconds = "not started", "", ""
        if (folder / MANIFEST).exists():
            state, seconds = "done", about(float(_read_manifest(folder / MANIFEST).get("seconds", 0.0)))
        elif (folder / STARTED).exists():
            began = (folder / STARTED).stat().st_mtime
            state, seconds = "begun", about(max(0.0, time.time() - began)) + " ago"
        if state != "done" and (folder / ERROR).exists():
            state = "begun" if state == "begun" else "failed"
            detail = str(read_json(folder / ERROR, "delete it").get("error"))
        if stage is Stage.distill and state == "begun":
            detail = progress_line(config, run_dir) + (f"; last error: {detail}" if detail else "")
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
        result.add_row(stage.value, state, detail, seconds, f"{size / 1e6:,.1f} MB" if size else "")
    if run_dir.exists():
        result.caption = f"{shutil.disk_usage(run_dir).free / 1e9:,.1f} GB free on its disk"
    return result


__all__ = ["STAGES", "Interrupted", "expectations", "run", "status"]

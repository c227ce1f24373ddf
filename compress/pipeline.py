"""The stages in order, and what a run folder allows: run what is missing, skip what is done, refuse what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress import (
    cache,
    distill,
    doctor,
    evaluate,
    export,
    plan,
    prune,
    score,
    search,
    selftest,
    steptest,
    teacher_choice,
)
from compress.agreement import check_agreement
from compress.artifacts import (
    ERROR,
    MANIFEST,
    STARTED,
    link,
    read_json,
    write_json,
)
from compress.capture import check_terms
from compress.errors import ArtifactError, ConfigError, Interrupted
from compress.estimate import estimate_seconds
from compress.families import Family, add_families
from compress.folders import read_config, read_model
from compress.inputs import export_folder, source_of, student_of, teacher_of
from compress.manifests import books, check_upstream, expectations, is_done, read_manifest, run_stage
from compress.models import check_same_tokenizer, check_usable, check_vocabulary
from compress.objectives.table import OBJECTIVES, needs_hidden_states
from compress.objectives.terms import Term
from compress.parallel import check_compiler, joined, launched, refuse_several_ranks
from compress.progress import about
from compress.rules import check, correction_config, round_config, sibling_config
from compress.settings import BUDGET, CompressConfig, Stage, TeacherMode
from compress.signals import check_student
from compress.stages import ON_RANKS, STAGES, check_share, chosen_stages, left_out, run_dir_of
from compress.training import check_training_data
from compress.training_log import progress_line
from compress.watchdog import watching

log = logging.getLogger(__name__)


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
    run_dir = run_dir_of(config)
    for stage in (Stage.search, Stage.distill):
        if config.stage in (Stage.all, stage) and stage in chosen_stages(config):
            check_share(config, stage, launched().size)
    if config.teacher.mode is TeacherMode.auto:
        config = _with_teacher_mode(config, run_dir)
    if config.stage is Stage.status:
        _print(status(config))
        return
    if config.stage is Stage.plan:
        _print_all(plan.run(config))
        return
    if config.stage is Stage.doctor:
        doctor.run(config, run_dir)
        return
    if config.stage not in ON_RANKS:
        refuse_several_ranks(f"stage={config.stage}")
    if config.stage is Stage.selftest:
        _print(selftest.run(config))
        table = steptest.run(config, run_dir)
        if table is not None:
            _print(table)
        return
    with joined() as ranks, watching(config.cluster.stall_seconds if ranks.size > 1 else None):
        check_agreement(config, run_dir, ranks)
        _run_stages(config, run_dir)


def _run_stages(config: CompressConfig, run_dir: Path) -> None:
    chosen = chosen_stages(config)
    expected = expectations(config)
    todo = [stage for stage in chosen if not is_done(config, stage, expected)]
    check_upstream(config, chosen, todo, expected)
    _preflight(config, run_dir, todo)
    for stage in chosen:
        if stage not in todo:
            log.info("%s: done before, skipped (%s)", stage, run_dir / STAGES[stage].folder(config))
    if todo:
        estimated = estimate_seconds(config, todo)
        log.info("will run %s: about %s in all, into %s", ", ".join(todo), about(sum(estimated.values())), run_dir)
    if Stage.tokenize in todo:
        run_stage(config, run_dir, Stage.tokenize, expected)
    if Stage.distill in todo:
        check_training_data(config, run_dir)  # refuses data that can't be trained on before the scoring
    if Stage.correct in todo:
        check_training_data(correction_config(config, str(teacher_of(config))), run_dir)
    for stage in todo:
        if stage is not Stage.tokenize:
            run_stage(config, run_dir, stage, expected)
    if not launched().is_main:
        return
    if Stage.evaluate in chosen:
        _print(evaluate.table(config, run_dir))
    elif chosen[-1] is Stage.prune:
        print(f"pruned, untrained:  {student_of(config, run_dir)}", flush=True)
    if Stage.evaluate in chosen or Stage.export in chosen:
        pruned = student_of(config, run_dir)
        print(f"pruned, untrained:  {pruned}\ndistilled:          {run_dir / export_folder(config)}", flush=True)


def _preflight(config: CompressConfig, run_dir: Path, todo: list[Stage]) -> None:
    """Refuse what can be known to fail in any of these stages, before the first one starts."""
    _check_places(config)
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
        if Stage.distill in todo:
            distill.preflight(config)
        if config.distill.compile and Stage.distill in todo:
            check_compiler("distill.compile")
        if config.score.compile and Stage.score in todo:
            check_compiler("score.compile")


def _has_manifest(config: CompressConfig, stage: Stage) -> bool:
    return (run_dir_of(config) / STAGES[stage].folder(config) / MANIFEST).exists()


def _with_teacher_mode(config: CompressConfig, run_dir: Path) -> CompressConfig:
    """teacher.mode=auto decided, once and for all of the run, as soon as its text is tokenized."""
    online = teacher_choice.with_mode(config, TeacherMode.online)
    path = run_dir / teacher_choice.FILE
    if not path.exists():
        if config.stage is Stage.all:
            left = [stage for stage in chosen_stages(online) if not _has_manifest(online, stage)]
            _preflight(online, run_dir, left)
            run(dataclasses.replace(online, stage=Stage.tokenize, until=None))
        if config.stage not in (Stage.all, Stage.cache, Stage.distill) or not (run_dir / "tokens" / MANIFEST).exists():
            return online
        made = teacher_choice.choose(online, run_dir)
        log.info("teacher.mode=auto: %s, since %s", made["mode"], made["why"])
        write_json(path, made)
    mode = read_json(path, "delete it, and it is measured again").get("mode")
    if mode not in ("online", "cached"):
        raise ArtifactError(f"{path} says mode={mode!r}, which is neither online nor cached; delete it")
    chosen = teacher_choice.with_mode(config, TeacherMode(mode))
    try:
        check(chosen)
    except ConfigError as error:
        raise ConfigError(f"{path} has chosen teacher.mode={mode} for this run, but {error}") from error
    return chosen


def _run_rounds(config: CompressConfig) -> None:
    """The rounds one after the other, each a run of its own in run_dir/round_N, over the same tokens."""
    numbers = list(range(1, len(config.rounds) + 1))
    chosen = numbers if config.round is None else [config.round]
    if config.stage in (Stage.selftest, Stage.doctor):
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
            for folder in ("tokens", "correct"):
                link(run_dir_of(one) / folder, run_dir_of(round_config(config, 1)) / folder)
        run(one)


def _run_siblings(config: CompressConfig) -> None:
    """The siblings up to prune one after the other, distill together, then each to its end; tokens and score once."""
    members = [sibling_config(config, sibling.name) for sibling in config.siblings]
    if config.stage is not Stage.all:
        for one in members[:1] if config.stage in (Stage.selftest, Stage.doctor) else members:
            run(one)
        return
    order = [Stage.tokenize, Stage.score, Stage.search, Stage.prune]
    before = config.until if config.until in order else Stage.prune
    planned = [(one, run_dir_of(one), expectations(one)) for one in members]
    _, first, scored = planned[0]
    for one, run_dir, expected in planned:
        if run_dir != first:
            link(run_dir / "tokens", first / "tokens")
            if expected[Stage.score]["fingerprint"] == scored[Stage.score]["fingerprint"]:
                link(run_dir / "score", first / "score")  # else how far removals were measured is its own
        log.info("sibling %s", run_dir.name)
        run(dataclasses.replace(one, until=before))
    if config.until in order:
        return
    shared = [Stage.correct] if config.until is Stage.correct else [Stage.correct, Stage.cache]
    with contextlib.ExitStack() as stack:
        training = []
        for one, run_dir, expected in planned:
            for stage in shared:
                if run_dir != first:
                    link(run_dir / stage, first / stage)
                if stage not in left_out(one) and not is_done(one, stage, expected):
                    run_stage(one, run_dir, stage, expected)
            if config.until in shared or is_done(one, Stage.distill, expected):
                continue
            if stack.enter_context(books(one, run_dir, Stage.distill, expected)):
                training.append((one, run_dir))
        if training:
            distill.run_together(training)
    for one in members if config.until not in shared else ():
        run(one)


def _print_all(tables: Iterable[Table]) -> None:
    for found in tables:
        _print(found)


def _print(table: Table) -> None:
    """To standard output, where nothing else goes; in a file or a pipe as wide as a table needs."""
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _check_places(config: CompressConfig) -> None:
    """What a run writes must not lie in a folder that it fingerprints."""
    run_dir = run_dir_of(config).resolve()
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
        k = (Term.k if term.k is None else term.k) if "k" in OBJECTIVES[term.objective].options else 1
        if k > vocabulary:
            raise ConfigError(
                f"distill.objectives[{number}].k={k} must be within 1 and vocab_size={vocabulary} of the teacher "
                f"{teacher}; set it lower"
            )
    if config.distill.balance_loss:
        elsewhere = config.distill.init_from
        found = read_config(Path(elsewhere).expanduser() if elsewhere else source_of(config), trust)
        if not found.shape.num_experts:
            raise ConfigError(
                f"distill.balance_loss={config.distill.balance_loss} balances the load of experts, and a "
                f"{found.family.title} model has none; set distill.balance_loss=0"
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
            if config.teacher.mode is TeacherMode.cached and key == "distill.init_from":
                check_student(read_config(student, trust).shape.vocab_size, vocabulary)
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


def status(config: CompressConfig) -> Table:
    """What is done, under way and left in the run folder; reads only."""
    run_dir = run_dir_of(config)
    result = Table(title=str(run_dir), title_justify="left")
    for column in ("stage", "state", "detail", "time", "disk"):
        result.add_column(column, justify="right" if column in ("time", "disk") else "left")
    for stage, entry in STAGES.items():
        if stage in (Stage.search, Stage.correct, Stage.cache) and stage in left_out(config):
            continue
        folder = run_dir / entry.folder(config)
        state, detail, seconds = "not started", "", ""
        if (folder / MANIFEST).exists():
            state, seconds = "done", about(float(read_manifest(folder / MANIFEST).get("seconds", 0.0)))
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

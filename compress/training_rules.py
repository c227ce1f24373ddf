"""The rules between the settings of training: batches, phases, validation, objectives, and who the teacher is.

As those of `rules.py`, of which they are a part, they need no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from compress.phases import num_steps, phase_settings
from compress.settings import CacheKind, CompressConfig, Curve, PhaseConfig, Stage, TeacherMode, TermConfig

if TYPE_CHECKING:
    from compress.objectives.table import Objective


def check_training(config: CompressConfig) -> None:
    """Raise ConfigError with key, value, rule and remedy."""
    _check_batches(config)
    _check_objectives(config)
    _check_validation(config)
    if config.teacher.mode is TeacherMode.cached:
        _check_cached(config)
    if config.teacher.mode is TeacherMode.previous_self:
        _check_previous_self(config)


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


_OPTION_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": (lambda v: v >= 1, "at least 1"),
    "beta": (lambda v: 0 < v < 1, "within 0 and 1, both excluded"),
    "skew": (lambda v: 0 <= v < 1, "within 0 and 1, 1 excluded"),
    "head_mass": (lambda v: 0 < v < 1, "within 0 and 1, both excluded"),
    "lower_quantile": (lambda v: 0 <= v < 1, "within 0 and 1, 1 excluded"),
    "upper_quantile": (lambda v: 0 < v <= 1, "within 0 and 1, 0 excluded"),
    "smoothing": (lambda v: 0 <= v <= 1, "within 0 and 1"),
    "max_temperature": (lambda v: math.isfinite(v) and v >= 1, "1 or more"),
}


def _check_objectives(config: CompressConfig) -> None:
    """Each term by itself; what it needs of the models is checked where they are read."""
    terms = config.distill.objectives
    if terms == [TermConfig()]:
        return
    from compress.objectives.table import OBJECTIVES, needs_hidden_states  # brings torch, which takes seconds

    if not terms:
        raise ConfigError("distill.objectives is empty; give one term at least, such as [{objective: forward_kl}]")
    for number, term in enumerate(terms):
        here = f"distill.objectives[{number}]"
        for key in ("weight", "weight_end"):
            value = getattr(term, key)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{here}.{key}={value} must be 0 or more, and finite")
        for key in ("temperature", "temperature_end"):
            value = getattr(term, key)
            if value is not None and not is_positive(value):
                raise ConfigError(f"{here}.{key}={value} must be a positive number")
        if term.curve is Curve.constant and (term.weight_end is not None or term.temperature_end is not None):
            raise ConfigError(f"{here}.curve=constant never reaches weight_end or temperature_end; take linear, cosine "
                              "or wsd, or leave them null")  # fmt: skip
        _check_options(here, term, OBJECTIVES[term.objective])
        low, high = term.lower_quantile or 0.0, 1.0 if term.upper_quantile is None else term.upper_quantile
        if low >= high:
            raise ConfigError(f"{here}: lower_quantile={low} must be below upper_quantile={high}")
        if term.objective == "bild" and term.k is not None and term.k < 2:
            raise ConfigError(f"{here}.k={term.k}: bild compares pairs; give 2 or more")
    if not any(term.weight or term.weight_end for term in terms):
        raise ConfigError("distill.objectives: every weight is 0, so there is nothing to learn; give one a weight")
    hidden = next((term.objective for term in terms if needs_hidden_states([term])), None)
    if hidden and config.distill.compile:
        raise ConfigError(
            f"distill.compile=true can't be combined with {hidden} in distill.objectives: compiled layers don't say "
            "what is inside them; set distill.compile=false"
        )
    if hidden and config.search.num_tokens:
        raise ConfigError(
            f"search.num_tokens={config.search.num_tokens:g} distils candidates of several shapes from recorded "
            f"logits, which {hidden} in distill.objectives can't take; set search.num_tokens=0, or leave it out"
        )


def _check_options(here: str, term: TermConfig, objective: Objective) -> None:
    """A term's options are its objective's, and within their range."""
    unused = [f.name for f in fields(TermConfig)[_COMMON:] if f.name not in objective.options]
    unused += ["temperature", "temperature_end", "squared"] if objective.hidden else []
    for name in unused:
        value = getattr(term, name)
        if value != getattr(TermConfig(), name):
            has = f"its options are {', '.join(objective.options)}" if objective.options else "it has no options"
            raise ConfigError(f"{here}.{name}={value} is not for {term.objective}: {has}; leave {name} out")
    for key, (holds, text) in _OPTION_RULES.items():
        value = getattr(term, key)
        if value is not None and not holds(value):
            raise ConfigError(f"{here}.{key}={value} must be {text}")
    if term.layers is not None and (not term.layers or any(len(pair) != 2 for pair in term.layers)):
        raise ConfigError(
            f"{here}.layers={term.layers} must be [student, teacher] pairs, such as [[-1, -1]], or null for the last "
            "of each"
        )


def _check_batches(config: CompressConfig) -> None:
    _check_phases(config)
    micro = config.distill.micro_batch_size
    for number, phase in enumerate(phase_settings(config)):
        batch, length, tokens = phase["global_batch_size"], phase["sequence_length"], phase["num_tokens"]
        # Where a phase says it, its own key is named.
        chosen = config.distill.phases[number] if config.distill.phases else PhaseConfig()
        keys = {
            key: f"distill.phases[{number}].{key}" if getattr(chosen, key) is not None else f"{section}.{key}"
            for key, section in (
                ("num_tokens", "distill"),
                ("global_batch_size", "distill"),
                ("sequence_length", "data"),
            )
        }
        if batch % micro:
            raise ConfigError(
                f"{keys['global_batch_size']}={batch} must be a multiple of distill.micro_batch_size={micro}"
            )
        if tokens < batch * length:
            raise ConfigError(
                f"{keys['num_tokens']}={tokens} is less than one step of {keys['global_batch_size']} * "
                f"{keys['sequence_length']} = {batch * length} tokens; give it more, or a smaller batch"
            )


def _check_validation(config: CompressConfig) -> None:
    distill = config.distill
    if distill.stop_slope is not None and distill.validate_steps is None:
        raise ConfigError(
            f"distill.stop_slope={distill.stop_slope} is of KL in validations; set distill.validate_steps, such as "
            f"{max(1, num_steps(config) // 50)}, or stop_slope=null"
        )
    if distill.keep_best and (distill.validate_steps is None or distill.checkpoint_steps % distill.validate_steps):
        raise ConfigError(
            f"distill.keep_best=true needs a validation at every checkpoint: distill.checkpoint_steps="
            f"{distill.checkpoint_steps} must be a multiple of distill.validate_steps={distill.validate_steps}; set "
            f"validate_steps={distill.checkpoint_steps}, or keep_best=false"
        )


_COMMON = [f.name for f in fields(TermConfig)].index("squared") + 1  # the fields that every objective has come first


def _check_cached(config: CompressConfig) -> None:
    """A cache is of whole packed sequences at their loss tokens, and nothing else of the teacher is at hand."""
    for number, phase in enumerate(config.distill.phases):
        if phase.sequence_length not in (None, config.data.sequence_length):
            raise ConfigError(
                f"distill.phases[{number}].sequence_length={phase.sequence_length} can't be had from "
                f"teacher.mode=cached, which holds sequences of data.sequence_length={config.data.sequence_length}; "
                "leave it null, or set teacher.mode=online"
            )
    for number, term in enumerate(config.distill.objectives):
        _check_cached_term(config, f"distill.objectives[{number}]", term)


def _check_previous_self(config: CompressConfig) -> None:
    """Half of a batch is repeated, has something said of it, and is never in one micro-batch with the other half."""
    from compress.objectives.table import OBJECTIVES, needs_hidden_states

    micro = config.distill.micro_batch_size
    for phase in phase_settings(config):
        batch = phase["global_batch_size"]
        if batch % (2 * micro):
            raise ConfigError(
                f"global_batch_size={batch} must be a multiple of 2 * distill.micro_batch_size={2 * micro} when "
                "teacher.mode=previous_self, which repeats half of each batch; change one of the two"
            )
    terms = config.distill.objectives
    hidden = next((term.objective for term in terms if needs_hidden_states([term])), None)
    if hidden:
        raise ConfigError(
            f"distill.objectives: {hidden} compares what is inside two models, and teacher.mode=previous_self has one; "
            "leave it out, or set teacher.mode=online"
        )
    if not any(OBJECTIVES[term.objective].labels_only for term in terms):
        raise ConfigError(
            "distill.objectives: with teacher.mode=previous_self the text is the only thing that is known of a fresh "
            "sequence; add {objective: cross_entropy}"
        )


def _check_cached_term(config: CompressConfig, key: str, term: TermConfig) -> None:
    """A cache holds a part of the teacher's distribution, at temperature 1, which few objectives can do with."""
    from compress.objectives.table import OBJECTIVES  # torch, for which no other rule should wait

    kind, objective = config.cache.kind, OBJECTIVES[term.objective]
    if objective.labels_only:
        return
    if kind not in objective.sparse:
        fitting = [name for name, other in OBJECTIVES.items() if kind in other.sparse or other.labels_only]
        other_kinds = [f"cache.kind={name}" for name in objective.sparse]
        raise ConfigError(
            f"{key}.objective={term.objective} can't be had from teacher.mode=cached with cache.kind={kind}, which "
            f"serves {', '.join(fitting)}; take one of them, or {' or '.join([*other_kinds, 'teacher.mode=online'])}"
        )
    for name, value in (("temperature", term.temperature), ("temperature_end", term.temperature_end)):
        if value is not None and value != 1:
            raise ConfigError(
                f"{key}.{name}={value:g} can't be had from teacher.mode=cached, which holds the teacher at temperature "
                f"1; set it 1, or teacher.mode=online"
            )
    if kind is CacheKind.top_k and term.k is not None and term.k != config.cache.k:
        raise ConfigError(
            f"{key}.k={term.k} is not cache.k={config.cache.k}, which is what a cache holds; set both the same, or "
            f"{key}.k=null"
        )


def check_ranks(config: CompressConfig, world: int, stage: Stage = Stage.distill) -> None:
    """Raise ConfigError where `world` ranks can't be given equally many micro-batches in distill or search, or the
    teacher that distill asks is for one."""
    if world == 1:
        return
    if stage is Stage.distill and config.teacher.mode in (TeacherMode.auto, TeacherMode.previous_self):
        raise ConfigError(
            f"WORLD_SIZE={world}: teacher.mode={config.teacher.mode} works in one process in this version; start it "
            "without torchrun, or choose teacher.mode=online or cached"
        )
    micro = config.distill.micro_batch_size
    batches = {f"phase {number}": p["global_batch_size"] for number, p in enumerate(phase_settings(config), start=1)}
    if stage is Stage.search:
        batches = {"the search": config.distill.global_batch_size} if config.search.num_tokens else {}
    for what, batch in batches.items():
        if batch % (micro * world):
            raise ConfigError(
                f"WORLD_SIZE={world}: the global batch of {what}, {batch} sequences, must be a multiple of "
                f"{world} ranks * distill.micro_batch_size={micro}, so that every rank has equally many micro-batches; "
                "start fewer ranks, or set distill.micro_batch_size lower or distill.global_batch_size higher"
            )


def _check_phases(config: CompressConfig) -> None:
    whole, sources = config.data.sequence_length, config.data.train
    for number, phase in enumerate(config.distill.phases):
        key = f"distill.phases[{number}]"
        length, weights = phase.sequence_length, phase.weights
        if phase.num_tokens is not None and not (is_positive(phase.num_tokens) and phase.num_tokens % 1 == 0):
            raise ConfigError(f"{key}.num_tokens={phase.num_tokens} must be a whole positive number of tokens")
        if phase.global_batch_size is not None and phase.global_batch_size < 1:
            raise ConfigError(f"{key}.global_batch_size={phase.global_batch_size} must be at least 1")
        if phase.learning_rate is not None and not is_positive(phase.learning_rate):
            raise ConfigError(f"{key}.learning_rate={phase.learning_rate} must be a positive number")
        if length is not None and length > whole:
            raise ConfigError(
                f"{key}.sequence_length={length} is longer than data.sequence_length={whole}, in which the text is "
                f"packed; set data.sequence_length={length} (which tokenizes anew) and give the shorter phases theirs"
            )
        if length is not None and (length < 8 or whole % length):
            legal = [n for n in range(8, whole + 1) if whole % n == 0]
            near = sorted(legal, key=lambda n: abs(n - length))[:3]
            raise ConfigError(
                f"{key}.sequence_length={length} must be 8 or more and divide data.sequence_length={whole}, whose rows "
                f"are cut into pieces of it; nearest: {', '.join(map(str, sorted(near)))}"
            )
        if weights is None:
            continue
        if any(source.weight is None for source in sources):
            raise ConfigError(
                f"{key}.weights={weights}: data.train gives no weights, so that its sources are dealt as one; give "
                "each of them one there (a run that began without goes on as a new one, by distill.init_from)"
            )
        if len(weights) != len(sources) or not all(0 <= w < math.inf for w in weights) or sum(weights) <= 0:
            raise ConfigError(
                f"{key}.weights={weights} must be a share of 0 or more for each of the {len(sources)} sources of "
                "data.train, not all 0"
            )

"""stage=plan: what a compression takes, from config.json alone: parameters, memory, work, time, money, disk.

No weights are read and nothing is written. Memory: `memory.py`. Work: 2 FLOP a parameter and token forward, 6 to train,
and the products of causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from compress.architecture import (
    ModelInfo,
    key_value_cache_bytes,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
)
from compress.capture import listening
from compress.communication import Collective, Links, step_collectives
from compress.errors import ConfigError
from compress.estimate import STEP_EFFICIENCY, flops_per_second, flops_per_token
from compress.families import PRUNABLE, Shape
from compress.folders import read_config
from compress.inputs import teacher_of
from compress.memory import MASTER_BYTES, MOMENT_BYTES, Layout, step_memory
from compress.parallel import available_bytes, check_layout, resolve_dtype
from compress.phases import num_tokens, phase_settings
from compress.progress import about
from compress.settings import CacheKind, CompressConfig, ComputeDtype, Optimizer, TeacherMode
from compress.shapes import enumerate_shapes
from compress.signals import Form
from compress.targets import budget, cut_info, given_shape, grid_of
from compress.training import asks_teacher

HEADROOM = 0.9  # of a GPU's memory that a step may take: the rest is the allocator's, the kernels' and the driver's
WINDOW_SHARE = 0.85  # of that, for what need not be held: the reckoning is right to a tenth or so
CPU_HEADROOM = 0.75  # the C library keeps freed memory: benchmarks/plan.py
TOKEN_BYTES = 6  # a token on disk: its id, and two marks
TIME_MARGIN = 1.25  # of Slurm's limit over the estimate


@dataclass(frozen=True)
class Plan:
    """Figures of one config; sizes in bytes, work in FLOP, time in seconds. copies: of the model, each on
    `layout.num_ranks` ranks. collectives: of a step of the phase with the most tokens, `step_seconds` of computing."""

    teacher: ModelInfo
    student: Shape
    layout: Layout
    copies: int
    collectives: list[Collective]
    step_seconds: float
    memory: dict[str, dict[str, int]]
    memory_limit: int
    flops_per_token: float
    seconds: float
    disk: dict[str, int]
    num_gpus: int
    gathers_once: bool

    @property
    def num_ranks(self) -> int:
        """Of all copies."""
        return self.layout.num_ranks * self.copies

    @property
    def peak(self) -> tuple[str, int]:
        """The moment at which a rank holds most, and how much."""
        return _peak(self.memory)


def run(config: CompressConfig) -> Iterator[Table]:
    """The tables of the plan. Raises ConfigError for what can't fit, saying what would."""
    return run_rounds([config])


def run_rounds(configs: Sequence[CompressConfig]) -> Iterator[Table]:
    """The tables of each round, which prunes what the one before was planned to leave."""
    source: ModelInfo | None = None
    for config in configs:
        made = make_plan(config, source)
        source = cut_info(made.teacher, made.student)
        yield from (_models(config, made), _memory(config, made), _work(config, made))
        if made.num_gpus > 1:
            yield _layouts(config, made)


def make_plan(config: CompressConfig, source: ModelInfo | None = None, num_ranks: int | None = None) -> Plan:
    """Reckon with config.json alone. Raises ConfigError for a shape, a budget or a layout that can't be.

    `source`: what is pruned where it isn't there yet; None = prune.source or the teacher. `num_ranks`: that train on
    CPUs; None = one, or one a GPU.
    """
    teacher, student = _models_of(config, source)
    cluster, num_gpus = config.cluster, config.cluster.num_nodes * config.cluster.gpus_per_node
    world = num_ranks or max(1, num_gpus)
    phases = phase_settings(config)
    for batch in (phase["global_batch_size"] for phase in phases):
        if batch % (world * config.distill.micro_batch_size):
            raise ConfigError(
                f"distill.global_batch_size={batch} is no multiple of {world} ranks "
                f"x distill.micro_batch_size={config.distill.micro_batch_size}; change one of them"
            )
    layout = _layout(config, check_layout(cluster.shard_ranks, world), num_gpus)
    if cluster.memory_bytes is not None:
        limit = int(cluster.memory_bytes)
    elif not num_gpus:
        limit = available_bytes()
    else:
        raise ConfigError(f"cluster.memory_bytes must be set for {num_gpus} GPUs, such as 80GiB")
    copies = world // layout.num_ranks
    usable = limit * HEADROOM if num_gpus else limit * CPU_HEADROOM / world
    once = _gathers_once(config, teacher, student, layout, world, usable)
    memory = _step_memory(config, teacher, student, layout, world, once)
    recompute, tokens = config.distill.recompute, num_tokens(config)
    work = sum(
        p["num_tokens"] * flops_per_token(teacher, student, p["sequence_length"], recompute, layout.teacher_runs)
        for p in phases
    )
    flops, speed = work / tokens, _speed(config, num_gpus)
    longest = _longest_phase(config)
    length, batch = longest["sequence_length"], longest["global_batch_size"]
    a_token = flops_per_token(teacher, student, length, recompute, layout.teacher_runs)
    made = Plan(
        teacher, student, layout, copies, _collectives(config, teacher, student, layout, copies, once),
        batch * length * a_token / speed, memory, limit, flops, flops * tokens / speed,
        _disk(config, teacher, student), num_gpus, once,
    )  # fmt: skip
    _check_fits(config, made)
    return made


def needs(config: CompressConfig, num_ranks: int) -> tuple[tuple[str, int], dict[str, int]]:
    """What training by `num_ranks` ranks on CPUs takes: (moment, bytes) of a rank's peak, and disk by part.

    Raises ConfigError as `make_plan` does, but not for what doesn't fit.
    """
    teacher, student = _models_of(config, None)
    layout = _layout(config, check_layout(config.cluster.shard_ranks, num_ranks), 0)
    memory = _step_memory(config, teacher, student, layout, num_ranks, bool(config.teacher.whole_window))
    return _peak(memory), _disk(config, teacher, student)


def gathers_once(
    config: CompressConfig, teacher: ModelInfo, student: Shape, num_ranks: int, free: int, on_cpu: bool
) -> bool:
    """Whether the teacher answers all micro-batches of a step before the student begins, and is gathered once for them:
    as teacher.whole_window says, or else where ranks share it, have several micro-batches a step, and what it holds
    fits into the `free` bytes of each."""
    layout = _layout(config, check_layout(config.cluster.shard_ranks, num_ranks), 0 if on_cpu else num_ranks)
    usable = free * (CPU_HEADROOM if on_cpu else HEADROOM)
    return _gathers_once(config, teacher, student, layout, num_ranks, usable)


def _gathers_once(
    config: CompressConfig, teacher: ModelInfo, student: Shape, layout: Layout, world: int, usable: float
) -> bool:
    if config.teacher.whole_window is not None:
        return config.teacher.whole_window
    micro_batches = _longest_phase(config)["global_batch_size"] // (world * layout.micro_batch_size)
    if not layout.teacher_runs or layout.num_ranks == 1 or micro_batches < 2:
        return False
    needed = _peak(_step_memory(config, teacher, student, layout, world, True))[1]
    return needed <= WINDOW_SHARE * usable


def _models_of(config: CompressConfig, source: ModelInfo | None) -> tuple[ModelInfo, Shape]:
    """The teacher, and the shape of the student that is cut from `source`."""
    trust = config.teacher.trust_remote_code
    teacher = read_config(teacher_of(config, config_only=True), trust)
    if config.distill.init_from:
        return teacher, read_config(Path(config.distill.init_from).expanduser(), trust).shape
    if source is None:
        source = read_config(Path(config.prune.source).expanduser(), trust) if config.prune.source else teacher
    return teacher, _student(config, source)


def _layout(config: CompressConfig, num_ranks: int, num_gpus: int) -> Layout:
    return Layout(
        teacher_runs=asks_teacher(config),
        num_ranks=num_ranks,
        micro_batch_size=config.distill.micro_batch_size,
        sequence_length=max(phase["sequence_length"] for phase in phase_settings(config)),
        recompute=config.distill.recompute,
        compute_bytes=_item_bytes(config, num_gpus),
        on_cpu=not num_gpus,
        gloo=not num_gpus,
        moment_bytes=_moment_bytes(config),
    )


def _step_memory(
    config: CompressConfig, teacher: ModelInfo, student: Shape, layout: Layout, world: int, once: bool
) -> dict[str, dict[str, int]]:
    """Of a distillation step of `world` ranks and, where the teacher is corrected, of a step of its own training, by
    moment. `once`: the teacher answers the whole window first."""
    beside = _beside(config, num_parameters(teacher, student) // layout.num_ranks, layout.on_cpu)
    if once and layout.teacher_runs:
        largest = max(phase["global_batch_size"] * phase["sequence_length"] for phase in phase_settings(config))
        states = largest // world * teacher.shape.hidden_size * layout.compute_bytes
        beside["teacher: final states of the whole window"] = states
    memory = {moment: {**parts, **beside} for moment, parts in step_memory(teacher, student, layout).items()}
    if once and layout.teacher_runs and layout.num_ranks > 1:
        whole = num_parameters(teacher, teacher.shape) * layout.compute_bytes
        memory["the teacher's forward"]["gathered: the teacher's"] = whole
    memory["the loss"]["states that terms compare"] = _compared(config, teacher.shape, student, layout)
    if config.correct.num_tokens is not None:
        own = step_memory(teacher, teacher.shape, replace(layout, teacher_runs=False))
        memory |= {f"{moment} of the teacher's correction": parts for moment, parts in own.items()}
    return memory


def _longest_phase(config: CompressConfig) -> dict[str, Any]:
    return max(phase_settings(config), key=lambda phase: phase["num_tokens"])


def _collectives(
    config: CompressConfig, teacher: ModelInfo, student: Shape, layout: Layout, copies: int, once: bool
) -> list[Collective]:
    """Of a step of the longest phase."""
    micro_batches = _longest_phase(config)["global_batch_size"] // (copies * layout.num_ranks * layout.micro_batch_size)
    return step_collectives(teacher, student, layout, micro_batches, copies, once)


def _compared(config: CompressConfig, teacher: Shape, student: Shape, layout: Layout) -> int:
    """Bytes of what both models record for terms on hidden states: outputs of layers, and inputs of attention."""
    numbers = 0
    for shape, to_teacher in ((student, False), (teacher, True)):
        wanted = listening(config.distill.objectives, to_teacher)
        attention = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        numbers += (len(wanted.outputs) + wanted.embedding) * shape.hidden_size + len(wanted.attention) * attention
    return layout.micro_batch_size * layout.sequence_length * layout.compute_bytes * numbers


def _student(config: CompressConfig, teacher: ModelInfo) -> Shape:
    if not budget(config):
        return given_shape(config, teacher)
    grid = grid_of(config, teacher)
    if not grid.limits:
        raise ConfigError(
            "stage=plan can't tell what prune.min_tokens_per_second leaves before it is measured; give "
            "prune.max_parameters"
        )
    return max(enumerate_shapes(teacher, grid), key=lambda found: (found[1], found[0].num_hidden_layers))[0]


def _item_bytes(config: CompressConfig, num_gpus: int) -> int:
    if config.compute_dtype is ComputeDtype.auto and num_gpus:
        return 2
    return resolve_dtype(config.compute_dtype).itemsize


def _speed(config: CompressConfig, num_gpus: int) -> float:
    """FLOP a second of the whole machine in a training step."""
    cluster = config.cluster
    if cluster.peak_flops is not None:
        return cluster.peak_flops * cluster.efficiency * max(1, num_gpus)
    if num_gpus:
        raise ConfigError("cluster.peak_flops must be set for GPUs, such as 989e12 for an H100 in bfloat16")
    return flops_per_second(resolve_dtype(config.compute_dtype)) * STEP_EFFICIENCY


def _moment_bytes(config: CompressConfig) -> int:
    """Of a parameter: AdamW's two moments, or Muon's one (of the layers' matrices, which are nearly all)."""
    return MOMENT_BYTES if config.distill.optimizer is Optimizer.adamw else MOMENT_BYTES // 2


def _beside(config: CompressConfig, parameters: int, on_cpu: bool) -> dict[str, int]:
    """What a rank holds all through training beside the step, for its share of the parameters."""
    found = {}
    state = MASTER_BYTES + _moment_bytes(config)
    if config.distill.ema_decay is not None:
        found["student: the moving average"] = MASTER_BYTES * parameters
        state += MASTER_BYTES
    if config.distill.async_checkpoint and on_cpu:  # a GPU's is in the memory of its host
        found["checkpoint: the copy being written"] = state * parameters
    return found


def _disk(config: CompressConfig, teacher: ModelInfo, student: Shape) -> dict[str, int]:
    count = num_parameters(teacher, student)
    item = 4 if config.export.dtype is ComputeDtype.float32 else 2
    # While one is written the ones to be kept are still there.
    state = MASTER_BYTES + _moment_bytes(config) + (MASTER_BYTES if config.distill.ema_decay is not None else 0)
    kept = config.distill.keep_checkpoints + config.distill.keep_best
    checkpoints = (kept + 1) * count * state
    cached = {}
    if config.teacher.mode is TeacherMode.cached:
        held = config.cache.k if config.cache.kind is CacheKind.top_k else config.cache.num_samples
        form = Form(config.cache.kind.value, held, teacher.shape.vocab_size)
        cached = {"the cached teacher, at most": int(num_tokens(config)) * form.max_bytes}
    return {
        "tokens, at most those to train on": int(num_tokens(config)) * TOKEN_BYTES,
        **cached,
        "the untrained student and the export": 2 * item * count,
        f"checkpoints, {kept} and the one being written": checkpoints,
    }


def _check_fits(config: CompressConfig, made: Plan) -> None:
    """Raise ConfigError where a step needs more than there is, with the nearest settings that would fit."""
    usable = _usable(made)
    moment, needed = made.peak
    if needed <= usable:
        return
    where = f"each of {made.num_gpus} GPUs" if made.num_gpus else "this machine"
    share = f"{usable / made.memory_limit:.0%} of {_gib(made.memory_limit)}"
    fits = [
        text
        for text, layout, world in _alternatives(config, made)
        if _peak(_step_memory(config, made.teacher, made.student, layout, world, bool(config.teacher.whole_window)))[1]
        <= usable
    ]
    raise ConfigError(
        f"training needs {_gib(needed)} on {where} at {moment}, and {share} are there to be used"
        + (f"; it would fit with {' or with '.join(fits)}" if fits else "; not even these would fit: more nodes, "
           "distill.recompute=true, distill.micro_batch_size=1; choose a smaller student or shorter sequences")
    )  # fmt: skip


def _usable(made: Plan) -> int:
    return int(made.memory_limit * (HEADROOM if made.num_gpus else CPU_HEADROOM))


def _alternatives(config: CompressConfig, made: Plan) -> Iterator[tuple[str, Layout, int]]:
    """Settings, the layout that they make, and its ranks in all."""
    layout = made.layout
    world = made.num_ranks
    if made.copies > 1:
        yield "cluster.shard_ranks=null", replace(layout, num_ranks=world), world
    if layout.micro_batch_size > 1:
        yield "distill.micro_batch_size=1", replace(layout, micro_batch_size=1), world
    if not layout.recompute:
        yield "distill.recompute=true", replace(layout, recompute=True), world
        if layout.micro_batch_size > 1:
            fewer = replace(layout, recompute=True, micro_batch_size=1)
            yield "distill.recompute=true distill.micro_batch_size=1", fewer, world
    if made.num_gpus and made.copies == 1:
        for factor in (2, 4, 8, 16):
            nodes, ranks = config.cluster.num_nodes * factor, world * factor
            if config.distill.global_batch_size % (ranks * layout.micro_batch_size) == 0:
                yield f"cluster.num_nodes={nodes}", replace(layout, num_ranks=ranks), ranks


def _peak(memory: dict[str, dict[str, int]]) -> tuple[str, int]:
    totals = {moment: sum(parts.values()) for moment, parts in memory.items()}
    moment = max(totals, key=totals.__getitem__)
    return moment, totals[moment]


# -- what a person sees


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def _models(config: CompressConfig, made: Plan) -> Table:
    info, shapes = made.teacher, (made.teacher.shape, made.student)
    result = Table(title=f"plan of {config.name}", title_justify="left")
    for column in ("", "teacher", "student"):
        result.add_column(column, justify="right" if column else "left")

    def row(label: str, values: list[str]) -> None:
        result.add_row(label, *values)

    for name in PRUNABLE:
        if getattr(info.shape, name):
            row(name, [f"{getattr(shape, name):,}" for shape in shapes])
    row("parameters", [f"{num_parameters(info, shape):,}" for shape in shapes])
    row("  outside of embedding and head",
        [f"{num_parameters(info, shape) - num_embedding_parameters(info, shape):,}" for shape in shapes])  # fmt: skip
    if info.shape.num_experts:
        row("  that a token meets", [f"{num_active_parameters(info, shape):,}" for shape in shapes])
    row("weights in bfloat16", [_gib(2 * num_parameters(info, shape)) for shape in shapes])
    context, count = config.shape.context_tokens, config.shape.num_contexts
    row(f"keys and values, {count} x {context:,} tokens",
        [_gib(key_value_cache_bytes(shape, context, count, 2)) for shape in shapes])  # fmt: skip
    if budget(config):
        result.caption = "the student is the largest of the budget's legal shapes; the scores choose among them"
    return result


def _memory(config: CompressConfig, made: Plan) -> Table:
    moment, needed = made.peak
    where = f"on each of {made.num_gpus} GPUs" if made.num_gpus else "on the CPU"
    result = Table(title=f"memory of a distillation step {where}", title_justify="left")
    result.add_column(f"at its peak, {moment}")
    result.add_column("", justify="right")
    for part, size in sorted(made.memory[moment].items(), key=lambda item: -item[1]):
        if size >= 2**20:
            result.add_row(part, _gib(size))
    result.add_section()
    result.add_row("in all", _gib(needed))
    result.add_row("there is", _gib(made.memory_limit))
    return result


def _work(config: CompressConfig, made: Plan) -> Table:
    cluster, tokens = config.cluster, num_tokens(config)
    result = Table(title="work, time and disk", title_justify="left")
    result.add_column("")
    result.add_column("", justify="right")
    result.add_row("FLOP a token: teacher forward, student forward and backward", f"{made.flops_per_token:.3g}")
    result.add_row(f"distill, {tokens:,.0f} tokens", about(made.seconds))
    if config.correct.num_tokens is not None:
        corrected, length = float(config.correct.num_tokens), config.data.sequence_length
        each = flops_per_token(made.teacher, made.teacher.shape, length, config.distill.recompute, teacher_runs=False)
        seconds = made.seconds * (corrected * each) / (tokens * made.flops_per_token)
        result.add_row(f"the teacher's correction, {corrected:,.0f} tokens", about(seconds))
    if made.num_gpus:
        hours = made.seconds / 3600 * made.num_gpus
        result.add_row(f"GPU-hours at {cluster.efficiency:.0%} of {cluster.peak_flops:.3g} FLOP/s", f"{hours:,.0f}")
        if cluster.price_per_gpu_hour is not None:
            result.add_row(
                f"money at {cluster.price_per_gpu_hour:g} a GPU-hour", f"{hours * cluster.price_per_gpu_hour:,.0f}"
            )
    result.add_section()
    for part, size in made.disk.items():
        result.add_row(f"disk: {part}", _gib(size))
    result.add_row("disk in all", _gib(sum(made.disk.values())))
    if made.num_gpus:
        result.add_section()
        result.add_row("Slurm's request", slurm_request(config, made.seconds))
    if made.layout.teacher_runs and made.layout.num_ranks > 1:
        result.add_row("a layer of the teacher is gathered", "once a step" if made.gathers_once else "each micro-batch")
    return result


def _layouts(config: CompressConfig, made: Plan) -> Table:
    """What sharing a model by fewer or more GPUs takes of memory and of the links, for the batch as it is."""
    cluster, world = config.cluster, made.num_ranks
    result = Table(title="how many GPUs share a model: cluster.shard_ranks", title_justify="left")
    for column in ("shared by", "copies", "memory of a GPU", "each sends a step", "for", "beside computing for"):
        result.add_column(column, justify="right")
    nodes = {cluster.gpus_per_node * 2**power for power in range(cluster.num_nodes.bit_length())}
    best: tuple[float, int] | None = None
    for share in sorted({1, made.layout.num_ranks, world, *(size for size in nodes if world % size == 0)}):
        layout = replace(made.layout, num_ranks=share)
        once = _gathers_once(config, made.teacher, made.student, layout, world, _usable(made))
        needed = _peak(_step_memory(config, made.teacher, made.student, layout, world, once))[1]
        collectives = _collectives(config, made.teacher, made.student, layout, world // share, once)
        sent = sum(one.sent for one in collectives)
        seconds = link_seconds(config, collectives, layout)
        fits = needed <= _usable(made)
        if fits and (best is None or (sent if seconds is None else seconds) < best[0]):
            best = sent if seconds is None else seconds, share
        result.add_row(
            f"{share}" + (" (chosen)" if share == made.layout.num_ranks else ""), f"{world // share}",
            _gib(needed) + ("" if fits else ", too much"), _gib(sent),
            "" if seconds is None else f"{seconds:.3g} s", f"{made.step_seconds:.3g} s",
        )  # fmt: skip
    result.caption = "" if best is None else f"of those that fit, {best[1]} keeps the links busy least"
    if seconds is None:
        result.caption += "; for seconds set cluster.node_bandwidth and cluster.network_bandwidth"
    return result


def link_seconds(config: CompressConfig, collectives: Sequence[Collective], layout: Layout) -> float | None:
    """Of a step, by cluster.node_bandwidth and cluster.network_bandwidth; None where these aren't given."""
    cluster = config.cluster
    if cluster.node_bandwidth is None or cluster.network_bandwidth is None:
        return None
    links = Links(cluster.gpus_per_node, cluster.node_bandwidth, cluster.network_bandwidth)
    return links.seconds(collectives, layout.num_ranks)


def slurm_request(config: CompressConfig, seconds: float) -> str:
    """Options of sbatch for the whole training in one job, a quarter of the time added; longer ones are requeued."""
    minutes = max(10, int(seconds * TIME_MARGIN / 60) + 1)
    days, rest = divmod(minutes, 24 * 60)
    time = f"{days}-{rest // 60:02d}:{rest % 60:02d}:00" if days else f"{rest // 60:02d}:{rest % 60:02d}:00"
    gpus = config.cluster.gpus_per_node
    return f"--nodes={config.cluster.num_nodes} --ntasks-per-node={gpus} --gpus-per-node={gpus} --time={time}"

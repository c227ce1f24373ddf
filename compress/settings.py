"""Every setting of a compression, typed, with its default. A choice is an enum; there is no `_target_`.

Read by `config.py` (from the command line and yaml) and held to the rules of `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

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
    correct = "correct"
    cache = "cache"
    distill = "distill"
    export = "export"
    evaluate = "evaluate"
    plan = "plan"
    status = "status"
    selftest = "selftest"
    doctor = "doctor"


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


class Device(StrEnum):
    """What a training computes on."""

    auto = "auto"  # each rank's own GPU where torch sees any
    cpu = "cpu"
    cuda = "cuda"


class TeacherMode(StrEnum):
    """Where the teacher's word comes from while distilling."""

    online = "online"  # its own forward at every step
    cached = "cached"  # what stage cache has kept of it
    auto = "auto"  # online or cached, whichever takes less of the teacher's time on this machine
    previous_self = "previous_self"  # none: what the student itself said of the same text at the step before


class CacheKind(StrEnum):
    """What is kept of a teacher's distribution (`signals.py`)."""

    sample = "sample"
    top_k = "top_k"


class Optimizer(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Curve(StrEnum):
    """How a quantity goes from its first value to its last (`schedules.py`)."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"


class ObjectiveName(StrEnum):
    """What a term of the loss is (docs/objectives.md)."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"
    skew_kl = "skew_kl"
    skew_reverse_kl = "skew_reverse_kl"
    total_variation = "total_variation"
    adaptive_kl = "adaptive_kl"
    top_k_kl = "top_k_kl"
    bild = "bild"
    dac_kl = "dac_kl"
    span_relation = "span_relation"
    uncertainty_kl = "uncertainty_kl"
    dynamic_kl = "dynamic_kl"
    cross_entropy = "cross_entropy"
    label_smoothing = "label_smoothing"
    hidden_cosine = "hidden_cosine"
    hidden_mse = "hidden_mse"
    minilm_attention = "minilm_attention"
    minilm_value = "minilm_value"
    embedding_mse = "embedding_mse"


@dataclass
class TermConfig:
    """A summand of the loss. The options below `squared` belong to single objectives; null is their default."""

    objective: ObjectiveName = ObjectiveName.forward_kl
    weight: float = 1.0
    weight_end: float | None = None  # at the phase's last step; none = as at the first
    temperature: float = 1.0
    temperature_end: float | None = None
    curve: Curve = Curve.linear  # from first to last
    squared: bool = False  # times temperature**2
    k: int | None = None
    beta: float | None = None
    skew: float | None = None
    head_mass: float | None = None
    lower_quantile: float | None = None
    upper_quantile: float | None = None
    smoothing: float | None = None
    max_temperature: float | None = None
    layers: list[list[int]] | None = None  # [student, teacher] pairs, from 0, negative from the end; none = the last


@dataclass
class TeacherConfig:
    """The model to shrink: a Hugging Face folder, a hub id, or `embedded:NAME`."""

    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    mode: TeacherMode = TeacherMode.online
    # online: asked about a whole global batch first; where it is sharded, gathered once for that, whole on every rank.
    # null: where that saves gathering and its memory is there
    whole_window: bool | None = None


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
    compile: bool = False  # reduce activations by compiled kernels: a pass costs a tenth less, after half a minute
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
    """Choosing among the shapes of a budget by measurement: cut, compare, distil a little, halve, repeat."""

    num_candidates: int = 0  # of the best predicted shapes, cut and measured; 0 = the best predicted is taken
    num_tokens: Size = 0.0  # of the first round's short distillation, each round twice the last; 0 = none
    num_distilled: int | None = None  # of the candidates, the best untrained ones that are distilled; none = all
    num_sequences: int = 32  # that candidates are compared on
    judge: str | None = None  # the validation set these come from; none = the first
    continue_winner: bool = False  # distill goes on from the winner's trained weights instead of prune's


@dataclass
class CorrectConfig:
    """Training the teacher on the text first, by cross-entropy; the rest of its settings are those of distill."""

    num_tokens: Size | None = None  # null = the teacher is distilled from as it is
    trial_tokens: Size | None = None  # of them, the first, that tell whether it is needed; null = a tenth
    min_gain: float = 0.01  # share that the mean validation loss must fall by in the trial; below it nothing is changed
    learning_rate: float = 2e-5


@dataclass
class CacheConfig:
    """What is kept of the teacher at every loss token of the training sequences, when teacher.mode=cached."""

    kind: CacheKind = CacheKind.sample
    num_samples: int = 12  # kind=sample: ids drawn with replacement
    k: int = 64  # kind=top_k
    sequences_per_shard: int = 256  # after a kill the shard that was being made is made again
    micro_batch_size: int = 4


@dataclass
class PhaseConfig:
    """A stretch of training with its own warm-up and curves; what it leaves out is as in distill.* and data.*."""

    num_tokens: Size | None = None
    sequence_length: int | None = None  # one that divides data.sequence_length: rows are cut into such pieces
    global_batch_size: int | None = None
    learning_rate: float | None = None  # muon's is changed in the same ratio
    weights: list[float] | None = None  # shares of the sources of data.train, in their order; 0 leaves one out


@dataclass
class DistillConfig:
    init_from: str | None = None  # a student pruned elsewhere; none = this run's prune folder
    num_tokens: Size = MISSING
    # One after the other; none = one as below. A finished run goes on when more are appended.
    phases: list[PhaseConfig] = field(default_factory=list)
    global_batch_size: int = 4  # sequences a step
    micro_batch_size: int = 4  # sequences a forward; changes memory, not the gradient
    objectives: list[TermConfig] = field(default_factory=lambda: [TermConfig()])  # the loss is their sum
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = 4e-4
    muon_learning_rate: float = 0.005  # of the layers' matrices when optimizer=muon; the rest trains by AdamW
    min_learning_rate_ratio: float = 0.1  # of the learning rate, at the last step
    learning_rate_curve: Curve = Curve.cosine
    decay_share: float = 0.2  # of all steps, the decay at the end of a wsd curve
    warmup_steps: int = 8
    weight_decay: float = 0.0
    balance_loss: float = 0.0  # weight of the load balancing loss of a mixture's experts (compress/routing.py)
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_gradient_norm: float = 1.0
    recompute: bool = False  # a layer's activations are made again in the backward: less memory, a third more work
    compile: bool = False  # decoder layers, forward KL: 1.2x on a CPU after half a minute, needs a C++ compiler
    ema_decay: float | None = None  # a moving average of the weights is exported instead of them; null = none
    checkpoint_steps: int = 16
    keep_checkpoints: int = 2
    keep_best: bool = False  # the checkpoint of the lowest validation KL too
    async_checkpoint: bool = False  # copied and written beside the steps, from the host's memory
    log_steps: int = 1
    validate_steps: int | None = None  # KL to the teacher, loss, top-1 every so many steps; null = never
    validate_tokens: Size = 16384.0  # of each validation set, at most
    stop_slope: float | None = None  # stop when validation KL falls slower, in nats per million tokens; null = never
    stop_validations: int = 4  # that the slope is taken over


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
class JobConfig:
    """What a stage asks Slurm for (launch/pipeline.sh); what it leaves out is as the cluster's."""

    num_nodes: int | None = None
    ranks_per_node: int | None = None
    time: str | None = None  # as sbatch takes it, such as 1-12:00:00
    cpus: int | None = None  # of a node; none = the site's default
    memory: str | None = None  # of a node, such as 64G
    submissions: int = 1  # jobs in a row that share the work, where a site allows no requeue; 1 = one that is requeued


@dataclass
class JobsConfig:
    """By stage."""

    tokenize: JobConfig = field(default_factory=JobConfig)
    score: JobConfig = field(default_factory=JobConfig)
    search: JobConfig = field(default_factory=JobConfig)
    prune: JobConfig = field(default_factory=JobConfig)
    correct: JobConfig = field(default_factory=JobConfig)
    cache: JobConfig = field(default_factory=JobConfig)
    distill: JobConfig = field(default_factory=JobConfig)
    export: JobConfig = field(default_factory=JobConfig)
    evaluate: JobConfig = field(default_factory=JobConfig)


@dataclass
class ClusterConfig:
    """The machines: what stage=plan reckons with, and how ranks share a model; nothing here changes a result."""

    num_nodes: int = 1
    ranks_per_node: int = 1  # processes of a distributed stage
    time: str = "04:00:00"  # of a job, as sbatch takes it
    jobs: JobsConfig = field(default_factory=JobsConfig)
    stall_seconds: float | None = 1800.0  # without progress, after which one of several ranks ends; none = never
    shard_ranks: int | None = None  # that share a model (FSDP2); further ones hold copies (HSDP); none = all
    device: Device = Device.auto  # of the stages that ask models; pruning and exporting are a CPU's
    gpus_per_node: int = 0  # 0 = the CPU trains
    memory_bytes: Size | None = None  # of one GPU; none = what is free on this machine
    peak_flops: Size | None = None  # of one GPU in bfloat16, without sparsity, a second; none = of a product here
    efficiency: float = 0.4  # share of it that a training step reaches
    # Bytes a second that a GPU sends, and receives as many: to the others of its node; to other nodes. None: unknown.
    node_bandwidth: Size | None = None
    network_bandwidth: Size | None = None
    price_per_gpu_hour: float | None = None


@dataclass
class RoundConfig:
    """One of several rounds of pruning and distilling; what it leaves out is as for a single one."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    num_tokens: Size | None = None  # none = distill.num_tokens
    learning_rate: float | None = None  # none = distill.learning_rate


@dataclass
class SiblingConfig:
    """One of several students that are distilled in one teacher pass, each by its own pruning."""

    name: str = MISSING  # its folder under run_dir
    prune: PruneConfig = field(default_factory=PruneConfig)


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
    correct: CorrectConfig = field(default_factory=CorrectConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # In run_dir/NAME, each a run of its own; the teacher says everything once for all of them.
    siblings: list[SiblingConfig] = field(default_factory=list)
    rounds: list[RoundConfig] = field(
        default_factory=list
    )  # in run_dir/round_1, ...; each prunes the last one's student
    round: int | None = None  # only this one of them, from 1


BUDGET = ("max_parameters", "max_non_embedding_parameters", "max_active_parameters", "max_bytes",
          "min_tokens_per_second")  # fmt: skip


def set_name(source: SourceConfig) -> str:
    """The name of a validation set in folders and tables."""
    return source.name or Path(source.path.removeprefix("embedded:")).name.split(".")[0]

"""The export contract: a student that loads, computes what it must, and whose engines are known, or the stage fails.

1. transformers loads the folder strictly, with the promised number of parameters, and runs it as it is stored.
2. Its tensors are those that the axis table asks for, no more; a tied head is stored once; vocabulary rows are whole.
3. Its logits are those of the masked teacher (`masking.py`), with compensated or merged weights folded into both.
4. Its sizes and kinds of attention against the rules of inference engines (`engines.yaml`): reported; none of them but
   transformers runs here.
"""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from compress.architecture import ModelInfo, config_layer_types, expert_of, num_parameters
from compress.artifacts import open_tensors
from compress.errors import ArtifactError, NumericalError
from compress.families import Shape
from compress.folders import read_model
from compress.importance import experts_of
from compress.masking import mask_layer, mask_outside
from compress.models import decoder_layers, load_model
from compress.slicing import Kept
from compress.streaming import LayerStream, through_layer

log = logging.getLogger(__name__)
ENGINES = Path(__file__).parent / "engines.yaml"
# Of the spread of the logits, in float32. A wrong unit is off by 0.1 and more; sums in another order by about 1e-5.
TOLERANCE = 1e-3
SEVERITY = ("yes", "slower", "unquantised only", "not known", "no")
PROBE_TOKENS = 48  # in three packed documents


def check_student(
    folder: Path,
    info: ModelInfo,
    kept: Kept,
    replaced: Mapping[str, Tensor] | None,
    trust_remote_code: bool = False,
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """Points 1 to 4 for a freshly cut student. Raises ArtifactError for the first that doesn't hold.

    Logits are compared a layer at a time, so models of any size are. `whole` False for a student that doesn't fit into
    memory: then transformers loads it strictly a layer at a time too, and doesn't run it in the stored dtype.
    """
    student = _read_student(folder, trust_remote_code)
    promised = num_parameters(info, student.shape)
    found = sum(math.prod(tensor.shape) for tensor in student.tensors.values())
    ids, positions = _probe(student.shape.vocab_size)
    if whole:
        found = _run_whole(student, ids, trust_remote_code)
    if found != promised:
        raise ArtifactError(f"{folder} loads with {found:,} parameters, {promised:,} were promised; please report this")
    ours = LayerStream(student, torch.float32, trust_remote_code)
    teacher = LayerStream(info, torch.float32, trust_remote_code)
    states = streamed_states(ours, ids, positions), streamed_states(teacher, ids, positions, kept, replaced or {})
    difference = relative_difference(_whole(ours, states[0]), teacher.head_logits(states[1]))
    if not difference <= TOLERANCE:
        raise ArtifactError(
            f"{folder}: its logits differ from the masked teacher's by {difference:.2g} of their spread, more than "
            f"{TOLERANCE}: the axis table's rows of {info.family.title} are wrong for this model. Check them by "
            "stage=selftest, and please report this"
        )
    return {
        "strict_load": True,
        "num_parameters": found,
        "logits_difference": difference,
        "engines": _engines_of(student),
    }


def describe_export(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Points 1, 2 and 4 for a trained student that was reloaded strictly; its logits are its own by then.

    Raises ArtifactError for tensors that the table doesn't ask for, or that are missing.
    """
    student = _read_student(folder, trust_remote_code)
    return {
        "strict_load": True,
        "num_parameters": sum(math.prod(tensor.shape) for tensor in student.tensors.values()),
        "engines": _engines_of(student),
    }


def _read_student(folder: Path, trust_remote_code: bool) -> ModelInfo:
    """A written folder, checked by its headers. Raises ArtifactError for a tied head that is stored too.

    `read_model` lets a head pass that equals the embedding, as teachers have it; a student isn't to carry it twice.
    """
    student = read_model(folder, trust_remote_code)
    head = student.family.head
    if student.shape.tied:
        for shard in sorted(folder.glob("*.safetensors")):
            with open_tensors(shard) as reader:
                if head in reader.keys():  # noqa: SIM118  # a reader isn't a mapping
                    raise ArtifactError(
                        f"{shard}: {head} is stored, but tie_word_embeddings=true makes it "
                        f"{student.family.embedding}, which is stored already; please report this"
                    )
    return student


@torch.no_grad()
def _run_whole(student: ModelInfo, ids: Tensor, trust_remote_code: bool) -> int:
    """Parameters of the student as transformers loads it. Raises ArtifactError if it doesn't run in the stored dtype.

    The logits are compared in float32, where kernels ask for less than in bfloat16.
    """
    dtype = _stored_dtype(student)
    model = load_model(student.folder, dtype, trust_remote_code)
    try:
        model(input_ids=ids, use_cache=False)
    except Exception as error:  # the kernels' RuntimeError, and whatever a model's own code raises
        problems = _engines_of(student)["transformers"]["why"]
        remedy = (
            f"Set shape.multiple_of=16, or these sizes to multiples of {16 // dtype.itemsize}"
            if problems
            else "Check that the teacher runs in this dtype, and please report this"
        )
        raise ArtifactError(
            f"{student.folder} can't be run by transformers in {str(dtype).removeprefix('torch.')} ({error})"
            + "".join(f"; {problem}" for problem in problems)
            + f". {remedy}"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _engines_of(student: ModelInfo) -> dict[str, dict[str, Any]]:
    types = config_layer_types(student.parsed)
    return engine_report(student.family.model_type, student.shape, types, _stored_dtype(student).itemsize)


def log_engines(contract: Mapping[str, Any]) -> None:
    """Which inference engines the sizes suit, and why not."""
    for engine in contract["engines"].values():
        reason = f": {'; '.join(engine['why'])}" if engine["why"] else ""
        log.info("sizes for %s: %s%s", engine["title"], engine["runs"], reason)


@torch.no_grad()
def streamed_states(
    stream: LayerStream,
    ids_BT: Tensor,
    position_ids: Tensor,
    kept: Kept | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Behind the last norm (N, D), a layer at a time: of the model itself, or of the teacher masked to what is kept."""
    info = stream.info
    numbers = range(stream.num_layers) if kept is None else kept["layers"].tolist()
    hidden_BTD = final_BTD = torch.zeros(0)
    for position, number in enumerate(numbers):
        model = stream.layer(number)
        layer = decoder_layers(model)[0]
        if kept is not None:
            mask_outside(model, info.family, info.shape, kept)
            mask_layer(layer, position, info.family, info.shape, kept)
        for name, weight in _of_layer(replaced or {}, f"{info.family.layers}{number}."):
            stored, expert = getattr(torch, _TORCH[info.tensors[name].dtype]), expert_of(name)
            if expert is None:
                layer.get_parameter(name.partition(f".{number}.")[2]).copy_(weight.to(stored))
            else:  # transformers holds all experts' in one
                experts_of(layer).down_proj[expert].copy_(weight.to(stored))
        if position == 0:
            hidden_BTD = stream.embed(model, ids_BT)
            if kept is not None:
                silent_D = torch.ones(info.shape.hidden_size, dtype=torch.bool).index_fill(0, kept["hidden"], False)
                hidden_BTD = hidden_BTD.masked_fill(silent_D, 0)
        hidden_BTD, final_BTD = through_layer(model, hidden_BTD, position_ids)
        del model, layer
        stream.let_go()
    return final_BTD.flatten(0, 1)


def _of_layer(replaced: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, replaced[name]) for name in replaced if name.startswith(prefix))


_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_dtype(student: ModelInfo) -> torch.dtype:
    found: torch.dtype = getattr(torch, _TORCH[student.tensors[student.family.embedding].dtype])
    return found


def _probe(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids (1, T) over the whole vocabulary, and positions of three packed documents."""
    ids = (torch.arange(PROBE_TOKENS) * max(1, vocab_size // PROBE_TOKENS) + 3) % vocab_size
    lengths = (PROBE_TOKENS // 2, PROBE_TOKENS // 3, PROBE_TOKENS - PROBE_TOKENS // 2 - PROBE_TOKENS // 3)
    return ids[None], torch.cat([torch.arange(length) for length in lengths])[None]


def _whole(stream: LayerStream, final_ND: Tensor) -> Tensor:
    """(N, V), filled in place: so the student's and the teacher's heads needn't be mapped at once."""
    logits_NV = torch.empty(len(final_ND), stream.info.shape.vocab_size)
    start = 0
    for block_NR in stream.head_logits(final_ND):
        logits_NV[:, start : start + block_NR.shape[1]] = block_NR
        start += block_NR.shape[1]
    return logits_NV


def relative_difference(one_NV: Tensor, other: Iterable[Tensor]) -> float:
    """The largest difference over the standard deviation of `other`, which comes in blocks of the vocabulary.

    NumericalError where there is nothing to compare.
    """
    largest, count, total, squares, start = 0.0, 0, 0.0, 0.0, 0
    for theirs in other:
        ours = one_NV[:, start : start + theirs.shape[1]]
        start += theirs.shape[1]
        if not bool(ours.isfinite().all() and theirs.isfinite().all()):
            raise NumericalError(
                "the logits of the student or of the masked teacher are not finite; set "
                "compute_dtype=float32, or check the teacher's weights"
            )
        largest = max(largest, (ours - theirs).abs().max().item())
        count += theirs.numel()
        total += theirs.sum(dtype=torch.float64).item()
        squares += theirs.double().square().sum().item()
    variance = max(0.0, squares / count - (total / count) ** 2)
    return largest / max(math.sqrt(variance), 1e-12)


@dataclass(frozen=True)
class _Student:
    """What the rules look at."""

    model_type: str
    sizes: Mapping[str, int]  # those of Shape, `query_width` and `key_value_width`
    layer_types: Sequence[str]  # empty where the family doesn't distinguish
    item_bytes: int  # of a stored weight


@dataclass(frozen=True)
class _Rule:
    """What an engine asks of a student, and what is so `otherwise`, one of SEVERITY; engines.yaml explains the keys."""

    otherwise: str
    source: str
    families: Sequence[str] | None = None
    sizes: Sequence[str] = ()
    multiple_of: int | None = None
    multiple_of_bytes: int | None = None
    at_most: int | None = None
    one_of: Sequence[int] | None = None
    equal: Sequence[str] = ()
    sliding_period: int | None = None

    def broken(self, student: _Student) -> list[str]:
        """What doesn't hold, in words; a size of 0 isn't there."""
        if self.families is not None and student.model_type not in self.families:
            return []
        found = [problem for size in self.sizes for problem in self._of_size(size, student)]
        if len({student.sizes[size] for size in self.equal}) > 1:
            found.append(" and ".join(f"{size}={student.sizes[size]}" for size in self.equal) + " are not equal")
        if self.sliding_period:
            found += _out_of_step(student.layer_types, self.sliding_period)
        return found

    def _of_size(self, size: str, student: _Student) -> Iterator[str]:
        value = student.sizes[size]
        if not value:
            return
        if self.multiple_of and value % self.multiple_of:
            yield f"{size}={value} is no multiple of {self.multiple_of}"
        if self.multiple_of_bytes and value * student.item_bytes % self.multiple_of_bytes:
            items = self.multiple_of_bytes // student.item_bytes
            yield f"{size}={value} is no multiple of {items}, {self.multiple_of_bytes} bytes in the stored dtype"
        if self.at_most and value > self.at_most:
            yield f"{size}={value} is more than {self.at_most}"
        if self.one_of and value not in self.one_of:
            yield f"{size}={value} is none of {', '.join(map(str, self.one_of))}"


def _out_of_step(layer_types: Sequence[str], period: int) -> list[str]:
    """The first layer that slides, or doesn't, against a pattern in which the last layer of each period doesn't."""
    for layer, kind in enumerate(layer_types):
        expected = "full_attention" if layer % period == period - 1 else "sliding_attention"
        if kind != expected:
            return [f"layer_types: layer {layer} is {kind}, where it computes {expected} (period {period})"]
    return []


@cache
def _engines() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(ENGINES.read_text())
    for engine in found.values():
        engine["rules"] = [_Rule(**rule) for rule in engine["rules"]]
    return found


def engine_report(
    model_type: str, shape: Shape, layer_types: Sequence[str] | None, item_bytes: int
) -> dict[str, dict[str, Any]]:
    """For each engine whether it runs such a student: `runs` (one of SEVERITY), why, and the tensor-parallel sizes.

    `layer_types` None where the family doesn't distinguish; `item_bytes` of a stored weight.
    """
    sizes = {
        **vars(shape),
        "query_width": shape.num_attention_heads * shape.head_dim,
        "key_value_width": shape.num_key_value_heads * shape.head_dim,
    }
    student = _Student(model_type, sizes, layer_types or (), item_bytes)
    report = {}
    for name, engine in _engines().items():
        why, runs = [], "yes"
        if model_type not in engine.get("families", [model_type]):
            runs, why = "not known", [f"model_type={model_type} is not among those it is known to read"]
        for rule in engine["rules"]:
            for problem in rule.broken(student):
                why.append(f"{problem} ({rule.source})")
                runs = max(runs, rule.otherwise, key=SEVERITY.index)
        report[name] = {"title": engine["title"], "runs": runs, "why": why}
        if engine.get("tensor_parallel"):
            heads, groups = shape.num_attention_heads, shape.num_key_value_heads
            report[name]["tensor_parallel"] = [
                ranks
                for ranks in (1, 2, 4, 8, 16)
                if heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)
            ]
    return report

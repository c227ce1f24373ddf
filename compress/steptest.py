"""The step's half of stage=selftest: on the user's own teacher and student, does distillation compute what it says?

Two short sequences of the run's own training text (random ids where there is none), float32, the gradients of the last
decoder layer and the norm after it: under a minute for a small model, and the memory of both models in float64.
"""

# N loss tokens, D student hidden, E teacher hidden, V vocabulary

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.capture import listening, make_projections
from compress.errors import NumericalError
from compress.inputs import student_of, teacher_of
from compress.models import (
    OutputHead,
    cast_weights,
    check_same_tokenizer,
    check_vocabulary,
    decoder_layers,
    load_model,
    output_head,
    without_padding,
)
from compress.objectives import distillation_loss
from compress.objectives.chunked import DenseSignal, Targets, chunked_loss
from compress.objectives.table import OBJECTIVES
from compress.objectives.terms import Term
from compress.selftest import logits
from compress.settings import CompressConfig
from compress.step import StudentModule, accumulate_gradients, targets_of, trunk
from compress.teacher import Teacher
from compress.tokens import TokenBatch, TokenSet
from compress.training import terms_at

log = logging.getLogger(__name__)
SEQUENCES, LENGTH = 4, 48
Measure = Callable[[], tuple[float, float]]  # (the largest relative error found, what is allowed)


def run(config: CompressConfig, run_dir: Path) -> Table | None:
    """The properties and whether they hold; None where there is no student yet.

    Raises ConfigError for models of different vocabularies, NumericalError naming the properties that don't hold.
    """
    student_path, teacher_path = student_of(config, run_dir), teacher_of(config)
    trust = config.teacher.trust_remote_code
    if not (student_path / "config.json").is_file():
        log.info("selftest: no student at %s yet, so the step isn't tried; prune first, or set distill.init_from",
                 student_path)  # fmt: skip
        return None
    check_same_tokenizer(teacher_path, student_path, trust)
    check_vocabulary(teacher_path, student_path, trust)
    torch.manual_seed(config.seed)
    teacher, student = (load_model(path, torch.float32, trust).eval() for path in (teacher_path, student_path))
    batch = own_text(run_dir, min(model.config.vocab_size for model in (teacher, student)))
    table = Table(title="a distillation step with these models", title_justify="left")
    for column in ("property", "error", "allowed", "holds"):
        table.add_column(column)
    broken = []
    for name, measure in properties(teacher, student, batch, terms_at(config.distill)):
        error, allowed = measure()
        holds = error <= allowed
        table.add_row(name, f"{error:.1e}", f"{allowed:.0e}", "yes" if holds else "NO")
        if not holds:
            broken.append(f"{name}: {error:.1e}, allowed {allowed:.0e}")
    if broken:
        raise NumericalError(
            f"the distillation step is wrong with teacher {teacher_path} and student {student_path}: "
            + "; ".join(broken)
            + ". Look at both models' weights; if they are sound, this is a bug worth a report"
        )
    return table


def properties(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: TokenBatch, terms: Sequence[Term]
) -> Iterator[tuple[str, Measure]]:
    """Name and measure of each property of a step with these terms; models in float32."""
    source = Teacher(teacher, listening(terms, to_teacher=True))
    theirs = source.signal(batch).hidden_NE
    head, teacher_head = without_padding(output_head(student), output_head(teacher))
    with torch.no_grad():
        ours = trunk(student, batch)[batch.loss_mask]
    targets = targets_of(batch, pairs=True)

    def itself() -> tuple[float, float]:
        """KL(teacher || teacher), and the gradient's size over the hidden states'."""
        hidden_NE = theirs.clone().requires_grad_()
        signal = DenseSignal(theirs, teacher_head)
        loss, _ = chunked_loss(hidden_NE, _constant(teacher_head), signal, targets, [Term("forward_kl")])
        [gradient_NE] = torch.autograd.grad(loss, [hidden_NE])
        return max(abs(loss.item()) / len(theirs), gradient_NE.abs().max().item()), 1e-5

    yield "KL(teacher, teacher) is 0, and so is its gradient", itself

    def shifted() -> tuple[float, float]:
        """Cross-entropy against transformers' own, which shifts the labels itself."""
        labels = batch.input_ids.clone()
        labels[:, 1:][~batch.loss_mask[:, :-1]] = -100
        labels[:, 0] = -100
        mean = _cross_entropy_by_transformers(student, batch, labels, len(head.weight_VD))
        loss, _ = chunked_loss(ours, _constant(head), None, targets, [Term("cross_entropy")])
        return abs(loss.item() / len(ours) / mean - 1), 1e-4

    yield "loss mask and shift are transformers' own", shifted

    def alone() -> tuple[float, float]:
        """Both models' hidden states of packed documents against each document alone."""
        return max(_packing_error(model, batch) for model in (teacher, student)), 1e-3

    yield "packed documents are as each alone, for both models", alone

    def padding() -> tuple[float, float]:
        """The step's KL, with 64 rows of noise more in the student's head, against KL of transformers' own logits."""
        common = len(head.weight_VD)
        log_p_NV, log_q_NV = (_log_softmax_by_transformers(model, batch, common) for model in (teacher, student))
        plain = F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum").item()
        padded, other = without_padding(_with_noise(output_head(student)), output_head(teacher))
        return abs(distillation_loss(ours, padded, theirs, other).item() - plain) / max(abs(plain), 1e-3), 1e-4

    def split() -> tuple[float, float]:
        """In float64, but for what a family does in float32 (norms, routers): a gradient that is small beside its
        summands, as real models have, would be blurred beyond what is allowed."""
        with _in_float64(student, teacher):
            return _split_error(student, source, batch, terms), 1e-5

    yield "padding of the vocabulary counts for nothing", padding
    yield "the gradient is the same for every split", split
    for term in terms:
        if OBJECTIVES[term.objective].function is None:  # of hidden states: by autograd, in the split alone
            continue
        exact = _Exact(term, ours, head, theirs, teacher_head, targets)
        yield f"{term.objective}: float32 is float64", exact.precision
        if not OBJECTIVES[term.objective].detached:
            yield f"{term.objective}: the gradient is that of finite differences", exact.slope


class _Exact:
    """One term at a few tokens, in float32 and float64."""

    def __init__(
        self, term: Term, ours: Tensor, head: OutputHead, theirs: Tensor, teacher_head: OutputHead, targets: Targets
    ) -> None:
        few = slice(0, 16)
        self.term, self.labels_only = term, OBJECTIVES[term.objective].labels_only
        self.ours, self.head = ours[few], head
        self.theirs, self.teacher_head = theirs[few], teacher_head
        self.targets = Targets(targets.labels_N[few], targets.paired_N[few])

    def _loss(self, hidden_ND: Tensor, head: OutputHead) -> Tensor:
        dtype = hidden_ND.dtype
        signal = None if self.labels_only else DenseSignal(self.theirs.to(dtype), _as(self.teacher_head, dtype))
        loss, _ = chunked_loss(hidden_ND, head, signal, self.targets, [self.term])
        return loss

    def precision(self) -> tuple[float, float]:
        single, double = (
            self._loss(self.ours.to(dtype), _as(self.head, dtype)).item() for dtype in (torch.float32, torch.float64)
        )
        return abs(single - double) / max(abs(double), 1e-6), 1e-3

    def slope(self) -> tuple[float, float]:
        """Along the gradient and a random direction at once, of the hidden states and of the head's steepest rows."""
        hidden_ND, head = self.ours.double(), _as(self.head, torch.float64)
        weight_VD = head.weight_VD
        with torch.enable_grad():
            loss = self._loss(hidden_ND.requires_grad_(), replace(head, weight_VD=weight_VD.requires_grad_()))
            slopes = torch.autograd.grad(loss, [hidden_ND, weight_VD])
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        steepest = slopes[1].norm(dim=1).topk(min(32, len(slopes[1]))).indices
        worst, generator = 0.0, torch.Generator().manual_seed(0)
        for values, slope, rows in ((hidden_ND, slopes[0], slice(None)), (weight_VD, slopes[1], steepest)):
            kept, gradient = values[rows].clone(), slope[rows]
            noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            step = (gradient / gradient.norm().clamp_min(1e-30) + noise / noise.norm()) * 1e-5 * kept.norm()
            losses = []
            for sign in (1, -1):
                values[rows] = kept + sign * step
                losses.append(self._loss(hidden_ND, replace(head, weight_VD=weight_VD)).item())
            values[rows] = kept
            expected = (gradient * step).sum().item()
            worst = max(worst, abs((losses[0] - losses[1]) / 2 - expected) / max(abs(expected), 1e-12))
        return worst, 1e-3


def _constant(head: OutputHead) -> OutputHead:
    """A head that asks for no gradient."""
    return _as(head, head.weight_VD.dtype)


def _as(head: OutputHead, dtype: torch.dtype) -> OutputHead:
    bias_V = None if head.bias_V is None else head.bias_V.detach().to(dtype)
    return OutputHead(head.weight_VD.detach().to(dtype), head.softcap, bias_V, head.scale)


@torch.no_grad()
def _cross_entropy_by_transformers(model: PreTrainedModel, batch: TokenBatch, labels_BT: Tensor, rows: int) -> float:
    logits_BTV = logits(model, batch.input_ids, batch.position_ids)[..., :rows].float()
    found = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
    return float(found.item())


@torch.no_grad()
def _packing_error(model: PreTrainedModel, batch: TokenBatch) -> float:
    """The largest difference of a hidden state over their spread, of the first sequence's documents."""
    ids_T, positions_T = batch.input_ids[0], batch.position_ids[0]
    starts = [*(positions_T == 0).nonzero().squeeze(1).tolist(), len(ids_T)]
    together_TD = trunk(model, batch.rows(0, 1))[0]
    worst = 0.0
    for begin, end in itertools.pairwise(starts):
        positions = torch.arange(end - begin, device=ids_T.device)[None]
        yes = torch.ones_like(positions, dtype=torch.bool)
        alone_TD = trunk(model, TokenBatch(ids_T[None, begin:end], positions, yes, yes))[0]
        worst = max(worst, ((alone_TD - together_TD[begin:end]).abs().max() / together_TD.std()).item())
    return worst


@torch.no_grad()
def _log_softmax_by_transformers(model: PreTrainedModel, batch: TokenBatch, rows: int) -> Tensor:
    """Of the whole model's logits at the loss tokens, over the vocabulary's first rows (N, V)."""
    logits_BTV = logits(model, batch.input_ids, batch.position_ids)
    return torch.log_softmax(logits_BTV[batch.loss_mask][:, :rows].float(), -1)


def _with_noise(head: OutputHead) -> OutputHead:
    """The head padded by 64 rows that no token has."""
    noise_VD = torch.randn(64, head.weight_VD.shape[1], generator=torch.Generator().manual_seed(0))
    more_VD = torch.cat([head.weight_VD.detach(), noise_VD.to(head.weight_VD) * head.weight_VD.std().detach()])
    more_V = None if head.bias_V is None else torch.cat([head.bias_V.detach(), noise_VD[:, 0].to(head.bias_V)])
    return OutputHead(more_VD, head.softcap, more_V, head.scale)


@contextlib.contextmanager
def _in_float64(*models: PreTrainedModel) -> Iterator[None]:
    """The models with weights of that dtype inside of the block, and the same bits as before after it."""
    before = {id(model): (model.dtype, getattr(model.config, "_experts_implementation", None)) for model in models}
    try:
        for model in models:
            cast_weights(model, torch.float64)
            if before[id(model)][1] is not None:  # the grouped kernels of mixtures don't know it
                model.set_experts_implementation("eager")
        yield
    finally:
        for model in models:
            dtype, experts = before[id(model)]
            cast_weights(model, dtype)
            if experts is not None:
                model.set_experts_implementation(experts)


def _split_error(student: PreTrainedModel, teacher: Teacher, batch: TokenBatch, terms: Sequence[Term]) -> float:
    """The largest relative L2 difference of a gradient, all sequences at once against one by one; of the parameters of
    the last layer and of the norm after it."""
    asked = {name: p.requires_grad for name, p in student.named_parameters()}
    layers: nn.ModuleList = decoder_layers(student)
    student.requires_grad_(False)
    inside = {id(p) for p in layers.parameters()}
    norms = [p for p in student.base_model.parameters() if p.ndim == 1 and id(p) not in inside]
    parameters = [*layers[-1].parameters(), *norms]
    found: list[list[Tensor]] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        widths = student.config.hidden_size, teacher.model.config.hidden_size
        module = StudentModule(student, make_projections(terms, *widths, seed=0).to(student.dtype))
        for size in (len(batch.input_ids), 1):
            parts = [batch.rows(start, start + size) for start in range(0, len(batch.input_ids), size)]
            accumulate_gradients(module, teacher, parts, terms)
            found.append([p.grad.clone() for p in parameters if p.grad is not None])
            student.zero_grad()
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(asked[name])
    return max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in zip(*found, strict=True))


def own_text(run_dir: Path, vocab_size: int) -> TokenBatch:
    """Sequences of the run's training tokens, cut short; random ids in three documents each before there are any."""
    folder = run_dir / "tokens" / "train"
    if (folder / "index.json").is_file():
        data = TokenSet.open(folder)
        whole = data.batch(range(min(SEQUENCES, data.num_sequences)))
        length = min(LENGTH, data.sequence_length)
        parts = [getattr(whole, name)[:, :length] for name in ("input_ids", "position_ids", "loss_mask", "valid_mask")]
        parts[2] = parts[2].clone()
        parts[2][:, -1] = False
        batch = TokenBatch(*parts)
        if bool(batch.loss_mask.any()):
            return batch
    ids = torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (LENGTH // 2, LENGTH // 4, LENGTH - LENGTH // 2 - LENGTH // 4)])
    positions = positions.expand_as(ids)
    mask = torch.roll(positions, -1, 1) > 0
    mask[:, -1] = False
    return TokenBatch(ids, positions, mask, torch.ones_like(mask))

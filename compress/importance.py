"""Importance of every prunable unit from activations.

One forward-only pass gives all of it (Minitron, arXiv 2407.14679, section 2.2): activations are reduced
as they appear, and what is kept is a few numbers per unit. A score is defined per sequence and then over sequences, so
it doesn't depend on how sequences are put into batches. Gradients and weights: `gradients.py`.
"""

# B sequences, T tokens, L layers, D hidden, F intermediate, H query heads, G key-value heads, d head_dim, X any of them
# E experts, K experts of a token, N tokens of a batch

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import ModelInfo, Taps, shape_of, taps
from compress.criteria import Criterion, parse_criterion
from compress.devices import CPU
from compress.errors import NumericalError
from compress.families import Family, Shape, family_of_config
from compress.kernels import compiled
from compress.models import decoder_layers
from compress.parallel import ALONE, Ranks
from compress.reductions import BLOCKED, Reductions, Running, column_norms
from compress.scores import Importance, Widths, by_block_influence
from compress.step import trunk
from compress.streaming import LayerStream, Progress, sweep
from compress.tokens import TokenBatch


class Listener:
    """The hooks of one pass over layers that may come and go: names as in the whole model, layer by layer."""

    def __init__(
        self,
        family: Family,
        num_layers: int,
        aggregations: Sequence[str],
        reductions: Reductions,
        similarity: bool = False,
    ) -> None:
        self.where = taps(family)
        self.reductions = reductions
        self.aggregations = aggregations
        self.scores: dict[tuple[str, str], Running] = {}  # (module, aggregation over the sequence); after combine()
        # By what a batch said (keys and their sizes).
        self.running: dict[tuple[tuple[tuple[str, str], int], ...], Running] = {}
        self.routed_norm: dict[str, Tensor] = {}  # module of the experts -> (E,) sum of output norms
        self.routed_count: dict[str, Tensor] = {}
        self.angles = [0.0] * num_layers
        self.similarity = _Similarity(num_layers) if similarity else None
        self.num_sequences = self.num_tokens = 0
        self.valid_BT: Tensor | None = None
        self.real_B: Tensor | None = None
        self.all_valid_BT: Tensor = torch.zeros(0)
        # What the running batch says, side by side, and of what. In one place: hundreds of small tensors that stay
        # between the activations would keep the memory of those from being used again.
        self.heard_BX: Tensor = torch.zeros(0, 0, dtype=torch.float64)
        self.heard: list[tuple[tuple[str, str], int]] = []  # (module, aggregation) and how many units
        self.num_heard = self.end_heard = 0  # sequences and columns of them

    def attach(self, layer: nn.Module, number: int) -> list[Callable[[], None]]:
        """Listen to a layer; returns what takes each hook off again."""
        inside = [pattern.partition(".layers.*.")[2] for pattern in self.where.hidden]
        undo = [self._hook(layer, name, number, of_output=True) for name in inside]
        for pattern in (self.where.intermediate, self.where.query_heads):
            if pattern is not None:
                undo.append(self._hook(layer, pattern.partition(".layers.*.")[2], number, of_output=False))
        undo.append(layer.register_forward_hook(self._influence(number), with_kwargs=True).remove)
        experts = experts_of(layer)
        if experts is not None:
            undo.append(self._listen_experts(experts, f"{number}.experts"))
        return undo

    def start(self, valid_BT: Tensor, count: bool = True) -> bool:
        """Say which tokens of the coming batch are real; False when none is, and the batch isn't worth running.

        `count` False for a batch that comes again, to another layer.
        """
        self._settle()
        real_B = valid_BT.any(1)
        self.all_valid_BT = valid_BT
        self.real_B = None if bool(real_B.all()) else real_B
        self.valid_BT = None if bool(valid_BT.all()) else valid_BT[real_B]
        if count:
            self.num_sequences += int(real_B.sum())
            self.num_tokens += int(valid_BT.sum())
        return bool(real_B.any())

    def _add(self, name: str, values_BTX: Tensor) -> None:
        if self.real_B is not None:
            values_BTX = values_BTX[self.real_B]
        for aggregation in self.aggregations:
            self._hear((name, aggregation), self.reductions.aggregate(values_BTX, self.valid_BT, aggregation))

    def _hear(self, key: tuple[str, str], values_BX: Tensor) -> None:
        count, begin, end = len(values_BX), self.end_heard, self.end_heard + values_BX.shape[1]
        rows, columns = self.heard_BX.shape
        if count > rows or end > columns:
            larger_BX = torch.empty(max(count, rows), max(end, 2 * columns, 1 << 16), dtype=torch.float64)
            larger_BX[:rows, :begin] = self.heard_BX[:, :begin]
            self.heard_BX = larger_BX
        self.heard_BX[:count, begin:end] = values_BX
        self.heard.append((key, end - begin))
        self.num_heard, self.end_heard = count, end

    def _settle(self) -> None:
        """Add what the last batch said, as one long vector: hundreds of short ones would take as long as a layer."""
        if not self.heard:
            return
        values_BX = self.heard_BX[: self.num_heard, : self.end_heard]
        mean_X = values_BX.mean(0)
        running = self.running.setdefault(tuple(self.heard), Running())
        running.merge(self.num_heard, mean_X, values_BX.sub_(mean_X).square_().sum(0))
        self.heard, self.end_heard = [], 0

    def _split(self) -> dict[tuple[str, str], Running]:
        """Module and aggregation over the sequence -> what was heard there."""
        self._settle()
        scores: dict[tuple[str, str], Running] = {}
        for sizes, running in self.running.items():
            widths = [size for _, size in sizes]
            parts = zip(sizes, running.mean_X.split(widths), running.deviation_X.split(widths), strict=True)
            for (key, _), mean_X, deviation_X in parts:
                scores.setdefault(key, Running()).merge(running.count, mean_X, deviation_X)
        self.running = {}
        return scores

    def _hook(self, layer: nn.Module, name: str, number: int, of_output: bool) -> Callable[[], None]:
        def hook(_module: Any, arguments: Any, output: Tensor) -> None:
            self._add(f"{number}.{name}", output if of_output else arguments[0])

        handle = layer.get_submodule(name).register_forward_hook(hook)
        return handle.remove

    def _influence(self, number: int) -> Callable[..., None]:
        def hook(_module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
            before_BTD = arguments[0] if arguments else keywords["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output
            if self.similarity is not None:
                self.similarity.add(number, before_BTD, after_BTD, self.all_valid_BT)
            if self.real_B is None and self.valid_BT is None:
                before_ND, after_ND = before_BTD.flatten(0, 1), after_BTD.flatten(0, 1)
            else:
                before_ND, after_ND = before_BTD[self.all_valid_BT], after_BTD[self.all_valid_BT]
            self.angles[number] += self.reductions.angles(before_ND, after_ND)

        return hook

    def _listen_experts(self, experts: Any, name: str) -> Callable[[], None]:
        """Units are scored with 0 where a token isn't routed to their expert.

        Experts are scored by the mean norm of their weighted output over the tokens that are (REAP, NVIDIA's code).
        """

        def visit(expert: int, token_M: Tensor, inner_MF: Tensor, outer_MD: Tensor, _weight_M1: Tensor) -> None:
            valid_N = self.all_valid_BT.flatten()
            norm_E = self.routed_norm.setdefault(name, torch.zeros(experts.num_experts, dtype=torch.float64))
            count_E = self.routed_count.setdefault(name, torch.zeros(experts.num_experts, dtype=torch.float64))
            added_MD = outer_MD.to(inner_MF.dtype)  # as the stream gets it
            norm_M = torch.linalg.vector_norm(added_MD.float(), dim=-1)[valid_N[token_M]]
            norm_E[expert] += norm_M.double().sum().cpu()
            count_E[expert] += len(norm_M)
            all_NF = inner_MF.new_zeros(len(valid_N), inner_MF.shape[1]).index_copy_(0, token_M, inner_MF)
            self._add(f"{name}.{expert}", all_NF.unflatten(0, self.all_valid_BT.shape))

        return route_through(experts, visit)

    def combine(self, ranks: Ranks) -> None:
        """Add what the other ranks heard on their batches; every rank has all of it then."""
        self.scores = self._split()
        if ranks.size == 1:
            return
        keys = sorted(self.scores)
        angles_L = torch.tensor(self.angles, dtype=torch.float64)
        parts = [torch.tensor([self.num_sequences, self.num_tokens]), angles_L]
        parts += [found[name] for found in (self.routed_norm, self.routed_count) for name in sorted(found)]
        if self.similarity is not None:
            parts += [self.similarity.sum_SS, torch.tensor(self.similarity.count)]
        totals = iter(ranks.sums(parts))
        self.num_sequences, self.num_tokens = (int(value) for value in next(totals))
        self.angles = next(totals).tolist()
        for routed in (self.routed_norm, self.routed_count):
            for name in sorted(routed):
                routed[name] = next(totals)
        if self.similarity is not None:
            self.similarity.sum_SS, self.similarity.count = next(totals), int(next(totals))
        running = [self.scores[key] for key in keys]
        heard = ranks.gather([t for r in running for t in (torch.tensor(r.count), r.mean_X, r.deviation_X)])
        for place, key in enumerate(keys):
            merged = Running()
            for found in heard:
                count, mean_X, deviation_X = found[3 * place : 3 * place + 3]
                merged.merge(int(count), mean_X, deviation_X)
            self.scores[key] = merged

    def finish(
        self, norms: Sequence[dict[str, Tensor]] | None, shape: Shape, criteria: Sequence[Criterion]
    ) -> Importance:
        """The scores by each activation criterion; `norms` (`reader_norms` of every layer) for weighted ones."""
        if self.num_tokens == 0:
            raise NumericalError("the calibration batches hold no real token to score; check data.calibration")
        widths = {}
        for criterion in criteria:
            if criterion.kind in ("activation", "weighted_activation"):
                weights = norms if criterion.kind == "weighted_activation" else None
                widths[str(criterion)] = self._widths(shape, criterion, weights)
        influence_L = torch.tensor(self.angles, dtype=torch.float64) / self.num_tokens
        if not bool(influence_L.isfinite().all()):
            raise NumericalError(
                f"layer {int((~influence_L.isfinite()).nonzero()[0])}: its block influence is not finite; "
                "set compute_dtype=float32, or check the teacher's weights"
            )
        return Importance(
            widths=widths,
            depths={"block_influence": by_block_influence(influence_L)},
            block_influence_L=influence_L.float(),
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            similarity_SS=None if self.similarity is None else self.similarity.result(),
        )

    def _widths(self, shape: Shape, criterion: Criterion, norms: Sequence[dict[str, Tensor]] | None) -> Widths:
        def score(number: int, name: str) -> Tensor:
            values_X = self.scores[f"{number}.{name}", criterion.sequence].result(criterion.batch)
            if not bool(values_X.isfinite().all()):
                raise NumericalError(
                    f"layer {number}, {name}: {int((~values_X.isfinite()).sum())} of {values_X.numel()} scores are not "
                    "finite; set compute_dtype=float32, or check the teacher's weights"
                )
            return (
                values_X if norms is None else values_X * norms[number].get(name, torch.ones((), dtype=torch.float64))
            )

        layers = range(shape.num_hidden_layers)
        hidden = [pattern.partition(".layers.*.")[2] for pattern in self.where.hidden]
        readers = {"intermediate": self.where.intermediate, "query_heads": self.where.query_heads}
        columns = {
            axis: torch.stack([score(number, pattern.partition(".layers.*.")[2]) for number in layers])
            for axis, pattern in readers.items()
            if pattern is not None
        }
        experts = None
        if shape.num_experts:
            counts_LE = torch.stack([self.routed_count[f"{number}.experts"] for number in layers])
            norms_LE = torch.stack([self.routed_norm[f"{number}.experts"] for number in layers])
            experts = {
                "experts": norms_LE / counts_LE.clamp(min=1),
                "expert_intermediate": torch.stack(
                    [
                        torch.stack([score(number, f"experts.{e}") for e in range(shape.num_experts)])
                        for number in layers
                    ]
                ),
            }
        total_D = torch.stack([torch.stack([score(n, name) for name in hidden]).sum(0) for n in layers]).sum(0)
        return _by_unit(total_D, columns, experts, shape)


def _by_unit(hidden_D: Tensor, columns: Mapping[str, Tensor], experts: Widths | None, shape: Shape) -> Widths:
    """Scores of columns to scores of units: a head by the L2 norm over its columns, a group over those of its heads."""
    columns_LHd = columns["query_heads"].unflatten(1, (shape.num_attention_heads, shape.head_dim))
    heads_LH = torch.linalg.vector_norm(columns_LHd, dim=2)
    found = {
        "hidden": hidden_D,
        "query_heads": heads_LH,
        "key_value_heads": torch.linalg.vector_norm(heads_LH.unflatten(1, (shape.num_key_value_heads, -1)), dim=2),
        **({"intermediate": columns["intermediate"]} if "intermediate" in columns else {}),
        **(experts or {}),
    }
    return {axis: scores.float() for axis, scores in found.items()}


class _Similarity:
    """Mean cosine between the residual stream before, between and behind the layers, over real tokens; (L+1, L+1)."""

    MAX_TOKENS = 1024  # of a batch, evenly spread: all depths of one batch are held at once

    def __init__(self, num_layers: int) -> None:
        self.states: list[Tensor] = []
        self.sum_SS = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
        self.count = 0

    def add(self, number: int, before_BTD: Tensor, after_BTD: Tensor, valid_BT: Tensor) -> None:
        places = valid_BT.flatten().nonzero().squeeze(1)
        if len(places) > self.MAX_TOKENS:
            places = places[torch.arange(self.MAX_TOKENS, device=places.device) * len(places) // self.MAX_TOKENS]
        if number == 0:
            self.states = [F.normalize(before_BTD.flatten(0, 1)[places].float(), dim=-1)]
        self.states.append(F.normalize(after_BTD.flatten(0, 1)[places].float(), dim=-1))
        if number == len(self.sum_SS) - 2:
            states_NSD = torch.stack(self.states, 1)
            self.sum_SS += (states_NSD @ states_NSD.transpose(1, 2)).double().sum(0).cpu()
            self.count += len(places)
            self.states = []

    def result(self) -> Tensor:
        return (self.sum_SS / max(self.count, 1)).float()


def experts_of(layer: nn.Module) -> Any:
    """The module that holds a layer's experts as fused parameters; None in a dense layer."""
    return next(
        (module for module in layer.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")),
        None,
    )


def run_expert(experts: Any, expert: int, hidden_MD: Tensor, kept_F: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(units after the gate (M, F), output (M, D)) of one expert of transformers' fused experts modules.

    With `kept_F` the other units are 0.
    """
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if not experts.is_transposed:
        gate_up, down = gate_up.T, down.T
    inner_MX = hidden_MD @ gate_up
    if experts.has_bias:
        inner_MX = inner_MX + experts.gate_up_proj_bias[expert]
    inner_MF: Tensor = experts._apply_gate(inner_MX)
    if kept_F is not None:
        kept_F = kept_F.to(inner_MF.device)
        inner_MF = torch.zeros_like(inner_MF).index_copy_(1, kept_F, inner_MF[:, kept_F])
    outer_MD = inner_MF @ down
    return inner_MF, outer_MD + experts.down_proj_bias[expert] if experts.has_bias else outer_MD


Visit = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


def route_through(experts: Any, visit: Visit) -> Callable[[], None]:
    """Run the experts one by one in place of the fused kernels, which show nothing of what is inside; returns the undo.

    `visit(expert, token_M, inner_MF, outer_MD, weight_M1)` is called for every expert in every batch, also for one that
    no token is routed to: its tokens, their units after the gate, the output times the router's weight before it is
    cast to the stream's dtype, and that weight.
    """
    original = experts.forward

    def forward(hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        result_ND = torch.zeros_like(hidden_ND)
        for expert in range(experts.num_experts):
            token_M, place_M = (index_NK == expert).nonzero(as_tuple=True)
            inner_MF, outer_MD = run_expert(experts, expert, hidden_ND[token_M])
            weight_M1 = weight_NK[token_M, place_M, None]
            outer_MD = outer_MD * weight_M1
            visit(expert, token_M, inner_MF, outer_MD, weight_M1)
            result_ND.index_add_(0, token_M, outer_MD.to(hidden_ND.dtype))
        return result_ND

    experts.forward = forward

    def undo() -> None:
        del experts.forward
        assert experts.forward == original

    return undo


def reader_norms(layer: nn.Module, where: Taps) -> dict[str, Tensor]:
    """L2 norm of the weights that read each column, by module (or `experts.E`): what a unit adds to the stream."""
    found = {}
    for pattern in (where.intermediate, where.query_heads):
        if pattern is not None:
            name = pattern.partition(".layers.*.")[2]
            weight: Tensor = layer.get_submodule(name).weight  # type: ignore[assignment]
            found[name] = column_norms(weight.detach())
    experts = experts_of(layer)
    if experts is not None:
        for expert in range(experts.num_experts):
            down = experts.down_proj[expert].detach()
            found[f"experts.{expert}"] = column_norms(down.T if experts.is_transposed else down)
    return found


@torch.no_grad()
def estimate_importance(
    model: PreTrainedModel,
    batches: Iterable[TokenBatch],
    criteria: Sequence[str] = ("activation:l2/mean",),
    *,
    similarity: bool = False,
    ranks: Ranks = ALONE,
    compile: bool = False,
) -> Importance:
    """Scores of every axis from one forward pass of the trunk; the output head doesn't run.

    hidden: outputs of every per-layer norm, summed over them. intermediate: input of down_proj, so after activation
    and gate (as NVIDIA's code; the paper's formula taps before). query_heads: columns of o_proj's input, then L2 over
    head_dim; key_value_heads: L2 over the columns of all heads of the group. experts: mean norm of the router-weighted
    output; expert_intermediate: as intermediate, per expert. Block influence of a layer: 1 - mean cosine between its
    input and output over real tokens. A sequence is a row of a batch.

    Args:
        criteria: activation or weighted_activation with aggregations (`criteria.parse_criterion`). A weighted score is
            multiplied by the L2 norm of the weights that read the unit: what the column adds to the residual stream,
            and not only how large it is.
        similarity: also the mean cosine between the stream at any two depths, for contiguous blocks of layers.
        ranks: every rank calls this with the same batches, runs its share of them, and returns the scores of all.
        compile: reduce by compiled kernels (`kernels.compiled`).

    Raises NumericalError when a score isn't finite or no batch has a real token.
    """
    parsed = [parse_criterion(text) for text in criteria]
    assert all("activation" in criterion.kind for criterion in parsed), "for the others see gradients.py"
    family, shape = family_of_config(model.config), shape_of(model.config)
    layers = decoder_layers(model)
    aggregations = tuple(dict.fromkeys(criterion.sequence for criterion in parsed))
    reductions = compiled(model.dtype, aggregations) if compile else BLOCKED
    listener = Listener(family, shape.num_hidden_layers, aggregations, reductions, similarity)
    training = model.training
    model.eval()
    undo = [remove for number, layer in enumerate(layers) for remove in listener.attach(layer, number)]
    try:
        for batch in ranks.mine(batches):
            if listener.start(batch.valid_mask):
                trunk(model, batch)
    finally:
        for remove in undo:
            remove()
        model.train(training)
    listener.combine(ranks)
    weighted = any(criterion.kind == "weighted_activation" for criterion in parsed)
    norms = [reader_norms(layer, listener.where) for layer in layers] if weighted else None
    return listener.finish(norms, shape, parsed)


@torch.no_grad()
def stream_importance(
    info: ModelInfo,
    dtype: torch.dtype,
    batches: Sequence[TokenBatch],
    criteria: Sequence[str] = ("activation:l2/mean",),
    *,
    spill: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda steps, total: steps,
    ranks: Ranks = ALONE,
    compile: bool = False,
    device: torch.device = CPU,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Importance:
    """The scores of `estimate_importance`, bit for bit, with one layer of the model in memory at a time.

    Args:
        prepare: called with each layer's model, on the device, before the batches, which are there, pass through it.
        batches: calibration; kept as token ids.
        spill: a folder for their hidden states; None keeps them in memory.
    """
    parsed = [parse_criterion(text) for text in criteria]
    stream = LayerStream(info, dtype, trust_remote_code, device=device)
    batches = [batch for batch in ranks.mine(batches) if bool(batch.valid_mask.any())]
    aggregations = tuple(dict.fromkeys(criterion.sequence for criterion in parsed))
    reductions = compiled(dtype, aggregations) if compile else BLOCKED
    listener = Listener(info.family, stream.num_layers, aggregations, reductions)
    weighted = any(criterion.kind == "weighted_activation" for criterion in parsed)
    norms: list[dict[str, Tensor]] = []
    first = True

    def visit(model: PreTrainedModel, number: int) -> Callable[[], None]:
        nonlocal first
        first = number == 0
        prepare(model)
        layer = decoder_layers(model)[0]
        if weighted:
            norms.append(reader_norms(layer, listener.where))
        undo = listener.attach(layer, number)

        def leave() -> None:
            for remove in undo:
                remove()

        return leave

    def before(batch: TokenBatch) -> None:
        listener.start(batch.valid_mask, count=first)

    sweep(stream, batches, range(stream.num_layers), visit, before, spill=spill, progress=progress)
    listener.combine(ranks)
    return listener.finish(norms if weighted else None, info.shape, parsed)

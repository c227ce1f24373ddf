"""Which layers to remove: by what the model still says without them, on calibration text.

Block influence (`importance.by_block_influence`) looks at a layer alone; this measures the whole model without it, in
one of four ways and by one of three strategies:

    loss   cross-entropy on the text (paper 1's PPL, arXiv 2407.14679, section 2.2)
    nmse   squared difference of the logits over the squared logits (Nemotron Elastic, arXiv 2511.16664)
    kl     KL(teacher || model), nats per token
    task   cross-entropy of the right answer among the choices of a multiple-choice task (paper 2, arXiv 2408.11796,
           section 2.2, chose layers by Winogrande)

    NAME          each layer alone, one pass over them (one-shot)
    NAME_greedy   the least damaging layer goes, then the next is looked for without it
    NAME_block    a contiguous block (paper 2: it keeps accuracy where scattered layers keep only the loss)
"""

# B sequences, T tokens, N tokens that are looked at, C of a chunk, D hidden, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import ConfigError, NumericalError
from compress.families import family_of_config
from compress.models import OutputHead, decoder_layers, logits_of, output_head
from compress.objectives import distillation_loss
from compress.parallel import ALONE, Ranks
from compress.scores import LayerRemovals
from compress.step import trunk
from compress.tokens import TokenBatch

MEASURES = ("loss", "nmse", "kl", "task")
STRATEGIES = ("", "_greedy", "_block")
MAX_TOKENS = 1024  # the head of a small model costs as much as a dozen layers; so many tokens tell candidates apart
_CHUNK = 256
Progress = Callable[[Iterator[Any], int], Iterable[Any]]


def removal_reach(num_hidden_layers: int, wanted: int | None, reach: int | None) -> int:
    """How many layers to remove so that a student of `wanted` layers can be cut; half of them when nothing is said.

    `reach` (score.max_removed_layers), where given, is removed at least, so that one scoring serves several depths.
    Raises ConfigError when that leaves no layer.
    """
    if reach is not None and not 0 <= reach < num_hidden_layers:
        raise ConfigError(
            f"score.max_removed_layers={reach} must be within 0 and {num_hidden_layers - 1}: "
            f"the teacher has {num_hidden_layers} layers and one stays"
        )
    if wanted is None:
        return num_hidden_layers // 2 if reach is None else reach
    return max(num_hidden_layers - wanted, reach or 0)


class Measure(Protocol):
    """How bad final hidden states (N, D) at the looked-at tokens are, in the order of the batches: (sum, of how much).

    Their ratio is 0 or more; kept apart so that several ranks' shares can be added. A removal's damage is how far it
    rises: by loss or task also below 0, where the model does better without the layers; by kl or nmse it doesn't fall.
    """

    def __call__(self, final_ND: Tensor) -> tuple[float, float]: ...


class LogitMeasure:
    """loss, nmse or kl of a model whose head is the teacher's, against the teacher's own hidden states."""

    def __init__(self, kind: str, teacher_ND: Tensor, label_N: Tensor, head: OutputHead) -> None:
        assert kind in ("loss", "nmse", "kl"), kind
        self.kind, self.teacher_ND, self.label_N, self.head = kind, teacher_ND, label_N, head

    def __call__(self, final_ND: Tensor) -> tuple[float, float]:
        head, count = self.head, len(final_ND)
        if self.kind == "kl":
            return distillation_loss(final_ND, head, self.teacher_ND, head).item(), float(count)
        above = below = 0.0
        for start in range(0, count, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            ours_CV = self._logits(final_ND[chunk])
            if self.kind == "loss":
                above += F.cross_entropy(ours_CV, self.label_N[chunk], reduction="none").sum(dtype=torch.float64).item()
                below += len(ours_CV)
            else:
                theirs_CV = self._logits(self.teacher_ND[chunk])
                above += (ours_CV - theirs_CV).square().sum(dtype=torch.float64).item()
                below += theirs_CV.square().sum(dtype=torch.float64).item()
        return above, below

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        return logits_of(hidden_CD, self.head).float()


class TaskMeasure:
    """Cross-entropy of the right choice, each choice weighed by its summed log-probability; nats per item."""

    def __init__(self, label_N: Tensor, choice_N: Tensor, item_of_choice: Tensor, right: Tensor, head: OutputHead):
        """`choice_N`: which choice each token belongs to; `right`: per item, the number of its right choice."""
        self.label_N, self.choice_N, self.head = label_N, choice_N, head
        self.item_of_choice, self.right = item_of_choice, right
        self.accuracy = math.nan  # of the last call

    def __call__(self, final_ND: Tensor) -> tuple[float, float]:
        token_N = torch.empty(len(final_ND), dtype=torch.float64)
        for start in range(0, len(final_ND), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits_CV = logits_of(final_ND[chunk], self.head).float()
            token_N[chunk] = -F.cross_entropy(logits_CV, self.label_N[chunk], reduction="none").double().cpu()
        score = torch.zeros(len(self.item_of_choice), dtype=torch.float64).index_add_(0, self.choice_N, token_N)
        total, hits = 0.0, 0
        for item, right in enumerate(self.right.tolist()):
            choices = (self.item_of_choice == item).nonzero().squeeze(1)
            place = (choices == right).nonzero().item()
            total -= score[choices].log_softmax(0)[place].item()
            hits += int(score[choices].argmax().item() == place)
        self.accuracy = hits / len(self.right)
        return total, float(len(self.right))


class Trials:
    """The current model's hidden states before every kept layer, so that a trial runs only the layers behind the gap.

    Memory: (kept layers) x (tokens of all batches) x D in the compute dtype.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[TokenBatch], picked: Sequence[Tensor]) -> None:
        """`picked`: for each batch the flat places (of B * T) at which final hidden states are looked at."""
        self.layers, self.norm = decoder_layers(model), final_norm(model)
        self.kept = list(range(len(self.layers)))
        self.picked = picked
        self.num_trials = 0
        self.states: list[list[Tensor]] = []  # [batch][position in kept] -> (B, T, D)
        self.arguments: list[list[dict[str, Any]]] = []  # [batch][layer]: masks, rotary tables, ... of any family
        finals = []
        for batch, places in zip(batches, picked, strict=True):
            states: list[Tensor] = []
            arguments: list[dict[str, Any]] = []
            handles = []

            def listen(
                _module: Any,
                positional: Any,
                keywords: dict[str, Any],
                states: list[Tensor] = states,
                arguments: list[dict[str, Any]] = arguments,
            ) -> None:
                keywords = dict(keywords)
                states.append(positional[0] if positional else keywords.pop("hidden_states"))
                arguments.append(keywords)

            for layer in self.layers:
                handles.append(layer.register_forward_pre_hook(listen, with_kwargs=True))
            try:
                finals.append(trunk(model, batch).flatten(0, 1)[places])
            finally:
                for handle in handles:
                    handle.remove()
            self.states.append(states)
            self.arguments.append(arguments)
        self.whole_ND = torch.cat(finals)  # what the model says with every layer

    def _run(self, batch: int, layer: int, hidden_BTD: Tensor) -> Tensor:
        output = self.layers[layer](hidden_BTD, **self.arguments[batch][layer])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def without(self, gone: Collection[int]) -> Tensor:
        """Final hidden states (N, D) of the current model without these layers, after the last norm."""
        self.num_trials += 1
        first = min(self.kept.index(layer) for layer in gone)
        finals = []
        for batch, places in enumerate(self.picked):
            hidden_BTD = self.states[batch][first]
            for later in self.kept[first:]:
                if later not in gone:
                    hidden_BTD = self._run(batch, later, hidden_BTD)
            finals.append(self.norm(hidden_BTD.flatten(0, 1)[places]))
        return torch.cat(finals)

    def remove(self, layer: int) -> None:
        """Take the layer out of the current model; what lies before it is untouched."""
        position = self.kept.index(layer)
        del self.kept[position]
        for batch, states in enumerate(self.states):
            hidden_BTD = states[position]
            del states[position + 1 :]
            for place in range(position, len(self.kept) - 1):
                hidden_BTD = self._run(batch, self.kept[place], hidden_BTD)
                states.append(hidden_BTD)


def final_norm(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The norm behind the last layer, whatever the family calls it."""
    return model.get_submodule(family_of_config(model.config).final_norm)


def spread_loss_tokens(batches: Sequence[TokenBatch], max_loss_tokens: int = MAX_TOKENS) -> list[Tensor]:
    """For each batch the flat places of its share of `max_loss_tokens` loss tokens, evenly spread over all of them."""
    places = [batch.loss_mask.flatten().nonzero().squeeze(1) for batch in batches]
    total = sum(len(p) for p in places)
    if total == 0:
        raise NumericalError("the calibration batches hold no loss token; check data.calibration and data.loss_on")
    count = min(total, max_loss_tokens)
    chosen = torch.arange(count) * total // count
    picked, start = [], 0
    for place in places:
        inside = chosen[(chosen >= start) & (chosen < start + len(place))] - start
        picked.append(place[inside.to(place.device)])
        start += len(place)
    return picked


def labels_at(batches: Sequence[TokenBatch], picked: Sequence[Tensor]) -> Tensor:
    """The next token at each looked-at place, (N,)."""
    pairs = zip(batches, picked, strict=True)
    return torch.cat([torch.roll(batch.input_ids, -1, 1).flatten()[places] for batch, places in pairs])


@dataclass(frozen=True)
class Removal(LayerRemovals):
    """What is removed, the damage above the whole model's in the measure's unit, and how many models were run."""

    num_trials: int = 0


def rank_layers(
    model: PreTrainedModel,
    batches: Iterable[TokenBatch],
    num_remove: int,
    criterion: str = "kl_greedy",
    *,
    max_loss_tokens: int = MAX_TOKENS,
    skip_share: float = 0.0,
    progress: Progress = lambda trials, total: trials,
    ranks: Ranks = ALONE,
) -> Removal:
    """What to remove for 1 to `num_remove` layers, by loss, nmse or kl and a strategy.

    Args:
        batches: calibration; all of them are kept in memory as hidden states.
        max_loss_tokens: the damage is over at most so many loss tokens, evenly spread.
        skip_share: of the greedy strategy; 0 tries every layer in every round. Above 0 (lazy greedy, Minoux 1978) a
            layer isn't tried while the damage so far plus this share of the rise that it caused when last tried is no
            better than the best of the round: the layers that were far too dear before aren't measured again.
        progress: wraps the trials, given their number; such as `compress.progress.track`.
        ranks: every rank calls this with the same batches and measures on its share of them; all find the same.

    Raises ConfigError for a number of layers that isn't there, NumericalError for a damage that isn't finite.
    """
    kind, strategy = _parse(criterion)
    assert kind != "task", "rank_layers_by_task takes the task's items"
    batches = list(batches)

    def prepare() -> tuple[Trials, Measure]:
        picked = list(ranks.mine(spread_loss_tokens(batches, max_loss_tokens)))
        share = list(ranks.mine(batches))
        trials = Trials(model, share, picked)
        return trials, LogitMeasure(kind, trials.whole_ND, labels_at(share, picked), output_head(model))

    return _rank(model, prepare, num_remove, strategy, skip_share, progress, ranks)


def rank_layers_by_task(
    model: PreTrainedModel,
    batches: Sequence[TokenBatch],
    choice_of_row: Sequence[Tensor],
    item_of_choice: Tensor,
    right: Tensor,
    num_remove: int,
    criterion: str = "task_block",
    *,
    progress: Progress = lambda trials, total: trials,
) -> Removal:
    """As `rank_layers`, by a multiple-choice task.

    Args:
        batches: one choice a row; the loss mask is on the choice's tokens.
        choice_of_row: for each batch, the number of the choice in each row.
        item_of_choice: the item of each choice. right: for each item, the number of its right choice.
    """
    kind, strategy = _parse(criterion)
    assert kind == "task", criterion

    def prepare() -> tuple[Trials, Measure]:
        picked = [batch.loss_mask.flatten().nonzero().squeeze(1) for batch in batches]
        rows = [places // batch.input_ids.shape[1] for batch, places in zip(batches, picked, strict=True)]
        choice_N = torch.cat([c[row.cpu()] for c, row in zip(choice_of_row, rows, strict=True)])
        trials = Trials(model, batches, picked)
        return trials, TaskMeasure(labels_at(batches, picked), choice_N, item_of_choice, right, output_head(model))

    return _rank(model, prepare, num_remove, strategy, 0.0, progress, ALONE)


def _parse(criterion: str) -> tuple[str, str]:
    kind, _, strategy = criterion.partition("_")
    assert kind in MEASURES, criterion
    assert f"_{strategy}" in STRATEGIES or not strategy, criterion
    return kind, strategy


@torch.no_grad()
def _rank(
    model: PreTrainedModel,
    prepare: Callable[[], tuple[Trials, Measure]],
    num_remove: int,
    strategy: str,
    skip_share: float,
    progress: Progress,
    ranks: Ranks,
) -> Removal:
    if not 0 <= num_remove < model.config.num_hidden_layers:
        raise ConfigError(
            f"num_remove={num_remove} layers: must be within 0 and {model.config.num_hidden_layers - 1}, one stays"
        )
    training = model.training
    model.eval()
    try:
        trials, measure = prepare()

        def measured(final_ND: Tensor) -> float:
            above, below = ranks.sums([torch.tensor(part, dtype=torch.float64) for part in measure(final_ND)])
            return (above / below).item()

        whole = measured(trials.whole_ND)

        def damage(gone: Collection[int]) -> float:
            with torch.no_grad():  # a generator's body runs in its caller's mode
                found = measured(trials.without(gone)) - whole
            if not math.isfinite(found):
                names = ", ".join(map(str, sorted(gone)))
                raise NumericalError(f"the damage without layer {names} is {found}; set compute_dtype=float32")
            return found

        removed: list[list[int]] = []
        cost: list[float] = []
        layers = len(trials.kept)
        if strategy == "greedy":
            steps: Iterator[Any] = _greedy(trials, damage, num_remove, skip_share, removed, cost)
            total = sum(range(layers - num_remove + 1, layers + 1))
        elif strategy == "block":
            steps = _block(layers, damage, num_remove, removed, cost)
            total = sum(layers - number + 1 for number in range(1, num_remove + 1))
        else:
            steps = _one_shot(layers, damage, num_remove, removed, cost)
            total = layers + max(0, num_remove - 1)
        for _ in progress(steps, total):
            pass
    finally:
        model.train(training)
    return Removal(removed, cost, trials.num_trials)


def _one_shot(
    layers: int, damage: Callable[..., float], num_remove: int, removed: list[list[int]], cost: list[float]
) -> Iterator[int]:
    alone = {}
    for layer in range(layers):
        alone[layer] = damage([layer])
        yield layer
    order = sorted(alone, key=lambda layer: (alone[layer], layer))
    for number in range(1, num_remove + 1):
        removed.append(order[:number])
        cost.append(alone[order[0]] if number == 1 else damage(order[:number]))
        if number > 1:
            yield number


def _block(
    layers: int, damage: Callable[..., float], num_remove: int, removed: list[list[int]], cost: list[float]
) -> Iterator[int]:
    for number in range(1, num_remove + 1):
        found = {}
        for start in range(layers - number + 1):
            found[start] = damage(range(start, start + number))
            yield start
        best = min(found, key=lambda start: (found[start], start))
        removed.append(list(range(best, best + number)))
        cost.append(found[best])


def _greedy(
    trials: Trials,
    damage: Callable[..., float],
    num_remove: int,
    skip_share: float,
    removed: list[list[int]],
    cost: list[float],
) -> Iterator[int]:
    """Yields the layer of every candidate, tried or skipped."""
    reached = 0.0
    rise: dict[int, float] = {}
    order: list[int] = []
    for _ in range(num_remove):
        best, chosen = math.inf, -1
        for layer in sorted(trials.kept, key=lambda j: (rise.get(j, 0.0), j)):
            if not (skip_share and layer in rise and reached + skip_share * rise[layer] >= best):
                found = damage([layer])
                rise[layer] = found - reached
                if (found, layer) < (best, chosen):
                    best, chosen = found, layer
            yield layer
        with torch.no_grad():
            trials.remove(chosen)
        reached = best
        order.append(chosen)
        removed.append(order[:])
        cost.append(best)

"""Which layers to remove, by the KL to the teacher once they are gone: greedily, one at a time.

Block influence looks at a layer alone; this looks at what the remaining model says. Measured on SmolLM2-135M it leaves
less to be recovered by retraining (README). Paper 2 (arXiv 2408.11796, section 2.2) prefers such a criterion too.
"""

# B sequences, T tokens, N loss tokens of all batches, D hidden, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import ConfigError, NumericalError
from compress.objectives import distillation_loss
from compress.step import trunk
from compress.tokens import TokenBatch

Progress = Callable[[Iterator[int], int], Iterable[int]]


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


@dataclass(frozen=True)
class LayerRemoval:
    """Layers in the order of their removal, and KL(teacher || model) in nats per token after each."""

    order: list[int]
    kl: list[float]
    num_trials: int  # candidate models that were run


class _Trials:
    """The current model's hidden states before every kept layer, so that a trial runs only the layers behind the gap.

    Memory: (kept layers) x (tokens of all batches) x D in the compute dtype.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[TokenBatch], max_loss_tokens: int) -> None:
        self.layers, self.norm = model.model.layers, model.model.norm
        self.head_VD: Tensor = model.get_output_embeddings().weight
        self.kept = list(range(len(self.layers)))
        self.states: list[list[Tensor]] = []  # [batch][position in kept] -> (B, T, D)
        self.arguments: list[list[dict[str, Any]]] = []  # [batch][layer]: masks, rotary tables, ... of any family
        self.picked = _spread(batches, max_loss_tokens)
        finals = []
        for batch, picked in zip(batches, self.picked, strict=True):
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
                finals.append(trunk(model, batch).flatten(0, 1)[picked])
            finally:
                for handle in handles:
                    handle.remove()
            self.states.append(states)
            self.arguments.append(arguments)
        self.teacher_ND = torch.cat(finals)

    def _run(self, batch: int, layer: int, hidden_BTD: Tensor) -> Tensor:
        output = self.layers[layer](hidden_BTD, **self.arguments[batch][layer])
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def kl_without(self, layer: int) -> float:
        """KL(teacher || current model without `layer`), nats per token."""
        position = self.kept.index(layer)
        finals = []
        for batch, picked in enumerate(self.picked):
            hidden_BTD = self.states[batch][position]
            for later in self.kept[position + 1 :]:
                hidden_BTD = self._run(batch, later, hidden_BTD)
            finals.append(self.norm(hidden_BTD.flatten(0, 1)[picked]))
        total = distillation_loss(torch.cat(finals), self.head_VD, self.teacher_ND, self.head_VD)
        kl = total.item() / self.teacher_ND.shape[0]
        if not math.isfinite(kl):
            raise NumericalError(f"the KL without model.layers.{layer} is {kl}; set compute_dtype=float32")
        return kl

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


def _spread(batches: Sequence[TokenBatch], max_loss_tokens: int) -> list[Tensor]:
    """For each batch the flat places of its share of `max_loss_tokens` loss tokens, evenly spread over all of them.

    The head of a small model costs as much as a dozen layers, and a few hundred tokens tell the candidates apart.
    """
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


@torch.no_grad()
def greedy_layer_removal(
    model: PreTrainedModel,
    batches: Iterable[TokenBatch],
    num_remove: int,
    *,
    max_loss_tokens: int = 1024,
    skip_share: float = 0.0,
    progress: Progress = lambda trials, total: trials,
) -> LayerRemoval:
    """Remove `num_remove` layers one at a time, each time the one whose absence leaves KL(teacher || model) smallest.

    Args:
        batches: calibration; all of them are kept in memory as hidden states.
        max_loss_tokens: the KL is over at most so many loss tokens, evenly spread.
        skip_share: 0 tries every layer in every round. Above 0 (lazy greedy, Minoux 1978) a layer isn't tried while
            the KL so far plus this share of the rise that it caused when last tried is no better than the best of
            the round: the layers that were far too dear before aren't measured again.
        progress: wraps the trials, given their number; such as `compress.progress.track`.

    Raises ConfigError for a number of layers that isn't there, NumericalError for a KL that isn't finite.
    """
    if not 0 <= num_remove < model.config.num_hidden_layers:
        raise ConfigError(
            f"num_remove={num_remove} layers: must be within 0 and {model.config.num_hidden_layers - 1}, one stays"
        )
    training = model.training
    model.eval()
    trials = _Trials(model, list(batches), max_loss_tokens)
    order: list[int] = []
    curve: list[float] = []
    tried: list[int] = []

    def rounds() -> Iterator[int]:
        """Yields the layer of every candidate, tried or skipped."""
        reached = 0.0
        rise: dict[int, float] = {}
        for _ in range(num_remove):
            best, chosen = math.inf, -1
            for layer in sorted(trials.kept, key=lambda j: (rise.get(j, 0.0), j)):
                if not (skip_share and layer in rise and reached + skip_share * rise[layer] >= best):
                    with torch.no_grad():  # a generator's body runs in its caller's mode
                        kl = trials.kl_without(layer)
                    tried.append(layer)
                    rise[layer] = kl - reached
                    if (kl, layer) < (best, chosen):
                        best, chosen = kl, layer
                yield layer
            with torch.no_grad():
                trials.remove(chosen)
            reached = best
            order.append(chosen)
            curve.append(best)

    layers = len(trials.kept)
    try:
        for _ in progress(rounds(), sum(range(layers - num_remove + 1, layers + 1))):
            pass
    finally:
        model.train(training)
    return LayerRemoval(order, curve, len(tried))

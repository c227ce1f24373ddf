"""Which shapes a search measures: the best predicted of each number of layers within the budget, speed among it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.architecture import ModelInfo, num_parameters, parse_config, student_config
from compress.artifacts import read_json, write_json
from compress.errors import ConfigError
from compress.families import PRUNABLE, Shape
from compress.metrics import generation_speed
from compress.parallel import resolve_dtype
from compress.scores import Importance
from compress.settings import CompressConfig
from compress.shapes import Candidate, Grid, enumerate_shapes, extremes, parameter_limit, rank
from compress.targets import grid_of

log = logging.getLogger(__name__)
SPEEDS = "speeds.json"
SPEED_TOKENS = 32  # generated for a candidate's speed
NUM_BISECTIONS = 6  # of the parameters that a speed admits: to within 1 % of the range


@dataclass(frozen=True)
class Entry:
    """A candidate that is measured, under the name of its folder."""

    name: str
    candidate: Candidate


def entries_of(config: CompressConfig, info: ModelInfo, importance: Importance, folder: Path) -> list[Entry]:
    """search.num_candidates shapes within the budget: the best predicted of each number of layers first."""
    speeds = Speeds(config, info, folder)
    grid = grid_of(config, info, importance)
    wanted, criteria = config.search.num_candidates, (config.prune.width_criterion, config.prune.depth_criterion)

    def ranked(of: Grid) -> list[Candidate]:
        return rank(enumerate_shapes(info, of), importance, info.shape, *criteria)

    if not grid.limits:
        grid = speeds.admitted(grid, ranked)
    candidates = spread(ranked(grid))
    target = config.prune.min_tokens_per_second
    if target is not None:
        fast = []
        for candidate in candidates[: 4 * wanted]:
            if speeds.of(candidate.shape) >= target:
                fast.append(candidate)
            if len(fast) == wanted:
                break
        if not fast:
            raise ConfigError(speeds.too_slow())
        candidates = fast
    return [Entry(name_of(c.shape, info.shape), c) for c in candidates[:wanted]]


def spread(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best of each number of layers, best first, then the second best of each, and so on.

    Neighbours on the grid differ by a few channels; what decides is how depth and width are traded.
    """
    seen: dict[int, int] = {}
    keyed = []
    for candidate in candidates:
        layers = candidate.shape.num_hidden_layers
        keyed.append((seen.setdefault(layers, 0), candidate))
        seen[layers] += 1
    return [candidate for _, candidate in sorted(keyed, key=lambda pair: pair[0])]


_SHORT = {
    "hidden_size": "hidden",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "num_experts": "experts",
    "moe_intermediate_size": "expert",
}


def name_of(shape: Shape, teacher: Shape) -> str:
    """`layers25-mlp1120`: the sizes that differ from the teacher's."""
    changed = [name for name in PRUNABLE if getattr(shape, name) != getattr(teacher, name)]
    return "-".join(f"{_SHORT[name]}{getattr(shape, name)}" for name in sorted(changed, key=list(_SHORT).index))


class Speeds:
    """Tokens per second of generation by a model of a shape with random weights, measured once and kept in a file."""

    def __init__(self, config: CompressConfig, info: ModelInfo, folder: Path) -> None:
        self.config, self.info, self.path = config, info, folder / SPEEDS
        self.found: dict[str, float] = read_json(self.path) if self.path.exists() else {}

    def of(self, shape: Shape) -> float:
        name = name_of(shape, self.info.shape)
        if name not in self.found:
            sizes = student_config(self.info.config, self.info.family, shape, range(shape.num_hidden_layers))
            dtype = resolve_dtype(self.config.export.dtype)
            model = AutoModelForCausalLM.from_config(parse_config(sizes, name), dtype=dtype).eval()
            prompt = torch.arange(8)[None] % shape.vocab_size
            self.found[name] = generation_speed({name: model}, prompt, SPEED_TOKENS)[name]
            log.info("%s generates %.1f tokens/s here", name, self.found[name])
            write_json(self.path, self.found)
        return self.found[name]

    def admitted(self, grid: Grid, ranked: Any) -> Grid:
        """The grid with the most parameters whose best predicted shape is fast enough, by bisection."""
        target = self.config.prune.min_tokens_per_second
        assert target is not None
        low, high = extremes(self.info, grid)
        high = min(high, num_parameters(self.info, self.info.shape) - 1)

        def tried(parameters: int) -> Grid:
            # Any legal shape below the limit: with given sizes none may lie close to it.
            return replace(grid, limits=[parameter_limit(self.info, parameters)], min_budget_ratio=0.0)

        def fast(parameters: int) -> bool:
            return self.of(ranked(tried(parameters))[0].shape) >= target

        if not fast(low):
            raise ConfigError(self.too_slow())
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) // 2
            if fast(middle):
                low = middle
            else:
                high = middle
        return tried(low)

    def too_slow(self) -> str:
        name, speed = max(self.found.items(), key=lambda item: item[1])
        return (
            f"prune.min_tokens_per_second={self.config.prune.min_tokens_per_second:g} is out of reach on this machine: "
            f"the fastest of {len(self.found)} shapes tried, {name}, generates {speed:.1f}; lower it, or raise "
            f"shape.max_depth_pruning={self.config.shape.max_depth_pruning} and shape.max_width_pruning="
            f"{self.config.shape.max_width_pruning}"
        )

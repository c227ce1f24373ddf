"""From a budget to shapes: enumerate the legal ones, order them by the damage that the scores predict."""

# L layers, D hidden, F intermediate, H query heads, G key-value heads

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, lcm

import torch
from torch import Tensor

from compress.architecture import (
    ModelInfo,
    check_shape,
    key_value_cache_bytes,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    parse_config,
    student_config,
    uneven_size,
    with_sizes,
)
from compress.errors import ArchitectureError, ConfigError
from compress.families import PRUNABLE, Shape, family_of
from compress.scores import Importance, LayerRemovals, Widths
from compress.slicing import select_heads

MAX_CHOICES = 32  # of one axis: a large model's grid gets coarser instead of longer
HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Limit:
    """At most `value` of what `measure` says of a shape, which must never fall when a size grows."""

    key: str  # the setting it came from
    value: int
    unit: str
    measure: Callable[[Shape], int]


def parameter_limit(info: ModelInfo, value: int) -> Limit:
    return Limit("prune.max_parameters", value, "parameters", lambda shape: num_parameters(info, shape))


def non_embedding_limit(info: ModelInfo, value: int) -> Limit:
    return Limit(
        "prune.max_non_embedding_parameters",
        value,
        "parameters outside of embedding and head",
        lambda shape: num_parameters(info, shape) - num_embedding_parameters(info, shape),
    )


def active_limit(info: ModelInfo, value: int) -> Limit:
    return Limit(
        "prune.max_active_parameters", value, "parameters a token meets", lambda s: num_active_parameters(info, s)
    )


def memory_limit(info: ModelInfo, value: int, item_bytes: int, context_tokens: int, num_sequences: int) -> Limit:
    """Weights, and keys and values of so many sequences of `context_tokens`, at `item_bytes` an element."""
    return Limit(
        "prune.max_bytes",
        value,
        f"bytes of weights and of keys and values of {num_sequences} x {context_tokens:,} tokens",
        lambda shape: (
            item_bytes * num_parameters(info, shape)
            + key_value_cache_bytes(shape, context_tokens, num_sequences, item_bytes)
        ),
    )


@dataclass(frozen=True)
class Grid:
    """The bounds of a search. `fixed` holds the sizes that the user gave; the rest is open."""

    limits: Sequence[Limit]
    min_budget_ratio: float = 0.9  # of one limit at least
    multiple_of: int = 16
    tensor_parallel: int = 1
    max_width_pruning: float = 0.5
    max_depth_pruning: float = 0.5
    max_removed_layers: int | None = None  # how far the layers' removal order goes
    fixed: Mapping[str, int] | None = None

    def use(self, shape: Shape) -> float:
        """How much of the tightest limit a shape takes: it is within the budget at 1 or less."""
        return max(limit.measure(shape) / limit.value for limit in self.limits)


@dataclass(frozen=True)
class Candidate:
    """A legal shape within the budget. `damage` is the sum of `parts`; how they are formed: `rank`."""

    shape: Shape
    num_parameters: int
    damage: float
    parts: Mapping[str, float]


def enumerate_shapes(info: ModelInfo, grid: Grid) -> list[tuple[Shape, int]]:
    """Legal shapes within every limit that use min_budget_ratio of one at least, and their parameters.

    For each number of layers, hidden size and heads only the largest intermediate size that fits is listed: with the
    rest equal, a wider MLP keeps a superset of the units, so the narrower one is never the better.

    Raises ConfigError when there is none, naming what can be reached and the nearest legal shapes.
    """
    fixed = dict(grid.fixed or {})
    assert set(fixed) <= set(PRUNABLE), fixed
    assert grid.limits
    teacher = info.shape
    if grid.use(teacher) <= 1:
        has = " and ".join(f"{limit.key}={limit.value:,}" for limit in grid.limits)
        holds = " and ".join(f"{limit.measure(teacher):,} {limit.unit}" for limit in grid.limits)
        raise ConfigError(
            f"{has} is not smaller than the teacher's {holds}; choose a smaller budget, or none and a shape"
        )
    check_fixed(info, grid)
    inside: list[tuple[Shape, int]] = []
    below: tuple[float, Shape] | None = None
    above: tuple[float, Shape] | None = None
    extremes: list[Shape] = []
    for options in _open_shapes(info, grid, fixed):
        extremes += [options[0], options[-1]]
        low, high = 0, len(options)  # options[:low] fit, options[high:] don't
        while low < high:
            middle = (low + high) // 2
            if grid.use(options[middle]) <= 1:
                low = middle + 1
            else:
                high = middle
        if low > 0:
            used = grid.use(options[low - 1])
            if used >= grid.min_budget_ratio:
                inside.append((options[low - 1], num_parameters(info, options[low - 1])))
            if below is None or used > below[0]:
                below = used, options[low - 1]
        if low < len(options):
            used = grid.use(options[low])
            if above is None or used < above[0]:
                above = used, options[low]
    if inside:
        return inside
    if not extremes:
        raise _nothing_legal(info, grid)
    asked = " with ".join(f"{limit.key}={limit.value:,}" for limit in grid.limits)
    why = (
        f"{asked} (at least {grid.min_budget_ratio:.0%} of it used) is out of reach with "
        f"shape.max_width_pruning={grid.max_width_pruning}, shape.max_depth_pruning={grid.max_depth_pruning}"
        + (f", removable layers={grid.max_removed_layers}" if grid.max_removed_layers is not None else "")
        + f", shape.multiple_of={grid.multiple_of}"
        + (f" and the given {', '.join(f'prune.{k}={v}' for k, v in fixed.items())}" if fixed else "")
    )
    reach = []
    for limit in grid.limits:
        values = [limit.measure(shape) for shape in extremes]
        reach.append(f"{min(values):,} to {max(values):,} {limit.unit}")
    near = "; ".join(
        f"{_describe(shape, teacher)} with {' and '.join(f'{limit.measure(shape):,}' for limit in grid.limits)}"
        for _, shape in (found for found in (below, above) if found)
    )
    raise ConfigError(f"{why}: legal shapes hold {' and '.join(reach)}; nearest: {near}")


def extremes(info: ModelInfo, grid: Grid) -> tuple[int, int]:
    """Parameters of the smallest and of the largest legal shape, whatever the limits. Raises ConfigError for none."""
    ends = [
        num_parameters(info, shape)
        for options in _open_shapes(info, grid, dict(grid.fixed or {}))
        for shape in (options[0], options[-1])
    ]
    if not ends:
        raise _nothing_legal(info, grid)
    return min(ends), max(ends)


def check_fixed(info: ModelInfo, grid: Grid) -> None:
    """Refuse a given size that is wrong by itself, so that the message is about it and not about the budget.

    Heads and hidden size are judged together, the open ones of them chosen to suit those that are given.
    """
    fixed = dict(grid.fixed or {})
    for name in HEADS:
        if fixed.get(name, 0) > getattr(info.shape, name):
            raise ConfigError(f"prune.{name}={fixed[name]} is more than the teacher's {getattr(info.shape, name)}")
    suiting = next(_attention(info, grid, fixed), None)
    if suiting is None and not set(HEADS) <= set(fixed):
        raise _nothing_legal(info, grid)
    check_shape(info, with_sizes(info.shape, {**fixed, **(suiting or {})}), grid.multiple_of)


def _nothing_legal(info: ModelInfo, grid: Grid) -> ConfigError:
    """Why no shape is legal, whatever the budget, and for each given size what would be, with the rest as given."""
    fixed = dict(grid.fixed or {})
    bounds = [f"prune.{name}={value}" for name, value in fixed.items()]
    bounds += [f"shape.{key}={getattr(grid, key)}" for key in ("multiple_of", "tensor_parallel", "max_width_pruning")]
    reason = _broken_rule(info, grid, fixed)
    legal = {name: _nearest_legal(info, grid, name) for name in fixed}
    remedies = [f"prune.{name}={' or '.join(map(str, near))}" for name, near in legal.items() if near]
    remedy = f"legal with the rest as given: {'; '.join(remedies)}" if remedies else "loosen several of these"
    return ConfigError(f"no shape is legal with {', '.join(bounds)}{f' ({reason})' if reason else ''}; {remedy}")


def _nearest_legal(info: ModelInfo, grid: Grid, name: str) -> list[int]:
    """The two values of a given size that are nearest to it among those that are legal with the rest as given."""
    apart = {other: getattr(info.shape, other) for other in ("num_hidden_layers", "num_experts")}  # suit all the others
    if name in apart:
        return []
    given = dict(grid.fixed or {})
    value = given.pop(name)
    found = {getattr(shape, name) for options in _open_shapes(info, grid, {**given, **apart}) for shape in options}
    return sorted(sorted(found, key=lambda size: abs(size - value))[:2])


def _broken_rule(info: ModelInfo, grid: Grid, fixed: Mapping[str, int]) -> str | None:
    """What every choice of heads and hidden size runs into; None where that is for the bounds themselves to say."""
    teacher, family = info.shape, info.family
    pairs = _heads(teacher, grid, fixed)
    if not pairs:
        return f"each key-value head keeps the same number of query heads, 1 to {teacher.group_size}"
    found = [(*pair, hidden) for pair in pairs for hidden in _hidden(info, pair[0], grid, fixed)]
    if found:
        return next((refusal for sizes in found if (refusal := _refusal(info, *sizes))), None)
    if family.locked:
        return f"in {family.title} hidden_size is num_attention_heads x {teacher.head_dim}"
    return f"for {family.title} in transformers 5 hidden_size is a multiple of num_attention_heads"


def _describe(shape: Shape, teacher: Shape) -> str:
    """The sizes that differ from the teacher's, as settings."""
    changed = [f"prune.{n}={getattr(shape, n)}" for n in PRUNABLE if getattr(shape, n) != getattr(teacher, n)]
    return " ".join(changed) or "the teacher's own shape"


def _open_shapes(info: ModelInfo, grid: Grid, fixed: Mapping[str, int]) -> Iterator[list[Shape]]:
    """For every choice of the other axes, the shapes over all intermediate (or expert) sizes, ascending."""
    teacher = info.shape
    last = "intermediate_size" if teacher.intermediate_size else "moe_intermediate_size"
    step = lcm(grid.multiple_of, grid.tensor_parallel)
    widths = [w for w in _widths(last, getattr(teacher, last), step, grid, fixed) if w % grid.tensor_parallel == 0]
    for attention in _attention(info, grid, fixed) if widths else ():
        for layers in _layers(teacher, grid, fixed):
            for experts in _experts(info, grid, fixed):
                sizes = {**attention, "num_hidden_layers": layers, "num_experts": experts}
                yield [with_sizes(teacher, {**sizes, last: width}) for width in widths]


def _attention(info: ModelInfo, grid: Grid, fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Heads and hidden size that go together: by the family's rules, by transformers', and for the ranks."""

    def hidden_sizes(heads: int, groups: int) -> Iterator[int]:
        # The MLP is shared over the ranks too, but it isn't chosen here: 0 suits any number of them.
        mlp = {"intermediate_size": 0, "moe_intermediate_size": 0}
        sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, **mlp}
        if not uneven_size(with_sizes(info.shape, sizes), grid.tensor_parallel):
            for hidden in _hidden(info, heads, grid, fixed):
                if _refusal(info, heads, groups, hidden) is None:
                    yield hidden

    # Only heads that have a hidden size are thinned out: the few that suit a given one would be lost among the others.
    pairs = [pair for pair in _heads(info.shape, grid, fixed) if next(hidden_sizes(*pair), None) is not None]
    for heads, groups in _thinned(pairs):
        for hidden in hidden_sizes(heads, groups):
            yield {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}


def _refusal(info: ModelInfo, heads: int, groups: int, hidden: int) -> str | None:
    """What transformers has against these sizes, such as Phi-3's with longrope, where the table has no rule for it."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
    return _refusal_of(json.dumps(info.config, sort_keys=True), with_sizes(info.shape, sizes))


@lru_cache(maxsize=2**14)  # milliseconds each, and a search enumerates the same grid again and again
def _refusal_of(config_json: str, shape: Shape) -> str | None:
    config = json.loads(config_json)
    try:
        family = family_of(config, "config.json")
        student = student_config(config, family, shape, range(shape.num_hidden_layers))
        parse_config(student, f"hidden_size={shape.hidden_size} num_attention_heads={shape.num_attention_heads}")
    except ArchitectureError as error:
        return str(error)
    return None


def _hidden(info: ModelInfo, heads: int, grid: Grid, fixed: Mapping[str, int]) -> list[int]:
    """Hidden sizes that are legal with so many heads."""
    teacher, divisible = info.shape, info.family.hidden_divisible_by_heads
    if info.family.locked:
        locked = heads * teacher.head_dim
        legal = locked == teacher.hidden_size or locked % grid.multiple_of == 0
        return [locked] if legal and fixed.get("hidden_size", locked) == locked else []
    step = lcm(grid.multiple_of, heads) if divisible else grid.multiple_of
    found = _widths("hidden_size", teacher.hidden_size, step, grid, fixed)
    return [hidden for hidden in found if not divisible or hidden % heads == 0]


def _experts(info: ModelInfo, grid: Grid, fixed: Mapping[str, int]) -> list[int]:
    """Numbers of experts down to what a token is routed to; 0 in a dense model."""
    total = info.shape.num_experts
    if not total or "num_experts" in fixed:
        return [fixed.get("num_experts", 0)]
    lowest = max(info.parsed.num_experts_per_tok, ceil(total * (1 - grid.max_width_pruning)))
    stride = max(1, ceil((total - lowest) / MAX_CHOICES))
    return list(range(total, lowest - 1, -stride))


def _widths(name: str, size: int, step: int, grid: Grid, fixed: Mapping[str, int]) -> list[int]:
    if name in fixed:
        return [fixed[name]]
    lowest = max(1, ceil(size * (1 - grid.max_width_pruning)))
    coarse = step * ceil((size - lowest) / (step * MAX_CHOICES) or 1)
    # Multiples that are counted from zero, not from the teacher's size: they are what matrix units like.
    return sorted({size, *range(ceil(lowest / coarse) * coarse, size, coarse)})


def _layers(teacher: Shape, grid: Grid, fixed: Mapping[str, int]) -> list[int]:
    if "num_hidden_layers" in fixed:
        return [fixed["num_hidden_layers"]]
    total = teacher.num_hidden_layers
    lowest = max(1, ceil(total * (1 - grid.max_depth_pruning)))
    if grid.max_removed_layers is not None:
        lowest = max(lowest, total - grid.max_removed_layers)
    return list(range(lowest, total + 1))


def _heads(teacher: Shape, grid: Grid, fixed: Mapping[str, int]) -> list[tuple[int, int]]:
    """(query heads, key-value heads) with the same number of query heads in every group.

    Open heads go by whole groups or by whole heads of every group; each count is within max_width_pruning. The
    teacher's own come first.
    """
    fixed = {name: fixed[name] for name in HEADS if name in fixed}
    if fixed and teacher.group_size == 1:  # one of them given gives both
        fixed = {name: getattr(with_sizes(teacher, fixed), name) for name in HEADS}
    lowest_heads = ceil(teacher.num_attention_heads * (1 - grid.max_width_pruning))
    lowest_groups = ceil(teacher.num_key_value_heads * (1 - grid.max_width_pruning))
    found = []
    for groups in range(1, teacher.num_key_value_heads + 1):
        if groups != fixed.get("num_key_value_heads", groups):
            continue
        for size in range(1, teacher.group_size + 1):
            heads = groups * size
            if heads != fixed.get("num_attention_heads", heads):
                continue
            heads_free = "num_attention_heads" not in fixed and heads < lowest_heads
            groups_free = "num_key_value_heads" not in fixed and groups < lowest_groups
            if not (heads_free or groups_free):
                found.append((heads, groups))
    return found[::-1]


def _thinned(pairs: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """At most MAX_CHOICES of them; the first stays."""
    return pairs[:: max(1, ceil(len(pairs) / MAX_CHOICES))]


def rank(
    shapes: Sequence[tuple[Shape, int]],
    importance: Importance,
    teacher: Shape,
    width: str | None = None,
    depth: str | None = None,
) -> list[Candidate]:
    """Candidates by predicted damage, least first. An order for choosing what to try, not a forecast of the loss.

    Everything is put on one scale, the share of the residual stream's direction that is lost:

    * layers: a removed layer turns the stream by its block influence BI = 1 - cos, which for small angles is half
      the relative energy of what the layer adds.
    * intermediate, heads: of a kept layer a share of that energy is lost. With e the share of squared importance that
      is dropped (attention and MLP taken as equal halves): BI * (e_heads + e_intermediate) / 2. In a mixture a unit
      is kept where its expert and it in its expert are.
    * hidden: dropping channels with the share e of squared importance turns the stream itself by
      1 - sqrt(1 - e), and every kept layer reads a stream that lacks e, so adds BI * e.

    With another depth criterion than block influence the layers' part is its measured damage; the other parts are
    then scaled by the damage per block influence: `_damage_per_influence`.
    """
    scores, removals = importance.width(width), importance.depth(depth)
    influence_L = importance.block_influence_L.double().clamp(min=0)
    scale = _damage_per_influence(removals, influence_L)
    hidden_kept = _kept_share(scores["hidden"])
    units_kept = {axis: _kept_share(scores[axis]) for axis in ("intermediate", "experts", "expert_intermediate")
                  if axis in scores}  # fmt: skip
    heads_lost: dict[tuple[int, int], Tensor] = {}
    candidates = []
    for shape, count in shapes:
        number = teacher.num_hidden_layers - shape.num_hidden_layers
        assert number <= len(removals.removed), "enumerated past the depth criterion's reach"
        key = shape.num_attention_heads, shape.num_key_value_heads
        if key not in heads_lost:
            heads_lost[key] = _heads_lost(scores, teacher, *key)
        stays_L = torch.ones(teacher.num_hidden_layers, dtype=torch.bool)
        stays_L[removals.of(number)] = False
        kept_influence = influence_L[stays_L]
        hidden_lost = 1 - float(hidden_kept[shape.hidden_size - 1])
        if shape.num_experts:
            inside_L = units_kept["expert_intermediate"][..., shape.moe_intermediate_size - 1].mean(1)
            mlp_lost_L = 1 - units_kept["experts"][:, shape.num_experts - 1] * inside_L
        else:
            mlp_lost_L = 1 - units_kept["intermediate"][:, shape.intermediate_size - 1]
        parts = {
            "layers": removals.cost[number - 1] if number else 0.0,
            "hidden": scale * (1 - (1 - hidden_lost) ** 0.5 + hidden_lost * float(kept_influence.sum())),
            "intermediate": scale * float((kept_influence * mlp_lost_L[stays_L]).sum()) / 2,
            "heads": scale * float((kept_influence * heads_lost[key][stays_L]).sum()) / 2,
        }
        candidates.append(Candidate(shape, count, sum(parts.values()), parts))
    return sorted(candidates, key=lambda c: (c.damage, -c.num_parameters))


def _damage_per_influence(removals: LayerRemovals, influence_L: Tensor) -> float:
    """Of the smallest removal that tells: for small disturbances damage is proportional to lost energy.

    A model can do better on a task, or on the text by loss, without a layer. How far the damage falls below 0 is how
    little it tells of lost energy, so a removal counts whose damage is above 0 by more than that. Without one the
    widths are left on block influence's own scale.
    """
    unclear = max([0.0, *(-cost for cost in removals.cost)])
    for layers, cost in zip(removals.removed, removals.cost, strict=True):
        influence = float(influence_L[layers].sum())
        if cost > unclear and influence > 0:
            return cost / influence
    return 1.0


def _kept_share(scores: Tensor) -> Tensor:
    """Along the last dimension, at n - 1: the share of squared importance that the n best units hold."""
    energy = scores.double().square().sort(dim=-1, descending=True).values.cumsum(-1)
    return (energy / energy[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)


def _heads_lost(scores: Widths, teacher: Shape, heads: int, groups: int) -> Tensor:
    """The share of squared query-head importance that is lost in each of the teacher's layers; (L,)."""
    kept_LH = select_heads(scores, groups, heads // groups)[1]
    energy_LH = scores["query_heads"].double().square()
    total_L = energy_LH.sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    return (1 - energy_LH.gather(1, kept_LH).sum(1) / total_L).clamp(min=0)

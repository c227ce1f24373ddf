"""What units are scored by, as it is written in settings, score files and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compress.errors import ConfigError

AGGREGATIONS = ("mean", "l2", "variance")
AGGREGATED = ("activation", "weighted_activation")
KINDS = (*AGGREGATED, "taylor", "weight_magnitude")


@dataclass(frozen=True)
class Criterion:
    """How units are scored: `activation:l2/mean` is |activation|, mean over the sequence, L2 over the batch."""

    kind: str
    batch: str = "l2"
    sequence: str = "mean"

    def __str__(self) -> str:
        return f"{self.kind}:{self.batch}/{self.sequence}" if self.kind in AGGREGATED else self.kind


def parse_criterion(text: str) -> Criterion:
    """`KIND` or `KIND:BATCH/SEQUENCE`; Minitron's default is l2/mean. Raises ConfigError for another text."""
    match = re.fullmatch(r"(\w+)(?::(\w+)/(\w+))?", text)
    if match is None or match[1] not in KINDS or not {match[2], match[3]} <= {None, *AGGREGATIONS}:
        raise ConfigError(
            f"score.width: {text!r} must be one of {', '.join(KINDS)}, or with aggregations over batch and sequence "
            f"KIND:BATCH/SEQUENCE of {', '.join(AGGREGATIONS)}, such as activation:l2/mean"
        )
    if match[1] not in AGGREGATED and match[2]:
        raise ConfigError(f"score.width: {text!r}: {match[1]} has no aggregations; write it alone")
    return Criterion(match[1], match[2] or "l2", match[3] or "mean")

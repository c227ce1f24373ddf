"""Errors a user can act on. Each message names the key or file, the value, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class CompressError(Exception):
    """Base of every error that is the user's to mend; printed without a traceback."""


class ConfigError(CompressError):
    """A setting is unknown, of the wrong type, or breaks a rule."""


class ArtifactError(CompressError):
    """A file or folder is missing, truncated, foreign, in use, or made with other settings."""


class ArchitectureError(CompressError):
    """A model family, checkpoint or shape that the axis table can't describe."""


class NumericalError(CompressError):
    """A loss, score or weight is not finite, or nothing is left to average over."""


class DistributedError(CompressError):
    """The ranks can't reach each other, or some of their nodes aren't fit: on other nodes the same may work."""

    def __init__(self, message: str, nodes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes  # those at fault, where they are known


class Interrupted(CompressError):
    """A signal asked the run to stop; everything up to the last committed step is kept."""

"""Errors a user can act on. Each message names the key or file, the value, the rule and the remedy."""


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


class Interrupted(CompressError):
    """A signal asked the run to stop; everything up to the last committed step is kept."""

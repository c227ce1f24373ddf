"""A process of several that makes no progress ends, with what each of its threads was doing.

A collective waits for a rank that is stopped, cut off or stuck in a file system for half an hour and more, by its kind;
Slurm sees running processes. What ends here is tried again by the job script, from the newest commit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Iterator

_seconds: float | None = None


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[None]:
    """End this process where `progressed` isn't called for so long; None: never."""
    global _seconds
    _seconds = seconds
    progressed()
    try:
        yield
    finally:
        _seconds = None
        faulthandler.cancel_dump_traceback_later()


def progressed() -> None:
    """Something was done: the time begins anew. Called by every long loop (`progress.track`)."""
    if _seconds is not None:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=sys.__stderr__ or sys.stderr)

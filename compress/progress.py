"""Progress of a long loop with rate and time left: a live bar on a terminal, else a log line now and then.

`console` is the one console that everything interactive writes to (standard error, so that standard output stays the
result's); a log handler on it prints above the bar instead of through it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from compress.watchdog import progressed

T = TypeVar("T")
log = logging.getLogger(__name__)
console = Console(stderr=True)
LINE_SECONDS = 10.0  # at most one log line in this time where there is no terminal

_showing = False  # a bar is up; loops inside the loop that it shows stay silent


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    unit: str = "it",
    amount: Callable[[T], float] | None = None,
) -> Iterator[T]:
    """Yield from `iterable`, showing share done, rate and time left.

    `total` counts items (none: len(iterable), where it has one). Share and time left go by items; the rate is the sum
    of `amount(item)` in `unit` per second, or items where no amount is given. An item counts when the next is
    asked for.
    """
    global _showing
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    iterable = _noted(iterable)
    if _showing:
        yield from iterable
        return
    _showing = True
    try:
        yield from (_bar if console.is_terminal else _lines)(iterable, description, total, unit, amount)
    finally:
        _showing = False


def _noted(iterable: Iterable[T]) -> Iterator[T]:
    for item in iterable:
        yield item
        progressed()


def _bar(
    iterable: Iterable[T], description: str, total: int | None, unit: str, amount: Callable[[T], float] | None
) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[facts]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, facts="")
        meter = _Meter(total, unit)
        for item in iterable:
            yield item
            meter.add(1.0 if amount is None else amount(item))
            progress.update(task, completed=meter.items, facts=meter.facts())


def _lines(
    iterable: Iterable[T], description: str, total: int | None, unit: str, amount: Callable[[T], float] | None
) -> Iterator[T]:
    meter = _Meter(total, unit)
    written = time.monotonic()
    for item in iterable:
        yield item
        meter.add(1.0 if amount is None else amount(item))
        if time.monotonic() - written >= LINE_SECONDS:
            written = time.monotonic()
            done = f"{meter.items / total:.0%}" if total else f"{meter.items} done"
            log.info("%s: %s, %s", description, done, meter.facts())


class _Meter:
    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.items, self.amount, self.start = 0, 0.0, time.monotonic()

    def add(self, amount: float) -> None:
        self.items += 1
        self.amount += amount

    def facts(self) -> str:
        """Such as '523.1 tok/s, 0:02:10 left', by the mean rate since the start."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.amount / seconds
        text = f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.3g} {self.unit}/s"
        if self.total is None:
            return text
        return f"{text}, {duration(max(self.total - self.items, 0) * seconds / self.items)} left"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def about(seconds: float) -> str:
    """Seconds in words, as coarse as an estimate is: `40 s`, `9 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

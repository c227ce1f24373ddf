"""stage=doctor: are these machines fit for the run? Asked before the expensive step; a line a check, nothing is kept.

The first rank of each node looks at what is its own (`fitness.py`). What they found goes over the store that the ranks
meet in, since the network that gloo would take may be what is wrong; where nothing failed, all ranks try what needs all
of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from compress import agreement
from compress.errors import CompressError, ConfigError, DistributedError
from compress.fitness import CHECKS, CLOCK_REMEDY, SKEW_SECONDS, Check, Line, Subject, Verdict
from compress.parallel import Ranks, joined, launched, meet
from compress.settings import CompressConfig

PATIENCE = timedelta(seconds=300)  # between the first rank's report and the last one's
TORCHRUN_SECONDS = 10.0  # between nodes: its rendezvous compares their wall clocks, with 15 s of patience
_ROUND_TRIPS = 8


def run(config: CompressConfig, run_dir: Path) -> None:
    """Print a line a check, by the first rank.

    Raises, on every rank, ConfigError where each node finds the same check failing, or all of them together: so would
    the next try. DistributedError, with their names, where only some nodes aren't fit.
    """
    ranks = launched()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own: dict[str, Line] = {}
    if ranks.size == 1 or int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0:
        subject = Subject(config, run_dir, here, ranks.size)
        own = {name: _tried(check, subject) for name, check in CHECKS.items()}
    if ranks.size == 1:
        _conclude({_node(ranks): own}, {}, ranks)
        return
    store = meet(PATIENCE)
    nodes = _exchange(store, ranks, own)
    together: dict[str, Line] = {}
    if not _failing(nodes):
        absent = [folder for folder in (run_dir, *run_dir.absolute().parents) if not folder.exists()]
        with joined(store):
            together = _together(config, run_dir, ranks)
        for folder in absent if ranks.is_main else ():  # made for the check
            with contextlib.suppress(OSError):
                folder.rmdir()
    _conclude(nodes, together, ranks)


def _tried(check: Check, subject: Subject) -> Line:
    try:
        return check(subject)
    except CompressError as error:
        return Line(Verdict.fail, str(error))
    except OSError as error:
        return Line(Verdict.fail, f"{error}; see that this node can read and write there")


def _node(ranks: Ranks) -> str:
    name = os.environ.get("SLURMD_NODENAME") or platform.node()
    return name if ranks.size == 1 else f"{name} (rank {ranks.rank})"


def _exchange(store: dist.Store, ranks: Ranks, own: Mapping[str, Line]) -> dict[str, dict[str, Line]]:
    """The lines of each node, on every rank."""
    lines = {name: dataclasses.astuple(line) for name, line in own.items()}
    store.set(f"doctor/said/{ranks.rank}", json.dumps([_node(ranks), lines]))
    found: dict[str, dict[str, Line]] = {}
    for rank in range(ranks.size):
        try:
            node, said = json.loads(store.get(f"doctor/said/{rank}"))
        except dist.DistError as error:
            raise DistributedError(
                f"rank {rank} of {ranks.size} did not report within {PATIENCE.total_seconds():.0f} s; its own log says "
                "more: it wasn't started, has ended, or waits for a file system"
            ) from error
        if said:
            found[node] = {name: Line(Verdict(verdict), text) for name, (verdict, text) in said.items()}
    store.set(f"doctor/heard/{ranks.rank}", "")
    if ranks.is_main:  # whose process may hold the store
        store.wait([f"doctor/heard/{rank}" for rank in range(ranks.size)])
    return found


def _failing(nodes: Mapping[str, Mapping[str, Line]]) -> dict[str, list[str]]:
    """The nodes that fail, by check."""
    names = next(iter(nodes.values()))
    failed = {name: [node for node, lines in nodes.items() if lines[name].verdict is Verdict.fail] for name in names}
    return {name: found for name, found in failed.items() if found}


def _conclude(nodes: dict[str, dict[str, Line]], together: Mapping[str, Line], ranks: Ranks) -> None:
    if ranks.is_main:
        for line in report(nodes, together):
            print(line, flush=True)
    failed = _failing(nodes)
    common = {name: next(iter(nodes.values()))[name] for name, found in failed.items() if len(found) == len(nodes)}
    common |= {name: line for name, line in together.items() if line.verdict is Verdict.fail}
    if common:
        raise ConfigError("the doctor says no: " + "; ".join(f"{name}: {line.text}" for name, line in common.items()))
    if failed:
        unfit = sorted({node for found in failed.values() for node in found})
        reasons = (f"{node}: {name}: {nodes[node][name].text}" for name, found in failed.items() for node in found)
        raise DistributedError(
            "the doctor says that some nodes aren't fit: " + "; ".join(reasons),
            [node.partition(" ")[0] for node in unfit],
        )


def report(nodes: Mapping[str, Mapping[str, Line]], together: Mapping[str, Line]) -> list[str]:
    """A line a check and finding, with the nodes that have it where there are several."""
    found = []
    for check in next(iter(nodes.values())):
        finders: dict[Line, list[str]] = {}
        for node, lines in nodes.items():
            finders.setdefault(lines[check], []).append(node)
        for line, who in finders.items():
            where = "" if len(nodes) == 1 else "every node: " if len(who) == len(nodes) else f"{', '.join(who)}: "
            found.append(f"{line.verdict}  {check:<20}  {where}{line.text}")
    found += [f"{line.verdict}  {check:<20}  all ranks: {line.text}" for check, line in together.items()]
    if len(nodes) > 1 and not together:
        found.append("what needs all ranks wasn't tried; mend the above first")
    return found


# -- what all ranks look at together


def _together(config: CompressConfig, run_dir: Path, ranks: Ranks) -> dict[str, Line]:
    found = {}
    for name, check in agreement.CHECKS.items():
        try:
            check(config, run_dir, ranks)
            found[name] = Line(Verdict.ok, "the same for all")
        except ConfigError as error:  # raised on every rank, or on none
            found[name] = Line(Verdict.fail, str(error))
    return {**found, "clocks": _skew(clock_offsets(ranks))}


def clock_offsets(ranks: Ranks) -> list[tuple[float, float]]:
    """By how many seconds each rank's clock is ahead of the first one's, and by how many this can be wrong.

    From the quickest of a few round trips: half of it is as much as its answer can have been under way.
    """
    found = torch.zeros(ranks.size, 2, dtype=torch.float64)
    answer = torch.zeros(1, dtype=torch.float64)
    for other in range(1, ranks.size):
        trips = []
        for _ in range(_ROUND_TRIPS if ranks.rank in (0, other) else 0):
            if ranks.is_main:
                asked, began = time.time(), time.monotonic()
                dist.send(answer, other)
                dist.recv(answer, other)
                half = (time.monotonic() - began) / 2
                trips.append((half, float(answer) - asked - half))
            else:
                dist.recv(answer, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
        if trips:
            half, offset = min(trips)
            found[other] = torch.tensor([offset, half])
    [offsets] = ranks.sums([found])
    return [(offset, half) for offset, half in offsets.tolist()]


def _skew(offsets: Sequence[tuple[float, float]]) -> Line:
    rank, (offset, half) = max(enumerate(offsets), key=lambda found: abs(found[1][0]) - found[1][1])
    least = abs(offset) - half  # whatever the network took
    if least <= SKEW_SECONDS:
        return Line(
            Verdict.ok, f"at most {abs(offset):.3f} s off the first rank's, by a round trip of {2 * half:.4f} s"
        )
    text = f"rank {rank}'s is {offset:+.1f} s off the first one's; {CLOCK_REMEDY}"
    if least <= TORCHRUN_SECONDS:
        return Line(Verdict.warn, f"{text}; as it is, times in logs are wrong")
    return Line(Verdict.fail, f"{text}: torchrun takes a node for dead whose clock is 15 s off the others'")

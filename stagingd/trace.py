# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The last versions as a trace that ui.perfetto.dev and chrome://tracing show. Pure.

The format is Chrome's trace event format (JSON object format): complete events "X" for what took time, instant events
"i" for seal and abort, metadata "M" for names. Times are microseconds from the first event on. A process is a stage's
trainers, an engine, or the daemon; a thread is a rank. An engine's rank has a second thread, for what kept the engine
from generating: an update holds its lease for a part of the time only, so the two do not nest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stagingd.history import DAEMON, TRAINER, Span, VersionHistory
from stagingd.seen import Seen

Event = dict[str, Any]

LIVE: Final = ("swap", "update")
"""What keeps an engine from generating."""

OF_ENGINES: Final = ("read", *LIVE)
"""What engines' ranks do."""


@dataclass
class _Processes:
    """Numbers for processes, in the order in which they are asked for, and the events that name them."""

    numbers: dict[tuple[str, str], int] = field(default_factory=dict)
    threads: dict[tuple[int, int], str] = field(default_factory=dict)

    def of(self, stage: str, who: str) -> int:
        """The process of a stage's trainers, of its part of the daemon, or of an engine."""
        return self.numbers.setdefault((stage, who), len(self.numbers) + 1)

    def thread(self, pid: int, span: Span) -> int:
        """The thread of a rank, and its name."""
        live = span.what in LIVE
        number = 2 * span.rank + live if span.what in OF_ENGINES else span.rank
        self.threads[pid, number] = "seals" if span.what == "seal" else f"rank {span.rank}{' pauses' if live else ''}"
        return number

    def names(self) -> Iterator[Event]:
        """Metadata events."""
        for (stage, who), pid in self.numbers.items():
            name = {TRAINER: "trainers", DAEMON: "daemon"}.get(who, f"engine {who.removeprefix('engine ')}")
            yield _metadata("process_name", pid, 0, name=f"{stage}: {name}")
            yield _metadata("process_sort_index", pid, 0, sort_index=pid)
        for (pid, tid), name in self.threads.items():
            yield _metadata("thread_name", pid, tid, name=name)
            yield _metadata("thread_sort_index", pid, tid, sort_index=tid)


def _metadata(what: str, pid: int, tid: int, **arguments: str | int) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def chrome_trace(seen: Seen) -> dict[str, Any]:
    """The trace, to be written as JSON. What is under way ends when it was seen, and says so."""
    start_s = min((_first(one) for versions in seen.histories.values() for one in versions), default=seen.at_s)
    processes, events = _Processes(), []
    for stage, versions in seen.histories.items():
        processes.of(stage, TRAINER), processes.of(stage, DAEMON)  # these two first, whatever came first
        for one in versions:
            events += [_complete(stage, one, span, start_s, seen.at_s, processes) for span in one.spans]
            events += _instants(stage, one, start_s, processes)
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [*processes.names(), *sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))],
        "otherData": {"start_unix_s": start_s + seen.wall_minus_monotonic_s},
    }


def _first(one: VersionHistory) -> float:
    return min([one.begun_s, *(span.begin_s for span in one.spans)])


def _complete(stage: str, one: VersionHistory, span: Span, start_s: float, now: float, processes: _Processes) -> Event:
    end_s = now if span.end_s is None else span.end_s
    arguments: Mapping[str, object] = {"version": one.version, "attempt": one.attempt}
    if span.bytes is not None:
        arguments = {**arguments, "bytes": span.bytes}
    if span.end_s is None:
        arguments = {**arguments, "under_way": True}
    who = _who(span)
    pid = processes.of(stage, who)
    return {
        "ph": "X",
        "name": f"{span.what} {one.version}",
        "cat": span.what,
        "pid": pid,
        "tid": processes.thread(pid, span),
        "ts": (span.begin_s - start_s) * 1e6,
        "dur": max(end_s - span.begin_s, 0.0) * 1e6,
        "args": arguments,
    }


def _who(span: Span) -> str:
    """A name of the process that no other has: an engine may be called as it likes."""
    return f"engine {span.who}" if span.what in OF_ENGINES else span.who


def _instants(stage: str, one: VersionHistory, start_s: float, processes: _Processes) -> Iterator[Event]:
    pid = processes.of(stage, DAEMON)
    for what, at_s, details in (("sealed", one.sealed_s, {}), ("aborted", one.aborted_s, {"reason": one.reason})):
        if at_s is not None:
            yield {
                "ph": "i",
                "s": "g" if what == "aborted" else "p",
                "name": f"{what} {one.version}",
                "cat": what,
                "pid": pid,
                "tid": 0,
                "ts": (at_s - start_s) * 1e6,
                "args": {"version": one.version, "attempt": one.attempt, **details},
            }

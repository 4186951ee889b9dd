# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What has happened to a stage's last versions, and when: who filled, measured, read and applied them.

Pure: it is told the time with every call, in seconds on the machine's monotonic clock. It begins with the daemon:
what happened under one that has ended is not known, and what that one left counts from when it was taken over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from stagingd.record import Record
from stagingd.totals import Totals

VERSIONS: Final = 256
"""Versions that are remembered, each time that one was begun counted by itself."""

SPANS: Final = 1 << 15
"""Spans that are remembered of all versions together: of stages with many ranks, fewer versions are."""

READER_SPANS: Final = 3 * 1024
"""Spans of readers that are remembered of one version: so many ranks may read a stage at one time, in three ways."""

REASON_CHARACTERS: Final = 500
"""Reasons are for people; a longer one is cut."""

TRAINER: Final = "trainer"
DAEMON: Final = "daemon"

What = Literal["fill", "measure", "seal", "read", "swap", "update"]


class Span(Record):
    """Something that took time, or is under way.

    ``fill``: from a trainer rank's Begun to its commit. ``measure``: from its Measure to Measured, where trainers
    quantize. ``seal``: from the last commit until the version is sealed. ``read``: from an engine rank's Leased to its
    release, or to where the lease was lost; the last one, of several. ``swap``, ``update``: what an engine's worker
    tells of itself; as long as it kept the engine from generating.

    Attributes:
        what: see above.
        who: "trainer", the engine's name, or "daemon".
        rank: of the trainer or of the engine; 0 for the daemon.
        begin_s: when it began, in seconds on the machine's monotonic clock.
        end_s: when it ended; None while it is under way.
        bytes: how many were written; None where that is not known.
    """

    what: What
    who: str
    rank: int
    begin_s: float
    end_s: float | None
    bytes: int | None = None


class VersionHistory(Record):
    """One attempt to fill a version, and what became of it.

    Attributes:
        version, attempt: which; a version that was aborted may be begun again, by another attempt.
        begun_s: when the first rank began it, in seconds on the machine's monotonic clock.
        sealed_s, aborted_s: when that happened; None where it has not.
        reason: of the abort; else empty.
        spans: in the order in which they began to be known.
    """

    version: int
    attempt: int
    begun_s: float
    sealed_s: float | None
    aborted_s: float | None
    reason: str
    spans: tuple[Span, ...]


@dataclass
class _Times:
    """Of a span."""

    begin_s: float
    end_s: float | None = None
    bytes: int | None = None


Key = tuple[What, str, int]


@dataclass
class _Entry:
    """A ``VersionHistory`` that goes on."""

    version: int
    attempt: int
    begun_s: float
    sealed_s: float | None = None
    aborted_s: float | None = None
    reason: str = ""
    spans: dict[Key, _Times] = field(default_factory=dict)
    made: VersionHistory | None = None

    def open(self, *, what: What, who: str | None = None) -> Iterator[_Times]:
        """The spans of a kind that are under way, of one engine or of all."""
        for (kind, name, _), times in self.spans.items():
            if kind == what and times.end_s is None and who in (None, name):
                yield times

    def record(self) -> VersionHistory:
        """As it is now. Made once as long as nothing happens: many are asked for, again and again."""
        if self.made is None:
            self.made = self._record()
        return self.made

    def _record(self) -> VersionHistory:
        spans = tuple(
            Span(what=what, who=who, rank=rank, begin_s=times.begin_s, end_s=times.end_s, bytes=times.bytes)
            for (what, who, rank), times in self.spans.items()
        )
        return VersionHistory(
            version=self.version,
            attempt=self.attempt,
            begun_s=self.begun_s,
            sealed_s=self.sealed_s,
            aborted_s=self.aborted_s,
            reason=self.reason,
            spans=spans,
        )


class History:
    """The last versions of one stage. Bounded, whatever it is told: see the constants of this module.

    What is told of a version that is not remembered is forgotten, too.

    Args:
        ranks: how many trainer ranks fill a version together.

    Attributes:
        totals: of all versions since the daemon began, also of those that are remembered no more.
        lost_leases: how many leases were taken away.
    """

    def __init__(self, ranks: int) -> None:
        self.totals: Totals[What] = Totals()
        self.lost_leases = 0
        self._room = 2 * ranks + 1 + READER_SPANS
        self._entries: dict[int, _Entry] = {}
        self._spans = 0

    def versions(self, last: int) -> tuple[VersionHistory, ...]:
        """So many of the last versions, oldest first."""
        entries = list(self._entries.values())
        return tuple(entry.record() for entry in entries[max(0, len(entries) - last) :])

    # Trainers

    def begun(self, version: int, attempt: int, rank: int, now: float) -> None:
        """A trainer rank begins to fill a version, perhaps as the first."""
        self._begin(self._entry(version, attempt, now), ("fill", TRAINER, rank), now)

    def measuring(self, version: int, rank: int, now: float) -> None:
        """A trainer rank has stored its moments, and waits for those of the others."""
        entry = self._find(version)
        if entry is not None:
            self._begin(entry, ("measure", TRAINER, rank), now)

    def measured(self, version: int, now: float) -> None:
        """All trainer ranks have stored their moments."""
        entry = self._find(version)
        if entry is not None:
            for times in entry.open(what="measure"):
                self._end(entry, "measure", times, now)

    def committed(self, version: int, rank: int, size: int, now: float) -> None:
        """A trainer rank has put all its boxes, of ``size`` bytes."""
        entry = self._find(version)
        times = entry and entry.spans.get(("fill", TRAINER, rank))
        if entry and times and times.end_s is None:
            self._end(entry, "fill", times, now, size)

    def sealed(self, version: int, now: float) -> None:
        """The version is complete."""
        entry = self._find(version)
        if entry is None:
            return
        commits = [t.end_s for (what, *_), t in entry.spans.items() if what == "fill" and t.end_s is not None]
        entry.sealed_s = now
        self._begin(entry, ("seal", DAEMON, 0), max(commits, default=now))
        for times in entry.open(what="seal"):
            self._end(entry, "seal", times, now)

    def aborted(self, version: int, reason: str, now: float) -> None:
        """The version was given up: nobody goes on with it."""
        entry = self._find(version)
        if entry is None:
            return
        entry.aborted_s, entry.reason = now, reason[:REASON_CHARACTERS]
        for times in entry.spans.values():
            times.end_s = now if times.end_s is None else times.end_s
        entry.made = None

    def taken_over(self, version: int, attempt: int, *, sealed: bool, now: float) -> None:
        """A daemon that has ended left this version."""
        entry = self._entry(version, attempt, now)
        entry.sealed_s, entry.made = now if sealed else None, None

    # Readers

    def leased(self, version: int, engine: str, rank: int, now: float) -> None:
        """An engine's rank may read a version from now on."""
        entry = self._find(version)
        if entry is not None:
            self._begin(entry, ("read", engine, rank), now)

    def released(self, engine: str, rank: int, now: float) -> None:
        """An engine's rank reads nothing any more: it has released its lease, or is gone."""
        for entry in self._entries.values():
            times = entry.spans.get(("read", engine, rank))
            if times and times.end_s is None:
                self._end(entry, "read", times, now)

    def lease_lost(self, version: int, engine: str, now: float) -> None:
        """A lease was taken away from all ranks of an engine."""
        self.lost_leases += 1
        entry = self._find(version)
        for times in entry.open(what="read", who=engine) if entry else ():
            times.end_s = now
        if entry is not None:
            entry.made = None

    def reported(
        self,
        version: int,
        what: Literal["swap", "update"],
        engine: str,
        rank: int,
        *,
        end_s: float,
        seconds: float,
        size: int,
    ) -> None:
        """An engine's rank tells that it has made a version live, and for how long the engine was kept by it."""
        entry = self._find(version)
        if entry is not None:
            self._put(entry, (what, engine, rank), _Times(end_s - seconds, end_s, size))
            self.totals.add(what, seconds, size)

    # Entries

    def _find(self, version: int) -> _Entry | None:
        """The last attempt at a version."""
        return next((entry for entry in reversed(self._entries.values()) if entry.version == version), None)

    def _entry(self, version: int, attempt: int, now: float) -> _Entry:
        if attempt not in self._entries:
            self._entries[attempt] = _Entry(version, attempt, now)
            self._forget()
        return self._entries[attempt]

    def _begin(self, entry: _Entry, key: Key, now: float) -> None:
        """A span begins, unless it is under way: what was lost with its answer is asked again."""
        times = entry.spans.get(key)
        if times is None or times.end_s is not None:
            self._put(entry, key, _Times(now))

    def _end(self, entry: _Entry, what: What, times: _Times, now: float, size: int | None = None) -> None:
        times.end_s, times.bytes, entry.made = now, size, None
        self.totals.add(what, now - times.begin_s, size)

    def _put(self, entry: _Entry, key: Key, times: _Times) -> None:
        if key not in entry.spans:
            if len(entry.spans) >= self._room:
                return  # engines under ever new names: those that came first stay
            self._spans += 1
        entry.spans[key], entry.made = times, None
        self._forget()

    def _forget(self) -> None:
        while len(self._entries) > VERSIONS or (self._spans > SPANS and len(self._entries) > 1):
            oldest = self._entries.pop(next(iter(self._entries)))
            self._spans -= len(oldest.spans)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How fast versions come, and how long engines stood still for them: from a stage's history. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stagingd.history import Span, VersionHistory, What
from stagingd.record import Record

AVERAGED: Final = 10
"""Intervals between versions that a rate is the average of, at most."""


class Rates(Record):
    """Of one stage; None where fewer than two versions are known.

    Attributes:
        versions_a_minute: sealed versions in a minute. Falls when the next one is late.
        written_bytes_s: bytes in a second that trainers put into slots, on average over the same time.
        applied_bytes_s: bytes in a second that engines' workers wrote to live weights; of all that report.
    """

    versions_a_minute: float | None
    written_bytes_s: float | None
    applied_bytes_s: float | None


class Pause(Record):
    """An engine stood still to make a version live: as long as its slowest rank.

    Attributes:
        engine: its name.
        version: which was made live.
        what: ``swap`` or ``update``.
        seconds: how long the slowest rank took.
        ended_s: when the last rank was done, in seconds on the machine's monotonic clock.
        ranks: how many have reported it.
    """

    engine: str
    version: int
    what: What
    seconds: float
    ended_s: float
    ranks: int


def rates(versions: Sequence[VersionHistory], now: float) -> Rates:
    """The rates over the last ``AVERAGED`` intervals.

    Args:
        versions: a stage's history, oldest first.
        now: seconds on the machine's monotonic clock.
    """
    # One without a seal was taken over from a daemon that ended: when it was sealed is not known.
    known = [one for one in versions if one.sealed_s is not None and any(span.what == "seal" for span in one.spans)]
    times = [one.sealed_s for one in known if one.sealed_s is not None][-AVERAGED - 1 :]
    if len(times) < 2 or times[-1] <= times[0]:
        return Rates(versions_a_minute=None, written_bytes_s=None, applied_bytes_s=None)
    intervals = len(times) - 1
    usual = (times[-1] - times[0]) / intervals
    elapsed = max(times[-1], now - usual) - times[0]
    spans = [span for one in known[-intervals:] for span in one.spans]
    return Rates(
        versions_a_minute=60 * intervals / elapsed,
        written_bytes_s=_bytes(spans, "fill") / elapsed,
        applied_bytes_s=_bytes(spans, "swap", "update") / elapsed,
    )


def _bytes(spans: Sequence[Span], *kinds: str) -> int:
    return sum(span.bytes or 0 for span in spans if span.what in kinds)


def pauses(versions: Sequence[VersionHistory], last: int) -> list[Pause]:
    """So many of the last pauses of engines, the last one first."""
    found: dict[tuple[str, int, str], Pause] = {}
    for one in versions:
        for span in one.spans:
            if span.what in ("swap", "update") and span.end_s is not None:
                key = (span.who, one.version, span.what)
                before = found.get(key)
                found[key] = Pause(
                    engine=span.who,
                    version=one.version,
                    what=span.what,
                    seconds=max(span.end_s - span.begin_s, before.seconds if before else 0.0),
                    ended_s=max(span.end_s, before.ended_s if before else span.end_s),
                    ranks=1 + (before.ranks if before else 0),
                )
    return sorted(found.values(), key=lambda pause: pause.ended_s, reverse=True)[:last]

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a daemon says of its stages at one time: the status, and the history of each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import UnknownStage
from stagingd.history import VersionHistory
from stagingd.rates import pauses, rates

SHOWN_VERSIONS: Final = 16
"""Versions that rates and pauses are shown of: more than ``rates`` takes the average of."""

SHOWN_PAUSES: Final = 8
"""Pauses of a stage that programs are given."""


@dataclass(frozen=True)
class Seen:
    """One look at a daemon.

    Attributes:
        report: its status.
        histories: the last versions of each stage, oldest first.
        at_s: when, in seconds on the machine's monotonic clock.
        wall_minus_monotonic_s: what is to be added to times for seconds since 1970.
    """

    report: wire.StatusReport
    histories: Mapping[str, tuple[VersionHistory, ...]]
    at_s: float
    wall_minus_monotonic_s: float = 0.0


def look(connection: Connection, *, last: int, stage: str | None = None) -> Seen:
    """Ask a daemon.

    Args:
        connection: to the daemon.
        last: how many versions of each stage.
        stage: only this one; by default all.

    Raises:
        UnknownStage: there is no such stage.
        DaemonUnreachable: the daemon does not answer.
    """
    report = connection.request(wire.Status(), wire.StatusReport)
    shown = [one for one in report.stages if stage in (None, one.stage)]
    histories: dict[str, tuple[VersionHistory, ...]] = {}
    wall = time.time() - time.monotonic()
    for name in [one.stage for one in shown] if stage is None else [stage]:
        try:
            answer = connection.request(wire.History(stage=name, last=last), wire.HistoryReport)
        except UnknownStage:
            if stage is not None:
                raise
            continue  # it was dropped since the report
        histories[name], wall = answer.versions, answer.wall_minus_monotonic_s
    there = tuple(one for one in shown if one.stage in histories)
    return Seen(report.model_copy(update={"stages": there}), histories, time.monotonic(), wall)


def as_plain(seen: Seen) -> dict[str, Any]:
    """For programs: the status report, with each stage's ``rates`` and last ``pauses``, and the time ``at_s``."""
    plain = seen.report.model_dump()
    for stage in plain["stages"]:
        versions = seen.histories.get(stage["stage"], ())
        stage["rates"] = rates(versions, seen.at_s).model_dump()
        stage["pauses"] = [pause.model_dump() for pause in pauses(versions, SHOWN_PAUSES)]
    return {**plain, "at_s": seen.at_s}

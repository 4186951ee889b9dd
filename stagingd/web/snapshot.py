# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""All that is shown of a daemon at one time. Nothing in it changes any more, so other threads may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stagingd import wire
from stagingd.health import VersionHealth
from stagingd.history import VersionHistory, What
from stagingd.service import Service
from stagingd.totals import Durations

SHOWN_VERSIONS: Final = 64
"""Versions of a stage that are shown, at most."""


@dataclass(frozen=True)
class StageSnapshot:
    """One stage.

    Attributes:
        status: as ``stagingd status`` has it.
        versions: the last versions, oldest first.
        totals: since the daemon began.
        lost_leases: how many leases were taken away since.
        layers: names of the layers of which ``health`` tells; empty as long as the stage is not declared.
        health: of the last versions, oldest first.
    """

    status: wire.StageStatus
    versions: tuple[VersionHistory, ...]
    totals: Mapping[What, Durations]
    lost_leases: int
    layers: tuple[str, ...]
    health: tuple[VersionHealth, ...]


@dataclass(frozen=True)
class Snapshot:
    """All stages.

    Attributes:
        at_s: when it was taken, in seconds on the machine's monotonic clock.
        wall_minus_monotonic_s: what is to be added to such times for seconds since 1970.
        report: the daemon's status.
        stages: by name.
        door_open: whether new connections are taken.
    """

    at_s: float
    wall_minus_monotonic_s: float
    report: wire.StatusReport
    stages: Mapping[str, StageSnapshot]
    door_open: bool = True


def take(service: Service, *, door_open: bool) -> Snapshot:
    """Everything as it is now. For the event loop, which alone may touch the service."""
    report, now = service.status(), service.clock()
    stages = {
        status.stage: StageSnapshot(
            status=status,
            versions=stage.history.versions(SHOWN_VERSIONS),
            totals=stage.history.totals.so_far(),
            lost_leases=stage.history.lost_leases,
            layers=stage.layers.names if stage.ready else (),
            health=stage.health.versions,
        )
        for status, stage in zip(report.stages, service.stages.values(), strict=True)
    }
    return Snapshot(now, service.wall_clock() - now, report, stages, door_open)

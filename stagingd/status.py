# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What people are told of a stage: who uses it, what is in its slots, and what is awaited."""

from __future__ import annotations

from collections.abc import Iterable

from stagingd import wire
from stagingd.hosted import HostedStage
from stagingd.pending import Pending
from stagingd.slots import Lease, Slot


def stage_status(stage: HostedStage, pending: Iterable[Pending], now: float, lease_s: float) -> wire.StageStatus:
    """The status of one stage.

    Args:
        stage: which.
        pending: the questions to all stages that wait.
        now: the time in seconds, on the clock of leases and questions.
        lease_s: how long a lease lasts, in seconds.
    """
    buffer = stage.buffer
    waiting = (
        wire.WaitingStatus(
            who=str(p.session), what=p.waiting.what, peers=tuple(p.waiting.peers), waited_s=now - p.since
        )
        for p in pending
        if p.stage == stage.name
    )
    return wire.StageStatus(
        stage=stage.name,
        policy=buffer.policy.value,
        trainers=tuple(sorted(stage.trainers)),
        ranks=buffer.ranks,
        engines=tuple(sorted(stage.engines)),
        tensors=len(stage.segment.catalog.tensors) if stage.segment else 0,
        segment=stage.segment.name if stage.segment else "",
        segment_bytes=stage.segment.size if stage.segment else 0,
        slots=tuple(map(_slot_status, buffer.slots)),
        leases=tuple(_lease_status(lease, now, lease_s) for lease in buffer.leases.values()),
        waiting=tuple(waiting),
        sealed_versions=stage.sealed_versions,
        aborted_versions=stage.aborted_versions,
        begins_kept_waiting=stage.begins_kept_waiting,
    )


def _slot_status(slot: Slot) -> wire.SlotStatus:
    return wire.SlotStatus(
        state=slot.state.value,
        version=slot.version,
        begun_ranks=tuple(sorted(slot.begun)),
        measured_ranks=tuple(sorted(slot.measured)),
        committed_ranks=tuple(sorted(slot.committed)),
    )


def _lease_status(lease: Lease, now: float, lease_s: float) -> wire.LeaseStatus:
    return wire.LeaseStatus(
        lease=lease.id,
        engine=lease.engine,
        version=lease.version,
        awaited_ranks=tuple(lease.missing),
        reading_ranks=tuple(sorted(lease.holding)),
        age_s=now - (lease.until - lease_s),
    )

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a daemon's state, to be compared: what its successor must find, and what a refusal must not change."""

from __future__ import annotations

from dataclasses import dataclass

from stagingd.buffer import DoubleBuffer
from stagingd.hosted import HostedStage
from stagingd.service import Service
from stagingd.slots import Lease


def buffer_picture(buffer: DoubleBuffer) -> object:
    """All that counts in a double buffer."""
    return (
        [(slot.state, slot.version, frozenset(slot.begun), frozenset(slot.committed)) for slot in buffer.slots],
        [_lease_picture(lease) for lease in buffer.leases.values()],
        (buffer.newest_sealed, buffer.next_lease, buffer.last_abort, dict(buffer.lost_leases)),
    )


def _lease_picture(lease: Lease) -> object:
    which = (lease.id, lease.engine, lease.ranks, lease.slot.index, lease.version, lease.until)
    return which, frozenset(lease.holding), frozenset(lease.done), frozenset(lease.gone)


@dataclass(frozen=True)
class StagePicture:
    """What a successor must find of a stage; clients by their tokens."""

    buffer: object
    counts: tuple[int, ...]
    trainers: dict[int, bytes]
    engines: dict[str, tuple[int, set[int], dict[int, bytes]]]

    @property
    def tokens(self) -> set[bytes]:
        """All clients that have a seat."""
        members = [token for *_, engine in self.engines.values() for token in engine.values()]
        return {*self.trainers.values(), *members}


def stage_pictures(service: Service) -> dict[str, StagePicture]:
    """Those of all stages that have memory."""
    return {name: _stage_picture(stage) for name, stage in service.stages.items() if stage.ready}


def _stage_picture(stage: HostedStage) -> StagePicture:
    return StagePicture(
        buffer_picture(stage.buffer),
        (stage.sealed_versions, stage.aborted_versions, stage.begins_kept_waiting),
        {rank: session.token for rank, session in stage.trainers.items()},
        {
            name: (engine.ranks, set(engine.gone), {rank: session.token for rank, session in engine.members.items()})
            for name, engine in stage.engines.items()
        },
    )


def picture(service: Service) -> object:
    """All that a refusal must not change."""
    declaring = {name: sorted(stage.declaration.by_rank) for name, stage in service.stages.items() if stage.declaration}
    revisions = {name: stage.revision for name, stage in service.stages.items()}
    used = {s for s in service.sessions if s.identity or s.expires or any(x.uses(s) for x in service.stages.values())}
    sessions = {session.token: (session.identity, session.expires) for session in used}  # the others are forgotten soon
    return stage_pictures(service), declaring, revisions, sessions, set(service.pending)

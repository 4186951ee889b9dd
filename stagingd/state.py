# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a stage's ledger holds: everything that a restarted daemon has to know, as one msgpack record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgpack
from pydantic import BeforeValidator, Field, ValidationError

from stagingd.buffer import DoubleBuffer
from stagingd.errors import SegmentUnreadable
from stagingd.policy import Policy
from stagingd.record import Name, Rank, RankCount, Record, Version
from stagingd.slots import Lease, Slot, SlotState


def unpacked(packed: object) -> object:
    """What msgpack bytes hold, for a validator. Raises ValueError."""
    if not isinstance(packed, bytes):
        raise ValueError("not bytes")
    return msgpack.unpackb(packed, use_list=False)


REASON_CHARACTERS = 2000
"""Reasons are for people; a longer one is cut."""


class SessionRecord(Record):
    """A session that holds ranks of the stage: see ``Session``."""

    token: bytes
    name: Name
    uid: int
    pid: int
    started: int


class SlotRecord(Record):
    """A slot: see ``Slot``."""

    state: Annotated[SlotState, Field(strict=False)]
    version: Version | None
    kept: Version | None = None
    attempt: int
    begun: tuple[Rank, ...]
    measured: tuple[Rank, ...]
    committed: tuple[Rank, ...]


class LeaseRecord(Record):
    """A lease: see ``Lease``. ``until`` is on the machine's monotonic clock, which all its processes share."""

    id: int
    engine: Name
    ranks: RankCount
    slot: Annotated[int, Field(ge=0, le=1)]
    version: Version
    until: float
    holding: tuple[Rank, ...]
    done: tuple[Rank, ...]
    gone: tuple[Rank, ...]


class BufferRecord(Record):
    """A double buffer: see ``DoubleBuffer``."""

    slots: tuple[SlotRecord, SlotRecord]
    leases: tuple[LeaseRecord, ...]
    lost_leases: tuple[tuple[int, str], ...]
    next_lease: int
    next_attempt: int
    newest_sealed: Version | None
    last_abort: tuple[Version, str] | None


class EngineRecord(Record):
    """A reader group; its members as rank and position in ``MembersRecord.sessions``."""

    name: Name
    ranks: RankCount
    members: tuple[tuple[Rank, int], ...]
    gone: tuple[Rank, ...]


class MembersRecord(Record):
    """Who speaks for which rank. ``trainers`` are rank and position in ``sessions``."""

    sessions: tuple[SessionRecord, ...]
    trainers: tuple[tuple[Rank, int], ...]
    engines: tuple[EngineRecord, ...]


class StageState(Record):
    """All of it. The members stand in it as a record of their own, since they seldom change."""

    members: Annotated[MembersRecord, BeforeValidator(unpacked)]
    buffer: BufferRecord
    sealed_versions: int
    aborted_versions: int
    begins_kept_waiting: int


def encode(state: Mapping[str, object]) -> bytes:
    """A state as a record. It is made by the daemon itself, so it is checked when it is read."""
    packed: bytes = msgpack.packb(state)
    return packed


def decode(segment: str, record: bytes | None) -> StageState:
    """The state in a segment's ledger. Raises SegmentUnreadable when there is none that is whole."""
    if record is None:
        raise SegmentUnreadable(
            f"segment {segment} holds no whole state record", remedy="declare the stage anew; its versions are lost"
        )
    try:
        return StageState.model_validate(unpacked(record))
    except (ValueError, msgpack.UnpackException, ValidationError) as error:
        raise SegmentUnreadable(
            f"the state record of segment {segment} is not one: {error}",
            remedy="declare the stage anew; its versions are lost",
        ) from error


def buffer_state(buffer: DoubleBuffer) -> dict[str, object]:
    """A double buffer, as ``BufferRecord`` has it."""
    abort = buffer.last_abort
    return {
        "slots": [_slot_state(slot) for slot in buffer.slots],
        "leases": [_lease_state(lease) for lease in buffer.leases.values()],
        "lost_leases": [(lease, reason[:REASON_CHARACTERS]) for lease, reason in buffer.lost_leases.items()],
        "next_lease": buffer.next_lease,
        "next_attempt": buffer.next_attempt,
        "newest_sealed": buffer.newest_sealed,
        "last_abort": abort and (abort[0], abort[1][:REASON_CHARACTERS]),
    }


def _slot_state(slot: Slot) -> dict[str, object]:
    return {
        "state": slot.state.value,
        "version": slot.version,
        "kept": slot.kept,
        "attempt": slot.attempt,
        "begun": list(slot.begun),
        "measured": list(slot.measured),
        "committed": list(slot.committed),
    }


def _lease_state(lease: Lease) -> dict[str, object]:
    return {
        "id": lease.id,
        "engine": lease.engine,
        "ranks": lease.ranks,
        "slot": lease.slot.index,
        "version": lease.version,
        "until": lease.until,
        "holding": list(lease.holding),
        "done": list(lease.done),
        "gone": list(lease.gone),
    }


def restored_buffer(record: BufferRecord, ranks: int, policy: Policy) -> DoubleBuffer:
    """The double buffer that a record describes."""
    buffer = DoubleBuffer(ranks, policy)
    for slot, was in zip(buffer.slots, record.slots, strict=True):
        slot.state, slot.version, slot.kept, slot.attempt = was.state, was.version, was.kept, was.attempt
        slot.begun, slot.measured, slot.committed = set(was.begun), set(was.measured), set(was.committed)
    for lease in record.leases:
        slot = buffer.slots[lease.slot]
        buffer.leases[lease.id] = Lease(
            lease.id,
            lease.engine,
            lease.ranks,
            slot,
            lease.version,
            lease.until,
            set(lease.holding),
            set(lease.done),
            set(lease.gone),
        )
    buffer.lost_leases = dict(record.lost_leases)
    buffer.next_lease = record.next_lease
    buffer.next_attempt = record.next_attempt
    buffer.newest_sealed = record.newest_sealed
    buffer.last_abort = record.last_abort
    return buffer

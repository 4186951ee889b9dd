# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers and readers do if nothing goes wrong: each step of theirs, from hello to commit or release."""

from __future__ import annotations

from collections.abc import Sequence

from life.clients import Seat
from life.machine import declared_tensors
from life.world import GOOD, Fate, World
from stagingd import wire
from stagingd.hosted import HostedStage

LONGEST_S = 40.0
"""The longest that a request waits here."""


def all_work(world: World, seats: Sequence[Seat], rounds: int, wait_s: float = LONGEST_S, *, hire: bool = True) -> None:
    """Everybody takes some steps, in turn; the daemon makes what memory they need.

    Args:
        world: where.
        seats: who.
        rounds: how many steps each takes.
        wait_s: how long their requests may wait.
        hire: start processes for seats that have none.
    """
    for seat in [*seats] * rounds:
        if hire or seat.client is not None:
            work(world, seat, wait_s)
        if world.service is not None and world.maker.busy:
            world.maker.make()
            world.settle()


def work(world: World, seat: Seat, wait_s: float = LONGEST_S, fate: Fate = GOOD) -> None:
    """A seat's next step: whatever a trainer or reader does that has no trouble."""
    if seat.client is None:
        hidden = world.plan.hidden and bool(seat.rank or seat.engine)
        world.employ(seat, world.machine.start(hidden=hidden, old_number=False))
    client = seat.client
    assert client is not None
    if seat.copying is not None and seat.copying.left:
        copy(seat, seat.copying.pieces_left)
    elif world.service is None:
        return
    elif client.identity is None:
        world.hello(client)
    elif client.asked is None:
        request = next_request(world, seat, wait_s)
        if request is not None:
            world.ask(seat, request, fate)
    elif client.again:
        world.repeat(client, fate)


def copy(seat: Seat, count: int) -> None:
    """A trainer copies some of its boxes, or writes some of their moments, and tells what has landed."""
    copying = seat.copying
    assert copying is not None
    for _ in range(min(count, copying.pieces_left)):
        box = copying.left[0]
        box.pop(0).write(copying.stamp, poison=copying.poison)
        if not box:
            del copying.left[0]
            landed = len(copying.memory.catalog.owned_by(seat.rank)) - len(copying.left)
            copying.memory.progress[copying.slot].land(seat.rank, landed)


def next_request(world: World, seat: Seat, wait_s: float = LONGEST_S) -> wire.Request | None:
    """What a seat asks next, if anything."""
    if seat.engine is not None:
        return _next_of_reader(world, seat, wait_s)
    if not seat.seated:
        return declaration(world, seat, wait_s)
    if seat.copying is not None:
        return commitment(world, seat, seat.copying.version, wait_s)
    version, begun = next_version(world, seat), _begun(world, seat)
    if begun not in (None, version):
        return wire.Abort(stage=seat.stage, rank=seat.rank, version=begun, reason="begun and forgotten")
    return wire.Begin(stage=seat.stage, rank=seat.rank, version=version, timeout_s=wait_s)


def _next_of_reader(world: World, seat: Seat, wait_s: float) -> wire.Request | None:
    assert seat.engine is not None
    if not seat.seated:
        return wire.Attach(stage=seat.stage, engine=seat.engine, rank=seat.rank, ranks=seat.ranks, timeout_s=wait_s)
    if seat.reading is not None:
        if not world.look(seat):
            return None
        return wire.Release(stage=seat.stage, lease=seat.reading.lease, rank=seat.rank, timeout_s=wait_s)
    newest = wire.LeaseVersion(stage=seat.stage, engine=seat.engine, rank=seat.rank, timeout_s=wait_s)
    early = seat.engine in world.plan.early
    return newest.model_copy(update={"early": True, "newer_than": seat.last_read} if early else {})


def declaration(world: World, seat: Seat, wait_s: float = LONGEST_S, *, row_missing: bool = False) -> wire.Declare:
    """A trainer's declaration; with a row missing it fits nobody's."""
    return wire.Declare(
        stage=seat.stage,
        rank=seat.rank,
        ranks=seat.ranks,
        options=world.options,
        tensors=declared_tensors(seat.rank, seat.ranks, row_missing=row_missing),
        timeout_s=wait_s,
    )


def commitment(world: World, seat: Seat, version: int, wait_s: float = LONGEST_S, *, more: int = 0) -> wire.Commit:
    """A trainer's commit, of so many more boxes than it has."""
    boxes = len(world.memory_of(seat.stage).catalog.owned_by(seat.rank)) + more
    return wire.Commit(stage=seat.stage, rank=seat.rank, version=version, boxes=boxes, timeout_s=wait_s)


def next_version(world: World, seat: Seat) -> int:
    """The version that a trainer begins next: that of the others, or one that nobody has begun."""
    stage = _stage(world, seat)
    if stage is None:
        return 1
    slot = stage.buffer.filling
    filling = slot.version if slot is not None and slot.version is not None else 0
    if slot is not None and seat.rank not in slot.begun:
        return filling
    return max(stage.buffer.newest_sealed or 0, seat.tried, filling) + 1


def _begun(world: World, seat: Seat) -> int | None:
    """The version that a rank has begun in the daemon's eyes, and not committed."""
    stage = _stage(world, seat)
    slot = stage.buffer.filling if stage is not None else None
    return slot.version if slot is not None and seat.rank in slot.begun - slot.committed else None


def _stage(world: World, seat: Seat) -> HostedStage | None:
    return world.up.stages.get(seat.stage)

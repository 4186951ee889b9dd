# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What must hold after every step, whatever has happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from life.host import LEASE_S
from life.work import LONGEST_S
from life.world import World
from stagingd.hosted import HostedStage
from stagingd.slots import SlotState
from stagingd.waiting import Waiting


def check_laws(world: World) -> None:
    """Check all of them."""
    at_most_one_slot_is_in_each_state_and_a_free_slot_has_no_version(world)
    a_leased_slot_is_never_writable(world)
    a_complete_slot_holds_exactly_its_version(world)
    what_a_reader_sees_is_one_complete_sealed_version(world)
    versions_rise(world)
    a_sealed_version_survives_everything_but_a_later_one(world)
    nobody_waits_without_a_deadline(world)
    nobody_waits_for_itself(world)
    who_could_go_on_does_not_wait(world)
    leases_do_not_leak(world)
    slots_do_not_leak(world)
    sessions_do_not_leak(world)


def _stages(world: World) -> Iterator[tuple[str, HostedStage]]:
    if world.service is not None:
        yield from world.up.stages.items()


def at_most_one_slot_is_in_each_state_and_a_free_slot_has_no_version(world: World) -> None:
    for _, stage in _stages(world):
        states = Counter(slot.state for slot in stage.buffer.slots if slot.state is not SlotState.FREE)
        assert not states or max(states.values()) == 1, states
        for slot in stage.buffer.slots:
            assert (slot.version is None) == (slot.state is SlotState.FREE)
            assert slot.state is SlotState.FILLING or slot.state is SlotState.FREE or slot.committed == slot.begun
            assert slot.state is not SlotState.DRAINING or stage.buffer.leases_on(slot)


def a_leased_slot_is_never_writable(world: World) -> None:
    for name, stage in _stages(world):
        for lease in stage.buffer.leases.values():
            early = lease.slot.state is SlotState.FILLING  # and whoever has it knows
            assert lease.slot.state in (SlotState.FRONT, SlotState.DRAINING) or early
            assert not early or lease.id in world.known[name].early or lease.id not in world.known[name].leased
            assert lease.slot.version == lease.version
            told = world.known[name].leased.get(lease.id, (lease.version, lease.slot.index))
            assert told == (lease.version, lease.slot.index)


def a_complete_slot_holds_exactly_its_version(world: World) -> None:
    """Whoever may still be writing what was aborted long ago."""
    for name, stage in _stages(world):
        for slot in stage.buffer.slots:
            if slot.version is not None and slot.state is not SlotState.FILLING:
                memory = bytes(world.memory_of(name).slots[slot.index])
                assert memory == world.known[name].images[slot.version], f"{name} {slot} is torn"


def what_a_reader_sees_is_one_complete_sealed_version(world: World) -> None:
    for seat in world.seats:
        world.look(seat)
        if seat.reading is not None and not seat.reading.forsaken:
            assert not seat.reading.torn, f"{seat} reads version {seat.reading.version}, and it is torn"


def versions_rise(world: World) -> None:
    while world.events:
        event = world.events.pop(0)
        if event.event == "sealed":
            known = world.known[event.stage]
            assert event.version is not None
            assert event.version > known.announced
            known.announced = event.version
            known.promised = max(event.version, known.promised)


def a_sealed_version_survives_everything_but_a_later_one(world: World) -> None:
    for name, stage in _stages(world):
        promised, sealed, newest = world.known[name].promised, stage.buffer.newest_sealed, stage.buffer.newest
        assert (newest.version if newest is not None else None) == sealed
        assert (-1 if sealed is None else sealed) >= promised, f"{name} {promised} is lost"
    if world.service is not None:
        kept = {name for name, known in world.known.items() if known.promised >= 0}
        assert kept <= set(world.up.stages), "a stage is lost"


def nobody_waits_without_a_deadline(world: World) -> None:
    if world.service is None:
        return
    service, now = world.up, world.machine.now
    waiting = {(pending.session.identity, pending.request_id): pending for pending in service.pending.values()}
    held = [asked for _, asked in world.held]
    for client in world.clients():
        asked = client.asked
        if asked is None or client.again or asked in held:
            continue
        pending = waiting.get((client.identity, asked.request_id))
        assert pending is not None, f"{asked.message} has no answer, and nothing to wait for"
        assert asked.arrived is not None
        assert pending.deadline <= asked.arrived + asked.message.timeout_s  # type: ignore[union-attr]
    for pending in service.pending.values():
        assert world.late or now < pending.deadline < now + LONGEST_S + 1
        deadline = service.next_deadline()
        assert deadline is not None
        assert deadline <= pending.deadline


def nobody_waits_for_itself(world: World) -> None:
    for client in world.clients():
        asked = client.asked
        if asked is None or client.identity is None or world.service is None:
            continue
        session = world.up.sessions.find(client.identity)
        pending = world.up.pending.get(session) if session is not None else None
        if pending is not None and asked.seat.engine is None:
            assert f"trainer rank {asked.seat.rank}" not in pending.waiting.peers, pending.waiting


def who_could_go_on_does_not_wait(world: World) -> None:
    if world.service is None:
        return
    for pending in world.up.pending.values():
        waiting = pending.question.poll()
        assert isinstance(waiting, Waiting), f"{pending.waiting} is over, and nobody was told: {waiting}"


def leases_do_not_leak(world: World) -> None:
    for _, stage in _stages(world):
        for lease in stage.buffer.leases.values():
            assert lease.until <= world.machine.now + LEASE_S
            assert world.late or world.machine.now < lease.until
            assert lease.missing
            assert lease.engine in stage.engines, f"nobody is left of {lease}"
            assert lease.holding <= set(stage.engines[lease.engine].members)
        engines = [lease.engine for lease in stage.buffer.leases.values()]
        assert len(engines) == len(set(engines))


def slots_do_not_leak(world: World) -> None:
    for name, stage in _stages(world):
        filling = stage.buffer.filling
        if filling is not None:
            assert stage.trainers, f"nobody is left of those who were filling {name} {filling}"
            assert filling.begun - filling.committed <= set(stage.trainers)


def sessions_do_not_leak(world: World) -> None:
    if world.service is None:
        return
    service, watch = world.up, world.watch
    held = {pid: holders for pid, (_, holders) in watch.held.items()}
    assert held == Counter(session.pid for session in service.sessions if session.pid)
    for session in service.sessions:
        assert session.pid or session.identity or session.expires is not None, f"{session} stays for ever"
        assert session.expires is None or session.expires <= world.machine.now + LEASE_S
    known = set(service.sessions)
    assert set(service.pending) <= known
    for stage in service.stages.values():
        members = [s for engine in stage.engines.values() for s in engine.members.values()]
        assert {*stage.trainers.values(), *members} <= known
        assert all(engine.members for engine in stage.engines.values())
        assert stage.declaration is None or set(stage.trainers) <= set(stage.declaration.by_rank)

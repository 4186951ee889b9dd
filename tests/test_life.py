# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's life as a stateful test: trainers, engines, deaths, restarts and late messages in any order.

``--life-steps N`` runs N steps; the default is for every change, a million is for a night. The world around the
daemon stands in life.py.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from life import (
    GOOD,
    LEASE_S,
    RETURN_S,
    Crash,
    Fate,
    Plan,
    Seat,
    World,
    declared_tensors,
    picture,
    stage_pictures,
)

from stagingd import wire
from stagingd.buffer import DoubleBuffer, Policy, SlotState, Waiting
from stagingd.hosted import HostedStage
from stagingd.service import Service
from stagingd.session import Peer

STEPS_PER_EXAMPLE = 50
CARRIED_OUT = 0.55
"""About how much of that is carried out: hypothesis varies examples, and some become short."""

LONGEST_S = 40.0
"""The longest that a request waits here."""

seats = st.integers(0, 7)
chance = st.booleans()
waits = st.sampled_from((LONGEST_S, 8.0, 1.0))
crashes = st.builds(Fate, crash=st.sampled_from(Crash), landed=st.sampled_from((0.0, 0.3, 0.9, 1.0)))
fates = st.one_of(st.just(Fate(hold=True)), st.just(Fate(cut=True)), crashes)


class Life(RuleBasedStateMachine):
    """Anything happens in any order; what must always hold, holds."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.world: World = None  # type: ignore[assignment]

    @initialize(
        ranks=st.integers(2, 3),
        policy=st.sampled_from(Policy),
        hidden=chance,
        second=chance,
        versions=st.integers(0, 3),
    )
    def begin_life(self, ranks: int, policy: Policy, hidden: bool, second: bool, versions: int) -> None:
        self.world = World(Plan(ranks, policy, hidden, second))
        for _ in range(versions):
            self.all_work(self.trainers, 6)
            self.all_work(self.readers, 4)

    # Who does what next, if all goes well

    @property
    def serving(self) -> bool:
        return self.world.service is not None

    @property
    def trainers(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.engine is None]

    @property
    def readers(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.engine is not None]

    def all_work(self, working: list[Seat], rounds: int, wait_s: float = LONGEST_S, *, hire: bool = True) -> None:
        """Everybody takes some steps, in turn; the daemon makes what memory they need."""
        for seat in working * rounds:
            if hire or seat.client is not None:
                self.work(seat, wait_s)
            if self.serving and self.world.maker.busy:
                self.world.maker.make()
                self.world.settle()

    def stage(self, name: str) -> HostedStage | None:
        return self.world.up.stages.get(name)

    def work(self, seat: Seat, wait_s: float = LONGEST_S, fate: Fate = GOOD) -> None:
        """A seat's next step: whatever a trainer or reader does that has no trouble."""
        world = self.world
        if seat.client is None:
            hidden = world.plan.hidden and bool(seat.rank or seat.engine)
            world.employ(seat, world.machine.start(hidden=hidden, old_number=False))
        client = seat.client
        assert client is not None
        if seat.copying is not None and seat.copying.left:
            self.copy(seat, len(seat.copying.left))
        elif not self.serving:
            return
        elif client.identity is None:
            world.hello(client)
        elif client.asked is None:
            world.ask(seat, self.next_request(seat, wait_s), fate)
        elif client.again:
            world.repeat(client, fate)

    def next_request(self, seat: Seat, wait_s: float) -> wire.Request:
        if seat.engine is not None:
            return self.next_of_reader(seat, wait_s)
        if not seat.seated:
            return self.declaration(seat, wait_s)
        if seat.copying is not None:
            return self.commitment(seat, seat.copying.version, wait_s)
        version = self.next_version(seat)
        filling = self.filling(seat)
        if filling is not None and filling != version:
            return wire.Abort(stage=seat.stage, rank=seat.rank, version=filling, reason="begun and forgotten")
        return wire.Begin(stage=seat.stage, rank=seat.rank, version=version, timeout_s=wait_s)

    def declaration(self, seat: Seat, wait_s: float) -> wire.Declare:
        return wire.Declare(
            stage=seat.stage,
            rank=seat.rank,
            ranks=seat.ranks,
            options=self.world.options,
            tensors=declared_tensors(seat.rank, seat.ranks),
            timeout_s=wait_s,
        )

    def commitment(self, seat: Seat, version: int, wait_s: float, more: int = 0) -> wire.Commit:
        boxes = len(self.world.memory_of(seat.stage).catalog.owned_by(seat.rank)) + more
        return wire.Commit(stage=seat.stage, rank=seat.rank, version=version, boxes=boxes, timeout_s=wait_s)

    def filling(self, seat: Seat) -> int | None:
        """The version that this seat's rank has begun in the daemon's eyes, and not committed."""
        stage = self.stage(seat.stage)
        slot = stage.buffer.filling if stage is not None else None
        return slot.version if slot is not None and seat.rank in slot.begun - slot.committed else None

    def next_version(self, seat: Seat) -> int:
        stage = self.stage(seat.stage)
        if stage is None:
            return 1
        slot = stage.buffer.filling
        filling = slot.version if slot is not None and slot.version is not None else 0
        if slot is not None and seat.rank not in slot.begun:
            return filling
        return max(stage.buffer.newest_sealed or 0, seat.tried, filling) + 1

    def next_of_reader(self, seat: Seat, wait_s: float) -> wire.Request:
        assert seat.engine is not None
        if not seat.seated:
            return wire.Attach(stage=seat.stage, engine=seat.engine, rank=seat.rank, ranks=seat.ranks, timeout_s=wait_s)
        if seat.reading is not None:
            self.world.look(seat)
            return wire.Release(stage=seat.stage, lease=seat.reading.lease, rank=seat.rank)
        return wire.LeaseVersion(stage=seat.stage, engine=seat.engine, rank=seat.rank, timeout_s=wait_s)

    def copy(self, seat: Seat, count: int) -> None:
        copying = seat.copying
        assert copying is not None
        for piece in copying.left[:count]:
            piece.write(copying.stamp, poison=copying.poison)
        del copying.left[:count]

    # Rules: what clients do

    def pick(self, number: int, eligible: list[Seat]) -> Seat:
        return eligible[number % len(eligible)]

    def connected(self) -> list[Seat]:
        return [s for s in self.world.seats if self.serving and s.client is not None and s.client.identity is not None]

    def able(self, *, trainer: bool) -> list[Seat]:
        """Trainers or readers of a stage with memory that can ask something; some give up an answer for it."""
        stages = self.world.up.stages if self.serving else {}
        ready = {name for name, stage in stages.items() if stage.ready}
        return [seat for seat in self.connected() if (seat.engine is None) is trainer and seat.stage in ready]

    def buffer(self, seat: Seat) -> DoubleBuffer:
        return self.world.up.stages[seat.stage].buffer

    @precondition(lambda self: self.serving)
    @rule(rounds=st.integers(1, 6), first=seats, wait_s=waits, hire=chance)
    def trainers_work(self, rounds: int, first: int, wait_s: float, hire: bool) -> None:
        first %= len(self.trainers)
        self.all_work(self.trainers[first:] + self.trainers[:first], rounds, wait_s, hire=hire)

    @precondition(lambda self: self.serving)
    @rule(rounds=st.integers(1, 4), first=seats, wait_s=waits, hire=chance)
    def readers_work(self, rounds: int, first: int, wait_s: float, hire: bool) -> None:
        first %= len(self.readers)
        self.all_work(self.readers[first:] + self.readers[:first], rounds, wait_s, hire=hire)

    @precondition(lambda self: self.serving)
    @rule(rounds=st.integers(1, 6))
    def everybody_works(self, rounds: int) -> None:
        self.all_work(self.world.seats, rounds)

    @precondition(lambda self: self.serving)
    @rule(number=seats, wait_s=waits)
    def one_works(self, number: int, wait_s: float) -> None:
        self.work(self.pick(number, self.world.seats), wait_s)

    @precondition(lambda self: self.connected())
    @rule(number=seats, wait_s=waits, fate=fates)
    def one_works_and_something_happens_to_its_request(self, number: int, wait_s: float, fate: Fate) -> None:
        self.work(self.pick(number, self.connected()), wait_s, fate)

    def empty(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.client is None]

    @precondition(lambda self: self.empty())
    @rule(number=seats, hidden=chance, old_number=chance)
    def a_process_starts(self, number: int, hidden: bool, old_number: bool) -> None:
        process = self.world.machine.start(hidden=hidden and self.world.plan.hidden, old_number=old_number)
        self.world.employ(self.pick(number, self.empty()), process)

    @precondition(lambda self: self.empty() and self.world.idle())
    @rule(number=seats)
    def a_process_comes_back(self, number: int) -> None:
        self.world.employ(self.pick(number, self.empty()), self.world.idle()[0])

    def copying(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.copying is not None and seat.copying.left]

    @precondition(lambda self: self.copying())
    @rule(number=seats, count=st.integers(1, 3), poison=chance)
    def one_copies(self, number: int, count: int, poison: bool) -> None:
        seat = self.pick(number, self.copying())
        assert seat.copying is not None
        seat.copying.poison |= poison and len(seat.copying.left) > count
        self.copy(seat, count)

    @precondition(lambda self: self.able(trainer=True))
    @rule(number=seats, ahead=st.integers(-3, 3), wait_s=waits, again=chance)
    def one_begins_any_version(self, number: int, ahead: int, wait_s: float, again: bool) -> None:
        seat = self.pick(number, self.able(trainer=True))
        version = max(0, self.next_version(seat) + ahead)
        message = wire.Begin(stage=seat.stage, rank=seat.rank, version=version, timeout_s=wait_s, again=again)
        self.ask_wrongly(seat, message)

    def ask_wrongly(self, seat: Seat, message: wire.Request) -> None:
        """Ask for what the real client would not ask for now, also while another answer is awaited."""
        assert seat.client is not None
        seat.client.honest = False
        self.world.ask(seat, message)

    @precondition(lambda self: self.able(trainer=True))
    @rule(number=seats, kind=st.sampled_from(("abort", "goodbye", "declare", "incomplete", "far", "old")), other=chance)
    def one_trainer_does_something_else(self, number: int, kind: str, other: bool) -> None:
        seat = self.pick(number, self.able(trainer=True))
        self.ask_wrongly(seat, self.other_request_of_trainer(seat, kind, other))

    def other_request_of_trainer(self, seat: Seat, kind: str, other: bool) -> wire.Request:
        filling, sealed = self.buffer(seat).filling, self.buffer(seat).newest_sealed
        version = filling.version if filling is not None and filling.version is not None else 0
        if kind == "goodbye":
            return wire.Bye()
        if kind == "declare":
            tensors = declared_tensors(seat.rank, seat.ranks, row_missing=other)
            return self.declaration(seat, 8.0).model_copy(update={"tensors": tensors})
        if kind == "abort":
            return wire.Abort(stage=seat.stage, rank=seat.rank, version=version + other, reason="no reason")
        if kind == "incomplete":
            return self.commitment(seat, version, 1.0, more=1)
        old = kind == "old" and sealed is not None
        return self.commitment(seat, sealed if old else 1000, 1.0).model_copy(update={"again": other})

    @precondition(lambda self: self.able(trainer=False))
    @rule(
        number=seats,
        kind=st.sampled_from(("exact", "newer", "newer than read", "release", "goodbye", "attach")),
        back=st.integers(-1, 3),
        wait_s=waits,
        again=chance,
    )
    def one_reader_does_something_else(self, number: int, kind: str, back: int, wait_s: float, again: bool) -> None:
        seat = self.pick(number, self.able(trainer=False))
        message = self.other_request_of_reader(seat, kind, back, again)
        if seat.reading is None or not isinstance(message, wire.LeaseVersion):
            waiting = {"timeout_s": wait_s} if "timeout_s" in type(message).model_fields else {}
            self.ask_wrongly(seat, message.model_copy(update=waiting))

    def other_request_of_reader(self, seat: Seat, kind: str, back: int, again: bool) -> wire.Request:
        assert seat.engine is not None
        version = max(0, (self.buffer(seat).newest_sealed or 0) - back)
        if kind == "goodbye":
            return wire.Bye()
        if kind == "release":
            lease = max(0, self.buffer(seat).next_lease - 1 - back)
            return wire.Release(stage=seat.stage, lease=lease, rank=seat.rank, again=again)
        if kind == "attach":
            ranks = seat.ranks + 1
            return wire.Attach(stage=seat.stage, engine=seat.engine, rank=ranks, ranks=ranks, timeout_s=1.0)
        which = {"exact": {"version": version}, "newer": {"newer_than": version}}
        chosen = which.get(kind, {"newer_than": seat.last_read})
        lease = wire.LeaseVersion(stage=seat.stage, engine=seat.engine, rank=seat.rank, timeout_s=1.0)
        return lease.model_copy(update=chosen)

    def owed(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.client is not None and seat.client.again]

    @precondition(lambda self: self.owed())
    @rule(number=seats)
    def one_gives_up(self, number: int) -> None:
        """A client waits no longer for an answer that its lost daemon owes it."""
        client = self.pick(number, self.owed()).client
        assert client is not None
        client.asked, client.again, client.honest = None, False, False

    @precondition(lambda self: self.serving)
    @rule(name=st.sampled_from(("policy", "draft")))
    def somebody_drops_a_stage(self, name: str) -> None:
        admin, stage = self.world.admin(), self.stage(name)
        free = stage is not None and stage.ready and not stage.trainers and not stage.engines
        before = picture(self.world.up)
        answer = self.world.up.handle(admin, b"drop", wire.encode(wire.Drop(stage=name)))[0].answer
        assert isinstance(answer, wire.Done) is free, answer
        if free:
            self.world.forget(name)
        else:
            assert picture(self.world.up) == before
        self.world.up.handle(admin, b"bye", wire.encode(wire.Bye()))

    # Rules: what goes wrong

    @precondition(lambda self: self.serving and self.world.held)
    @rule()
    def a_late_request_arrives(self) -> None:
        self.world.deliver()

    @precondition(lambda self: self.connected())
    @rule(number=seats)
    def a_connection_breaks(self, number: int) -> None:
        client = self.pick(number, self.connected()).client
        assert client is not None
        self.world.break_connection(client)

    @precondition(lambda self: self.serving and self.world.dropped)
    @rule()
    def the_daemon_sees_broken_connections(self) -> None:
        self.world.see_broken()

    def taken(self) -> list[Seat]:
        return [seat for seat in self.world.seats if seat.client is not None]

    @precondition(lambda self: self.taken())
    @rule(number=seats, seen=chance)
    def a_process_dies(self, number: int, seen: bool) -> None:
        client = self.pick(number, self.taken()).client
        assert client is not None
        self.world.die(client.process)
        if seen:
            self.world.see_deaths()

    @precondition(lambda self: self.serving and self.world.watch.ended)
    @rule()
    def the_daemon_sees_deaths(self) -> None:
        self.world.see_deaths()

    @precondition(lambda self: self.taken())
    @rule(number=seats)
    def a_process_opens_another_connection(self, number: int) -> None:
        """The one before broke; or it has closed it, but no daemon was there to be told."""
        seat = self.pick(number, self.taken())
        assert seat.client is not None
        self.world.break_connection(seat.client)
        self.world.see_broken()
        self.world.employ(seat, seat.client.process)

    @rule(seconds=st.sampled_from((0.5, 1.0, 3.0, 10.0, LEASE_S)), late=chance)
    def time_passes(self, seconds: float, late: bool) -> None:
        self.world.machine.now += seconds
        if self.serving:
            self.time_has_come(late)

    @precondition(lambda self: self.serving and self.world.up.next_deadline() is not None)
    @rule(late=chance)
    def the_next_deadline_comes(self, late: bool) -> None:
        deadline = self.world.up.next_deadline()
        assert deadline is not None
        self.world.machine.now = max(self.world.machine.now, deadline)
        self.time_has_come(late)

    def time_has_come(self, late: bool) -> None:
        """The daemon's loop settles; if it is late, only behind the next thing that happens."""
        if late:
            self.world.late = True
        else:
            self.world.settle()
            deadline = self.world.up.next_deadline()
            assert deadline is None or deadline > self.world.machine.now

    @precondition(lambda self: self.serving and self.world.maker.busy)
    @rule(fate=st.one_of(st.just(GOOD), crashes))
    def memory_is_made(self, fate: Fate) -> None:
        self.world.maker.make()
        self.world.enter(lambda service: service.settle(), fate)

    @precondition(lambda self: self.serving)
    @rule(hand_over=chance)
    def the_daemon_ends(self, hand_over: bool) -> None:
        if hand_over:
            self.world.hand_over()
        else:
            self.world.crash()

    @precondition(lambda self: not self.serving)
    @rule()
    def a_daemon_starts(self) -> None:
        self.start_daemon()

    @precondition(lambda self: not self.serving)
    @rule(rounds=st.integers(1, 2))
    def a_daemon_starts_and_everybody_comes_back(self, rounds: int) -> None:
        self.start_daemon()
        self.all_work(self.world.seats, rounds)

    def start_daemon(self) -> None:
        world = self.world
        undisturbed = world.left_tokens <= {client.token for client in world.clients()}
        world.start_daemon()
        if undisturbed:
            for name, found in stage_pictures(world.up).items():
                assert any(left.get(name, found) == found for left in world.left), f"{name} is not as it was left"

    @precondition(lambda self: self.connected())
    @rule(number=seats, kind=st.sampled_from(("stolen", "second", "garbage", "protocol", "nobody", "status", "taken")))
    def somebody_says_what_is_refused(self, number: int, kind: str) -> None:
        admin = self.world.admin() if kind in ("stolen", "taken", "status") else None
        before = picture(self.world.up)
        peer, message = self.refused_message(kind, self.pick(number, self.connected()), admin)
        (out,) = self.world.up.handle(peer, b"refused", message)
        assert isinstance(out.answer, wire.StatusReport if kind == "status" else wire.Refusal), out
        assert picture(self.world.up) == before, f"{kind} was refused ({out.answer}), and changed something"
        if admin is not None:
            self.world.up.handle(admin, b"bye", wire.encode(wire.Bye()))

    def refused_message(self, kind: str, seat: Seat, admin: Peer | None) -> tuple[Peer, bytes]:
        assert seat.client is not None
        peer = self.world.peer(seat.client)
        hello = wire.Hello(protocol=wire.PROTOCOL, connection=seat.client.token, name="refused")
        match kind:
            case "stolen" if admin is not None:
                return admin, wire.encode(hello)
            case "second":
                return peer, wire.encode(hello.model_copy(update={"connection": b"second token...."}))
            case "garbage":
                return peer, b"\x81\xa4kind"
            case "protocol":
                return peer, wire.encode(hello.model_copy(update={"protocol": wire.PROTOCOL + 1}))
            case "taken" if admin is not None and seat.seated and not seat.client.process.hidden:
                unseated = Seat(seat.stage, seat.rank, seat.ranks, seat.engine)
                return admin, wire.encode(self.next_request(unseated, 1.0))
            case "status" if admin is not None:
                return admin, wire.encode(wire.Status())
        nobody = Peer(b"nobody", 0, 0, 1)
        return nobody, wire.encode(wire.Release(stage="policy", lease=1, rank=0))

    # What must hold after every step

    @invariant()
    def all_holds(self) -> None:
        type(self).steps += 1
        if self.world is not None:
            self.at_most_one_slot_is_in_each_state_and_a_free_slot_has_no_version()
            self.a_leased_slot_is_never_writable()
            self.a_complete_slot_holds_exactly_its_version()
            self.what_a_reader_sees_is_one_complete_sealed_version()
            self.versions_rise()
            self.a_sealed_version_survives_everything_but_a_later_one()
            self.nobody_waits_without_a_deadline()
            self.nobody_waits_for_itself()
            self.who_could_go_on_does_not_wait()
            self.leases_do_not_leak()
            self.slots_do_not_leak()
            self.sessions_do_not_leak()

    def stages(self) -> Iterator[tuple[str, HostedStage]]:
        if self.serving:
            yield from self.world.up.stages.items()

    def at_most_one_slot_is_in_each_state_and_a_free_slot_has_no_version(self) -> None:
        for _, stage in self.stages():
            states = Counter(slot.state for slot in stage.buffer.slots if slot.state is not SlotState.FREE)
            assert not states or max(states.values()) == 1, states
            for slot in stage.buffer.slots:
                assert (slot.version is None) == (slot.state is SlotState.FREE)
                assert slot.state is SlotState.FILLING or slot.state is SlotState.FREE or slot.committed == slot.begun
                assert slot.state is not SlotState.DRAINING or stage.buffer.leases_on(slot)

    def a_leased_slot_is_never_writable(self) -> None:
        for name, stage in self.stages():
            for lease in stage.buffer.leases.values():
                assert lease.slot.state in (SlotState.FRONT, SlotState.DRAINING)
                assert lease.slot.version == lease.version
                told = self.world.known[name].leased.get(lease.id, (lease.version, lease.slot.index))
                assert told == (lease.version, lease.slot.index)

    def a_complete_slot_holds_exactly_its_version(self) -> None:
        """Whoever may still be writing what was aborted long ago."""
        for name, stage in self.stages():
            for slot in stage.buffer.slots:
                if slot.version is not None and slot.state is not SlotState.FILLING:
                    memory = bytes(self.world.memory_of(name).slots[slot.index])
                    assert memory == self.world.known[name].images[slot.version], f"{name} {slot} is torn"

    def what_a_reader_sees_is_one_complete_sealed_version(self) -> None:
        for seat in self.world.seats:
            self.world.look(seat)
            if seat.reading is not None and not seat.reading.forsaken:
                assert not seat.reading.torn, f"{seat} reads version {seat.reading.version}, and it is torn"

    def versions_rise(self) -> None:
        while self.world.events:
            event = self.world.events.pop(0)
            if event.event == "sealed":
                known = self.world.known[event.stage]
                assert event.version is not None
                assert event.version > known.announced
                known.announced = event.version

    def a_sealed_version_survives_everything_but_a_later_one(self) -> None:
        for name, stage in self.stages():
            promised, sealed, newest = self.world.known[name].promised, stage.buffer.newest_sealed, stage.buffer.newest
            assert (newest.version if newest is not None else None) == sealed
            assert (-1 if sealed is None else sealed) >= promised, f"{name} {promised} is lost"
        if self.serving:
            kept = {name for name, known in self.world.known.items() if known.promised >= 0}
            assert kept <= set(self.world.up.stages), "a stage is lost"

    def nobody_waits_without_a_deadline(self) -> None:
        if not self.serving:
            return
        service, now = self.world.up, self.world.machine.now
        waiting = {(pending.session.identity, pending.request_id): pending for pending in service.pending.values()}
        held = [asked for _, asked in self.world.held]
        for client in self.world.clients():
            asked = client.asked
            if asked is None or client.again or asked in held:
                continue
            pending = waiting.get((client.identity, asked.request_id))
            assert pending is not None, f"{asked.message} has no answer, and nothing to wait for"
            assert asked.arrived is not None
            assert pending.deadline <= asked.arrived + asked.message.timeout_s  # type: ignore[union-attr]
        for pending in service.pending.values():
            assert self.world.late or now < pending.deadline < now + LONGEST_S + 1
            deadline = service.next_deadline()
            assert deadline is not None
            assert deadline <= pending.deadline

    def nobody_waits_for_itself(self) -> None:
        for client in self.world.clients():
            asked = client.asked
            if asked is None or client.identity is None or not self.serving:
                continue
            session = self.world.up.sessions.find(client.identity)
            pending = self.world.up.pending.get(session) if session is not None else None
            if pending is not None and asked.seat.engine is None:
                assert f"trainer rank {asked.seat.rank}" not in pending.waiting.peers, pending.waiting

    def who_could_go_on_does_not_wait(self) -> None:
        if not self.serving:
            return
        for pending in self.world.up.pending.values():
            waiting = pending.question.poll()
            assert isinstance(waiting, Waiting), f"{pending.waiting} is over, and nobody was told: {waiting}"

    def leases_do_not_leak(self) -> None:
        for _, stage in self.stages():
            for lease in stage.buffer.leases.values():
                assert lease.until <= self.world.machine.now + LEASE_S
                assert self.world.late or self.world.machine.now < lease.until
                assert lease.missing
                assert lease.engine in stage.engines, f"nobody is left of {lease}"
                assert lease.holding <= set(stage.engines[lease.engine].members)
            engines = [lease.engine for lease in stage.buffer.leases.values()]
            assert len(engines) == len(set(engines))

    def slots_do_not_leak(self) -> None:
        for name, stage in self.stages():
            filling = stage.buffer.filling
            if filling is not None:
                assert stage.trainers, f"nobody is left of those who were filling {name} {filling}"
                assert filling.begun - filling.committed <= set(stage.trainers)

    def sessions_do_not_leak(self) -> None:
        if not self.serving:
            return
        service, watch = self.world.up, self.world.watch
        held = {pid: holders for pid, (_, holders) in watch.held.items()}
        assert held == Counter(session.pid for session in service.sessions if session.pid)
        for session in service.sessions:
            assert session.pid or session.identity or session.expires is not None, f"{session} stays for ever"
            assert session.expires is None or session.expires <= self.world.machine.now + LEASE_S
        known = set(service.sessions)
        assert set(service.pending) <= known
        for stage in service.stages.values():
            members = [s for engine in stage.engines.values() for s in engine.members.values()]
            assert {*stage.trainers.values(), *members} <= known
            assert all(engine.members for engine in stage.engines.values())

    # The end

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.everybody_dies()
                self.life_goes_on()
                self.world.up.stop()
                assert not self.world.segments()
        finally:
            self.world.clean()

    def everybody_dies(self) -> None:
        """When all processes are gone and time has passed, only the versions are left."""
        world = self.world
        if not self.serving:
            self.start_daemon()
        while world.maker.busy:
            world.maker.make()
        for process in list(world.machine.running.values()):
            world.die(process)
        while world.held:
            world.deliver()
        world.see_deaths()
        world.see_broken()
        world.machine.now += LONGEST_S + LEASE_S + RETURN_S
        world.settle()
        service: Service = world.up
        assert not list(service.sessions)
        assert not service.pending
        assert not world.watch.held
        assert service.next_deadline() is None
        for stage in service.stages.values():
            assert not stage.buffer.leases
            assert stage.buffer.slot_in(SlotState.FILLING, SlotState.DRAINING) is None
        self.a_complete_slot_holds_exactly_its_version()

    def life_goes_on(self) -> None:
        """Whatever has happened, new trainers can publish, and engines can read it."""
        world = self.world
        for seat in world.seats:
            seat.tried = 0
        goal = {seat.stage: self.next_version(seat) for seat in world.seats}
        for _ in range(40):
            for seat in world.seats:
                self.work(seat)
                if world.maker.busy:
                    world.maker.make()
                    world.settle()
            if all((seat.last_read or 0) >= goal[seat.stage] for seat in world.seats if seat.engine is not None):
                return
        raise AssertionError(f"version {goal} does not come: {stage_pictures(world.up)}")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Millions of lines of log would say nothing."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.timeout(24 * 3600)  # hypothesis itself is bounded by the number of steps
def test_life(request: pytest.FixtureRequest) -> None:
    wanted = request.config.getoption("--life-steps")
    Life.steps = 0
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=math.ceil(wanted / STEPS_PER_EXAMPLE / CARRIED_OUT),
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    assert Life.steps >= wanted, f"only {Life.steps} steps"

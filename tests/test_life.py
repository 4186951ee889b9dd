# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's life as a stateful test: trainers, engines, deaths, restarts and late messages in any order.

``--life-steps N`` runs N steps; the default is for every change, a million is for a night. The world around the
daemon stands in life/.
"""

from __future__ import annotations

import logging
import math
import sys
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
from life.clients import Seat
from life.host import LEASE_S, RETURN_S
from life.laws import check_laws
from life.pictures import picture, stage_pictures
from life.work import LONGEST_S, all_work, commitment, copy, declaration, next_request, next_version, work
from life.world import GOOD, Crash, Fate, Plan, World

from stagingd import wire
from stagingd.buffer import DoubleBuffer
from stagingd.policy import Policy
from stagingd.service import Service
from stagingd.session import Peer
from stagingd.slots import SlotState

STEPS_PER_EXAMPLE = 50
CARRIED_OUT = 0.7
"""About how much of that is carried out: hypothesis varies examples, and some become short."""

seats = st.integers(0, 7)
chance = st.booleans()
waits = st.sampled_from((LONGEST_S, 8.0, 1.0))
crashes = st.builds(Fate, crash=st.sampled_from(Crash), landed=st.sampled_from((0.0, 0.3, 0.9, 1.0)))
trouble = st.one_of(st.just(GOOD), st.just(GOOD), crashes)
fates = st.one_of(st.just(Fate(hold=True)), st.just(Fate(cut=True)), crashes)


def in_turn(working: list[Seat], first: int, idle: int) -> list[Seat]:
    """These seats in an order that begins anywhere, perhaps without one of them."""
    first %= len(working)
    return [seat for seat in working[first:] + working[:first] if working.index(seat) != idle]


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
        early=st.sampled_from(((), ("a",), ("b",), ("a", "b"))),
    )
    def begin_life(
        self, ranks: int, policy: Policy, hidden: bool, second: bool, versions: int, early: tuple[str, ...]
    ) -> None:
        self.world = World(Plan(ranks, policy, hidden, second, early))
        for _ in range(versions):
            all_work(self.world, self.trainers, 6)
            all_work(self.world, self.readers, 4)

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
    @rule(rounds=st.integers(1, 6), first=seats, idle=seats, wait_s=waits, hire=chance)
    def trainers_work(self, rounds: int, first: int, idle: int, wait_s: float, hire: bool) -> None:
        all_work(self.world, in_turn(self.trainers, first, idle), rounds, wait_s, hire=hire)

    @precondition(lambda self: self.serving)
    @rule(rounds=st.integers(1, 4), first=seats, idle=seats, wait_s=waits, hire=chance)
    def readers_work(self, rounds: int, first: int, idle: int, wait_s: float, hire: bool) -> None:
        all_work(self.world, in_turn(self.readers, first, idle), rounds, wait_s, hire=hire)

    @precondition(lambda self: self.serving)
    @rule(rounds=st.integers(1, 6))
    def everybody_works(self, rounds: int) -> None:
        all_work(self.world, self.world.seats, rounds)

    @precondition(lambda self: self.serving)
    @rule(number=seats, wait_s=waits)
    def one_works(self, number: int, wait_s: float) -> None:
        work(self.world, self.pick(number, self.world.seats), wait_s)

    @precondition(lambda self: self.connected())
    @rule(number=seats, wait_s=waits, fate=fates)
    def one_works_and_something_happens_to_its_request(self, number: int, wait_s: float, fate: Fate) -> None:
        work(self.world, self.pick(number, self.connected()), wait_s, fate)

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
        seat.copying.poison |= poison and seat.copying.pieces_left > count
        copy(seat, count)

    @precondition(lambda self: self.able(trainer=True))
    @rule(number=seats, ahead=st.integers(-3, 3), wait_s=waits, again=chance)
    def one_begins_any_version(self, number: int, ahead: int, wait_s: float, again: bool) -> None:
        seat = self.pick(number, self.able(trainer=True))
        version = max(0, next_version(self.world, seat) + ahead)
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
            return declaration(self.world, seat, 8.0, row_missing=other)
        if kind == "abort":
            return wire.Abort(stage=seat.stage, rank=seat.rank, version=version + other, reason="no reason")
        if kind == "incomplete":
            return commitment(self.world, seat, version, 1.0, more=1)
        old = kind == "old" and sealed is not None
        return commitment(self.world, seat, sealed if old else 1000, 1.0).model_copy(update={"again": other})

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
        chosen = which.get(kind, {"newer_than": seat.last_read, "early": True})
        newest = wire.LeaseVersion(stage=seat.stage, engine=seat.engine, rank=seat.rank, timeout_s=1.0)
        return newest.model_copy(update=chosen)

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
        admin, stage = self.world.admin(), self.world.up.stages.get(name)
        free = stage is not None and stage.ready and not stage.trainers and not stage.engines
        before = picture(self.world.up)
        answer = self.world.say(admin, wire.encode(wire.Drop(stage=name)))[0].answer
        assert isinstance(answer, wire.Done) is free, answer
        if free:
            self.world.forget(name)
        else:
            assert picture(self.world.up) == before
        self.world.say(admin, wire.encode(wire.Bye()))

    # Rules: what goes wrong

    @precondition(lambda self: self.serving and self.world.held)
    @rule()
    def a_late_request_arrives(self) -> None:
        self.world.deliver()

    @precondition(lambda self: self.serving and len(self.world.held) > 1)
    @rule(closed=chance, fate=trouble)
    def all_late_requests_arrive_at_once(self, closed: bool, fate: Fate) -> None:
        self.world.deliver_all(fate, closed=closed)

    @precondition(lambda self: self.connected())
    @rule(first=seats, wait_s=waits, closed=chance, fate=trouble)
    def everybody_asks_at_once(self, first: int, wait_s: float, closed: bool, fate: Fate) -> None:
        for seat in in_turn(self.world.seats, first, -1):
            if seat in self.connected():
                work(self.world, seat, wait_s, Fate(hold=True))
        if self.serving:
            self.world.deliver_all(fate, closed=closed)

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
    @rule(fate=trouble)
    def the_daemon_sees_deaths(self, fate: Fate) -> None:
        self.world.see_deaths(fate)

    @precondition(lambda self: self.taken())
    @rule(number=seats)
    def a_process_opens_another_connection(self, number: int) -> None:
        """The one before broke; or it has closed it, but no daemon was there to be told."""
        self.world.reconnect(self.pick(number, self.taken()))

    @rule(seconds=st.sampled_from((0.5, 1.0, 3.0, 10.0, LEASE_S)), late=chance)
    def time_passes(self, seconds: float, late: bool) -> None:
        self.world.machine.now += seconds
        if self.serving:
            self.time_has_come(late, GOOD)

    @precondition(lambda self: self.serving and self.world.up.next_deadline() is not None)
    @rule(late=chance, fate=trouble)
    def the_next_deadline_comes(self, late: bool, fate: Fate) -> None:
        deadline = self.world.up.next_deadline()
        assert deadline is not None
        self.world.machine.now = max(self.world.machine.now, deadline)
        self.time_has_come(late, fate)

    def time_has_come(self, late: bool, fate: Fate) -> None:
        """The daemon's loop settles; if it is late, only behind the next thing that happens."""
        if late:
            self.world.late = True
            return
        self.world.settle(fate)
        deadline = self.world.up.next_deadline() if self.serving else None
        assert deadline is None or deadline > self.world.machine.now

    @precondition(lambda self: self.serving and self.world.maker.busy)
    @rule(room=chance, fate=trouble)
    def memory_is_made(self, room: bool, fate: Fate) -> None:
        self.world.maker.make(room=room)
        self.world.settle(fate)

    @precondition(lambda self: self.serving)
    @rule(hand_over=chance)
    def the_daemon_ends(self, hand_over: bool) -> None:
        self.world.end_daemon(hand_over=hand_over)

    @precondition(lambda self: self.serving)
    @rule()
    def the_daemon_is_stopped(self) -> None:
        """For good: everybody who waits is told, and a daemon that starts later finds nothing."""
        self.world.stop_daemon()

    @precondition(lambda self: not self.serving)
    @rule()
    def a_daemon_starts(self) -> None:
        self.start_daemon()

    @precondition(lambda self: not self.serving)
    @rule(rounds=st.integers(1, 2))
    def a_daemon_starts_and_everybody_comes_back(self, rounds: int) -> None:
        self.start_daemon()
        all_work(self.world, self.world.seats, rounds)

    def start_daemon(self) -> None:
        world = self.world
        living = {client.token for client in world.clients()}
        world.start_daemon()
        for name, found in stage_pictures(world.up).items():
            possible = [left[name] for left in world.left if name in left]
            if possible and all(left.tokens <= living for left in possible):
                assert found in possible, f"{name} is not as it was left"

    @precondition(lambda self: self.connected())
    @rule(number=seats, kind=st.sampled_from(("stolen", "second", "garbage", "protocol", "nobody", "status", "taken")))
    def somebody_says_what_is_refused(self, number: int, kind: str) -> None:
        admin = self.world.admin() if kind in ("taken", "status") else None
        before = picture(self.world.up)
        peer, message = self.refused_message(kind, self.pick(number, self.connected()), admin)
        (out,) = self.world.say(peer, message)
        assert isinstance(out.answer, wire.StatusReport if kind == "status" else wire.Refusal), out
        assert picture(self.world.up) == before, f"{kind} was refused ({out.answer}), and changed something"
        if admin is not None:
            self.world.say(admin, wire.encode(wire.Bye()))

    def refused_message(self, kind: str, seat: Seat, admin: Peer | None) -> tuple[Peer, bytes]:
        assert seat.client is not None
        peer = self.world.peer(seat.client)
        hello = wire.Hello(protocol=wire.PROTOCOL, connection=seat.client.token, name="refused")
        match kind:
            case "stolen":
                thief = Peer(self.world.unique("thief"), peer.uid, peer.gid, self.world.administrator.pid)
                return thief, wire.encode(hello)
            case "second":
                return peer, wire.encode(hello.model_copy(update={"connection": b"second token...."}))
            case "garbage":
                return peer, b"\x81\xa4kind"
            case "protocol":
                return peer, wire.encode(hello.model_copy(update={"protocol": wire.PROTOCOL + 1}))
            case "taken" if admin is not None and seat.seated and not seat.client.process.hidden:
                unseated = Seat(seat.stage, seat.rank, seat.ranks, seat.engine)
                request = next_request(self.world, unseated, 1.0)
                assert request is not None
                return admin, wire.encode(request)
            case "status" if admin is not None:
                return admin, wire.encode(wire.Status())
        nobody = Peer(b"nobody", 0, 0, 1)
        return nobody, wire.encode(wire.Release(stage="policy", lease=1, rank=0))

    @invariant()
    def the_laws_hold(self) -> None:
        type(self).steps += 1
        if self.world is not None:
            check_laws(self.world)

    # The end

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.everybody_dies()
                self.life_goes_on()
                self.world.stop_daemon()
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
        check_laws(world)

    def life_goes_on(self) -> None:
        """Whatever has happened, new trainers can publish, and engines can read it."""
        world = self.world
        for seat in world.seats:
            seat.tried = 0
        goal = {seat.stage: next_version(self.world, seat) for seat in world.seats}
        for _ in range(40):
            for seat in world.seats:
                work(self.world, seat)
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
    while Life.steps < wanted:
        run_state_machine_as_test(
            Life,
            settings=settings(
                max_examples=math.ceil((wanted - Life.steps) / STEPS_PER_EXAMPLE / CARRIED_OUT),
                stateful_step_count=STEPS_PER_EXAMPLE,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )

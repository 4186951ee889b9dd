# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Everything there is: a machine, its clients, and at most one daemon, which may end at any instant."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from life.clients import Asked, Client, Copying, Known, Reading, Seat
from life.host import LEASE_S, Host
from life.machine import Process, declared_tensors
from life.pictures import picture, stage_pictures
from stagingd import wire
from stagingd.policy import Policy
from stagingd.service import Outgoing, Service
from stagingd.session import Peer


class Crash(StrEnum):
    """At which instant a daemon is killed that takes a message."""

    UNREAD = "unread"
    """Before it has read the message."""

    TORN = "torn"
    """While it writes its ledgers."""

    UNSENT = "unsent"
    """After it has written them, before anybody gets an answer."""


@dataclass(frozen=True)
class Fate:
    """What happens to a request on its way.

    Attributes:
        hold: it is under way until ``World.deliver``.
        cut: its connection breaks once the daemon has taken it; the answer is lost.
        crash: the daemon is killed while it has it in hand.
        landed: with ``TORN``, which part of the bytes that it wrote to its ledgers has arrived.
    """

    hold: bool = False
    cut: bool = False
    crash: Crash | None = None
    landed: float = 0.0


GOOD = Fate()


@dataclass(frozen=True)
class Taken:
    """A request that the daemon has taken and not settled: whether its answer has to wait, and what it changed."""

    peer: Peer
    asked: Asked
    waits: bool
    changed_nothing: bool


@dataclass(frozen=True)
class Plan:
    """What one example is about."""

    ranks: int = 2
    policy: Policy = Policy.LATEST
    hidden: bool = False
    second_stage: bool = False
    early: tuple[str, ...] = ()
    """Engines that begin to read versions early."""


class World(Host):
    """Everything: the machine, at most one daemon, and all seats with their clients.

    Attributes:
        seats: the ranks that there can be, with or without a client.
        known: per stage what clients were told.
        held: requests that are under way, with where they come from.
        dropped: connections that are broken, which the daemon has yet to see.
        forsaken: tokens of connections that broke, and whose processes live on and have opened others.
        crowded: the daemon has done several things at once: what one client was told, another may have undone already.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(heartbeats=plan.hidden)
        self.plan = plan
        self.options = wire.StageOptions(policy=plan.policy)
        self.administrator = self.machine.start(hidden=False, old_number=False)
        self.seats = list(_seats(plan))
        self.known: dict[str, Known] = {}
        self.held: list[tuple[Peer, Asked]] = []
        self.dropped: list[tuple[bytes, Client]] = []
        self.forsaken: set[bytes] = set()
        self.crowded = False
        self._unique = itertools.count(1)
        self.start_daemon()

    # The daemon

    def start_daemon(self) -> None:
        """A daemon, or the successor of the one before."""
        self.start_service()
        self.see_sealed()

    def end_daemon(self, *, hand_over: bool = False) -> None:
        """The daemon is killed, or hands over: every connection is broken."""
        self.end_service(hand_over=hand_over)
        self.held.clear()
        self.dropped.clear()
        for client in self.clients():
            self.disconnect(client)

    def stop_daemon(self) -> None:
        """The daemon ends, and gives back all memory."""
        while self.maker.busy:
            self.maker.make()
        waiting = {(p.session.identity, p.request_id) for p in self.up.pending.values() if p.session.identity}
        answers = self.up.stop()
        assert {(out.identity, out.request_id) for out in answers} == waiting
        assert not self.segments(), self.segments()
        self.end_daemon()
        for stage in self.known:
            self.forget(stage)
        for seat in self.seats:
            seat.leave()

    def enter(self, call: Callable[[Service], list[Outgoing]], fate: Fate = GOOD, sender: Client | None = None) -> None:
        """Have the daemon do something, and perhaps be killed meanwhile."""
        if fate.crash is Crash.UNREAD:
            self.end_daemon()
            return
        before, ledgers = stage_pictures(self.up), self.ledgers() if fate.crash is Crash.TORN else {}
        answers = call(self.up)
        if fate.crash is None:
            self.see_sealed()
            if fate.cut and sender is not None:
                self.break_connection(sender)
            for answer in answers:
                self.answer(answer)
            self.up.tell_the_news()
            if self.late:
                self.settle()
            return
        self.end_daemon()
        if fate.crash is Crash.TORN:
            self.left.append(before)
            self.tear(ledgers, fate.landed)

    def settle(self, fate: Fate = GOOD) -> None:
        """What the daemon's loop does when a deadline has come, or memory has been made."""
        self.late = False
        self.enter(lambda service: service.settle(), fate)

    def see_sealed(self) -> None:
        """Remember what every complete version holds, as soon as it is complete."""
        for name, stage in self.up.stages.items():
            known = self.known.setdefault(name, Known())
            for slot in stage.buffer.slots:
                if slot.version is not None and slot.state.value != "filling" and slot.version not in known.images:
                    stamps = known.committed.get(slot.version, {})
                    assert len(stamps) == stage.ranks, f"{name} {slot.version} is sealed, committed: {stamps}"
                    known.images[slot.version] = self.memory_of(name).image(stamps)

    # Clients

    def clients(self) -> list[Client]:
        return list(dict.fromkeys(seat.client for seat in self.seats if seat.client is not None))

    def peer(self, client: Client) -> Peer:
        process = client.process
        return Peer(client.identity or b"", os.geteuid(), os.getegid(), 0 if process.hidden else process.pid)

    def unique(self, what: str) -> bytes:
        return f"{what}-{next(self._unique)}".encode()

    def admin(self) -> Peer:
        """A connection of a process that never has a seat."""
        peer = Peer(self.unique("admin"), os.geteuid(), os.getegid(), self.administrator.pid)
        token = peer.identity.ljust(wire.TOKEN_BYTES, b".")
        hello = wire.encode(wire.Hello(protocol=wire.PROTOCOL, connection=token, name="admin"))
        assert isinstance(self.say(peer, hello)[0].answer, wire.Welcome)
        return peer

    def say(self, peer: Peer, body: bytes) -> list[Outgoing]:
        """The daemon takes a message that is neither late nor lost. Returns the answers, its own first."""
        answers = self.up.handle(peer, b"said", body)
        self.up.tell_the_news()
        return answers

    def employ(self, seat: Seat, process: Process) -> Client:
        """A new connection object in a process, for a seat and those that share its connection."""
        seats = self.sharing(seat)
        client = Client(process, self.unique("token").ljust(wire.TOKEN_BYTES, b"."), seats)
        for each in seats:
            each.leave()
            each.client = client
        return client

    def sharing(self, seat: Seat) -> list[Seat]:
        """The seats that one process takes through one connection: rank 0 of both stages' trainers, or engines."""
        if seat.rank or seat.engine == "b":
            return [seat]
        return [s for s in self.seats if s.rank == 0 and s.engine != "b" and bool(s.engine) == bool(seat.engine)]

    def hello(self, client: Client) -> bool:
        """Connect and say hello, with the token of before. Returns whether the daemon knows the client now."""
        before, client.identity = client.identity, self.unique("identity")
        if before is not None:
            self.dropped.append((before, client))
        message = wire.Hello(protocol=wire.PROTOCOL, connection=client.token, name=str(client.seats[0]))
        (answer, *others) = self.say(self.peer(client), wire.encode(message))
        for other in others:
            self.answer(other)
        if isinstance(answer.answer, wire.Refusal):
            # Only where the number's owner before has ended, and the daemon has yet to see that.
            assert answer.answer.code == "peer_died", answer
            assert client.process.pid in self.watch.ended
            client.identity = None
            return False
        if client.asked is not None:
            client.again, client.asked.arrived = True, None
        return True

    def disconnect(self, client: Client) -> None:
        client.broken = client.broken or client.identity is not None
        client.identity = None
        if client.asked is not None:
            client.again, client.asked.arrived = True, None

    def break_connection(self, client: Client) -> None:
        """The daemon has yet to see it."""
        if client.identity is not None:
            self.dropped.append((client.identity, client))
            self.disconnect(client)

    def reconnect(self, seat: Seat) -> None:
        """Its process opens another connection, for what the one before did, which broke: the daemon has seen that."""
        assert seat.client is not None
        self.break_connection(seat.client)
        self.see_broken()
        self.forsaken.add(seat.client.token)
        self.employ(seat, seat.client.process)

    def ask(self, seat: Seat, message: wire.Request, fate: Fate = GOOD) -> None:
        """Send a request. Requests of one connection arrive in order."""
        client = seat.client
        assert client is not None
        assert client.identity is not None
        while any(peer.identity == client.identity for peer, _ in self.held):
            self.deliver()
        if self.service is None or client.identity is None:
            return  # a late request was the end of it
        if client.broken and "again" in type(message).model_fields:
            message = message.model_copy(update={"again": True})
        client.broken = False
        request_id = struct.pack("<Q", next(client.ids))
        asked = client.asked = Asked(seat, message, request_id, self.machine.now, seat.copying)
        client.again = False
        self._lets_go(seat, message)
        if fate.hold:
            self.held.append((self.peer(client), asked))
        else:
            self.take(self.peer(client), asked, fate)

    def repeat(self, client: Client, fate: Fate = GOOD) -> None:
        """Ask again what was not answered, as a client does that has found its daemon, or a successor, again."""
        assert client.asked is not None
        client.broken = True
        self.ask(client.asked.seat, client.asked.message, fate)

    def _lets_go(self, seat: Seat, message: wire.Request) -> None:
        """A trainer is through with a slot once it commits or aborts, a reader once it releases."""
        if isinstance(message, wire.Commit | wire.Abort):
            seat.tried = max(seat.tried, message.version)
        if isinstance(message, wire.Abort):
            seat.copying = None
        if isinstance(message, wire.Release) and seat.reading is not None and seat.reading.lease == message.lease:
            seat.returned, seat.reading = seat.reading, None
        if isinstance(message, wire.Bye) and seat.client is not None:
            for each in seat.client.seats:
                each.copying = each.reading = None

    def deliver(self) -> None:
        """The request that has been on its way for longest arrives, perhaps from a client that is no more."""
        self.take(*self.held.pop(0))

    def deliver_all(self, fate: Fate = GOOD, *, closed: bool = False) -> None:
        """All requests that are on their way arrive at once.

        With ``closed`` the daemon sees a connection close behind them that had said goodbye, before it settles.
        """
        requests, self.held = self.held, []
        self.enter(lambda service: self._taken(service, requests, closed=closed), GOOD if closed else fate)
        if closed:
            self.settle(fate)

    def take(self, peer: Peer, asked: Asked, fate: Fate = GOOD) -> None:
        """The daemon takes a request."""
        sender = asked.seat.client
        waits = sender is not None and sender.asked is asked
        self.enter(lambda service: self._taken(service, [(peer, asked)]), fate, sender if waits else None)

    def _taken(self, service: Service, requests: list[tuple[Peer, Asked]], *, closed: bool = False) -> list[Outgoing]:
        """What the daemon's loop does: it takes what there is, one by one, and then settles."""
        self.crowded = self.late or len(requests) > 1
        took = [self._take(service, peer, asked) for peer, asked in requests]
        if closed:
            answers = service.connection_lost(b"said goodbye")
        else:
            self.late = False
            answers = service.settle()
        for each in took:
            self._check_taken(each, answers)
        return answers

    def _take(self, service: Service, peer: Peer, asked: Asked) -> Taken:
        asked.arrived = self.machine.now
        session = service.sessions.find(peer.identity)
        fresh = session is not None and session not in service.pending
        before = picture(service)
        service.take(peer, asked.request_id, wire.encode(asked.message))
        return Taken(peer, asked, session in service.pending, not fresh or picture(service) == before)

    def _check_taken(self, taken: Taken, answers: list[Outgoing]) -> None:
        """What is refused at once must change nothing."""
        asked, to = taken.asked, (taken.peer.identity, taken.asked.request_id)
        answer = next((out.answer for out in answers if (out.identity, out.request_id) == to), None)
        refused = answer if isinstance(answer, wire.Refusal) and not taken.waits else None
        if refused is not None and refused.code not in ("non_finite_values", "version_aborted"):
            assert taken.changed_nothing, f"{asked.message} was refused ({refused}), and changed something"
        if isinstance(asked.message, wire.Commit) and (refused is None or refused.code == "non_finite_values"):
            self._note_commit(asked.seat, asked.copying, asked.message)

    def _note_commit(self, seat: Seat, copying: Copying | None, message: wire.Commit) -> None:
        if copying is not None and copying.version == message.version:
            assert not copying.left
            known = self.known.setdefault(message.stage, Known())
            known.committed.setdefault(message.version, {})[seat.rank] = copying.stamp

    # Deaths

    def idle(self) -> list[Process]:
        """Processes that have closed their connections, and may open others."""
        busy = {self.administrator, *(client.process for client in self.clients())}
        return [process for process in self.machine.running.values() if process not in busy]

    def die(self, process: Process) -> None:
        """A process ends. What it has sent may still arrive."""
        self.machine.end(process)
        for other in self.clients():
            if other.process is process:
                if other.identity is not None and self.service is not None:
                    self.dropped.append((other.identity, other))
                for seat in other.seats:
                    if seat.client is other:
                        seat.leave()

    def see_deaths(self, fate: Fate = GOOD) -> None:
        """The daemon sees which processes have ended."""
        for pid in self.watch.ended:
            if self.service is not None and pid in self.watch.held:
                self.enter(lambda service, pid=pid: service.process_gone(pid), fate)  # type: ignore[misc]

    def see_broken(self) -> None:
        """The daemon sees which connections are broken."""
        while self.dropped and self.service is not None:
            identity, client = self.dropped.pop(0)
            for seat in client.seats if client.process.hidden and self.up.sessions.find(identity) else ():
                if seat.client is client and seat.reading is not None:
                    seat.reading.forsaken = True
            self.enter(lambda service, identity=identity: service.connection_lost(identity))  # type: ignore[misc]

    # Answers

    def answer(self, out: Outgoing) -> None:
        """An answer arrives, unless its connection is no more, or nobody waits for it any longer."""
        client = next((client for client in self.clients() if client.identity == out.identity), None)
        if client is None or client.asked is None or client.asked.request_id != out.request_id:
            return
        asked, client.asked = client.asked, None
        seat, message, answer = asked.seat, asked.message, out.answer
        seat.heard = answer
        self.known.setdefault(seat.stage, Known())
        match answer:
            case wire.Declared() | wire.Attached():
                self._seated(seat, message, answer)
            case wire.Begun():
                self._begin_copying(seat, message, answer)
            case wire.Sealed():
                self._sealed(seat, message, answer)
            case wire.Leased():
                self._begin_reading(seat, message, answer, asked.sent)
            case wire.Done():
                self._done(seat, message)
            case wire.Refusal():
                self._refused(seat, message, answer)

    def _seated(self, seat: Seat, message: wire.Request, answer: wire.Declared | wire.Attached) -> None:
        known, newest = self.known[seat.stage], -1 if answer.newest is None else answer.newest
        assert newest >= known.promised, f"version {known.promised} is lost"
        assert not isinstance(message, wire.Declare) or message.tensors == declared_tensors(seat.rank, seat.ranks)
        known.promised, seat.seated = newest, True

    def _begin_copying(self, seat: Seat, message: wire.Request, answer: wire.Begun) -> None:
        assert isinstance(message, wire.Begin)
        memory = self.memory_of(seat.stage)
        slot = self.up.stages[seat.stage].buffer.slots[answer.slot]
        granted = (slot.state.value, slot.version) == ("filling", message.version)
        assert granted or self.crowded, f"{seat} begins in {slot}"
        stamp = next(self._unique)
        if answer.attempt in seat.attempts:
            self.known[seat.stage].refilled.add(answer.attempt)
        seat.attempts.add(answer.attempt)
        memory.progress[answer.slot].start(seat.rank, answer.attempt)
        left = [list(box) for box in memory.pieces(answer.slot, seat.rank)]
        seat.copying = Copying(memory, answer.slot, message.version, stamp, left)
        seat.tried = message.version

    def _sealed(self, seat: Seat, message: wire.Request, answer: wire.Sealed) -> None:
        assert isinstance(message, wire.Commit)
        assert answer.version == message.version
        known = self.known[seat.stage]
        known.promised = max(answer.version, known.promised)
        if seat.copying is not None and seat.copying.version == answer.version:
            assert not seat.copying.poison, "a version with NaN was sealed"
            seat.copying = None

    def _begin_reading(self, seat: Seat, message: wire.Request, answer: wire.Leased, sent: float) -> None:
        assert isinstance(message, wire.LeaseVersion)
        known = self.known[seat.stage]
        assert message.version in (None, answer.version)
        assert message.newer_than is None or answer.version > message.newer_than, "it is not newer"
        first = known.leased.setdefault(answer.lease, (answer.version, answer.slot))
        assert first == (answer.version, answer.slot), "two ranks of an engine read different versions"
        assert (answer.attempt is None) is (answer.version in known.images) or message.early
        assert answer.deadline_s <= LEASE_S
        memory = self.memory_of(seat.stage)
        until = sent + answer.deadline_s
        if answer.attempt is not None:
            assert message.early, "it has not asked for what is being filled"
            known.early.add(answer.lease)
        seat.reading = Reading(memory, answer.lease, answer.slot, answer.version, until, answer.attempt)
        seat.last_read, seat.returned = answer.version, None
        self.look(seat)

    def _done(self, seat: Seat, message: wire.Request) -> None:
        if isinstance(message, wire.Release):
            returned, seat.returned = seat.returned, None
            torn = returned is not None and returned.lease == message.lease and returned.torn
            assert not torn, f"{seat} was told that it read version {returned} well, but it was torn"
            known = self.known[seat.stage]
            if returned is not None and returned.lease == message.lease and returned.seen is not None:
                early = returned.seen == known.images[returned.version] or returned.attempt in known.refilled
                assert early, f"{seat} read version {returned.version} early, and otherwise than it was sealed"
        if isinstance(message, wire.Bye) and seat.client is not None:
            for each in seat.client.seats:
                each.leave()
        if isinstance(message, wire.Drop):
            self.forget(message.stage)

    def _refused(self, seat: Seat, message: wire.Request, answer: wire.Refusal) -> None:
        assert answer.code not in ("internal_error", "message_refused", "message_too_large"), answer
        if answer.code == "disconnected" and seat.client is not None:
            self.disconnect(seat.client)
        if isinstance(message, wire.Commit) and answer.code != "commit_incomplete":
            copying = seat.copying
            through = copying is not None and copying.version == message.version and not copying.left
            seat.copying = None if through else copying
        if seat.client is not None and seat.client.honest:
            process = seat.client.process
            itself = f"{seat.client.seats[0]} (pid {'not visible' if process.hidden else process.pid}) asked anew"
            assert itself not in answer.what, answer
        if answer.code == "rank_taken":
            waiting = [session for session in self.up.sessions if session.expires is not None]
            forsaken = [session for session in self.up.sessions if session.token in self.forsaken]
            held = self.watch.ended or self.dropped or self.idle() or waiting or forsaken
            assert held or self.crowded, f"{seat}: nobody holds it: {answer}"
        if answer.code == "out_of_order":
            assert self._may_be_out_of_order(seat, message), f"{seat}: {message}: {answer}"
            seat.seated = seat.seated and "speaks for rank" not in answer.what

    def _may_be_out_of_order(self, seat: Seat, message: wire.Request) -> bool:
        client, stage = seat.client, self.up.stages.get(seat.stage)
        if client is None or not client.honest or client.process.hidden or stage is None:
            return True  # one that the daemon cannot see may have lost its seat by its silence
        aborted = stage.buffer.last_abort
        return isinstance(message, wire.Commit) and aborted is not None and message.version > aborted[0]

    def look(self, seat: Seat) -> bool:
        """The reader looks at everything, if its time is not over. False: it begins early, and has to wait for more."""
        reading = seat.reading
        if reading is None or self.machine.now >= reading.until:
            return True
        held = bytes(reading.memory.slots[reading.slot])
        if reading.attempt is not None:
            progress = reading.memory.progress[reading.slot]
            if reading.seen is None and progress.has(reading.attempt, reading.memory.everything):
                reading.seen = held
            return reading.seen is not None or not progress.holds(reading.attempt)
        if held != self.known[seat.stage].images[reading.version]:
            reading.torn = True
        return True

    # Knowledge

    def forget(self, stage: str) -> None:
        """The stage was given up: another may have its name, and any version."""
        self.known[stage] = Known()
        for seat in self.seats:
            if seat.stage == stage:
                seat.copying = seat.reading = seat.returned = seat.last_read = None
                seat.tried = 0
                seat.attempts.clear()


def _seats(plan: Plan) -> Iterator[Seat]:
    for rank in range(plan.ranks):
        yield Seat("policy", rank, plan.ranks)
    yield Seat("policy", 0, 1, engine="a")
    for rank in range(2):
        yield Seat("policy", rank, 2, engine="b")
    if plan.second_stage:
        yield Seat("draft", 0, 1)
        yield Seat("draft", 0, 1, engine="a")

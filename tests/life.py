# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A machine for the stateful test: processes, a clock, shared memory, and a daemon that ends at any instant.

Nothing here judges the daemon except ``World.answer``, through which every answer goes. What must hold at all
times stands in test_life.py.
"""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stagingd import segment, superblock, wire
from stagingd.boxes import Box, whole
from stagingd.buffer import DoubleBuffer, Policy
from stagingd.catalog import Catalog, OwnedBox, TensorDeclaration
from stagingd.config import Settings
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import PeerDied, StagingError
from stagingd.moments import StoredMoments, cells_of, stored_bytes
from stagingd.segment import SHARED_MEMORY, UNFINISHED, Segment
from stagingd.service import Outgoing, Service
from stagingd.session import Peer
from stagingd.superblock import PAGE

LEASE_S = 20.0
RETURN_S = 2.0
HEARTBEAT_S = 5.0

Array = npt.NDArray[np.generic]


class Crash(StrEnum):
    """At which instant a daemon is killed that takes a message."""

    UNREAD = "unread"
    """Before it has read the message."""

    TORN = "torn"
    """While it writes its ledgers."""

    UNSENT = "unsent"
    """After it has written them, before anybody gets an answer."""


# Processes and time


@dataclass(eq=False)
class Process:
    """A client's process. The daemon does not see the number of a hidden one."""

    pid: int
    started: int
    hidden: bool
    alive: bool = True


class Machine:
    """The clock and the process table."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running: dict[int, Process] = {}
        self.numbers: list[int] = []
        self._starts = itertools.count(1)

    def clock(self) -> float:
        return self.now

    def start(self, *, hidden: bool, old_number: bool) -> Process:
        """A new process; with the number of one that has ended if so wished and there is any."""
        free = [pid for pid in self.numbers if pid not in self.running]
        pid = free[-1] if old_number and free else 100 + len(self.numbers)
        if pid not in self.numbers:
            self.numbers.append(pid)
        process = self.running[pid] = Process(pid, next(self._starts), hidden)
        return process

    def end(self, process: Process) -> None:
        process.alive = False
        self.running.pop(process.pid, None)


class Watch:
    """Stands for ``Processes``: whom one daemon watches, and how often it said so."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.held: dict[int, tuple[Process, int]] = {}

    def hold(self, pid: int) -> int:
        process, holders = self.held.get(pid, (self._machine.running.get(pid), 0))
        if process is None or not process.alive:
            raise PeerDied(f"no process has pid {pid}", remedy="start it again", peer=str(pid))
        self.held[pid] = (process, holders + 1)
        return process.started

    def release(self, pid: int) -> None:
        process, holders = self.held.pop(pid)
        if holders > 1:
            self.held[pid] = (process, holders - 1)

    @property
    def ended(self) -> list[int]:
        """The numbers of those whose end the daemon has yet to see."""
        return [pid for pid, (process, _) in self.held.items() if not process.alive]


class Maker:
    """Makes memory when it is told to, as the daemon's background thread does."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Future[Segment], Callable[[], Segment]]] = []
        self.made: list[Future[Segment]] = []

    def submit(self, work: Callable[[], Segment]) -> Future[Segment]:
        future: Future[Segment] = Future()
        self._waiting.append((future, work))
        return future

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def make(self) -> None:
        future, work = self._waiting.pop(0)
        try:
            future.set_result(work())
        except StagingError as error:
            future.set_exception(error)
        self.made.append(future)


# Shared memory


@dataclass(frozen=True)
class Piece:
    """What a trainer rank writes in one go: the elements of a box, or one of the fields of its moments."""

    array: Array
    counts_nonfinite: bool

    def write(self, stamp: int, *, poison: bool = False) -> None:
        self.array[...] = int(poison) if self.counts_nonfinite else stamp


def pieces(memory: memoryview, catalog: Catalog, rank: int) -> list[Piece]:
    """Everything in a slot that a rank writes."""
    stored = StoredMoments(memory[catalog.moments_offset :][: stored_bytes(catalog.cells)], catalog.cells)
    return [piece for owned in catalog.owned_by(rank) for piece in _pieces_of_box(memory, catalog, owned, stored)]


def _pieces_of_box(memory: memoryview, catalog: Catalog, owned: OwnedBox, stored: StoredMoments) -> Iterator[Piece]:
    tensor = catalog.tensors[owned.tensor]
    kind = np.dtype(f"u{ITEM_BYTES[tensor.dtype]}")
    elements = np.frombuffer(memory, kind, tensor.bytes // kind.itemsize, tensor.offset).reshape(tensor.shape)
    yield Piece(elements[owned.box.slices], False)
    if tensor.has_moments:
        cells = sum(cells_of(grid, tensor.shape, owned.box).volume for grid in catalog.grids)
        for name in ("mean", "m2", "amax", "nonfinite"):
            field_cells = getattr(stored, name)[owned.first_cell : owned.first_cell + cells]
            yield Piece(field_cells, name == "nonfinite")


class Memory:
    """A stage's segment as its clients map it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.segment = segment.open_existing(name, writable=True)
        self.catalog = self.segment.catalog
        self.slots = [self.segment.slot(index) for index in (0, 1)]
        self._pieces = [[pieces(slot, self.catalog, rank) for rank in range(self.catalog.ranks)] for slot in self.slots]

    def pieces(self, slot: int, rank: int) -> list[Piece]:
        return self._pieces[slot][rank]

    def image(self, stamps: dict[int, int]) -> bytes:
        """The bytes of a slot in which every rank has written everything with its stamp."""
        slot = bytearray(self.catalog.slot_bytes)
        for rank, stamp in stamps.items():
            for piece in pieces(memoryview(slot), self.catalog, rank):
                piece.write(stamp)
        return bytes(slot)

    def close(self) -> None:
        self._pieces.clear()
        self.slots.clear()
        self.segment.close()


def declared_tensors(rank: int, ranks: int, *, row_missing: bool = False) -> tuple[TensorDeclaration, ...]:
    """Rows of one tensor, the last rank one more; columns of one with moments; a replica of a third."""
    rows, columns = (2 * ranks + 1,), (2, ranks)
    own_rows = Box((2 * rank,), ((3 if rank == ranks - 1 else 2) - row_missing,))
    return (
        TensorDeclaration(name="rows", dtype="int32", shape=rows, boxes=(own_rows,)),
        TensorDeclaration(name="columns", dtype="bfloat16", shape=columns, boxes=(Box((0, rank), (2, 1)),)),
        TensorDeclaration(name="replica", dtype="int64", shape=(3,), boxes=(whole((3,)),)),
    )


# Clients


@dataclass(eq=False)
class Asked:
    """A request that has not been answered yet.

    Attributes:
        seat: for whom.
        message, request_id: what is asked.
        sent: when.
        copying: what the seat had in hand then.
        arrived: when this daemon took it, if it has.
    """

    seat: Seat
    message: wire.Request
    request_id: bytes
    sent: float
    copying: Copying | None
    arrived: float | None = None


@dataclass(eq=False)
class Client:
    """A connection object of a process, as stagingd.connection has it: one request at a time, one token.

    Attributes:
        again: the request has to be repeated: its connection is gone, or its daemon.
        broken: the connection is gone, which it finds out when it next asks for something: so that goes out again.
        honest: as long as it does what the real one does. Then it never hears that it does things out of order.
    """

    process: Process
    token: bytes
    seats: list[Seat]
    identity: bytes | None = None
    asked: Asked | None = None
    again: bool = False
    broken: bool = False
    honest: bool = True
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


@dataclass
class Copying:
    """A trainer rank fills a slot; ``left`` are the pieces to come. It may have been told long ago not to."""

    memory: Memory
    slot: int
    version: int
    stamp: int
    left: list[Piece]
    poison: bool = False


@dataclass
class Reading:
    """A reader rank reads a slot.

    Attributes:
        torn: it has seen anything but one whole version.
        forsaken: the daemon cannot see its process, and has seen its connection break: it is taken for dead.
    """

    memory: Memory
    lease: int
    slot: int
    version: int
    until: float
    torn: bool = False
    forsaken: bool = False


@dataclass(eq=False)
class Seat:
    """A rank of a stage's trainers, or of one of its engines, and the client that speaks for it at present."""

    stage: str
    rank: int
    ranks: int
    engine: str | None = None
    client: Client | None = None
    seated: bool = False
    copying: Copying | None = None
    tried: int = 0
    reading: Reading | None = None
    returned: Reading | None = None
    last_read: int | None = None

    def leave(self) -> None:
        """Whoever sat here does nothing any more."""
        self.client, self.seated = None, False
        self.copying = self.reading = self.returned = self.last_read = None

    def __str__(self) -> str:
        return f"{self.stage} {self.engine or 'trainer'} {self.rank}"


@dataclass
class Known:
    """What clients were told of a stage, or could see: it must stay true.

    Attributes:
        promised: the newest version that anybody knows to be sealed; -1 for none.
        committed: per version and rank the stamp of the last commit that the daemon took.
        images: per sealed version what its slot holds.
        leased: per lease its version and slot.
        announced: the last version whose sealing was an event.
    """

    promised: int = -1
    committed: dict[int, dict[int, int]] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    leased: dict[int, tuple[int, int]] = field(default_factory=dict)
    announced: int = -1


# Pictures of the daemon's state


def buffer_picture(buffer: DoubleBuffer) -> object:
    """All that counts in a double buffer."""
    return (
        [(slot.state, slot.version, frozenset(slot.begun), frozenset(slot.committed)) for slot in buffer.slots],
        [
            (lease.id, lease.engine, lease.slot.index, lease.version, lease.until, set(lease.holding), set(lease.done))
            for lease in buffer.leases.values()
        ],
        (buffer.newest_sealed, buffer.next_lease, buffer.last_abort, dict(buffer.lost_leases)),
    )


def stage_pictures(service: Service) -> dict[str, object]:
    """Per stage that has memory, what a successor must find."""
    return {
        name: (
            buffer_picture(stage.buffer),
            {rank: session.token for rank, session in stage.trainers.items()},
            {
                name: (engine.ranks, {rank: session.token for rank, session in engine.members.items()})
                for name, engine in stage.engines.items()
            },
        )
        for name, stage in service.stages.items()
        if stage.ready
    }


def picture(service: Service) -> object:
    """All that a refusal must not change."""
    declaring = {name: sorted(stage.declaration.by_rank) for name, stage in service.stages.items() if stage.declaration}
    revisions = {name: stage.revision for name, stage in service.stages.items()}
    used = {s for s in service.sessions if s.identity or s.expires or any(x.uses(s) for x in service.stages.values())}
    sessions = {session.token: (session.identity, session.expires) for session in used}  # the others are forgotten soon
    return stage_pictures(service), declaring, revisions, sessions, set(service.pending)


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
class Plan:
    """What one example is about."""

    ranks: int = 2
    policy: Policy = Policy.LATEST
    hidden: bool = False
    second_stage: bool = False


class World:
    """Everything: the machine, at most one daemon, and all seats with their clients."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.machine = Machine()
        self.administrator = self.machine.start(hidden=False, old_number=False)
        self.prefix = f"/stagingd-life-{os.getpid()}-{uuid.uuid4().hex[:12]}-"
        self.settings = Settings(
            runtime_dir=Path(tempfile.gettempdir()),
            segment_prefix=self.prefix,
            lock_memory=False,
            lease_s=LEASE_S,
            return_s=RETURN_S,
            heartbeat_s=HEARTBEAT_S if plan.hidden else None,
        )
        self.events: list[wire.Event] = []
        self.known: dict[str, Known] = {}
        self.memories: dict[tuple[str, int], Memory] = {}
        self.seats = list(_seats(plan))
        self.options = wire.StageOptions(policy=plan.policy)
        self.dropped: list[tuple[bytes, Client]] = []
        self.held: list[tuple[Peer, Asked]] = []
        self.late = False
        self._unique = itertools.count(1)
        self.service: Service | None = None
        self.left: list[dict[str, object]] = []
        self.left_tokens: set[bytes] = set()
        self.start_daemon()

    # The daemon

    @property
    def up(self) -> Service:
        assert self.service is not None
        return self.service

    def start_daemon(self) -> None:
        """A daemon, or the successor of the one before."""
        self.watch, self.maker = Watch(self.machine), Maker()
        service = Service(self.settings, self.machine.clock, self.events.append, self.watch, self.maker.submit)  # type: ignore[arg-type]
        service.recover()
        self.service = service
        self.late = (service.next_deadline() or self.machine.now + 1) <= self.machine.now
        self.see_sealed()

    def unplug(self) -> None:
        """The daemon is no more: what its process held is let go, and every connection is broken."""
        service, self.service = self.up, None
        segments = [stage.segment for stage in service.stages.values()]
        segments += [future.result() for future in self.maker.made if not future.exception()]
        for mapped in segments:
            if mapped is not None:
                mapped.close()
        self.held.clear()
        self.dropped.clear()
        for client in self.clients():
            self.disconnect(client)

    def crash(self) -> None:
        """The daemon is killed. Its successor must find what it had written."""
        self._leave()
        self.unplug()

    def hand_over(self) -> None:
        """The daemon ends and leaves everything to a successor."""
        self._leave()
        self.up.hand_over()
        self.unplug()

    def _leave(self) -> None:
        self.left = [stage_pictures(self.up)]
        stages = self.up.stages.values()
        self.left_tokens = {s.token for s in self.up.sessions if any(stage.uses(s) for stage in stages)}

    def enter(self, call: Callable[[Service], list[Outgoing]], fate: Fate = GOOD, sender: Client | None = None) -> None:
        """Have the daemon do something, and perhaps be killed meanwhile."""
        if fate.crash is Crash.UNREAD:
            self.crash()
            return
        before, ledgers = stage_pictures(self.up), self._ledgers() if fate.crash is Crash.TORN else {}
        told = len(self.events)
        answers = call(self.up)
        if fate.crash is None:
            self.see_sealed()
            if fate.cut and sender is not None:
                self.break_connection(sender)
            for answer in answers:
                self.answer(answer)
            if self.late:
                self.settle()
            return
        self.crash()
        if fate.crash is Crash.TORN:
            self.left.append(before)
            del self.events[told:]
            self._tear(ledgers, fate.landed)

    def settle(self) -> None:
        """What the daemon's loop does when a deadline has come."""
        self.late = False
        answers = self.up.settle()
        self.see_sealed()
        for answer in answers:
            self.answer(answer)

    def _ledgers(self) -> dict[Path, bytes]:
        return {path: _ledger(path) for path in self.segments() if not path.name.endswith(UNFINISHED)}

    def _tear(self, before: dict[Path, bytes], landed: float) -> None:
        """Of what was written since, only the first part has arrived."""
        for path, old in before.items():
            new = _ledger(path)
            changed = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
            if len(changed):
                stop = int(changed[0] + landed * (changed[-1] + 1 - changed[0]))
                with path.open("r+b") as file:
                    file.seek(PAGE)
                    file.write(new[:stop] + old[stop:])

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
        assert isinstance(self.up.handle(peer, b"hello", hello)[0].answer, wire.Welcome)
        return peer

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
        (answer, *others) = self.up.handle(self.peer(client), b"hello", wire.encode(message))
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

    def take(self, peer: Peer, asked: Asked, fate: Fate = GOOD) -> None:
        """The daemon takes a request. What it refuses must change nothing."""
        asked.arrived = self.machine.now

        def call(service: Service) -> list[Outgoing]:
            session = service.sessions.find(peer.identity)
            fresh = session is not None and session not in service.pending
            before = picture(service)
            answers = service.handle(peer, asked.request_id, wire.encode(asked.message))
            mine = [
                out.answer for out in answers if (out.identity, out.request_id) == (peer.identity, asked.request_id)
            ]
            refused = mine and isinstance(mine[0], wire.Refusal)
            if refused and fresh and mine[0].code not in ("non_finite_values", "version_aborted"):
                assert picture(service) == before, f"{asked.message} was refused ({mine[0]}), and changed something"
            if isinstance(asked.message, wire.Commit) and not (refused and mine[0].code != "non_finite_values"):
                self._note_commit(asked.seat, asked.copying, asked.message)
            return answers

        sender = asked.seat.client
        self.enter(call, fate, sender if sender is not None and sender.asked is asked else None)

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

    def see_deaths(self) -> None:
        """The daemon sees which processes have ended."""
        for pid in self.watch.ended:
            if self.service is not None and pid in self.watch.held:
                self.enter(lambda service, pid=pid: service.process_gone(pid))  # type: ignore[misc]

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
        known = self.known.setdefault(seat.stage, Known())
        match answer:
            case wire.Declared() | wire.Attached():
                newest = -1 if answer.newest is None else answer.newest
                assert newest >= known.promised, f"version {known.promised} is lost"
                known.promised = newest
                seat.seated = True
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

    def _begin_copying(self, seat: Seat, message: wire.Request, answer: wire.Begun) -> None:
        assert isinstance(message, wire.Begin)
        memory = self.memory_of(seat.stage)
        slot = self.up.stages[seat.stage].buffer.slots[answer.slot]
        assert (slot.state.value, slot.version) == ("filling", message.version), f"{seat} begins in {slot}"
        stamp = next(self._unique)
        seat.copying = Copying(memory, answer.slot, message.version, stamp, list(memory.pieces(answer.slot, seat.rank)))
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
        assert answer.version in known.images
        assert answer.deadline_s <= LEASE_S
        memory = self.memory_of(seat.stage)
        until = sent + answer.deadline_s
        seat.reading = Reading(memory, answer.lease, answer.slot, answer.version, until)
        seat.last_read, seat.returned = answer.version, None
        self.look(seat)

    def _done(self, seat: Seat, message: wire.Request) -> None:
        if isinstance(message, wire.Release):
            returned, seat.returned = seat.returned, None
            torn = returned is not None and returned.lease == message.lease and returned.torn
            assert not torn, f"{seat} was told that it read version {returned} well, but it was torn"
        if isinstance(message, wire.Bye) and seat.client is not None:
            for each in seat.client.seats:
                each.leave()
        if isinstance(message, wire.Drop):
            self.forget(message.stage)

    def _refused(self, seat: Seat, message: wire.Request, answer: wire.Refusal) -> None:
        assert answer.code not in ("internal_error", "message_refused", "message_too_large"), answer
        if answer.code == "disconnected" and seat.client is not None:
            self.disconnect(seat.client)
        copying = seat.copying
        over = answer.code != "commit_incomplete" and copying is not None and not copying.left
        if over and isinstance(message, wire.Commit) and copying.version == message.version:
            seat.copying = None
        if answer.code == "out_of_order":
            assert self._may_be_out_of_order(seat, message), f"{seat}: {message}: {answer}"
            seat.seated = seat.seated and "speaks for rank" not in answer.what

    def _may_be_out_of_order(self, seat: Seat, message: wire.Request) -> bool:
        client, stage = seat.client, self.up.stages.get(seat.stage)
        if client is None or not client.honest or client.process.hidden or stage is None:
            return True  # one that the daemon cannot see may have lost its seat by its silence
        aborted = stage.buffer.last_abort
        return isinstance(message, wire.Commit) and aborted is not None and message.version > aborted[0]

    def look(self, seat: Seat) -> None:
        """The reader looks at everything, if its time is not over."""
        reading = seat.reading
        if reading is None or self.machine.now >= reading.until:
            return
        if bytes(reading.memory.slots[reading.slot]) != self.known[seat.stage].images[reading.version]:
            reading.torn = True

    # Memory

    def memory_of(self, stage: str) -> Memory:
        """The stage's segment, mapped once for all clients."""
        name = self.prefix + stage
        key = (name, (SHARED_MEMORY / name.lstrip("/")).stat().st_ino)
        if key not in self.memories:
            self.memories[key] = Memory(name)
        return self.memories[key]

    def forget(self, stage: str) -> None:
        """The stage was given up: another may have its name, and any version."""
        self.known[stage] = Known()
        for seat in self.seats:
            if seat.stage == stage:
                seat.copying = seat.reading = seat.returned = seat.last_read = None
                seat.tried = 0

    def segments(self) -> list[Path]:
        start = self.prefix.lstrip("/")
        return [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(start)]

    def clean(self) -> None:
        """Nothing of this example stays on the machine."""
        if self.service is not None:
            self.unplug()
        for memory in self.memories.values():
            memory.close()
        for path in self.segments():
            path.unlink()


def _ledger(path: Path) -> bytes:
    with path.open("rb") as file:
        size = superblock.unpack(path.name, file.read(PAGE)).ledger_bytes
        return file.read(size)


def _seats(plan: Plan) -> Iterator[Seat]:
    for rank in range(plan.ranks):
        yield Seat("policy", rank, plan.ranks)
    yield Seat("policy", 0, 1, engine="a")
    for rank in range(2):
        yield Seat("policy", rank, 2, engine="b")
    if plan.second_stage:
        yield Seat("draft", 0, 1)
        yield Seat("draft", 0, 1, engine="a")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's mind, apart from its sockets: a request comes in, answers and events go out.

Requests are taken one by one or many in a row; ``settle`` then gives all answers that have become possible, to
these requests or to earlier ones that had to wait. What they say stands in the ledgers before. Time comes from a
clock that is passed in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from stagingd import segment, wire
from stagingd.admission import check_admitted
from stagingd.catalog import Catalog
from stagingd.config import Settings
from stagingd.declaration import Declaration, Submit
from stagingd.errors import (
    DaemonUnreachable,
    MessageRefused,
    MessageTooLarge,
    OutOfOrder,
    StagingError,
    UnknownStage,
)
from stagingd.examination import Examiner
from stagingd.hosted import HostedStage
from stagingd.liveness import Processes
from stagingd.pending import Pending, overdue
from stagingd.question import Question, Tell
from stagingd.recovery import Left, recover
from stagingd.segment import Segment
from stagingd.session import Peer, Session, Sessions
from stagingd.status import stage_status
from stagingd.waiting import Waiting

log = structlog.get_logger()

WARNED_PEERS = 1024
"""How many peers are remembered whose refused messages have been logged."""


@dataclass(frozen=True)
class Outgoing:
    """An answer on its way: to whom, to which request."""

    identity: bytes
    request_id: bytes
    answer: wire.Answer


@dataclass
class Service:
    """All stages and all sessions.

    Args:
        settings: the daemon's settings.
        clock: the machine's monotonic time in seconds, which goes on when the daemon is restarted.
        event: called with every event.
        processes: watches the clients' processes.
        submit: has memory made in the background; ``settle`` is to be called when it is done.
        wall_clock: seconds since 1970, for people.
        examiner: has sealed versions looked at; without it nobody does.
    """

    settings: Settings
    clock: Callable[[], float]
    event: Callable[[wire.Event], None]
    processes: Processes
    submit: Submit
    wall_clock: Callable[[], float] = time.time
    examiner: Examiner | None = None
    stages: dict[str, HostedStage] = field(default_factory=dict)
    pending: dict[Session, Pending] = field(default_factory=dict)
    refused_messages: int = 0

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.processes, heartbeats=self.settings.heartbeat_s is not None)
        self._started = self.clock()
        self._warned: dict[bytes, None] = {}
        self._events: list[wire.Event] = []
        self._answers: list[Outgoing] = []
        self._locking: list[Future[Segment]] = []

    # Requests

    def handle(self, peer: Peer, request_id: bytes, body: bytes) -> list[Outgoing]:
        """Take one message, and settle."""
        self.take(peer, request_id, body)
        return self._settle()

    def take(self, peer: Peer, request_id: bytes, body: bytes) -> None:
        """Take one message; a refusal changes nothing. To be followed by ``settle``."""
        try:
            request = wire.decode_request(body)
            answer = self._dispatch(peer, request_id, request)
        except StagingError as error:
            if self.sessions.find(peer.identity) is None or isinstance(error, MessageRefused | MessageTooLarge):
                self._count_refusal(peer, error)
            answer = wire.refusal(error)
        if answer is not None:
            self._answers.append(Outgoing(peer.identity, request_id, answer))

    def _count_refusal(self, peer: Peer, error: StagingError) -> None:
        """Count it, and log the first of each peer: one that sends nothing else must not fill the disk."""
        self.refused_messages += 1
        if peer.identity not in self._warned:
            who = str(self.sessions.find(peer.identity) or f"uid {peer.uid}, pid {peer.pid}")
            log.warning("message_refused", peer=who, code=error.code, what=error.what)
            self._warned[peer.identity] = None
            if len(self._warned) > WARNED_PEERS:
                del self._warned[next(iter(self._warned))]

    def _dispatch(self, peer: Peer, request_id: bytes, request: wire.Request) -> wire.Answer | None:
        """The answer, or None when it has to wait."""
        if isinstance(request, wire.Hello):
            return self._hello(peer, request)
        session = self.sessions.require(peer.identity)
        self._supersede(session)
        match request:
            case wire.Declare():
                question = self._declare(session, request)
            case wire.Begin():
                question = self._stage(request.stage).begin(session, request)
            case wire.Measure():
                question = self._stage(request.stage).measure(session, request)
            case wire.Commit():
                question = self._stage(request.stage).commit(session, request)
            case wire.LeaseVersion():
                lease_s = self.settings.lease_s
                question = self._stage(request.stage).readers.lease(session, request, lease_s)
            case wire.Release():
                question = self._stage(request.stage).readers.release(session, request)
            case wire.Attach():
                question = self._attach(session, request)
            case _:
                return self._at_once(session, request)
        return self._ask(session, request_id, request.stage, question, request.timeout_s)

    def _at_once(
        self,
        session: Session,
        request: wire.Abort | wire.Status | wire.History | wire.Report | wire.Drop | wire.Bye,
    ) -> wire.Answer:
        """The answer to a request that never waits."""
        match request:
            case wire.Abort():
                return self._stage(request.stage).abort(session, request)
            case wire.Status():
                return self.status()
            case wire.History():
                return self._history(request)
            case wire.Report():
                return self._stage(request.stage).report(session, request)
            case wire.Drop():
                return self._drop(request)
            case wire.Bye():
                self._session_gone(session, "closed its connection")
                return wire.Done()

    def _supersede(self, session: Session) -> None:
        """Who asks anew does not wait for the answer before: it has given up. So nobody's questions pile up."""
        before = self.pending.pop(session, None)
        if before is not None:
            error = OutOfOrder(
                f"{session} asked anew while it was waiting for {before.waiting.what}",
                remedy="wait for an answer before the next request, or open a second connection",
                peer=str(session),
            )
            before.question.give_up(error.what)
            self._answers += self._outgoing(before, wire.refusal(error))

    def _ask(
        self, session: Session, request_id: bytes, stage: str, question: Question, timeout_s: float
    ) -> wire.Answer | None:
        now = self.clock()
        answer = question.poll()
        if not isinstance(answer, Waiting):
            return answer
        seen = self._seen(stage)
        self.pending[session] = Pending(session, request_id, stage, question, now + timeout_s, now, answer, seen)
        return None

    def _hello(self, peer: Peer, request: wire.Hello) -> wire.Welcome:
        if request.protocol != wire.PROTOCOL:
            raise MessageRefused(
                f"{request.name} speaks protocol {request.protocol}, the daemon protocol {wire.PROTOCOL}",
                remedy="install the same version of stagingd on both sides",
            )
        check_admitted(peer, self.settings)
        here = self.sessions.find(peer.identity)
        session = self.sessions.hello(peer, request)
        self._forget_abandoned(peer)
        if session is here:
            self._supersede(session)
        else:  # who comes back asks again: the answer would go to a connection that is no more
            self.pending.pop(session, None)
        return wire.Welcome(
            protocol=wire.PROTOCOL,
            pid=os.getpid(),
            events=str(self.settings.event_socket),
            return_s=self.settings.return_s,
        )

    def _forget_abandoned(self, peer: Peer) -> None:
        """Sessions of the same process that have neither a connection nor a rank any more."""
        for session in self.sessions:
            abandoned = session.identity is None and session.pid == peer.pid and session.expires is None
            if abandoned and not any(stage.uses(session) for stage in self.stages.values()):
                self._session_gone(session, "opened another connection")

    def _stage(self, name: str) -> HostedStage:
        if name not in self.stages:
            known = ", ".join(sorted(self.stages)) or "none"
            raise UnknownStage(
                f"there is no stage {name!r}; there are: {known}",
                remedy="declare it from the trainer first, or correct the name",
                stage=name,
            )
        return self.stages[name]

    def _declare(self, session: Session, request: wire.Declare) -> Question:
        stage = self.stages.get(request.stage) or self._new_stage(request)
        question = stage.declare(session, request)
        self.stages[request.stage] = stage
        return question

    def _new_stage(self, request: wire.Declare) -> HostedStage:
        stage = HostedStage(request.stage, request.ranks, request.options, self._tell(request.stage), self.clock)
        stage.declaration = Declaration(request.stage, request.ranks, request.options, self._make_segment, self.submit)
        return stage

    def _tell(self, stage: str) -> Tell:
        def tell(event: str, version: int | None, detail: str) -> None:
            routine = event in ("begun", "leased", "released")
            (log.debug if routine else log.info)(event, stage=stage, version=version, detail=detail)
            self._events.append(wire.Event(event=event, stage=stage, version=version, detail=detail))

        return tell

    def _make_segment(self, catalog: Catalog, terms: bytes) -> Segment:
        return segment.create(
            self.settings.segment_prefix + catalog.stage,
            catalog,
            terms=terms,
            lock=self.settings.lock_memory,
            mode=self.settings.shared_mode,
            group=self.settings.group_id,
        )

    def _attach(self, session: Session, request: wire.Attach) -> Question:
        def poll() -> wire.Answer | Waiting:
            stage = self.stages.get(request.stage)
            if stage is None:
                return Waiting(f"stage {request.stage!r} to be declared", ("a trainer, none of which has declared it",))
            if stage.declaration is not None:
                return stage.declaration.awaited
            return stage.attach(session, request)

        return Question(poll)

    def _drop(self, request: wire.Drop) -> wire.Done:
        if request.again and request.stage not in self.stages:
            return wire.Done()
        stage = self._stage(request.stage)
        users = [*map(str, stage.trainers.values()), *(f"engine {engine!r}" for engine in stage.engines)]
        if users or not stage.ready:
            raise OutOfOrder(
                f"stage {stage.name!r} is in use by {', '.join(users) or 'the daemon, which is making its memory'}",
                remedy="stop them, then drop it",
                stage=stage.name,
            )
        self._remove(self.stages.pop(stage.name))
        return wire.Done()

    def _remove(self, stage: HostedStage) -> None:
        if stage.segment is not None:
            stage.segment.unlink()
            stage.segment.close()

    # Time and death

    def process_gone(self, pid: int) -> list[Outgoing]:
        """A process has ended: all its connections are gone with it."""
        for session in self.sessions:
            if session.pid == pid:
                log.warning("peer_died", peer=str(session))
                self._session_gone(session, "died")
        return self._settle()

    def connection_lost(self, identity: bytes) -> list[Outgoing]:
        """A connection is closed, by its client or because the client was silent.

        A process that can be seen may come back by another connection; what it holds is safe until it ends.
        """
        session = self.sessions.find(identity)
        if session is not None and session.pid and any(stage.uses(session) for stage in self.stages.values()):
            self.sessions.disconnect(session)
        elif session is not None:
            self._session_gone(session, "lost its connection")
        return self._settle()  # in any case: the news is told next, and messages may have been taken before

    def _session_gone(self, session: Session, how: str) -> None:
        self.sessions.remove(session)
        self.pending.pop(session, None)
        for stage in self.stages.values():
            stage.session_gone(session, how)

    def settle(self) -> list[Outgoing]:
        """Deal with what time has brought. To be called when a deadline passes or memory has been made."""
        now = self.clock()
        self._see_what_is_locked()
        if self.examiner is not None:
            self.examiner.mind(self.stages.values())
        for stage in self.stages.values():
            stage.readers.end_leases(now)
        for session in self.sessions:
            if session.expires is not None and session.expires <= now:
                self._session_gone(session, "did not come back after the daemon was restarted")
        for pending in [pending for pending in self.pending.values() if pending.deadline <= now]:
            if not self._ask_again(pending):
                del self.pending[pending.session]
                error = overdue(pending, now)
                pending.question.give_up(error.what)
                self._answers += self._outgoing(pending, wire.refusal(error))
        return self._settle()

    def _see_what_is_locked(self) -> None:
        for locked in [future for future in self._locking if future.done()]:
            self._locking.remove(locked)
            failure = locked.exception()
            if isinstance(failure, StagingError):
                log.error("not_locked", what=failure.what, remedy=failure.remedy)
            elif failure is not None:
                raise failure

    def _settle(self) -> list[Outgoing]:
        """Ask the pending questions of stages that have changed, until nothing changes any more; then write it down."""
        progress = True
        while progress:
            progress = False
            for stage in self.stages.values():
                stage.make_progress()
            for pending in [pending for pending in self.pending.values() if pending.seen != self._seen(pending.stage)]:
                progress |= self._ask_again(pending)
        self._write_down()
        answers, self._answers = self._answers, []
        return answers

    def _ask_again(self, pending: Pending) -> bool:
        """Whether a pending question has been answered now."""
        try:
            answer = pending.question.poll()
        except StagingError as error:
            answer = wire.refusal(error)
        pending.seen = self._seen(pending.stage)
        if isinstance(answer, Waiting):
            pending.waiting = answer
            return False
        del self.pending[pending.session]
        self._answers += self._outgoing(pending, answer)
        return True

    def _seen(self, stage: str) -> tuple[int, int] | None:
        found = self.stages.get(stage)
        return None if found is None else (id(found), found.occasions)

    def _write_down(self) -> None:
        """Nothing is said that does not stand in the ledgers."""
        for name in [name for name, stage in self.stages.items() if stage.deserted]:
            del self.stages[name]
        for stage in self.stages.values():
            stage.save()

    def tell_the_news(self) -> None:
        """Publish what has happened. Apart from the answers, which are awaited: they are to be sent first."""
        events, self._events = self._events, []
        for event in events:
            self.event(event)

    def next_deadline(self) -> float | None:
        """When ``settle`` has to be called next, on the clock; None for never."""
        leases = [lease.until for stage in self.stages.values() for lease in stage.buffer.leases.values()]
        expiring = [session.expires for session in self.sessions if session.expires is not None]
        return min([pending.deadline for pending in self.pending.values()] + leases + expiring, default=None)

    # Beginning and end

    def recover(self) -> None:
        """Take over what a daemon that has ended left behind. Raises NotEnoughMemory."""
        for left in recover(self.settings):
            self._adopt(left)
            if self.settings.lock_memory:
                # Clients are waiting, and the pages are there: served first, locked meanwhile.
                self._locking.append(self.submit(left.segment.lock))
        self._write_down()

    def _adopt(self, left: Left) -> None:
        expires = self.clock() + self.settings.return_s
        found = [(record, self.sessions.adopt(record, expires)) for record in left.state.members.sessions]
        dead = [Session(**record.model_dump()) for record, session in found if session is None]
        gone = iter(dead)
        sessions = [session or next(gone) for _, session in found]
        name = left.segment.catalog.stage
        stage = HostedStage.adopt(left.segment, left.terms, left.state, sessions, self._tell(name), self.clock)
        self.stages[name] = stage
        held = {slot.state.value: slot.version for slot in stage.buffer.slots if slot.version is not None}
        log.info("adopted", stage=name, leases=len(stage.buffer.leases), sessions=len(sessions), **held)
        for session in dead:
            stage.session_gone(session, "died while the daemon was away")
        stage.readers.wait_for_readers()

    def hand_over(self) -> None:
        """The daemon ends and a successor will adopt everything: nobody is told, nothing is given back."""
        self._write_down()
        for stage in self.stages.values():
            if stage.segment is not None:
                stage.segment.close()
        self.stages.clear()

    def stop(self) -> list[Outgoing]:
        """The daemon ends: everybody who waits is told, and all memory is given back."""
        answers = []
        for pending in self.pending.values():
            error = DaemonUnreachable(
                f"the daemon stopped while {pending.session} was waiting for {pending.waiting.what}",
                remedy="start it again: stagingd serve",
            )
            answers += self._outgoing(pending, wire.refusal(error))
        self.pending.clear()
        for stage in self.stages.values():
            stage.make_progress()
            self._remove(stage)
        self.stages.clear()
        return answers

    @staticmethod
    def _outgoing(pending: Pending, answer: wire.Answer) -> list[Outgoing]:
        identity = pending.session.identity
        return [] if identity is None else [Outgoing(identity, pending.request_id, answer)]

    # For people

    def status(self) -> wire.StatusReport:
        """What the daemon holds, who uses it, and what is awaited."""
        for pending in list(self.pending.values()):
            self._ask_again(pending)  # what it waits for may have changed without an occasion for it to end
        return wire.StatusReport(
            pid=os.getpid(),
            uptime_s=self.clock() - self._started,
            connections=len(self.sessions),
            refused_messages=self.refused_messages,
            stages=tuple(
                stage_status(stage, self.pending.values(), self.clock(), self.settings.lease_s)
                for stage in self.stages.values()
            ),
        )

    def _history(self, request: wire.History) -> wire.HistoryReport:
        return wire.HistoryReport(
            versions=self._stage(request.stage).history.versions(request.last),
            wall_minus_monotonic_s=self.wall_clock() - self.clock(),
        )

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's mind, apart from its sockets: a request comes in, answers and events go out.

``handle`` takes one request; ``answers`` then gives every answer that has become possible, to this
request or to an earlier one that had to wait. Time comes from a clock that is passed in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from stagingd import segment, wire
from stagingd.buffer import Waiting
from stagingd.catalog import Catalog
from stagingd.config import Settings
from stagingd.declaration import Declaration
from stagingd.errors import (
    DaemonUnreachable,
    DeadlineExceeded,
    Disconnected,
    MessageRefused,
    MessageTooLarge,
    OutOfOrder,
    StagingError,
    UnknownStage,
)
from stagingd.hosted import HostedStage, Question, Session
from stagingd.segment import Segment

log = structlog.get_logger()

WARNED_PEERS = 1024
"""How many peers are remembered whose refused messages have been logged."""


@dataclass(frozen=True)
class Outgoing:
    """An answer on its way: to whom, to which request."""

    identity: bytes
    request_id: bytes
    answer: wire.Answer


@dataclass(eq=False)
class Pending:
    """A question that waits: who asked, until when."""

    session: Session
    request_id: bytes
    stage: str
    question: Question
    deadline: float
    since: float
    waiting: Waiting


@dataclass
class Service:
    """All stages and all sessions.

    Args:
        settings: the daemon's settings.
        clock: monotonic time in seconds.
        event: called with every event.
    """

    settings: Settings
    clock: Callable[[], float]
    event: Callable[[wire.Event], None]
    stages: dict[str, HostedStage] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    lease_deadlines: dict[tuple[str, int], float] = field(default_factory=dict)
    refused_messages: int = 0

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._warned: dict[bytes, None] = {}

    # Requests

    def handle(self, identity: bytes, request_id: bytes, body: bytes) -> Iterator[Outgoing]:
        """Take one message. Yields every answer that it makes possible; a refusal changes nothing."""
        try:
            request = wire.decode_request(body)
            answer = self._dispatch(identity, request_id, request)
        except StagingError as error:
            if identity not in self.sessions or isinstance(error, MessageRefused | MessageTooLarge):
                self._count_refusal(identity, error)
            answer = wire.refusal(error)
        if answer is not None:
            yield Outgoing(identity, request_id, answer)
        yield from self._settle()

    def _count_refusal(self, identity: bytes, error: StagingError) -> None:
        """Count it, and log the first of each peer: one that sends nothing else must not fill the disk."""
        self.refused_messages += 1
        if identity not in self._warned:
            session = self.sessions.get(identity)
            log.warning("message_refused", peer=str(session or identity.hex()), code=error.code, what=error.what)
            self._warned[identity] = None
            for oldest in list(self._warned)[:-WARNED_PEERS]:
                del self._warned[oldest]

    def _dispatch(self, identity: bytes, request_id: bytes, request: wire.Request) -> wire.Answer | None:
        """The answer, or None when it has to wait."""
        if isinstance(request, wire.Hello):
            return self._hello(identity, request)
        session = self._session(identity)
        match request:
            case wire.Declare():
                question = self._declare(session, request)
            case wire.Begin():
                question = self._stage(request.stage).begin(session, request)
            case wire.Commit():
                question = self._stage(request.stage).commit(session, request)
            case wire.LeaseVersion():
                question = self._lease(session, request)
            case wire.Attach():
                question = self._attach(session, request)
            case wire.Abort():
                return self._stage(request.stage).abort(session, request)
            case wire.Release():
                return self._stage(request.stage).release(session, request)
            case wire.Status():
                return self.status()
            case wire.Drop():
                return self._drop(request.stage)
            case wire.Bye():
                self.session_gone(identity, "closed its connection")
                return wire.Done()
        return self._ask(session, request_id, request.stage, question, request.timeout_s)

    def _ask(
        self, session: Session, request_id: bytes, stage: str, question: Question, timeout_s: float
    ) -> wire.Answer | None:
        now = self.clock()
        answer = question.poll()
        if not isinstance(answer, Waiting):
            return answer
        self.pending.append(Pending(session, request_id, stage, question, now + timeout_s, now, answer))
        return None

    def _hello(self, identity: bytes, request: wire.Hello) -> wire.Welcome:
        if request.protocol != wire.PROTOCOL:
            raise MessageRefused(
                f"{request.name} speaks protocol {request.protocol}, the daemon protocol {wire.PROTOCOL}",
                remedy="install the same version of stagingd on both sides",
            )
        self.sessions.setdefault(identity, Session(identity, request.name, request.pid))
        return wire.Welcome(protocol=wire.PROTOCOL, pid=os.getpid(), events=str(self.settings.event_socket))

    def _session(self, identity: bytes) -> Session:
        if identity not in self.sessions:
            raise Disconnected(
                "the daemon does not know this connection: it was restarted, or no hello was said",
                remedy="open the stage again",
            )
        return self.sessions[identity]

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
        try:
            question = stage.declare(session, request)
        finally:
            if stage.deserted:
                self.stages.pop(request.stage, None)
        self.stages[request.stage] = stage
        return question

    def _new_stage(self, request: wire.Declare) -> HostedStage:
        def tell(event: str, version: int | None, detail: str) -> None:
            routine = event in ("begun", "leased", "released")
            (log.debug if routine else log.info)(event, stage=request.stage, version=version, detail=detail)
            self.event(wire.Event(event=event, stage=request.stage, version=version, detail=detail))

        declaration = Declaration(request.stage, request.ranks, request.options)
        return HostedStage(declaration, self._make_segment, tell)

    def _make_segment(self, catalog: Catalog) -> Segment:
        return segment.create(
            self.settings.segment_prefix + catalog.stage,
            catalog,
            lock=self.settings.lock_memory,
            mode=0o660 if self.settings.group else 0o600,
            group=self.settings.group_id,
        )

    def _attach(self, session: Session, request: wire.Attach) -> Question:
        def poll() -> wire.Answer | Waiting:
            stage = self.stages.get(request.stage)
            if stage is None:
                return Waiting(f"stage {request.stage!r} to be declared", ("a trainer, none of which has declared it",))
            if not stage.ready:
                return stage.declaration.awaited
            return stage.attach(session, request)

        return Question(poll)

    def _lease(self, session: Session, request: wire.LeaseVersion) -> Question:
        def granted(lease: int) -> float:
            key = (request.stage, lease)
            deadline = self.lease_deadlines.setdefault(key, self.clock() + self.settings.lease_s)
            return deadline - self.clock()

        return self._stage(request.stage).lease(session, request, granted)

    def _drop(self, name: str) -> wire.Done:
        stage = self._stage(name)
        users = [*map(str, stage.trainers.values()), *(f"engine {engine!r}" for engine in stage.engines)]
        if users:
            raise OutOfOrder(
                f"stage {name!r} is in use by {', '.join(users)}", remedy="stop them, then drop it", stage=name
            )
        self._remove(self.stages.pop(name))
        return wire.Done()

    def _remove(self, stage: HostedStage) -> None:
        if stage.segment is not None:
            stage.segment.unlink()
            stage.segment.close()

    # Time and death

    def session_gone(self, identity: bytes, how: str) -> None:
        """A peer is gone: its questions are forgotten and what it held is given back."""
        session = self.sessions.pop(identity, None)
        if session is None:
            return
        self.pending = [pending for pending in self.pending if pending.session is not session]
        for stage in self.stages.values():
            stage.session_gone(session, how)
        self._forget_deserted()

    def _forget_deserted(self) -> None:
        for name in [name for name, stage in self.stages.items() if stage.deserted]:
            del self.stages[name]

    def settle(self) -> Iterator[Outgoing]:
        """The answers that have become possible; call it after ``session_gone`` and when a deadline passes."""
        now = self.clock()
        for key, deadline in list(self.lease_deadlines.items()):
            if deadline <= now and key[0] in self.stages:
                self.stages[key[0]].end_lease(key[1])
        for pending in [pending for pending in self.pending if pending.deadline <= now]:
            self.pending.remove(pending)
            error = overdue(pending, now)
            pending.question.give_up(error.what)
            self._forget_deserted()
            yield self._outgoing(pending, wire.refusal(error))
        yield from self._settle()

    def _settle(self) -> Iterator[Outgoing]:
        """Ask every pending question again until nothing changes any more."""
        progress = True
        while progress:
            progress = False
            for pending in list(self.pending):
                try:
                    answer = pending.question.poll()
                except StagingError as error:
                    answer = wire.refusal(error)
                if isinstance(answer, Waiting):
                    pending.waiting = answer
                    continue
                self.pending.remove(pending)
                progress = True
                yield self._outgoing(pending, answer)
        self._forget_ended_leases()

    def _forget_ended_leases(self) -> None:
        for stage, lease in list(self.lease_deadlines):
            if stage not in self.stages or lease not in self.stages[stage].buffer.leases:
                del self.lease_deadlines[stage, lease]

    def next_deadline(self) -> float | None:
        """When ``settle`` has to be called next, on the clock; None for never."""
        return min([p.deadline for p in self.pending] + list(self.lease_deadlines.values()), default=None)

    def stop(self) -> Iterator[Outgoing]:
        """The daemon ends: everybody who waits is told, and all memory is given back."""
        for pending in self.pending:
            error = DaemonUnreachable(
                f"the daemon stopped while {pending.session} was waiting for {pending.waiting.what}",
                remedy="start it again: stagingd serve",
            )
            yield self._outgoing(pending, wire.refusal(error))
        self.pending.clear()
        for stage in self.stages.values():
            self._remove(stage)
        self.stages.clear()

    @staticmethod
    def _outgoing(pending: Pending, answer: wire.Answer) -> Outgoing:
        return Outgoing(pending.session.identity, pending.request_id, answer)

    # For people

    def status(self) -> wire.StatusReport:
        """What the daemon holds, who uses it, and what is awaited."""
        return wire.StatusReport(
            pid=os.getpid(),
            uptime_s=self.clock() - self._started,
            connections=len(self.sessions),
            refused_messages=self.refused_messages,
            stages=tuple(self._stage_status(stage) for stage in self.stages.values()),
        )

    def _stage_status(self, stage: HostedStage) -> wire.StageStatus:
        now, buffer = self.clock(), stage.buffer
        waiting = (
            f"{p.session} waits for {p.waiting.what} from {', '.join(p.waiting.peers)} since {now - p.since:.1f} s"
            for p in self.pending
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
            slots=tuple(
                wire.SlotStatus(state=s.state.value, version=s.version, committed_ranks=tuple(sorted(s.committed)))
                for s in buffer.slots
            ),
            leases=tuple(self._lease_status(stage, lease, now) for lease in buffer.leases),
            waiting=tuple(waiting),
            sealed_versions=stage.sealed_versions,
            aborted_versions=stage.aborted_versions,
            begins_kept_waiting=stage.begins_kept_waiting,
        )

    def _lease_status(self, stage: HostedStage, lease_id: int, now: float) -> wire.LeaseStatus:
        lease = stage.buffer.leases[lease_id]
        began = self.lease_deadlines.get((stage.name, lease_id), now) - self.settings.lease_s
        return wire.LeaseStatus(
            lease=lease.id,
            engine=lease.engine,
            version=lease.version,
            awaited_ranks=tuple(lease.missing),
            age_s=now - began,
        )


def overdue(pending: Pending, now: float) -> DeadlineExceeded:
    """The error of a question whose deadline has passed: what was awaited, and from whom."""
    waiting = pending.waiting
    return DeadlineExceeded(
        f"waited {now - pending.since:.1f} s for {waiting.what}; awaited: {', '.join(waiting.peers) or 'nobody'}",
        remedy="look at the peers named here (stagingd status), or allow more time",
        stage=pending.stage,
        peer=", ".join(waiting.peers),
    )

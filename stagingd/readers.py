# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The engines of one stage: who belongs to them, and what they lease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from stagingd import wire
from stagingd.buffer import DoubleBuffer
from stagingd.errors import CatalogMismatch, OutOfOrder, TooManyPeers
from stagingd.history import History
from stagingd.question import Question, Tell
from stagingd.session import Session, refuse_taken
from stagingd.slots import Lease
from stagingd.waiting import Waiting

MAX_READER_RANKS: Final = 1024
"""Ranks of all engines of a stage together: the ledger has room for their leases."""


@dataclass
class Engine:
    """A reader group: the ranks that read a version together. ``gone`` are those that were members and left."""

    ranks: int
    members: dict[int, Session] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class Readers:
    """The reader side of a stage.

    Args:
        stage: its name, for messages.
        buffer: its double buffer.
        history: is told who reads.
        tell: called with every event.
        clock: the machine's monotonic time in seconds.
    """

    def __init__(
        self, stage: str, buffer: DoubleBuffer, history: History, tell: Tell, clock: Callable[[], float]
    ) -> None:
        self.engines: dict[str, Engine] = {}
        self.changes = 0
        """Rises whenever somebody comes or goes."""
        self._stage = stage
        self._buffer = buffer
        self._history = history
        self._tell = tell
        self._clock = clock

    def attach(self, session: Session, message: wire.Attach) -> None:
        """A reader rank joins its engine."""
        engine = self.engines.get(message.engine) or self._new_engine(message)
        if engine.ranks != message.ranks or message.rank >= message.ranks:
            raise CatalogMismatch(
                f"engine {message.engine!r} rank {message.rank} of {message.ranks} attaches, "
                f"but the engine has {engine.ranks} ranks",
                remedy="give every engine its own name, and all its ranks the same count",
                stage=self._stage,
                rank=message.rank,
            )
        holder = engine.members.get(message.rank)
        refuse_taken(holder, session, f"rank {message.rank} of engine {message.engine!r}", self._stage)
        if holder not in (None, session):
            self._buffer.reader_gone(message.engine, message.rank)
            self._history.released(message.engine, message.rank, self._clock())
        if holder is not session:
            engine.members[message.rank] = session
            engine.gone.discard(message.rank)
            self.engines[message.engine] = engine
            self.changes += 1

    def _new_engine(self, message: wire.Attach) -> Engine:
        ranks = sum(engine.ranks for engine in self.engines.values())
        if ranks + message.ranks > MAX_READER_RANKS:
            raise TooManyPeers(
                f"engine {message.engine!r} has {message.ranks} ranks, and {ranks} others read stage {self._stage!r}",
                remedy=f"read a stage with at most {MAX_READER_RANKS} ranks on one node",
                stage=self._stage,
            )
        return Engine(message.ranks)

    def lease(self, session: Session, message: wire.LeaseVersion, lease_s: float) -> Question:
        """A reader rank wants a version; a lease granted for it is good for ``lease_s`` seconds."""

        def poll() -> wire.Answer | Waiting:
            engine = self._check_reader(session, message.engine, message.rank)
            now, fresh = self._clock(), self._buffer.next_lease
            lease = self._buffer.lease(
                message.engine,
                engine.ranks,
                message.rank,
                version=message.version,
                newer_than=message.newer_than,
                until=now + lease_s,
                early=message.early,
                again=message.again,
                gone=engine.gone,
            )
            if isinstance(lease, Waiting):
                return lease
            self._history.leased(lease.version, lease.engine, message.rank, now)
            if lease.id == fresh:
                self._tell("leased", lease.version, f"engine {lease.engine!r}")
            return wire.Leased(
                lease=lease.id,
                version=lease.version,
                slot=lease.slot.index,
                deadline_s=lease.until - now,
                attempt=lease.slot.attempt if lease.early else None,
            )

        return Question(poll)

    def release(self, session: Session, message: wire.Release) -> Question:
        """A reader rank has read what it needs. Of what it has read early it is told whether it counts."""

        def poll() -> wire.Answer | Waiting:
            lease = self._buffer.leases.get(message.lease)
            if lease is not None:
                self._check_reader(session, lease.engine, message.rank)
            waiting = self._buffer.release(message.lease, message.rank, again=message.again)
            if waiting is not None:
                return waiting
            if lease is not None:
                self._history.released(lease.engine, message.rank, self._clock())
            if lease is not None and lease.complete:
                self._tell("released", lease.version, f"engine {lease.engine!r}")
            return wire.Done()

        def give_up(reason: str) -> None:
            lease = self._buffer.leases.get(message.lease)
            if lease is None:
                return
            # This rank's alone: others of the engine may be reading what it does not want any more.
            self._buffer.reader_gone(lease.engine, message.rank, reason)
            if lease.id in self._buffer.leases:
                self._history.released(lease.engine, message.rank, self._clock())
            else:
                self._lease_lost(lease, reason)

        return Question(poll, give_up)

    def wait_for_readers(self) -> None:
        """A reader that cannot be seen may be reading, and not know of the restart: it was promised the time."""
        for lease in self._buffer.leases.values():
            for rank in lease.holding:
                session = self.engines[lease.engine].members[rank]
                if session.expires is not None:
                    session.expires = max(session.expires, lease.until)

    def end_leases(self, now: float) -> None:
        """Leases whose time is up are taken from the ranks that have not released them."""
        for lease in [lease for lease in self._buffer.leases.values() if lease.until <= now]:
            reason = f"engine {lease.engine!r} ranks {lease.missing} did not release version {lease.version} in time"
            self._buffer.end_lease(lease.id, reason)
            self._lease_lost(lease, reason)

    def _lease_lost(self, lease: Lease, reason: str) -> None:
        self._history.lease_lost(lease.version, lease.engine, self._clock())
        self._tell("lease_lost", lease.version, reason)

    def member(self, name: str, rank: int) -> Session | None:
        """Who speaks for a rank of an engine, if anybody does."""
        engine = self.engines.get(name)
        return None if engine is None else engine.members.get(rank)

    def session_gone(self, session: Session, how: str) -> None:
        """A peer has closed its connection or died: nobody waits for it."""
        for name, engine in list(self.engines.items()):
            for rank in [rank for rank, holder in engine.members.items() if holder is session]:
                del engine.members[rank]
                engine.gone.add(rank)
                self.changes += 1
                self._buffer.reader_gone(name, rank, f"{session} {how}", last=not engine.members)
                self._history.released(name, rank, self._clock())
            if not engine.members:
                del self.engines[name]

    def _check_reader(self, session: Session, name: str, rank: int) -> Engine:
        engine = self.engines.get(name)
        if engine is None or engine.members.get(rank) is not session:
            raise OutOfOrder(
                f"{session} speaks for rank {rank} of engine {name!r} without having attached",
                remedy="attach first",
                stage=self._stage,
                rank=rank,
            )
        return engine

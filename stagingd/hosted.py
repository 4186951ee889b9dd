# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One stage in the daemon: its declaration, segment, double buffer, trainers and engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import structlog

from stagingd import state, wire
from stagingd.buffer import DoubleBuffer
from stagingd.declaration import Declaration, Terms
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import (
    CatalogMismatch,
    CommitIncomplete,
    NonFiniteValues,
    OutOfOrder,
    RankTaken,
    StagingError,
    TooManyPeers,
    VersionAborted,
)
from stagingd.health import Health
from stagingd.history import History
from stagingd.layers import Layers
from stagingd.nonfinite import nonfinite_tensors
from stagingd.segment import Segment
from stagingd.session import Session
from stagingd.slots import Lease, Slot, SlotState
from stagingd.state import StageState
from stagingd.waiting import Waiting

log = structlog.get_logger()

MAX_READER_RANKS: Final = 1024
"""Ranks of all engines of a stage together: the ledger has room for their leases."""

Tell = Callable[[str, int | None, str], None]
"""Called with every event: its name, the version concerned and details for people."""


@dataclass
class Question:
    """A request whose answer may have to wait.

    Attributes:
        poll: answers, or says what is awaited; asked again after every change of the stage.
        give_up: undoes what the request has started; called when its deadline passes.
    """

    poll: Callable[[], wire.Answer | Waiting]
    give_up: Callable[[str], None] = lambda _: None


@dataclass
class Engine:
    """A reader group: the ranks that read a version together. ``gone`` are those that were members and left."""

    ranks: int
    members: dict[int, Session] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class HostedStage:
    """A stage from its first declaration on.

    ``save`` writes what changed to the segment's ledger, and ``adopt``
    makes the stage again from there, in a daemon that was restarted.
    """

    def __init__(
        self, name: str, ranks: int, options: wire.StageOptions, tell: Tell, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.ranks = ranks
        self.options = options
        self.declaration: Declaration | None = None
        self.terms: Terms | None = None
        self.segment: Segment | None = None
        self.trainers: dict[int, Session] = {}
        self.engines: dict[str, Engine] = {}
        self.buffer = DoubleBuffer(ranks, options.policy)
        self.history = History(ranks)
        self.health = Health()
        self.sealed_versions = 0
        self.aborted_versions = 0
        self.begins_kept_waiting = 0
        self._tell = tell
        self._clock = clock
        self._owned_bytes: dict[int, int] = {}
        self._refused: tuple[int, StagingError] | None = None
        self._changes = 0
        self._saved: int | None = None
        self._members: tuple[int, bytes] | None = None

    @property
    def ready(self) -> bool:
        """Whether all ranks have declared and the memory is there."""
        return self.segment is not None

    @cached_property
    def layers(self) -> Layers:
        """By which its health is told. Raises OutOfOrder: it is not declared yet."""
        return Layers.from_tensors([tensor.name for tensor in self._segment().catalog.tensors])

    @property
    def deserted(self) -> bool:
        """Whether it holds nothing and nobody is declaring it: it may be forgotten."""
        declaration = self.declaration
        return not self.ready and (declaration is None or not declaration.by_rank)

    @property
    def revision(self) -> int:
        """Rises with every change."""
        return self._changes + self.buffer.revision

    @property
    def occasions(self) -> int:
        """Rises with every change by which somebody's waiting can end."""
        return self._changes + self.buffer.occasions

    # What outlives the daemon

    def save(self) -> None:
        """Write the state to the segment's ledger, if it has changed since."""
        if self.segment is not None and self._saved != self.revision:
            self.segment.ledger.write(state.encode(self._state()))
            self._saved = self.revision

    def _state(self) -> dict[str, object]:
        if self._members is None or self._members[0] != self._changes:
            self._members = self._changes, state.encode(self._who_is_who())
        return {
            "members": self._members[1],
            "buffer": state.buffer_state(self.buffer),
            "sealed_versions": self.sealed_versions,
            "aborted_versions": self.aborted_versions,
            "begins_kept_waiting": self.begins_kept_waiting,
        }

    def _who_is_who(self) -> dict[str, object]:
        sessions = list(dict.fromkeys(self._sessions()))
        at = {session: index for index, session in enumerate(sessions)}
        return {
            "sessions": [session.record for session in sessions],
            "trainers": [(rank, at[session]) for rank, session in self.trainers.items()],
            "engines": [
                {
                    "name": name,
                    "ranks": engine.ranks,
                    "members": [(rank, at[session]) for rank, session in engine.members.items()],
                    "gone": list(engine.gone),
                }
                for name, engine in self.engines.items()
            ],
        }

    def _sessions(self) -> list[Session]:
        readers = [session for engine in self.engines.values() for session in engine.members.values()]
        return [*self.trainers.values(), *readers]

    def uses(self, session: Session) -> bool:
        """Whether a session speaks for a rank of this stage."""
        return session in self._sessions()

    @classmethod
    def adopt(
        cls,
        segment: Segment,
        terms: Terms,
        was: StageState,
        sessions: Sequence[Session],
        tell: Tell,
        clock: Callable[[], float],
    ) -> HostedStage:
        """Take over the stage of a daemon that has ended: front, sealed and half-filled versions, and leases.

        Args:
            segment, terms, was: what that daemon left.
            sessions: those of ``was.members``, in its order.
            tell, clock: as for the stage itself.
        """
        stage = cls(segment.catalog.stage, segment.catalog.ranks, terms.options, tell, clock)
        stage.segment, stage.terms = segment, terms
        stage.trainers = {rank: sessions[index] for rank, index in was.members.trainers}
        for engine in was.members.engines:
            members = {rank: sessions[index] for rank, index in engine.members}
            stage.engines[engine.name] = Engine(engine.ranks, members, set(engine.gone))
        stage.buffer = state.restored_buffer(was.buffer, stage.ranks, stage.options.policy)
        stage.sealed_versions = was.sealed_versions
        stage.aborted_versions = was.aborted_versions
        stage.begins_kept_waiting = was.begins_kept_waiting
        stage._restore_progress()
        stage._restore_history()
        return stage

    def _restore_history(self) -> None:
        """What is in the slots, and who uses it; all from now on, for what was before is not known."""
        now = self._clock()
        for slot in sorted(self.buffer.slots, key=lambda slot: slot.attempt):
            if slot.version is not None:
                filling = slot.state is SlotState.FILLING
                self.history.taken_over(slot.version, slot.attempt, sealed=not filling, now=now)
                if not filling:
                    self.health.sealed(slot.version, slot.attempt)
                for rank in slot.begun - slot.committed if filling else ():
                    self.history.begun(slot.version, slot.attempt, rank, now)
        for lease in self.buffer.leases.values():
            for rank in lease.holding:
                self.history.leased(lease.version, lease.engine, rank, now)

    def _restore_progress(self) -> None:
        """What the daemon that has ended said of its slots after it last wrote the ledger was told to nobody."""
        for slot in self.buffer.slots:
            progress = self._segment().progress(slot.index)
            if slot.version is None:
                progress.clear()
                continue
            if not progress.holds(slot.attempt):
                progress.begin(slot.attempt)
            if slot.state is not SlotState.FILLING:
                progress.sealed(slot.attempt)
            elif len(slot.measured) == self.ranks:
                progress.measured(slot.attempt)

    # Declaring

    def declare(self, session: Session, message: wire.Declare) -> Question:
        """A trainer rank declares its tensors, or comes back with the same ones."""
        holder, declaration = self.trainers.get(message.rank), self.declaration
        self._check_free(holder, session, f"rank {message.rank} of stage {self.name!r}")
        if self.terms is not None:
            self.terms.check_same(message, self._segment().catalog)
        elif declaration is not None:
            declaration.add(message)
        if holder not in (None, session):
            self._abort_unfinished(message.rank, f"{holder} opened another connection")
        self.trainers[message.rank] = session
        self._changes += 1

        def poll() -> wire.Answer | Waiting:
            if declaration is not None and declaration.error is not None:
                raise declaration.error
            if self.segment is None:
                return (declaration or self._founding()).awaited
            return wire.Declared(segment=self.segment.name, newest=self.buffer.newest_sealed)

        def give_up(_: str) -> None:
            if self.trainers.get(message.rank) is session:
                self._forget_declaration(message.rank)

        return Question(poll, give_up)

    def make_progress(self) -> None:
        """Take the memory that has been made, or tell the ranks why there is none."""
        declaration = self.declaration
        if declaration is None:
            return
        made = declaration.finish()
        if made is not None:
            self.segment, self.terms, self.declaration = made, declaration.terms, None
            self._changes += 1
            self._tell("declared", None, f"{len(made.catalog.tensors)} tensors, {made.size} bytes")
        elif declaration.error is not None:
            self.trainers.clear()
            self.declaration = declaration.anew()
            self._changes += 1
            self._tell("declaration_refused", None, declaration.error.what)

    def _founding(self) -> Declaration:
        if self.declaration is None:
            raise OutOfOrder(f"stage {self.name!r} is not being declared", remedy="declare it", stage=self.name)
        return self.declaration

    def _forget_declaration(self, rank: int) -> None:
        if self.declaration is not None and self.declaration.terms is None:
            self.declaration.forget(rank)
            self.trainers.pop(rank, None)
            self._changes += 1

    def _check_free(self, holder: Session | None, session: Session, what: str) -> None:
        """Refuse a rank that another session speaks for, unless it may be taken over. Raises RankTaken."""
        if holder in (None, session):
            return
        if holder.identity is None and holder.pid and (holder.pid, holder.uid) == (session.pid, session.uid):
            return  # the same process has closed that connection, and the daemon was away when it said goodbye
        raise RankTaken(
            f"{what} is held by {holder}",
            remedy="give every process its own rank and every engine its own name, and stop the other one",
            stage=self.name,
            peer=str(holder),
        )

    # Trainers

    def begin(self, session: Session, message: wire.Begin) -> Question:
        """A trainer rank wants a slot to fill."""
        waited = False

        def poll() -> wire.Answer | Waiting:
            nonlocal waited
            self._check_trainer(session, message.rank)  # each time: another connection may have taken the rank
            fresh = self.buffer.filling is None
            slot = self.buffer.begin(message.rank, message.version, again=message.again)
            if isinstance(slot, Slot):
                if fresh:
                    self._refused = None
                    self._segment().progress(slot.index).begin(slot.attempt)
                    self._tell("begun", message.version, f"slot {slot.index}")
                self.history.begun(message.version, slot.attempt, message.rank, self._clock())
                self.begins_kept_waiting += waited  # only now: a restart meanwhile would have it counted twice
                return wire.Begun(slot=slot.index, attempt=slot.attempt, waited=waited)
            waited = True
            return self._with_engines(slot)

        return Question(poll)

    def _with_engines(self, waiting: Waiting) -> Waiting:
        """Name the engines that could end the waiting, when the buffer knows of no particular one."""
        if waiting.peers:
            return waiting
        attached = tuple(f"engine {name!r}" for name in self.engines)
        return Waiting(waiting.what, attached or ("an engine, none of which has attached",))

    def measure(self, session: Session, message: wire.Measure) -> Question:
        """A trainer rank has stored all its moments, and waits for those of the others."""
        self._check_trainer(session, message.rank)
        if self._segment().catalog.format is None:
            raise OutOfOrder(
                f"rank {message.rank} measures version {message.version} of a stage whose trainers do not quantize",
                remedy="open the stage with a quantization, or commit at once",
                stage=self.name,
                rank=message.rank,
            )
        self.buffer.measure(message.rank, message.version, again=message.again)
        filling = self.buffer.filling
        self.history.measuring(message.version, message.rank, self._clock())
        if filling is not None and len(filling.measured) == self.ranks:
            self._segment().progress(filling.index).measured(filling.attempt)
            self.history.measured(message.version, self._clock())

        def measured() -> set[int]:
            filling = self.buffer.filling
            return filling.measured if filling is not None and filling.version == message.version else set()

        def poll() -> wire.Answer | Waiting:
            self._check_trainer(session, message.rank)  # each time: another connection may have taken the rank
            if message.rank not in measured():
                raise self._aborted(message.version)
            if len(measured()) == self.ranks:
                return wire.Measured(version=message.version)
            return self.buffer.awaited_measures(message.version)

        def give_up(reason: str) -> None:
            if message.rank in measured():
                self._abort(reason)

        return Question(poll, give_up)

    def _check_measured(self, segment: Segment, message: wire.Commit) -> None:
        filling = self.buffer.filling
        if segment.catalog.format is None or filling is None or filling.version != message.version:
            return
        if len(filling.measured) < self.ranks:
            raise OutOfOrder(
                f"rank {message.rank} commits version {message.version} before all ranks have measured it",
                remedy="store the moments, measure, quantize, then commit",
                version=message.version,
                rank=message.rank,
            )

    def _aborted(self, version: int) -> VersionAborted:
        _, why = self.buffer.last_abort or (None, "the daemon lost it")
        return VersionAborted(
            f"version {version} was aborted: {why}",
            remedy="begin it again, or a later one, on every rank",
            version=version,
        )

    def commit(self, session: Session, message: wire.Commit) -> Question:
        """A trainer rank has put all its boxes; the last one's commit seals the version."""
        self._check_trainer(session, message.rank)
        segment = self._segment()
        owned = len(segment.catalog.owned_by(message.rank))
        if message.boxes != owned:
            raise CommitIncomplete(
                f"rank {message.rank} commits version {message.version} with {message.boxes} of its {owned} boxes",
                remedy="put every tensor that the rank declared before the commit",
                version=message.version,
                rank=message.rank,
            )
        self._check_measured(segment, message)
        complete = self.buffer.commit(message.rank, message.version, again=message.again)
        self.history.committed(message.version, message.rank, self._bytes_of(message.rank), self._clock())
        if complete:
            self._seal(segment)

        def poll() -> wire.Answer | Waiting:
            if self._refused is not None and self._refused[0] == message.version:
                raise self._refused[1]
            if self.buffer.newest_sealed == message.version:
                return wire.Sealed(version=message.version)
            if not self._awaits_seal(message):
                raise self._aborted(message.version)
            return self.buffer.awaited_commits(message.version)

        def give_up(reason: str) -> None:
            if self._awaits_seal(message):
                self._abort(reason)

        return Question(poll, give_up)

    def _bytes_of(self, rank: int) -> int:
        """The bytes that a trainer rank puts for every version."""
        if rank not in self._owned_bytes:
            catalog = self._segment().catalog
            sizes = (
                ITEM_BYTES[catalog.tensors[owned.tensor].dtype] * owned.box.volume for owned in catalog.owned_by(rank)
            )
            self._owned_bytes[rank] = sum(sizes)
        return self._owned_bytes[rank]

    def _awaits_seal(self, message: wire.Commit) -> bool:
        """Whether what this rank has committed is still there: the version may have been begun anew since."""
        filling = self.buffer.filling
        return filling is not None and filling.version == message.version and message.rank in filling.committed

    def _seal(self, segment: Segment) -> None:
        filling = self.buffer.filling
        if filling is None or filling.version is None:
            raise OutOfOrder("no version is being filled", remedy="begin one first")
        poisoned = nonfinite_tensors(segment, filling.index)
        if poisoned:
            listed = ", ".join(f"{name} ({count})" for name, count in list(poisoned.items())[:5])
            more = f" and {len(poisoned) - 5} more tensors" if len(poisoned) > 5 else ""
            if self.options.on_non_finite is wire.OnNonFinite.REJECT:
                self._refuse(filling.version, f"{listed}{more}", next(iter(poisoned)))
                return
            log.warning("non_finite_values", stage=self.name, version=filling.version, tensors=poisoned)
        self._refused = None
        version = self.buffer.seal()
        segment.progress(filling.index).sealed(filling.attempt)
        self.sealed_versions += 1
        self.history.sealed(version, self._clock())
        self.health.sealed(version, filling.attempt)
        self._tell("sealed", version, "")

    def _refuse(self, version: int, tensors: str, first: str) -> None:
        error = NonFiniteValues(
            f"version {version} holds NaN or infinite values: {tensors}",
            remedy="look at the optimizer step that made them; the engines keep the version before",
            stage=self.name,
            version=version,
            tensor=first,
        )
        self._refused = (version, error)
        self._abort(error.what)

    def abort(self, session: Session, message: wire.Abort) -> wire.Done:
        """A trainer rank gives up the version being filled."""
        self._check_trainer(session, message.rank)
        filling = self.buffer.filling
        if filling is not None and filling.version == message.version:
            self._abort(f"rank {message.rank} gave it up: {message.reason}")
        return wire.Done()

    def _abort(self, reason: str) -> None:
        self._aborting(lambda: self.buffer.abort(reason), reason)

    def _aborting(self, abort: Callable[[], int | None], reason: str) -> None:
        """Do what may abort a version, and say so where it did: to those who read it early by its slot, too."""
        filling = self.buffer.filling
        early = [] if filling is None else self.buffer.leases_on(filling)
        version = abort()
        if version is None or filling is None:
            return
        self._segment().progress(filling.index).clear()
        self.aborted_versions += 1
        self.history.aborted(version, reason, self._clock())
        self._tell("aborted", version, reason)
        for lease in early:
            self._tell("lease_lost", version, f"engine {lease.engine!r} began to read it early")

    # Readers

    def attach(self, session: Session, message: wire.Attach) -> wire.Answer:
        """A reader rank joins its engine."""
        engine = self.engines.get(message.engine) or self._new_engine(message)
        if engine.ranks != message.ranks or message.rank >= message.ranks:
            raise CatalogMismatch(
                f"engine {message.engine!r} rank {message.rank} of {message.ranks} attaches, "
                f"but the engine has {engine.ranks} ranks",
                remedy="give every engine its own name, and all its ranks the same count",
                stage=self.name,
                rank=message.rank,
            )
        holder = engine.members.get(message.rank)
        self._check_free(holder, session, f"rank {message.rank} of engine {message.engine!r}")
        if holder not in (None, session):
            self.buffer.reader_gone(message.engine, message.rank)
            self.history.released(message.engine, message.rank, self._clock())
        if holder is not session:
            engine.members[message.rank] = session
            engine.gone.discard(message.rank)
            self.engines[message.engine] = engine
            self._changes += 1
        return wire.Attached(segment=self._segment().name, newest=self.buffer.newest_sealed)

    def _new_engine(self, message: wire.Attach) -> Engine:
        ranks = sum(engine.ranks for engine in self.engines.values())
        if ranks + message.ranks > MAX_READER_RANKS:
            raise TooManyPeers(
                f"engine {message.engine!r} has {message.ranks} ranks, and {ranks} others read stage {self.name!r}",
                remedy=f"read a stage with at most {MAX_READER_RANKS} ranks on one node",
                stage=self.name,
            )
        return Engine(message.ranks)

    def lease(
        self, session: Session, message: wire.LeaseVersion, clock: Callable[[], float], lease_s: float
    ) -> Question:
        """A reader rank wants a version; a lease granted for it is good for ``lease_s`` seconds."""

        def poll() -> wire.Answer | Waiting:
            engine = self._check_reader(session, message.engine, message.rank)
            now, fresh = clock(), self.buffer.next_lease
            lease = self.buffer.lease(
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
            self.history.leased(lease.version, lease.engine, message.rank, now)
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
            lease = self.buffer.leases.get(message.lease)
            if lease is not None:
                self._check_reader(session, lease.engine, message.rank)
            waiting = self.buffer.release(message.lease, message.rank, again=message.again)
            if waiting is not None:
                return waiting
            if lease is not None:
                self.history.released(lease.engine, message.rank, self._clock())
            if lease is not None and lease.complete:
                self._tell("released", lease.version, f"engine {lease.engine!r}")
            return wire.Done()

        def give_up(reason: str) -> None:
            lease = self.buffer.end_lease(message.lease, reason)
            if lease is not None:
                self._lease_lost(lease, reason)

        return Question(poll, give_up)

    def wait_for_readers(self) -> None:
        """A reader that cannot be seen may be reading, and not know of the restart: it was promised the time."""
        for lease in self.buffer.leases.values():
            for rank in lease.holding:
                session = self.engines[lease.engine].members[rank]
                if session.expires is not None:
                    session.expires = max(session.expires, lease.until)

    def end_leases(self, now: float) -> None:
        """Leases whose time is up are taken from the ranks that have not released them."""
        for lease in [lease for lease in self.buffer.leases.values() if lease.until <= now]:
            reason = f"engine {lease.engine!r} ranks {lease.missing} did not release version {lease.version} in time"
            self.buffer.end_lease(lease.id, reason)
            self._lease_lost(lease, reason)

    def _lease_lost(self, lease: Lease, reason: str) -> None:
        self.history.lease_lost(lease.version, lease.engine, self._clock())
        self._tell("lease_lost", lease.version, reason)

    def report(self, session: Session, message: wire.Report) -> wire.Done:
        """A reader rank tells of itself, by any connection of its process."""
        engine = self.engines.get(message.engine)
        member = None if engine is None else engine.members.get(message.rank)
        if member is None or (member.pid, member.uid) != (session.pid, session.uid):
            raise OutOfOrder(
                f"{session} reports for rank {message.rank} of engine {message.engine!r}, which another process is, "
                "or none",
                remedy="attach first, and report from the same process",
                stage=self.name,
                rank=message.rank,
            )
        self.health.reported(self.layers, message.version, message.engine, message.rank, message.errors)
        if message.what == "examined":
            return wire.Done()
        self.history.reported(
            message.version,
            "swap" if message.what == "swapped" else "update",
            message.engine,
            message.rank,
            end_s=self._clock() - message.ago_s,
            seconds=message.seconds,
            size=message.bytes,
        )
        return wire.Done()

    # Both

    def session_gone(self, session: Session, how: str) -> None:
        """A peer has closed its connection or died: what it held is given back at once."""
        for rank in [rank for rank, holder in self.trainers.items() if holder is session]:
            del self.trainers[rank]
            self._changes += 1
            self._forget_declaration(rank)
            self._abort_unfinished(rank, f"{session} {how}")
        for name, engine in list(self.engines.items()):
            for rank in [rank for rank, holder in engine.members.items() if holder is session]:
                del engine.members[rank]
                engine.gone.add(rank)
                self._changes += 1
                self.buffer.reader_gone(name, rank, f"{session} {how}", last=not engine.members)
                self.history.released(name, rank, self._clock())
            if not engine.members:
                del self.engines[name]

    def _abort_unfinished(self, rank: int, why: str) -> None:
        reason = f"trainer rank {rank}: {why}"
        self._aborting(lambda: self.buffer.trainer_gone(rank, reason, there=self.trainers), reason)

    def _segment(self) -> Segment:
        if self.segment is None:
            raise OutOfOrder(
                f"stage {self.name!r} is not declared yet", remedy="declare it on every rank first", stage=self.name
            )
        return self.segment

    def _check_trainer(self, session: Session, rank: int) -> None:
        self._segment()
        if self.trainers.get(rank) is not session:
            raise OutOfOrder(
                f"{session} speaks for rank {rank} of stage {self.name!r} without having declared it",
                remedy="declare first",
                stage=self.name,
                rank=rank,
            )

    def _check_reader(self, session: Session, name: str, rank: int) -> Engine:
        engine = self.engines.get(name)
        if engine is None or engine.members.get(rank) is not session:
            raise OutOfOrder(
                f"{session} speaks for rank {rank} of engine {name!r} without having attached",
                remedy="attach first",
                stage=self.name,
                rank=rank,
            )
        return engine

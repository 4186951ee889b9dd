# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One stage in the daemon: its declaration, segment, double buffer, trainers and engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import structlog

from stagingd import state, wire
from stagingd.buffer import DoubleBuffer
from stagingd.declaration import Declaration, Terms
from stagingd.dtypes import ITEM_BYTES
from stagingd.errors import (
    CommitIncomplete,
    NonFiniteValues,
    OutOfOrder,
    StagingError,
    VersionAborted,
)
from stagingd.health import Health
from stagingd.history import History
from stagingd.layers import Layers
from stagingd.nonfinite import nonfinite_tensors
from stagingd.question import Question, Tell
from stagingd.readers import Engine, Readers
from stagingd.segment import Segment
from stagingd.session import Session, refuse_taken
from stagingd.slots import Slot, SlotState
from stagingd.state import StageState
from stagingd.waiting import Waiting

log = structlog.get_logger()


class HostedStage:
    """A stage from its first declaration on.

    ``save`` writes what changed to the segment's ledger, and ``adopt``
    makes the stage again from there, in a daemon that was restarted.
    """

    def __init__(
        self,
        name: str,
        ranks: int,
        options: wire.StageOptions,
        tell: Tell,
        clock: Callable[[], float],
        buffer: DoubleBuffer | None = None,
    ) -> None:
        self.name = name
        self.ranks = ranks
        self.options = options
        self.declaration: Declaration | None = None
        self.terms: Terms | None = None
        self.segment: Segment | None = None
        self.trainers: dict[int, Session] = {}
        self.buffer = buffer or DoubleBuffer(ranks, options.policy)
        self.history = History(ranks)
        self.readers = Readers(name, self.buffer, self.history, tell, clock)
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
        return self._members_changed + self.buffer.revision

    @property
    def occasions(self) -> int:
        """Rises with every change by which somebody's waiting can end."""
        return self._members_changed + self.buffer.occasions

    @property
    def _members_changed(self) -> int:
        return self._changes + self.readers.changes

    # What outlives the daemon

    def save(self) -> None:
        """Write the state to the segment's ledger, if it has changed since."""
        if self.segment is not None and self._saved != self.revision:
            self.segment.ledger.write(state.encode(self._state()))
            self._saved = self.revision

    def _state(self) -> dict[str, object]:
        if self._members is None or self._members[0] != self._members_changed:
            self._members = self._members_changed, state.encode(self._who_is_who())
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
        name, ranks = segment.catalog.stage, segment.catalog.ranks
        buffer = state.restored_buffer(was.buffer, ranks, terms.options.policy)
        stage = cls(name, ranks, terms.options, tell, clock, buffer)
        stage.segment, stage.terms = segment, terms
        stage.trainers = {rank: sessions[index] for rank, index in was.members.trainers}
        for engine in was.members.engines:
            members = {rank: sessions[index] for rank, index in engine.members}
            stage.readers.engines[engine.name] = Engine(engine.ranks, members, set(engine.gone))
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
        refuse_taken(holder, session, f"rank {message.rank} of stage {self.name!r}", self.name)
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
        """A trainer rank has stored the moments of what it quantizes, and waits for those of the others."""
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

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines that are attached, by name."""
        return self.readers.engines

    def attach(self, session: Session, message: wire.Attach) -> wire.Answer:
        """A reader rank joins its engine."""
        segment = self._segment()
        self.readers.attach(session, message)
        return wire.Attached(segment=segment.name, newest=self.buffer.newest_sealed)

    def report(self, session: Session, message: wire.Report) -> wire.Done:
        """A reader rank tells of itself, by any connection of its process."""
        member = self.readers.member(message.engine, message.rank)
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
        self.readers.session_gone(session, how)

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

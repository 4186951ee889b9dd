# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One stage in the daemon: its declaration, segment, double buffer, trainers and engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from stagingd import wire
from stagingd.boxes import Box
from stagingd.buffer import DoubleBuffer, Slot, Waiting
from stagingd.catalog import Catalog
from stagingd.declaration import Declaration
from stagingd.errors import (
    CatalogMismatch,
    CommitIncomplete,
    NonFiniteValues,
    OutOfOrder,
    RankTaken,
    StagingError,
    VersionAborted,
)
from stagingd.moments import cells_of
from stagingd.segment import Segment

log = structlog.get_logger()


@dataclass(eq=False)
class Session:
    """A connection that has said hello."""

    identity: bytes
    name: str
    pid: int

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


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
    """A reader group: the ranks that read a version together."""

    ranks: int
    members: dict[int, Session] = field(default_factory=dict)


class HostedStage:
    """A stage from its first declaration on.

    Args:
        declaration: the collecting declaration of its first rank.
        make_segment: allocates the memory once the catalog is known.
        tell: called with every event: its name, the version concerned and details for people.
    """

    def __init__(
        self,
        declaration: Declaration,
        make_segment: Callable[[Catalog], Segment],
        tell: Callable[[str, int | None, str], None],
    ) -> None:
        self.name = declaration.stage
        self.declaration = declaration
        self.trainers: dict[int, Session] = {}
        self.engines: dict[str, Engine] = {}
        self.segment: Segment | None = None
        self.buffer = DoubleBuffer(declaration.ranks, declaration.options.policy)
        self.sealed_versions = 0
        self.aborted_versions = 0
        self.begins_kept_waiting = 0
        self._make_segment = make_segment
        self._tell = tell
        self._refused: tuple[int, StagingError] | None = None

    @property
    def ready(self) -> bool:
        """Whether all ranks have declared and the memory is there."""
        return self.segment is not None

    @property
    def deserted(self) -> bool:
        """Whether it holds nothing and nobody is declaring it: it may be forgotten."""
        return not self.ready and not self.declaration.by_rank

    # Trainers

    def declare(self, session: Session, message: wire.Declare) -> Question:
        """A trainer rank declares its tensors, or comes back with the same ones."""
        holder = self.trainers.get(message.rank)
        if holder not in (None, session):
            raise RankTaken(
                f"rank {message.rank} of stage {self.name!r} is held by {holder}",
                remedy="give every trainer process its own rank, and stop the other one",
                stage=self.name,
                rank=message.rank,
                peer=str(holder),
            )
        declaration = self.declaration
        if self.ready:
            declaration.check_same(message)
        else:
            self._add_declaration(message)
        self.trainers[message.rank] = session

        def poll() -> wire.Answer | Waiting:
            if declaration.error is not None:
                raise declaration.error
            if self.segment is None:
                return declaration.awaited
            newest = self.buffer.newest_sealed
            return wire.Declared(segment=self.segment.name, newest=newest)

        return Question(poll, lambda _: self._forget_declaration(message.rank))

    def _add_declaration(self, message: wire.Declare) -> None:
        try:
            catalog = self.declaration.add(message)
            if catalog is not None:
                self.segment = self._make_segment(catalog)
                self._tell("declared", None, f"{len(catalog.tensors)} tensors, {self.segment.size} bytes")
        except CatalogMismatch:
            raise  # this rank is wrong; the others' declaration stands
        except StagingError as error:
            self.declaration.error = error
            self.trainers.clear()
            options = self.declaration.options
            self.declaration = Declaration(self.name, self.declaration.ranks, options)
            raise

    def _forget_declaration(self, rank: int) -> None:
        if not self.ready:
            self.declaration.by_rank.pop(rank, None)
            self.trainers.pop(rank, None)

    def begin(self, session: Session, message: wire.Begin) -> Question:
        """A trainer rank wants a slot to fill."""
        self._check_trainer(session, message.rank)
        waited = False

        def poll() -> wire.Answer | Waiting:
            nonlocal waited
            fresh = self.buffer.filling is None
            slot = self.buffer.begin(message.rank, message.version)
            if isinstance(slot, Slot):
                if fresh:
                    self._refused = None
                    self._tell("begun", message.version, f"slot {slot.index}")
                return wire.Begun(slot=slot.index, waited=waited)
            if not waited:
                waited = True
                self.begins_kept_waiting += 1
            return self._with_engines(slot)

        return Question(poll)

    def _with_engines(self, waiting: Waiting) -> Waiting:
        """Name the engines that could end the waiting, when the buffer knows of no particular one."""
        if waiting.peers:
            return waiting
        attached = tuple(f"engine {name!r}" for name in self.engines)
        return Waiting(waiting.what, attached or ("an engine, none of which has attached",))

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
        if self.buffer.commit(message.rank, message.version):
            self._seal(segment)

        def poll() -> wire.Answer | Waiting:
            if self._refused is not None and self._refused[0] == message.version:
                raise self._refused[1]
            if self.buffer.newest_sealed == message.version:
                return wire.Sealed(version=message.version)
            if self.buffer.filling is None:
                _, why = self.buffer.last_abort or (None, "the daemon lost it")
                raise VersionAborted(
                    f"version {message.version} was aborted: {why}",
                    remedy="begin it again, or a later one, on every rank",
                    version=message.version,
                )
            return self.buffer.awaited_commits(message.version)

        return Question(poll, self._abort)

    def _seal(self, segment: Segment) -> None:
        filling = self.buffer.filling
        if filling is None or filling.version is None:
            raise OutOfOrder("no version is being filled", remedy="begin one first")
        poisoned = nonfinite_tensors(segment, filling.index)
        if poisoned:
            listed = ", ".join(f"{name} ({count})" for name, count in list(poisoned.items())[:5])
            more = f" and {len(poisoned) - 5} more tensors" if len(poisoned) > 5 else ""
            if self.declaration.options.on_non_finite is wire.OnNonFinite.REJECT:
                self._refuse(filling.version, f"{listed}{more}", next(iter(poisoned)))
                return
            log.warning("non_finite_values", stage=self.name, version=filling.version, tensors=poisoned)
        self._refused = None
        version = self.buffer.seal()
        self.sealed_versions += 1
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
        version = self.buffer.abort(reason)
        if version is not None:
            self.aborted_versions += 1
            self._tell("aborted", version, reason)

    # Readers

    def attach(self, session: Session, message: wire.Attach) -> wire.Answer:
        """A reader rank joins its engine."""
        engine = self.engines.get(message.engine) or Engine(message.ranks)
        if engine.ranks != message.ranks or message.rank >= message.ranks:
            raise CatalogMismatch(
                f"engine {message.engine!r} rank {message.rank} of {message.ranks} attaches, "
                f"but the engine has {engine.ranks} ranks",
                remedy="give every engine its own name, and all its ranks the same count",
                stage=self.name,
                rank=message.rank,
            )
        holder = engine.members.get(message.rank)
        if holder not in (None, session):
            raise RankTaken(
                f"rank {message.rank} of engine {message.engine!r} is held by {holder}",
                remedy="give every engine its own name",
                stage=self.name,
                rank=message.rank,
                peer=str(holder),
            )
        engine.members[message.rank] = session
        self.engines[message.engine] = engine
        return wire.Attached(segment=self._segment().name, newest=self.buffer.newest_sealed)

    def lease(self, session: Session, message: wire.LeaseVersion, granted: Callable[[int], float]) -> Question:
        """A reader rank wants a version; ``granted`` gives the seconds that a lease is good for."""
        engine = self._check_reader(session, message.engine, message.rank)

        def poll() -> wire.Answer | Waiting:
            lease = self.buffer.lease(
                message.engine,
                engine.ranks,
                message.rank,
                version=message.version,
                newer_than=message.newer_than,
            )
            if isinstance(lease, Waiting):
                return lease
            if len(lease.holding) == 1 and not lease.done:
                self._tell("leased", lease.version, f"engine {lease.engine!r}")
            return wire.Leased(
                lease=lease.id, version=lease.version, slot=lease.slot.index, deadline_s=granted(lease.id)
            )

        return Question(poll)

    def release(self, session: Session, message: wire.Release) -> wire.Done:
        """A reader rank has read what it needs."""
        lease = self.buffer.leases.get(message.lease)
        if lease is not None:
            self._check_reader(session, lease.engine, message.rank)
        self.buffer.release(message.lease, message.rank)
        if lease is not None and lease.complete:
            self._tell("released", lease.version, f"engine {lease.engine!r}")
        return wire.Done()

    def end_lease(self, lease_id: int) -> None:
        """A lease's time is up: it is taken from the ranks that have not released it."""
        lease = self.buffer.leases.get(lease_id)
        if lease is not None:
            reason = f"engine {lease.engine!r} ranks {lease.missing} did not release version {lease.version} in time"
            self.buffer.end_lease(lease_id, reason)
            self._tell("lease_lost", lease.version, reason)

    # Both

    def session_gone(self, session: Session, how: str) -> None:
        """A peer has closed its connection or died: what it held is given back at once."""
        for rank in [rank for rank, holder in self.trainers.items() if holder is session]:
            del self.trainers[rank]
            self._forget_declaration(rank)
            version = self.buffer.trainer_gone(rank, f"trainer rank {rank}, {session}, {how}")
            if version is not None:
                self.aborted_versions += 1
                self._tell("aborted", version, f"trainer rank {rank} {how}")
        for name, engine in list(self.engines.items()):
            for rank in [rank for rank, holder in engine.members.items() if holder is session]:
                del engine.members[rank]
                self.buffer.reader_gone(name, rank)
            if not engine.members:
                del self.engines[name]

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


def nonfinite_tensors(segment: Segment, slot: int) -> dict[str, int]:
    """The tensors of a slot that hold NaN or infinite values, with how many."""
    catalog, counts = segment.catalog, segment.moments(slot).nonfinite
    if not np.any(counts):
        return {}
    grid, found = catalog.grids[0], dict[str, int]()
    for owned in catalog.owned:
        tensor = catalog.tensors[owned.tensor]
        if not tensor.has_moments:
            continue
        cells: Box = cells_of(grid, tensor.shape, owned.box)
        count = int(counts[owned.first_cell : owned.first_cell + math.prod(cells.lengths)].sum())
        if count:
            found[tensor.name] = found.get(tensor.name, 0) + count
    return found

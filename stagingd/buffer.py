# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The double buffer: two slots, the versions in them, and who may touch which.

    back:   FREE --begin--> FILLING --last commit, checks pass--> SEALED --leased--> FRONT
                               | abort, a rank dies, a check fails        the old front: DRAINING while
                               +--> FREE (the front is untouched)         leased, then FREE

A slot that was drained keeps its version until the next one is begun: who asks for that very version leases it again.

Who asks to begin early leases a version that is still being filled, where none that is complete would do. Such a lease
keeps nobody from anything: if the version is aborted, the lease is lost; if it is sealed, it becomes the front at once,
and the lease is one like others. Until then it cannot be released: what was read under it counts for nothing.

A pure state machine: it knows no clock, socket or memory. What cannot be done yet is answered with
``Waiting``, which says what is awaited and from whom, and changes nothing; the caller asks again
after the next change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from stagingd.errors import (
    LeaseLost,
    OutOfOrder,
    VersionAborted,
    VersionMismatch,
    VersionNotAvailable,
    VersionNotRising,
)
from stagingd.policy import Policy
from stagingd.slots import Lease, Slot, SlotState
from stagingd.waiting import Waiting, named

REMEMBERED_LOSSES = 16
"""Leases taken away that are remembered: enough to tell a late rank why, and bounded for ever."""


class DoubleBuffer:
    """The life of one stage's two slots.

    Every call that changes anything raises ``revision``; one by which somebody's waiting can end raises
    ``occasions`` too, so that who waits need not be asked after every commit of another rank. ``again`` marks a
    call that may have been carried out before: its answer was lost with the daemon that gave it. Such a call is
    answered as it was then.

    Args:
        ranks: how many trainer ranks fill a version together.
        policy: what to do with a sealed version that nobody has read.
    """

    def __init__(self, ranks: int, policy: Policy) -> None:
        self.ranks = ranks
        self.policy = policy
        self.slots = (Slot(0), Slot(1))
        self.leases: dict[int, Lease] = {}
        self.newest_sealed: int | None = None
        self.last_abort: tuple[int, str] | None = None
        self.next_lease = 1
        self.next_attempt = 1
        self.lost_leases: dict[int, str] = {}
        self.revision = 0
        self.occasions = 0

    # What the slots hold

    def slot_in(self, *states: SlotState) -> Slot | None:
        """The slot in one of these states, if any."""
        return next((slot for slot in self.slots if slot.state in states), None)

    @property
    def filling(self) -> Slot | None:
        """The slot being filled."""
        return self.slot_in(SlotState.FILLING)

    @property
    def newest(self) -> Slot | None:
        """The slot with the newest complete version: the sealed one, else the front."""
        return self.slot_in(SlotState.SEALED) or self.slot_in(SlotState.FRONT)

    def leases_on(self, slot: Slot) -> list[Lease]:
        """The leases that keep a slot from being written."""
        return [lease for lease in self.leases.values() if lease.slot is slot]

    def _occasion(self) -> None:
        self.revision += 1
        self.occasions += 1

    # Trainers

    def begin(self, rank: int, version: int, *, again: bool = False) -> Slot | Waiting:
        """A rank starts to fill a version; all ranks begin the same one.

        Raises:
            VersionNotRising: the stage has sealed this version or a later one.
            VersionMismatch: other ranks are filling another version.
            OutOfOrder: this rank has begun already, or has not finished the version before.
        """
        if self.newest_sealed is not None and version <= self.newest_sealed:
            raise VersionNotRising(
                f"rank {rank} begins version {version}, but version {self.newest_sealed} is sealed",
                remedy=f"use a version greater than {self.newest_sealed}",
                version=version,
                rank=rank,
            )
        filling = self.filling
        if filling is not None:
            return self._join(filling, rank, version, again)
        back = self._claim_back(version)
        if isinstance(back, Slot):
            back.state, back.version, back.kept = SlotState.FILLING, version, None
            back.attempt, self.next_attempt = self.next_attempt, self.next_attempt + 1
            back.begun.add(rank)
            self._occasion()
        return back

    def _join(self, filling: Slot, rank: int, version: int, again: bool) -> Slot | Waiting:
        if filling.version == version and rank not in filling.begun:
            filling.begun.add(rank)
            self.revision += 1
            return filling
        if again and filling.version == version and rank not in filling.committed:
            return filling
        if rank in filling.committed and filling.version != version:
            return Waiting(f"version {filling.version} to be committed", self._uncommitted(filling))
        if rank in filling.begun:
            raise OutOfOrder(
                f"rank {rank} begins version {version} while it is filling version {filling.version}",
                remedy="commit or abort a version before the next begins",
                version=version,
                rank=rank,
            )
        raise VersionMismatch(
            f"rank {rank} begins version {version}, but {_ranks(filling.begun)} filling version {filling.version}",
            remedy="begin the same version on every rank",
            version=version,
            rank=rank,
        )

    def _claim_back(self, version: int) -> Slot | Waiting:
        sealed, front = self.slot_in(SlotState.SEALED), self.slot_in(SlotState.FRONT)
        if sealed is not None and self.policy is Policy.BLOCK:
            return Waiting(f"version {sealed.version} to be read before version {version} is begun")
        occupied = front if sealed is not None else self.slot_in(SlotState.DRAINING)
        holders = self.leases_on(occupied) if occupied is not None else []
        if occupied is not None and holders:
            return Waiting(
                f"version {occupied.version} to be released before version {version} is begun",
                tuple(f"engine {lease.engine!r} ranks {lease.missing}" for lease in holders),
            )
        if sealed is not None:
            # Overwriting it instead would lose a committed version if the one now begun is aborted.
            self._make_front(sealed)
        free = self.slot_in(SlotState.FREE)
        assert free is not None  # of two slots one is the front, and nobody leases the other
        return free

    def _uncommitted(self, slot: Slot) -> tuple[str, ...]:
        return named("trainer rank", (rank for rank in range(self.ranks) if rank not in slot.committed))

    def measure(self, rank: int, version: int, *, again: bool = False) -> None:
        """A rank has stored the moments of all its boxes.

        Raises:
            VersionAborted: the version was given up meanwhile.
            OutOfOrder: the rank has not begun it, or has measured it already.
        """
        filling = self._begun_by(rank, version, "measures")
        if not again:
            _refuse_twice(rank, version, "measures", filling.measured)
        filling.measured.add(rank)
        self.revision += 1
        if len(filling.measured) == self.ranks:
            self._occasion()

    def awaited_measures(self, version: int) -> Waiting:
        """What keeps the scales of a version from being known: the ranks that have not measured it."""
        filling = self.filling
        there = filling.measured if filling is not None and filling.version == version else set(range(self.ranks))
        missing = named("trainer rank", (rank for rank in range(self.ranks) if rank not in there))
        return Waiting(f"version {version} to be measured", missing)

    def commit(self, rank: int, version: int, *, again: bool = False) -> bool:
        """A rank has put all its boxes. Returns whether all have, so that the version can be sealed.

        Raises:
            VersionAborted: the version was given up meanwhile.
            OutOfOrder: the rank has not begun it, or has committed it already.
        """
        if again and version == self.newest_sealed:
            return False
        filling = self._begun_by(rank, version, "commits")
        if not again:
            _refuse_twice(rank, version, "commits", filling.committed)
        filling.committed.add(rank)
        self.revision += 1
        return len(filling.committed) == self.ranks

    def _begun_by(self, rank: int, version: int, does: str) -> Slot:
        """The slot in which a rank has begun a version. Raises VersionAborted, OutOfOrder: it has not."""
        filling = self.filling
        if filling is not None and filling.version == version and rank in filling.begun:
            return filling
        unsealed = self.newest_sealed is None or version > self.newest_sealed
        if self.last_abort is not None and unsealed and version <= self.last_abort[0]:
            newest, why = self.last_abort
            raise VersionAborted(
                f"version {version} was aborted: {why if version == newest else f'{newest} was begun after it'}",
                remedy="begin it again, or a later one, on every rank",
                version=version,
                rank=rank,
            )
        raise OutOfOrder(
            f"rank {rank} {does} version {version} without having begun it",
            remedy="begin, put every box, then commit",
            version=version,
            rank=rank,
        )

    def awaited_commits(self, version: int) -> Waiting:
        """What keeps a version from being sealed: the ranks that have not committed it."""
        filling = self.filling
        peers = self._uncommitted(filling) if filling is not None and filling.version == version else ()
        return Waiting(f"version {version} to be committed", peers)

    def seal(self) -> int:
        """All ranks have committed and the checks have passed: the version is complete. Returns it."""
        filling = self.filling
        if filling is None or filling.version is None or len(filling.committed) != self.ranks:
            raise OutOfOrder("no version is ready to be sealed", remedy="seal after the last commit")
        filling.state = SlotState.SEALED
        self.newest_sealed = filling.version
        if self.leases_on(filling):
            self._make_front(filling)
        self._occasion()
        return filling.version

    def abort(self, reason: str) -> int | None:
        """Give up the version being filled, if any. Returns it."""
        filling = self.filling
        if filling is None or filling.version is None:
            return None
        version = filling.version
        self.last_abort = (version, reason)
        for lease in self.leases_on(filling):
            self.end_lease(lease.id, f"version {version} was aborted: {reason}")
        filling.clear()
        self._occasion()
        return version

    def trainer_gone(self, rank: int, reason: str, *, there: Collection[int] | None = None) -> int | None:
        """A trainer rank is gone: what can no longer be finished is aborted. Returns the version, if any.

        Args:
            rank: the one that is gone. What it has committed stands as long as the others can finish the version.
            reason: why, for whoever asks.
            there: the ranks that are still there; all others by default.
        """
        filling = self.filling
        others = set(range(self.ranks) if there is None else there) - {rank}
        if filling is None or set(range(self.ranks)) - filling.committed <= others:
            return None
        return self.abort(reason)

    # Readers

    def lease(
        self,
        engine: str,
        ranks: int,
        rank: int,
        *,
        version: int | None,
        newer_than: int | None,
        until: float,
        early: bool = False,
        again: bool = False,
        gone: Iterable[int] = (),
    ) -> Lease | Waiting:
        """An engine's rank asks to read: the first rank decides which version all of them get.

        Args:
            engine: the reader group's name.
            ranks: how many ranks it has.
            rank: which of them asks.
            version: exactly this one; the newest complete one by default.
            newer_than: only a version greater than this.
            until: when a lease granted now is to be taken away; ranks that join later get the first's.
            early: where no complete version will do, one that is being filled will.
            gone: ranks that have left the engine, for which a lease granted now is not kept.

        Raises:
            VersionNotAvailable: the version has been replaced.
            VersionMismatch: another rank of this engine has leased another version.
            OutOfOrder: this rank holds a lease already.
        """
        current = next((lease for lease in self.leases.values() if lease.engine == engine), None)
        if current is not None:
            return self._join_lease(current, rank, version, newer_than, early, again)
        slot = self._readable(version, newer_than)
        if isinstance(slot, Waiting):
            filling = self._begun_early(version, newer_than) if early else None
            if filling is None:
                return slot
            slot = filling
        if slot.state is SlotState.SEALED:
            self._make_front(slot)
        elif slot.state is SlotState.FREE:
            slot.state, slot.version, slot.kept = SlotState.DRAINING, slot.kept, None
        assert slot.version is not None  # only a free slot has none
        lease = Lease(self.next_lease, engine, ranks, slot, slot.version, until, holding={rank}, gone={*gone} - {rank})
        self.leases[lease.id] = lease
        self.next_lease += 1
        self._occasion()
        return lease

    def _join_lease(
        self, lease: Lease, rank: int, version: int | None, newer_than: int | None, early: bool, again: bool
    ) -> Lease | Waiting:
        if lease.early and not early:
            return self.awaited_commits(lease.version)
        if rank in lease.done:
            return Waiting(
                f"engine {lease.engine!r} to finish version {lease.version}",
                named(f"engine {lease.engine!r} rank", lease.missing),
            )
        if rank in lease.holding and not again:
            raise OutOfOrder(
                f"engine {lease.engine!r} rank {rank} holds a lease on version {lease.version} already",
                remedy="release it before the next lease",
                version=lease.version,
                rank=rank,
            )
        wrong = version not in (None, lease.version)
        if wrong or (newer_than is not None and lease.version <= newer_than):
            asked = f"version {version}" if wrong else f"a version newer than {newer_than}"
            raise VersionMismatch(
                f"engine {lease.engine!r} rank {rank} asks for {asked}, "
                f"but rank {min(lease.holding | lease.done)} leased version {lease.version}",
                remedy="ask for the same version on every rank of an engine",
                version=version,
                rank=rank,
            )
        lease.holding.add(rank)
        lease.gone.discard(rank)
        self.revision += 1
        return lease

    def _readable(self, version: int | None, newer_than: int | None) -> Slot | Waiting:
        newest = self.newest
        if version is None:
            if newest is None:
                return Waiting("the first version", self._trainers())
            if newer_than is not None and newest.version is not None and newest.version <= newer_than:
                return Waiting(f"a version newer than {newer_than}", self._trainers())
            return newest
        for slot in (newest, self.slot_in(SlotState.FRONT), self.slot_in(SlotState.DRAINING)):
            if slot is not None and slot.version == version:
                return slot
        for slot in self.slots:
            if slot.kept == version:
                return slot
        if newest is not None and newest.version is not None and version < newest.version:
            there = [slot.version if slot.kept is None else slot.kept for slot in self.slots]
            held = sorted(str(one) for one in there if one is not None)
            raise VersionNotAvailable(
                f"version {version} has been replaced; the stage holds {', '.join(held)}",
                remedy="ask for the latest, or for a version that is there",
                version=version,
            )
        return Waiting(f"version {version}", self._trainers())

    def _begun_early(self, version: int | None, newer_than: int | None) -> Slot | None:
        """What is being filled, if it is what is asked for."""
        filling = self.filling
        if filling is None or filling.version is None:
            return None
        wanted = version in (None, filling.version) and (newer_than is None or filling.version > newer_than)
        return filling if wanted else None

    def _trainers(self) -> tuple[str, ...]:
        filling = self.filling
        if filling is None:
            return (f"{self.ranks} trainer ranks, none of which has begun",)
        return self._uncommitted(filling)

    def _make_front(self, sealed: Slot) -> None:
        """Flip: the sealed slot becomes the front; the old front drains, or is free if nobody reads it."""
        front = self.slot_in(SlotState.FRONT)
        if front is not None:
            front.state = SlotState.DRAINING
            self._free_if_drained(front)
        sealed.state = SlotState.FRONT

    def release(self, lease_id: int, rank: int, *, again: bool = False) -> Waiting | None:
        """A rank has read what it needs. None when it is released; an early lease only once the version is sealed.

        Raises:
            LeaseLost: the lease ended before.
            OutOfOrder: the rank does not hold it.
        """
        lease = self.leases.get(lease_id)
        taken = lease_id in self.lost_leases and (lease is None or rank not in lease.holding)
        if again and not taken and (self._ended_well(lease_id) if lease is None else rank in lease.done):
            return None
        if lease is None or taken:
            why = self.lost_leases.get(lease_id, "it does not exist")
            raise LeaseLost(
                f"lease {lease_id} is gone: {why}",
                remedy="discard what was read under it and lease again",
                rank=rank,
            )
        if rank not in lease.holding:
            raise OutOfOrder(
                f"engine {lease.engine!r} rank {rank} releases lease {lease_id} without holding it",
                remedy="release a lease once per rank",
                rank=rank,
            )
        if lease.early:
            return self.awaited_commits(lease.version)
        lease.done.add(rank)
        self._let_go(lease, rank)
        return None

    def _ended_well(self, lease_id: int) -> bool:
        """Whether a lease that is gone was released by all its ranks. In doubt, no: what was read may be torn."""
        if len(self.lost_leases) == REMEMBERED_LOSSES and lease_id < min(self.lost_leases):
            return False
        return lease_id < self.next_lease

    def reader_gone(self, engine: str, rank: int, reason: str = "it left", *, last: bool = False) -> None:
        """A reader rank is gone, perhaps the engine's last: it holds nothing any more, and nobody waits for it.

        Should it come back, what it has read since is worth nothing: it must not believe that it released the lease.
        """
        for lease in [lease for lease in self.leases.values() if lease.engine == engine]:
            if rank in lease.holding:
                self._remember_lost(lease.id, reason)
            lease.gone.update(range(lease.ranks) if last else [rank])
            self._let_go(lease, rank)

    def end_lease(self, lease_id: int, reason: str) -> Lease | None:
        """Take a lease away from all its ranks. Returns it, or None when it had ended."""
        lease = self.leases.pop(lease_id, None)
        if lease is not None:
            self._occasion()
            self._remember_lost(lease_id, reason)
            self._free_if_drained(lease.slot)
        return lease

    def _let_go(self, lease: Lease, rank: int) -> None:
        self.revision += 1
        lease.holding.discard(rank)
        if lease.complete:
            del self.leases[lease.id]
            self._free_if_drained(lease.slot)
            self._occasion()

    def _remember_lost(self, lease_id: int, reason: str) -> None:
        self.lost_leases[lease_id] = reason
        for old in sorted(self.lost_leases)[:-REMEMBERED_LOSSES]:
            del self.lost_leases[old]

    def _free_if_drained(self, slot: Slot) -> None:
        if slot.state is SlotState.DRAINING and not self.leases_on(slot):
            version = slot.version
            slot.clear()
            slot.kept = version


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    listed = ", ".join(map(str, numbers))
    return f"rank {listed} is" if len(numbers) == 1 else f"ranks {listed} are"


def _refuse_twice(rank: int, version: int, does: str, done: Collection[int]) -> None:
    if rank in done:
        raise OutOfOrder(
            f"rank {rank} {does} version {version} twice",
            remedy="measure and commit a version once per rank",
            version=version,
            rank=rank,
        )

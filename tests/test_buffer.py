# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The double buffer's life, as sentences and as a state machine."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stagingd.buffer import DoubleBuffer
from stagingd.errors import (
    LeaseLost,
    OutOfOrder,
    StagingError,
    VersionAborted,
    VersionMismatch,
    VersionNotAvailable,
    VersionNotRising,
)
from stagingd.policy import Policy
from stagingd.slots import Lease, Slot, SlotState
from stagingd.waiting import Waiting

RANKS = 2
UNTIL = 60.0


def buffer(policy: Policy = Policy.LATEST) -> DoubleBuffer:
    return DoubleBuffer(RANKS, policy)


def publish(double: DoubleBuffer, version: int) -> None:
    for rank in range(RANKS):
        assert isinstance(double.begin(rank, version), Slot)
    for rank in range(RANKS):
        double.commit(rank, version)
    double.seal()


def lease(double: DoubleBuffer, engine: str = "e", rank: int = 0, ranks: int = 1, **which: int) -> Lease:
    got = double.lease(
        engine, ranks, rank, version=which.get("version"), newer_than=which.get("newer_than"), until=UNTIL
    )
    assert isinstance(got, Lease)
    return got


def test_a_version_is_readable_once_all_ranks_have_committed() -> None:
    double = buffer()
    double.begin(0, 1)
    double.begin(1, 1)
    assert not double.commit(0, 1)
    assert isinstance(double.lease("e", 1, 0, version=None, newer_than=None, until=UNTIL), Waiting)
    assert double.commit(1, 1)
    double.seal()
    assert lease(double).version == 1


def test_the_scales_of_a_version_are_known_once_all_ranks_have_measured_it() -> None:
    double = buffer()
    for rank in range(RANKS):
        double.begin(rank, 1)
    double.measure(0, 1)
    assert double.awaited_measures(1) == Waiting("version 1 to be measured", ("trainer rank 1",))
    seen = double.occasions
    double.measure(1, 1)
    assert double.occasions > seen, "who waits is asked again"
    assert double.awaited_measures(1).peers == ()


def test_a_rank_measures_what_it_has_begun_once() -> None:
    double = buffer()
    with pytest.raises(OutOfOrder, match="rank 0 measures version 1 without having begun it"):
        double.measure(0, 1)
    double.begin(0, 1)
    double.measure(0, 1)
    double.measure(0, 1, again=True)
    with pytest.raises(OutOfOrder, match="rank 0 measures version 1 twice"):
        double.measure(0, 1)


def test_a_version_that_is_aborted_is_measured_no_more() -> None:
    double = buffer()
    for rank in range(RANKS):
        double.begin(rank, 1)
    double.measure(0, 1)
    double.abort("rank 1 died")
    with pytest.raises(VersionAborted, match="rank 1 died"):
        double.measure(1, 1)
    for rank in range(RANKS):
        double.begin(rank, 2)
    assert double.awaited_measures(2).peers == ("trainer rank 0", "trainer rank 1")


def test_the_trainer_fills_the_next_version_while_one_is_read() -> None:
    double = buffer()
    publish(double, 1)
    held = lease(double)
    publish(double, 2)
    assert (held.slot.state, held.slot.version) == (SlotState.FRONT, 1)


def test_policy_block_waits_for_a_reader() -> None:
    double = buffer(Policy.BLOCK)
    publish(double, 1)
    assert isinstance(double.begin(0, 2), Waiting)
    lease(double)
    assert isinstance(double.begin(0, 2), Slot)


def test_policy_latest_skips_a_version_that_nobody_read_and_keeps_it_until_the_next_is_sealed() -> None:
    double = buffer()
    publish(double, 1)
    publish(double, 2)
    double.begin(0, 3)
    double.abort("a rank died")
    assert lease(double).version == 2


def test_a_leased_slot_is_waited_for_and_the_engine_is_named() -> None:
    double = buffer()
    publish(double, 1)
    held = lease(double, "slow")
    publish(double, 2)
    waiting = double.begin(0, 3)
    assert isinstance(waiting, Waiting)
    assert "slow" in waiting.peers[0]
    double.release(held.id, 0)
    assert isinstance(double.begin(0, 3), Slot)


def test_all_ranks_of_an_engine_get_the_same_version_although_a_newer_one_is_sealed_between() -> None:
    double = buffer()
    publish(double, 1)
    first = lease(double, rank=0, ranks=2)
    publish(double, 2)
    assert lease(double, rank=1, ranks=2) is first
    double.release(first.id, 0)
    assert isinstance(double.lease("e", 2, 0, version=None, newer_than=None, until=UNTIL), Waiting)
    double.release(first.id, 1)
    assert lease(double, rank=0, ranks=2).version == 2


def test_two_engines_may_read_different_versions() -> None:
    double = buffer()
    publish(double, 1)
    slow = lease(double, "slow")
    publish(double, 2)
    assert lease(double, "quick").version == 2
    assert slow.slot.state is SlotState.DRAINING


def test_versions_rise() -> None:
    double = buffer()
    publish(double, 5)
    for version in (5, 4):
        with pytest.raises(VersionNotRising, match="greater than 5"):
            double.begin(0, version)


def test_two_ranks_with_different_versions_are_refused_and_nothing_changes() -> None:
    double = buffer()
    double.begin(0, 7)
    with pytest.raises(VersionMismatch, match="rank 0 is filling version 7"):
        double.begin(1, 8)
    assert double.filling is not None
    assert double.filling.begun == {0}


def test_calls_out_of_order_are_refused() -> None:
    double = buffer()
    with pytest.raises(OutOfOrder):
        double.commit(0, 1)
    double.begin(0, 1)
    with pytest.raises(OutOfOrder):
        double.begin(0, 1)
    double.commit(0, 1)
    with pytest.raises(OutOfOrder):
        double.commit(0, 1)
    with pytest.raises(OutOfOrder):
        double.seal()


def test_a_late_commit_of_an_aborted_version_says_why_it_was_aborted() -> None:
    double = buffer()
    double.begin(0, 1)
    double.begin(1, 1)
    double.trainer_gone(1, "rank 1 died")
    with pytest.raises(VersionAborted, match="rank 1 died"):
        double.commit(0, 1)


def test_a_version_that_is_not_there_is_refused_or_waited_for() -> None:
    double = buffer()
    for version in (1, 2, 3):
        publish(double, version)
    with pytest.raises(VersionNotAvailable, match="holds 2, 3"):
        double.lease("e", 1, 0, version=1, newer_than=None, until=UNTIL)
    assert isinstance(double.lease("e", 1, 0, version=9, newer_than=None, until=UNTIL), Waiting)
    assert isinstance(double.lease("e", 1, 0, version=None, newer_than=3, until=UNTIL), Waiting)
    assert lease(double, version=2).version == 2


def test_the_version_before_can_be_leased_again_until_the_next_is_begun() -> None:
    double = buffer()
    for version in (1, 2):
        publish(double, version)
    lease(double, version=2)
    double.release(1, 0)
    again = lease(double, version=1)
    assert (again.slot.state, again.slot.version) == (SlotState.DRAINING, 1)
    assert isinstance(double.begin(0, 3), Waiting)
    double.release(again.id, 0)
    assert isinstance(double.begin(0, 3), Slot)
    with pytest.raises(VersionNotAvailable, match="holds 2, 3"):
        double.lease("e", 1, 0, version=1, newer_than=None, until=UNTIL)


def test_a_dead_reader_frees_its_slot() -> None:
    double = buffer()
    publish(double, 1)
    lease(double, rank=0, ranks=2)
    lease(double, rank=1, ranks=2)
    double.reader_gone("e", 0)
    assert double.leases
    double.reader_gone("e", 1)
    assert not double.leases


def test_a_lease_that_was_taken_away_cannot_be_released() -> None:
    double = buffer()
    publish(double, 1)
    held = lease(double)
    double.end_lease(held.id, "held too long")
    with pytest.raises(LeaseLost, match="held too long"):
        double.release(held.id, 0)


class Life(RuleBasedStateMachine):
    """Trainers and engines do anything in any order; what must always hold, holds."""

    def __init__(self) -> None:
        super().__init__()
        self.double = DoubleBuffer(RANKS, Policy.LATEST)
        self.sealed: list[int] = []
        self.held: dict[int, tuple[Slot, int]] = {}
        self.contents: dict[int, int | None] = {0: None, 1: None}

    def attempt(self, call: object, *args: object) -> object:
        before = self.picture()
        try:
            return call(*args)  # type: ignore[operator]
        except StagingError:
            assert self.picture() == before  # what is refused changes nothing
            return None

    def picture(self) -> object:
        slots = [(s.state, s.version, s.kept, set(s.begun), set(s.committed)) for s in self.double.slots]
        leases = [(k, set(v.holding), set(v.done)) for k, v in self.double.leases.items()]
        return slots, leases

    @rule(rank=st.integers(0, RANKS - 1), ahead=st.integers(-1, 3))
    def begin(self, rank: int, ahead: int) -> None:
        before = self.picture()
        version = (self.double.newest_sealed or 0) + ahead
        got = self.attempt(self.double.begin, rank, max(0, version))
        if isinstance(got, Waiting):
            assert self.picture() == before
        elif isinstance(got, Slot):
            self.contents[got.index] = None

    @rule(rank=st.integers(0, RANKS - 1))
    def commit(self, rank: int) -> None:
        filling = self.double.filling
        if filling is not None and self.attempt(self.double.commit, rank, filling.version):
            self.sealed.append(self.double.seal())
            self.contents[filling.index] = self.sealed[-1]

    @rule(rank=st.integers(0, RANKS - 1))
    def trainer_dies(self, rank: int) -> None:
        self.double.trainer_gone(rank, "died")

    @rule(engine=st.sampled_from("ab"), rank=st.integers(0, 1), back=st.none() | st.integers(0, 2))
    def take(self, engine: str, rank: int, back: int | None) -> None:
        version = None if back is None or not self.sealed else self.sealed[-1 - min(back, len(self.sealed) - 1)]
        got = self.attempt(lambda: self.double.lease(engine, 2, rank, version=version, newer_than=None, until=UNTIL))
        if isinstance(got, Lease):
            self.held[got.id] = (got.slot, got.version)
            assert self.contents[got.slot.index] == got.version

    @rule(data=st.data(), rank=st.integers(0, 1))
    def release(self, data: st.DataObject, rank: int) -> None:
        if self.double.leases:
            self.attempt(self.double.release, data.draw(st.sampled_from(list(self.double.leases))), rank)

    @rule(engine=st.sampled_from("ab"), rank=st.integers(0, 1))
    def reader_dies(self, engine: str, rank: int) -> None:
        self.double.reader_gone(engine, rank)

    @rule(data=st.data())
    def lease_expires(self, data: st.DataObject) -> None:
        if self.double.leases:
            self.double.end_lease(data.draw(st.sampled_from(list(self.double.leases))), "expired")

    @invariant()
    def at_most_one_front_one_sealed_one_filling(self) -> None:
        states = [slot.state for slot in self.double.slots]
        for state in (SlotState.FRONT, SlotState.SEALED, SlotState.FILLING, SlotState.DRAINING):
            assert states.count(state) <= 1

    @invariant()
    def a_leased_slot_is_never_written(self) -> None:
        for lease_id in self.double.leases:
            slot, version = self.held[lease_id]
            assert slot.state in (SlotState.FRONT, SlotState.DRAINING)
            assert slot.version == version

    @invariant()
    def the_newest_sealed_version_survives_everything_but_a_later_one(self) -> None:
        newest = self.double.newest
        assert (newest.version if newest else None) == (self.sealed[-1] if self.sealed else None)

    @invariant()
    def versions_rise(self) -> None:
        assert all(a < b for a, b in itertools.pairwise(self.sealed))

    @invariant()
    def a_draining_slot_is_leased(self) -> None:
        for slot in self.double.slots:
            assert slot.state is not SlotState.DRAINING or self.double.leases_on(slot)
            assert (slot.version is None) == (slot.state is SlotState.FREE)
            assert slot.kept is None or slot.state is SlotState.FREE

    @invariant()
    def every_version_that_is_still_whole_can_be_leased(self) -> None:
        held = {slot.version if slot.kept is None else slot.kept for slot in self.double.slots}
        assert {version for version in self.contents.values() if version is not None} <= held


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moments of the daemon's life that chance meets too seldom, or met once: each as a sentence."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest
import structlog
from life.clients import Seat
from life.host import LEASE_S, RETURN_S
from life.laws import check_laws
from life.pictures import picture, stage_pictures
from life.work import all_work, commitment, copy, declaration, next_request, work
from life.world import Crash, Fate, Plan, World

from stagingd import wire
from stagingd.policy import Policy
from stagingd.recovery import SET_ASIDE
from stagingd.slots import SlotState


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A stage with two trainer ranks, engine a with one rank and engine b with two; nobody has said hello."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    world = World(getattr(request, "param", Plan()))
    yield world
    try:
        check_laws(world)
    finally:
        world.clean()
        structlog.reset_defaults()


hidden = pytest.mark.parametrize("world", [Plan(hidden=True)], indirect=True)
block = pytest.mark.parametrize("world", [Plan(policy=Policy.BLOCK)], indirect=True)


def trainers(world: World) -> list[Seat]:
    return [seat for seat in world.seats if seat.engine is None]


def engine(world: World, name: str) -> list[Seat]:
    return [seat for seat in world.seats if seat.engine == name]


def publish(world: World) -> int:
    """The trainers publish one version more. Returns it."""
    before = newest(world)
    while newest(world) == before:
        all_work(world, trainers(world), 1)
    return newest(world)


def newest(world: World) -> int:
    stage = world.up.stages.get("policy")
    return (stage.buffer.newest_sealed or 0) if stage is not None else 0


def attach(world: World, seats: list[Seat]) -> None:
    for seat in seats:
        while not seat.seated:
            work(world, seat)


def lease(world: World, seats: list[Seat]) -> int:
    """The ranks lease the newest version. Returns the lease's number."""
    attach(world, seats)
    for seat in seats:
        work(world, seat)
        assert seat.reading is not None
    return seats[0].reading.lease  # type: ignore[union-attr]


def begun(world: World) -> None:
    """Both ranks have begun a version and copied all of it."""
    while any(seat.copying is None for seat in trainers(world)):
        all_work(world, [seat for seat in trainers(world) if seat.copying is None], 1)
    for seat in trainers(world):
        assert seat.copying is not None
        copy(seat, seat.copying.pieces_left)


def restart(world: World) -> None:
    """The daemon is killed, and a successor takes its place."""
    world.end_daemon()
    world.start_daemon()


def states(world: World) -> list[SlotState]:
    return [slot.state for slot in world.up.stages["policy"].buffer.slots]


def heard(seat: Seat) -> str:
    """The last answer, in a word."""
    assert seat.heard is not None
    return seat.heard.code if isinstance(seat.heard, wire.Refusal) else seat.heard.kind


def connect(world: World, seat: Seat) -> None:
    assert seat.client is not None
    assert world.hello(seat.client)


def open_another_connection(world: World, seat: Seat) -> None:
    """The process's connection breaks, the daemon sees it, and the process says hello by another one."""
    world.reconnect(seat)
    connect(world, seat)


# What is repeated


@pytest.mark.parametrize("crash", [*Crash, None])
@pytest.mark.parametrize("landed", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_last_commit_that_a_crash_interrupts_is_sealed_once_it_is_repeated(
    world: World, crash: Crash | None, landed: float
) -> None:
    begun(world)
    first, last = trainers(world)
    work(world, first)
    fate = Fate(crash=crash, landed=landed) if crash is not None else Fate(cut=True)
    work(world, last, fate=fate)
    if crash is not None:
        world.start_daemon()
    for seat in (last, first):
        if seat.client is not None and seat.client.identity is None:
            connect(world, seat)
            work(world, seat)
    assert [heard(seat) for seat in (first, last)] == ["sealed", "sealed"]
    assert newest(world) == 1


def test_a_commit_that_is_repeated_after_the_seal_is_answered_as_before(world: World) -> None:
    publish(world)
    (first, _), before = trainers(world), picture(world.up)
    world.ask(first, commitment(world, first, 1).model_copy(update={"again": True}))
    assert heard(first) == "sealed"
    assert picture(world.up) == before
    assert first.client is not None
    first.client.honest = False
    world.ask(first, commitment(world, first, 1))
    assert heard(first) == "out_of_order"


def test_a_commit_that_is_repeated_by_another_connection_does_not_give_itself_up(world: World) -> None:
    begun(world)
    first, last = trainers(world)
    work(world, first)  # commits, and waits for the other rank
    assert first.client is not None
    world.break_connection(first.client)
    connect(world, first)
    work(world, first)
    work(world, last)
    assert [heard(seat) for seat in (first, last)] == ["sealed", "sealed"]


def test_a_begin_that_is_repeated_gets_the_same_slot(world: World) -> None:
    first, _ = trainers(world)
    begun(world)
    slot = first.copying.slot if first.copying is not None else None
    message = wire.Begin(stage="policy", rank=0, version=1, timeout_s=1.0, again=True)
    restart(world)
    connect(world, first)
    world.ask(first, message)
    assert isinstance(first.heard, wire.Begun)
    assert first.heard.slot == slot


def test_a_lease_that_is_repeated_is_the_same_lease_with_the_same_end(world: World) -> None:
    publish(world)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    message = next_request(world, reader)
    assert message is not None
    work(world, reader, fate=Fate(crash=Crash.UNSENT))
    world.machine.now += 5.0
    world.start_daemon()
    connect(world, reader)
    work(world, reader)
    assert isinstance(message, wire.LeaseVersion)
    assert isinstance(reader.heard, wire.Leased)
    assert (reader.heard.lease, reader.heard.deadline_s) == (1, LEASE_S - 5.0)


def test_a_lease_that_was_granted_is_not_the_answer_to_another_question(world: World) -> None:
    publish(world)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    work(world, reader, fate=Fate(crash=Crash.UNSENT))
    world.start_daemon()
    connect(world, reader)
    for which in ({"version": 7}, {"newer_than": 1}):
        other = wire.LeaseVersion(stage="policy", engine="a", rank=0, timeout_s=1.0, again=True)
        world.ask(reader, other.model_copy(update=which))
        assert heard(reader) == "version_mismatch"


def test_a_release_that_is_repeated_is_done_unless_the_lease_was_lost(world: World) -> None:
    publish(world)
    (reader,) = engine(world, "a")
    good = lease(world, [reader])
    release = wire.Release(stage="policy", lease=good, rank=0)
    world.ask(reader, release)
    world.ask(reader, release.model_copy(update={"again": True}))
    assert heard(reader) == "done"
    lost = lease(world, [reader])
    world.machine.now += LEASE_S
    world.settle()
    for again in (False, True):
        world.ask(reader, wire.Release(stage="policy", lease=lost, rank=0, again=again))
        assert heard(reader) == "lease_lost"
    restart(world)
    connect(world, reader)
    world.ask(reader, wire.Release(stage="policy", lease=lost, rank=0, again=True))
    assert heard(reader) == "lease_lost"


def test_who_held_a_lease_longer_ago_than_losses_are_remembered_is_told_that_it_was_lost(world: World) -> None:
    publish(world)
    (reader,) = engine(world, "a")
    first = lease(world, [reader])
    for _ in range(20):
        world.machine.now += LEASE_S
        world.settle()
        reader.reading = None
        lease(world, [reader])
    world.ask(reader, wire.Release(stage="policy", lease=first, rank=0, again=True))
    assert heard(reader) == "lease_lost"


# Connections and sessions


def test_a_second_hello_with_another_token_is_refused_and_leaves_no_session(world: World) -> None:
    all_work(world, trainers(world), 1)
    client = trainers(world)[0].client
    assert client is not None
    before, holders = picture(world.up), dict(world.watch.held)
    hello = wire.Hello(protocol=wire.PROTOCOL, connection=b"another token...", name="again")
    (out,) = world.up.handle(world.peer(client), b"", wire.encode(hello))
    assert isinstance(out.answer, wire.Refusal)
    assert picture(world.up) == before
    assert (world.watch.held, len(world.up.sessions)) == (holders, 2)


def test_a_refused_declaration_takes_nothing_from_the_connection_before(world: World) -> None:
    begun(world)
    first, _ = trainers(world)
    open_another_connection(world, first)
    before = stage_pictures(world.up)
    world.ask(first, declaration(world, first, row_missing=True))
    assert heard(first) == "catalog_mismatch"
    assert stage_pictures(world.up) == before
    world.ask(first, declaration(world, first))
    assert heard(first) == "declared"
    assert states(world) == [SlotState.FREE, SlotState.FREE]


@block
def test_a_slot_is_not_given_to_a_connection_that_has_been_replaced(world: World) -> None:
    publish(world)
    first, _ = trainers(world)
    work(world, first)  # begins version 2, and waits until version 1 is read
    open_another_connection(world, first)
    work(world, first)
    lease(world, engine(world, "a"))
    work(world, first)
    assert heard(first) == "begun"


def test_a_lease_is_not_given_to_a_connection_that_has_been_replaced(world: World) -> None:
    all_work(world, trainers(world), 2)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    work(world, reader)  # asks for the first version
    open_another_connection(world, reader)
    attach(world, [reader])
    publish(world)
    work(world, reader)
    assert heard(reader) == "leased"


def test_the_deadline_of_a_replaced_connection_does_not_undo_what_its_successor_declared(world: World) -> None:
    first, second = trainers(world)
    world.employ(first, world.machine.start(hidden=False, old_number=False))
    connect(world, first)
    work(world, first, wait_s=1.0)
    open_another_connection(world, first)
    work(world, first, wait_s=30.0)
    world.machine.now += 2.0
    world.settle()
    work(world, second)
    work(world, second)
    world.maker.make()
    world.settle()
    assert [heard(seat) for seat in (first, second)] == ["declared", "declared"]


def test_a_session_that_is_forgotten_waits_for_nothing_any_more(world: World) -> None:
    first, _ = trainers(world)
    world.employ(first, world.machine.start(hidden=False, old_number=False))
    connect(world, first)
    for _ in range(2):
        work(world, first)  # declares, and waits for rank 1
        open_another_connection(world, first)
    assert set(world.up.pending) <= set(world.up.sessions)


def test_a_process_with_the_number_of_a_dead_one_has_none_of_its_seats(world: World) -> None:
    publish(world)
    first, _ = trainers(world)
    assert first.client is not None
    old = first.client.process
    world.end_daemon()
    world.die(old)
    new = world.machine.start(hidden=False, old_number=True)
    assert new.pid == old.pid
    world.start_daemon()
    assert 0 not in world.up.stages["policy"].trainers
    world.employ(first, new)
    connect(world, first)
    work(world, first)
    assert heard(first) == "declared"


# Versions


def test_a_version_that_nobody_can_finish_ends_with_the_last_who_could_have(world: World) -> None:
    publish(world)
    first, last = trainers(world)
    assert first.client is not None
    world.die(first.client.process)
    world.see_deaths()
    while not (isinstance(last.heard, wire.Begun) and last.copying is not None and not last.copying.left):
        work(world, last)
    work(world, last)  # commits, and waits for rank 0
    assert last.client is not None
    world.die(last.client.process)
    world.see_deaths()
    assert SlotState.FILLING not in states(world)
    assert publish(world) == 2


def test_what_a_dead_rank_has_committed_is_sealed_if_the_others_are_there(world: World) -> None:
    begun(world)
    first, last = trainers(world)
    work(world, first)
    assert first.client is not None
    world.die(first.client.process)
    world.see_deaths()
    work(world, last)
    assert heard(last) == "sealed"


def test_a_commit_is_not_taken_for_one_of_the_next_attempt_at_the_same_version(world: World) -> None:
    begun(world)
    first, last = trainers(world)
    work(world, first)  # commits, and waits
    assert last.client is not None
    last.client.honest = False
    world.ask(last, wire.Abort(stage="policy", rank=1, version=1, reason="anew"))
    assert heard(first) == "version_aborted"
    begun(world)
    work(world, first)
    work(world, last, wait_s=5.0)
    assert heard(last) == "sealed"


@pytest.mark.parametrize("world", [Plan(ranks=3)], indirect=True)
def test_who_waits_for_a_version_is_told_when_another_rank_begins_it_anew(world: World) -> None:
    begun(world)
    first, second, _ = trainers(world)
    work(world, first)
    work(world, second)  # both have committed, and wait for rank 2
    assert second.client is not None
    second.client.honest = False
    world.ask(second, wire.Begin(stage="policy", rank=1, version=1, timeout_s=1.0))  # its commit is given up
    assert [heard(first), heard(second)] == ["version_aborted", "begun"]


@pytest.mark.parametrize("world", [Plan(ranks=3)], indirect=True)
def test_who_waited_in_vain_is_told_who_was_awaited_last(world: World) -> None:
    begun(world)
    first, second, _ = trainers(world)
    work(world, first, wait_s=1.0)
    work(world, second)
    world.machine.now += 1.0
    world.settle()
    assert isinstance(first.heard, wire.Refusal)
    assert first.heard.code == "deadline_exceeded"
    assert "awaited: trainer rank 2" in first.heard.what


@pytest.mark.parametrize("world", [Plan(ranks=3)], indirect=True)
def test_a_late_commit_is_told_of_its_abort_also_when_a_later_version_was_aborted_since(world: World) -> None:
    begun(world)
    late, other, _ = trainers(world)
    assert other.client is not None
    other.client.honest = False
    for version in (1, 2):
        world.ask(other, wire.Begin(stage="policy", rank=1, version=version, timeout_s=1.0))
        world.ask(other, wire.Abort(stage="policy", rank=1, version=version, reason="no reason"))
    work(world, late)
    assert heard(late) == "version_aborted"


def test_late_copies_into_an_aborted_slot_are_overwritten_before_it_can_be_sealed(world: World) -> None:
    begun(world)
    late, other = trainers(world)
    assert late.copying is not None
    stale, pieces = late.copying.stamp, late.copying.memory.pieces(late.copying.slot, 0)
    assert other.client is not None
    world.die(other.client.process)
    world.see_deaths()
    for _ in range(4):
        work(world, other)  # a new process begins and commits the next version in the same slot
    for piece in itertools.chain(*pieces):
        piece.write(stale)  # and rank 0 is not through with the version before
    assert states(world) == [SlotState.FILLING, SlotState.FREE]
    assert publish(world) == 2
    check_laws(world)


def test_a_seal_is_told_only_once_it_is_written_although_a_connection_closes_meanwhile(world: World) -> None:
    begun(world)
    first, last = trainers(world)
    work(world, first)
    work(world, last, fate=Fate(hold=True))
    world.deliver_all(Fate(crash=Crash.UNREAD), closed=True)
    told = [event.version for event in world.events if event.event == "sealed"]
    world.start_daemon()
    assert told == [newest(world)]


# Leases


def test_a_lease_ends_with_its_engine_although_one_of_its_ranks_never_came(world: World) -> None:
    publish(world)
    first, _ = engine(world, "b")
    lease(world, [first])
    assert first.client is not None
    world.die(first.client.process)
    world.see_deaths()
    assert not world.up.stages["policy"].buffer.leases


def test_a_rank_that_has_left_its_engine_is_not_awaited_by_the_leases_that_follow(world: World) -> None:
    publish(world)
    first, second = engine(world, "b")
    attach(world, [first, second])
    assert second.client is not None
    world.die(second.client.process)
    world.see_deaths()
    restart(world)
    connect(world, first)
    lease(world, [first])
    work(world, first)  # releases it
    assert not world.up.stages["policy"].buffer.leases


def test_a_rank_that_asked_for_a_newer_version_does_not_get_the_old_one(world: World) -> None:
    publish(world)
    first, second = engine(world, "b")
    attach(world, [first, second])
    newer = wire.LeaseVersion(stage="policy", engine="b", rank=1, newer_than=1, timeout_s=30.0)
    world.ask(second, newer)
    work(world, first)
    assert [heard(first), heard(second)] == ["leased", "version_mismatch"]


@hidden
def test_a_reader_that_cannot_be_seen_keeps_its_lease_over_a_restart_for_the_promised_time(world: World) -> None:
    publish(world)
    second = engine(world, "b")[1:]
    lease(world, second)
    restart(world)
    world.machine.now += 2 * RETURN_S
    world.settle()
    for _ in range(12):
        all_work(world, trainers(world), 1)
    check_laws(world)  # its slot is as it was
    connect(world, second[0])
    work(world, second[0])
    assert heard(second[0]) == "done"


@hidden
def test_a_reader_that_was_taken_for_dead_learns_that_its_lease_was_lost(world: World) -> None:
    publish(world)
    (reader,) = engine(world, "a")
    lease(world, [reader])
    assert reader.client is not None
    assert reader.client.process.hidden
    world.break_connection(reader.client)
    world.see_broken()
    publish(world)
    publish(world)  # into the slot that it reads
    connect(world, reader)
    work(world, reader)
    assert heard(reader) == "lease_lost"


# Segments


def test_whoever_declares_a_stage_for_which_there_was_no_room_may_be_others_than_before(world: World) -> None:
    all_work(world, trainers(world)[:1], 2)
    (first, second) = trainers(world)
    for _ in range(2):
        work(world, second)
    world.maker.make(room=False)
    world.settle()
    assert [heard(seat) for seat in (first, second)] == ["not_enough_memory", "not_enough_memory"]
    world.employ(first, world.machine.start(hidden=False, old_number=False))
    assert publish(world) == 1


@pytest.mark.parametrize("fate", [Fate(crash=crash, landed=0.5) for crash in Crash])
def test_a_daemon_that_ends_before_it_has_announced_a_stage_leaves_nothing_that_is_set_aside(
    world: World, fate: Fate
) -> None:
    all_work(world, trainers(world)[:1], 2)
    work(world, trainers(world)[1])
    work(world, trainers(world)[1])
    world.maker.make()
    world.settle(fate)
    world.start_daemon()
    assert not [path for path in world.segments() if path.name.endswith(SET_ASIDE)]
    assert publish(world) == 1


def test_a_daemon_that_is_stopped_while_it_makes_memory_gives_it_back(world: World) -> None:
    for seat in trainers(world):
        work(world, seat)
        work(world, seat)
    assert world.maker.busy
    world.stop_daemon()
    assert not world.segments()
    world.start_daemon()
    assert publish(world) == 1


two_stages = pytest.mark.parametrize("world", [Plan(second_stage=True)], indirect=True)


@two_stages
def test_what_a_connection_held_stays_with_its_process_though_another_one_said_goodbye(world: World) -> None:
    first, draft = next(iter(trainers(world))), trainers(world)[-1]
    all_work(world, [first, draft], 2)
    assert draft.seated
    open_another_connection(world, first)
    world.ask(first, wire.Bye())
    assert heard(first) == "done"
    world.employ(draft, world.machine.start(hidden=False, old_number=False))
    world.employ(world.seats[-1], world.idle()[0])  # the process before has work to do
    draft.heard = None
    while draft.heard is None or heard(draft) not in ("rank_taken", "declared"):
        work(world, draft)
    assert heard(draft) == "rank_taken"


early = pytest.mark.parametrize("world", [Plan(early=("a",))], indirect=True)


@early
def test_what_a_rank_still_tells_of_an_aborted_attempt_does_not_count_for_the_next_at_the_same_version(
    world: World,
) -> None:
    begun(world)
    late, other = trainers(world)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    assert other.client is not None
    other.client.honest = False
    world.ask(other, wire.Abort(stage="policy", rank=1, version=1, reason="no reason"))
    world.ask(other, wire.Begin(stage="policy", rank=1, version=1, timeout_s=1.0))
    assert other.copying is not None
    copy(other, other.copying.pieces_left)
    assert late.copying is not None
    late.copying.memory.progress[late.copying.slot].land(0, len(late.copying.memory.catalog.owned_by(0)))
    work(world, reader)  # leases what is being filled
    assert reader.reading is not None
    assert not world.look(reader), "what rank 0 had put before the abort was taken for what it puts now"
    work(world, late)
    assert heard(late) == "version_aborted"
    world.ask(late, wire.Begin(stage="policy", rank=0, version=1, timeout_s=1.0))
    assert late.copying is not None
    copy(late, late.copying.pieces_left)
    assert world.look(reader)
    for seat in (late, other, reader):
        work(world, seat)
    assert [heard(seat) for seat in (late, other, reader)] == ["sealed", "sealed", "done"]


@early
def test_an_abort_that_a_crash_undoes_is_undone_for_who_reads_early_too(world: World) -> None:
    begun(world)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    work(world, reader)
    _, second = trainers(world)
    abort = wire.Abort(stage="policy", rank=1, version=1, reason="no reason")
    world.ask(second, abort, Fate(crash=Crash.TORN, landed=0.0))
    assert reader.reading is not None
    assert not reader.reading.memory.progress[reader.reading.slot].holds(1)
    world.start_daemon()
    assert reader.reading.memory.progress[reader.reading.slot].holds(1)
    check_laws(world)


@early
def test_a_process_that_dies_while_it_is_read_early_takes_the_lease_away_and_the_next_version_is_read(
    world: World,
) -> None:
    begun(world)
    _, second = trainers(world)
    (reader,) = engine(world, "a")
    attach(world, [reader])
    work(world, reader)
    assert second.client is not None
    world.die(second.client.process)
    world.see_deaths()
    work(world, reader)
    assert heard(reader) == "lease_lost"
    assert publish(world) == 2
    work(world, reader)
    assert reader.reading is not None
    assert (reader.reading.version, reader.reading.attempt) == (2, None)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Rank 1 of an engine is killed, in a process of its own. Rank 0 and the trainers survive in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stagingd_client import Stage
from stagingd_vllm import Reader
from stagingd_vllm.reader import Lease

from crashes import actors, model
from crashes.points import Moment, Point, Step
from crashes.processes import Actor
from crashes.scene import TIMEOUT_S, attach, founded, newest_read, state_of
from crashes.table import Outcome
from crashes.waiting import milliseconds_since

Paused = Callable[[Actor], float]


def dies(point: Point, name: str, socket: Path, paused: Paused | None = None) -> Outcome:
    """Nobody waits for the dead worker: neither the trainers nor the other rank of its engine."""
    with founded(name, socket) as trainers, attach(name, socket, ranks=2) as survivor:
        lease = _under_way(point, trainers, survivor)
        with closing(Actor(actors.worker, name, str(socket), point.id)) as doomed:
            died = paused(doomed) if paused is not None else doomed.died_at(point)
        if lease is not None:
            assert model.check(lease) == 1
            lease.release()
        if point.step is Step.FLIP:
            assert state_of(2, name, socket) == ("sealed" if point.moment is Moment.BEFORE else "front")
        else:
            for publication in [stage.commit() for stage in trainers]:
                publication.wait()
        front, after_ms = newest_read(name, socket), milliseconds_since(died)
        assert front == 2
        model.publish(3, *trainers)
        following_ms = milliseconds_since(died)
        model.publish(4, *trainers)
        milliseconds_since(died)
        if (point.step, point.moment) != (Step.ATTACH, Moment.BEFORE):  # else the engine never was complete
            _go_on_alone(trainers, survivor)
        _go_on_together(name, socket, trainers, survivor)
        return Outcome("no error, nobody waits", after_ms, front, point.fate, 3, following_ms)


def _under_way(point: Point, trainers: tuple[Stage, Stage], survivor: Reader) -> Lease | None:
    """Version 2 is sealed where it is to be flipped, and being filled otherwise; the survivor reads version 1."""
    if point.step is Step.FLIP:
        model.publish(2, *trainers)
        return None
    for stage in trainers:
        model.fill(stage, 2)
        stage.fence()
    return None if point.step is Step.ATTACH else survivor.lease(timeout_s=TIMEOUT_S)


def _go_on_alone(trainers: tuple[Stage, Stage], survivor: Reader) -> None:
    """The other rank reads a version without the dead one, and its slot is free for the trainers at once."""
    with survivor.lease(timeout_s=TIMEOUT_S) as lease:
        assert model.check(lease) == 4
    for version in (5, 6):
        model.publish(version, *trainers)


def _go_on_together(name: str, socket: Path, trainers: tuple[Stage, Stage], survivor: Reader) -> None:
    """Another process takes the dead one's place: both ranks read the same version."""
    model.publish(7, *trainers)
    with closing(Actor(actors.new_worker, name, str(socket))) as successor:
        assert successor.said() == "attached"
        with survivor.lease(timeout_s=TIMEOUT_S) as lease:
            assert model.check(lease) == 7
            successor.tell("read")
            assert successor.said() == "7"
        successor.ended()
        assert successor.exit_status() == 0
    for version in (8, 9):
        model.publish(version, *trainers)
    assert newest_read(name, socket) == 9

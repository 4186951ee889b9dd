# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Trainer rank 1 is killed, in a process of its own. Rank 0 survives in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from stagingd_client import Publication, Stage

from crashes import actors, model
from crashes.points import Asked, Fate, Moment, Point, Step
from crashes.processes import Actor
from crashes.scene import committed, founded, newest_read, open_stage, state_of
from crashes.table import Outcome
from crashes.waiting import milliseconds_since, until
from stagingd.errors import VersionAborted

Paused = Callable[[Actor], float]
"""What happens to a doomed process that pauses. Returns when it died."""


def dies(point: Point, name: str, socket: Path, paused: Paused | None = None) -> Outcome:
    """Rank 1 takes part in version 2 until it is killed; another process takes its place in version 3."""
    if point.hook == Asked("declare", taken="declared"):
        return _dies_founding(point, name, socket)
    with founded(name, socket) as (survivor, stand_in):
        stand_in.close()
        model.fill(survivor, 2)
        survivor.fence()
        with closing(_doomed(point, name, socket, survivor)) as doomed:
            died = paused(doomed) if paused is not None else doomed.died_at(point)
            # Where rank 1 is to be the first to commit, rank 0 has not done so yet.
            publication = survivor._last if survivor._current is None else survivor.commit()
            assert publication is not None
            saw = _seen(point, publication, doomed.pid)
            after_ms = milliseconds_since(died)
        if point.step is Step.FLIP:
            assert state_of(2, name, socket) == ("sealed" if point.moment is Moment.BEFORE else "front")
        front = newest_read(name, socket)
        assert front == (2 if point.fate is Fate.SEALED else 1)
        return Outcome(saw, after_ms, front, point.fate, _go_on(point, name, socket, survivor))


def _doomed(point: Point, name: str, socket: Path, survivor: Stage) -> Actor:
    """The doomed rank; the survivor commits before it does, except where it is to be the first."""
    if point.step is not Step.COMMIT:
        survivor.commit()
        until(lambda: committed(name, socket, 0), "rank 0 to have committed")
    doomed = Actor(actors.trainer, name, str(socket), point.id)
    if point.step is Step.COMMIT and point.moment is Moment.AFTER:
        until(lambda: committed(name, socket, 1), "rank 1 to have committed")
        survivor.commit()
    return doomed


def _seen(point: Point, publication: Publication, pid: int) -> str:
    """What the survivor learns of version 2."""
    if point.fate is Fate.WAITS:
        assert not publication.done
        return "rank 0 waits for rank 1"
    if point.fate is Fate.SEALED:
        publication.wait()
        return "no error"
    with pytest.raises(VersionAborted) as caught:
        publication.wait()
    for said in ("version 2 was aborted: trainer rank 1", f"pid {pid}", point.how):
        assert said in str(caught.value)
    return f"VersionAborted: trainer rank 1 (pid …), {point.how}"


def _go_on(point: Point, name: str, socket: Path, survivor: Stage) -> int:
    """Another process takes the dead one's place, and the next version goes through."""
    versions = (2, 3) if point.fate is Fate.WAITS else (3,)
    with closing(Actor(actors.new_trainer, name, str(socket), *map(str, versions))) as successor:
        if point.fate is Fate.WAITS:
            assert survivor._last is not None
            survivor._last.wait()
        model.publish(3, survivor)
        successor.ended()
        assert successor.exit_status() == 0
    assert newest_read(name, socket) == 3
    return 3


def _dies_founding(point: Point, name: str, socket: Path) -> Outcome:
    """The doomed rank declares another stage; version 2 of the first is under way, and nothing befalls it."""
    other = f"{name}-other"
    with founded(name, socket) as (zero, one), open_stage(other, socket, 0) as survivor:
        model.fill(zero, 2)
        model.fill(one, 2)
        with (
            ThreadPoolExecutor(1) as background,
            closing(Actor(actors.trainer, other, str(socket), point.id)) as doomed,
        ):
            answered = point.moment is Moment.AFTER
            declared = background.submit(survivor.declare, model.shards(0, 0)) if answered else None
            died = doomed.died_at(point)
            for publication in (zero.commit(), one.commit()):
                publication.wait()
            front, after_ms = newest_read(name, socket), milliseconds_since(died)
            assert front == 2
            with closing(Actor(actors.new_trainer, other, str(socket), "1")) as successor:
                (declared or background.submit(survivor.declare, model.shards(0, 0))).result()
                model.publish(1, survivor)
                successor.ended()
                assert successor.exit_status() == 0
        assert newest_read(other, socket) == 1
        model.publish(3, zero, one)
        assert newest_read(name, socket) == 3
        return Outcome("no error; the stage is founded with its successor", after_ms, front, point.fate, 3)

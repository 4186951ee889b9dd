# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon is killed. All its clients survive, in this process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from crashes import model
from crashes.play import LAST_VERSION, SECOND, STAGE, Play
from crashes.points import Fate, Point
from crashes.processes import Place
from crashes.reign import Reign
from crashes.scene import attach, check_deserted, declare, newest_read, observer, open_stage
from crashes.table import Outcome
from crashes.waiting import DEADLINE_S, milliseconds_since
from stagingd import wire
from stagingd.errors import DaemonUnreachable, UnknownStage

NEXT_VERSION: Final = 9
"""What fresh clients publish, where the old ones have given up."""


def restarted(point: Point, place: Place) -> Outcome:
    """Another daemon follows at once: the clients go on by themselves, and learn nothing of it."""
    ends_for_good = point.fate is Fate.GIVEN_BACK
    with ThreadPoolExecutor(1) as background, Reign(place, point, restarted=True) as reign:
        with Play(place.socket, reign.under_way, reign.doom.passage) as play:
            if ends_for_good:
                outcome = _told(play, reign)
            else:
                front = background.submit(_front, place.socket, reign)
                outcome = _undisturbed(play, reign, front)
                assert front.result() >= point.front
        reign.check_deaths()
    if ends_for_good:
        _go_on(place.socket)
    check_deserted(place.socket)
    place.stop()
    return outcome


def _front(socket: Path, reign: Reign) -> int:
    """Another engine reads the front as soon as there is a daemon again. Returns its version."""
    reign.fallen.result(DEADLINE_S)
    with closing(observer(socket)):
        return newest_read(STAGE, socket)


def _undisturbed(play: Play, reign: Reign, front: Future[int]) -> Outcome:
    """The play comes to its end, with all versions in their turn."""
    play.run()
    died = reign.fallen.result(DEADLINE_S)
    act, at = next((act, at) for act, at in play.done if at > died)
    assert newest_read(STAGE, play.socket) == LAST_VERSION
    saw, read = f"no error: {act} goes on", front.result(DEADLINE_S)
    return Outcome(saw, round((at - died) * 1000), read, Fate.SEALED, LAST_VERSION)


def _told(play: Play, reign: Reign) -> Outcome:
    """The daemon was told to end for good: who waits learns that it has, or that the stage is gone."""
    gone = r"there is no stage 'policy'|the daemon stopped while trainer rank 0"
    with pytest.raises((UnknownStage, DaemonUnreachable), match=gone) as told:
        play.run()
    after_ms = milliseconds_since(reign.fallen.result(DEADLINE_S))
    with pytest.raises(UnknownStage):
        play.publications[1].wait()
    saw = "there is no stage …" if told.type is UnknownStage else "the daemon stopped while …"
    return Outcome(f"{told.type.__name__}: {saw}", after_ms, None, Fate.GIVEN_BACK, NEXT_VERSION)


def not_restarted(point: Point, place: Place) -> Outcome:
    """Nobody follows: every client is told which daemon is gone. Long after, there is one again."""
    with ThreadPoolExecutor(1) as background, Reign(place, point, restarted=False) as reign:
        with Play(place.socket, reign.under_way, reign.doom.passage) as play:
            idle = background.submit(_idle, place.socket, reign)
            outcome = _unreachable(play, reign, point, place.return_s)
            idle.result(DEADLINE_S)
        reign.check_deaths()
    place.daemon()
    with closing(observer(place.socket)):
        assert point.fate is Fate.GIVEN_BACK or newest_read(STAGE, place.socket) == point.front
    _go_on(place.socket)
    check_deserted(place.socket)
    place.stop()
    return outcome


def _unreachable(play: Play, reign: Reign, point: Point, return_s: float) -> Outcome:
    """Whoever was asking something learns which daemon is gone; but who was told of its end in time, that."""
    with pytest.raises(DaemonUnreachable) as caught:
        play.run()
    after_ms = milliseconds_since(reign.fallen.result(DEADLINE_S))
    gone = f"the daemon (pid {reign.first.pid}) at {play.socket} is gone"
    told = "the daemon stopped while trainer rank 0"
    errors = [caught.value]
    for publication in play.publications:
        with pytest.raises(DaemonUnreachable) as waited:
            publication.wait()
        errors.append(waited.value)
    assert all(gone in error.what or (point.fate is Fate.GIVEN_BACK and told in error.what) for error in errors)
    saw = f"the daemon (pid …) is gone for {return_s} s" if gone in errors[0].what else "the daemon stopped while …"
    fate = point.fate if point.fate is Fate.GIVEN_BACK else Fate.SEALED if point.front >= 2 else Fate.ABORTED
    front = None if point.fate is Fate.GIVEN_BACK else point.front
    return Outcome(f"DaemonUnreachable: {saw}", after_ms, front, fate, NEXT_VERSION)


def _idle(socket: Path, reign: Reign) -> None:
    """A client that asks nothing until the death, and is told in time."""
    with closing(observer(socket)) as connection:
        died = reign.fallen.result(DEADLINE_S)
        with pytest.raises(DaemonUnreachable, match=rf"the daemon \(pid {reign.first.pid}\)"):
            connection.request(wire.Status(), wire.StatusReport)
        milliseconds_since(died)


def _go_on(socket: Path) -> None:
    """Fresh clients take all places, publish the next versions, and read them."""
    with open_stage(STAGE, socket, 0) as zero, open_stage(STAGE, socket, 1) as one:
        with open_stage(SECOND, socket, 0, ranks=1) as second:
            declare(zero, one)
            declare(second)
            with attach(STAGE, socket, rank=0, ranks=2), attach(STAGE, socket, rank=1, ranks=2):
                for version in (NEXT_VERSION, NEXT_VERSION + 1, NEXT_VERSION + 2):
                    model.publish(version, zero, one)
                    assert newest_read(STAGE, socket) == version

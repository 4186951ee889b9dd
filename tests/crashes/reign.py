# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemons of one place, one after the other: who dies where, and who follows."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from crashes.doom import Doom
from crashes.points import Copied, Point, Step, Viewed
from crashes.processes import Place
from crashes.waiting import DEADLINE_S


class Reign:
    """Starts the first daemon; whenever one dies, the next follows at once. A context.

    Args:
        place: where they serve.
        point: where one of them is killed: the second where that is recovery, else the first.
        restarted: whether another one follows the last that dies.

    Attributes:
        first: the daemon that the clients know.
        fallen: when it died, on the monotonic clock; made known at once.
        doom: what clients come by; it kills the first daemon where the point is a client's.
    """

    def __init__(self, place: Place, point: Point, *, restarted: bool) -> None:
        self._place = place
        self._point = point
        self._by_client = isinstance(point.hook, Copied | Viewed)
        doomed = None if self._by_client else point
        line = [None, doomed] if point.step is Step.RECOVERY else [doomed]
        self._dying, self._following = len(line), [*line[1:], *[None] * restarted]
        self._struck: list[str] = []
        self.first = place.daemon(line[0])
        self.fallen: Future[float] = Future()
        self.doom = Doom(point, self._struck.append, victim=self.first.pid)
        self._background = ThreadPoolExecutor(1)
        self._succession = self._background.submit(self._succeed)

    def _succeed(self) -> None:
        for _ in range(self._dying):
            died = self._place.daemons[-1].ended()
            if not self.fallen.done():
                self.fallen.set_result(died)
            if self._following:
                self._place.daemon(self._following.pop(0))

    def under_way(self) -> None:
        """Version 2 is: the daemon is told to end, or killed so that a successor recovers, where that is the scene."""
        if self._point.step is Step.RECOVERY:
            self.first.kill()
        elif self._point.what.startswith("stop"):
            os.kill(self.first.pid, signal.SIGTERM)
        elif self._point.what.startswith("hand over"):
            os.kill(self.first.pid, signal.SIGUSR1)
        else:
            return
        self.first.ended()

    def check_deaths(self) -> None:
        """Assert that all who were to die did, where they were to."""
        self._succession.result(DEADLINE_S)
        dead = self._place.daemons[: self._dying]
        for daemon in dead:
            assert daemon.exit_status() == -signal.SIGKILL
        said = self._struck if self._by_client else [dead[-1].said()]
        assert said == [self._point.id]

    def __enter__(self) -> Reign:
        if self._by_client:
            self.doom.set()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.doom.lift()
        if error is not None:  # nobody need follow any more
            self._following.clear()
            self._place.end()
        self._background.shutdown()

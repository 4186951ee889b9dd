# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where the event loop leaves snapshots for the threads that serve them.

The loop is never waited for with anything of its own in hand: it is woken, and leaves a snapshot when it comes by.
However many ask, it leaves one in ``FRESH_S`` seconds at most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from stagingd.errors import StagingError
from stagingd.web.snapshot import Snapshot

FRESH_S: Final = 0.2
"""How old a snapshot may be that is served, in seconds."""

WAIT_S: Final = 2.0
"""How long the event loop may take for one, in seconds: far longer than a turn of it."""


class LoopBusy(StagingError):
    """The event loop has left no snapshot in time, or ends."""

    code = "loop_busy"


class Board:
    """The last snapshot, and whether another is wanted.

    Args:
        wake: makes the event loop come by.
        wait_s: how long it may take.
    """

    def __init__(self, wake: Callable[[], None], wait_s: float = WAIT_S) -> None:
        self._wake = wake
        self._wait_s = wait_s
        self._condition = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._closed = False
        self.wanted = False
        """Whether the event loop is to leave a snapshot. For it alone to read, without waiting for anybody."""

    def current(self) -> Snapshot:
        """A snapshot that is fresh. For other threads. Raises LoopBusy."""
        with self._condition:
            asked = time.monotonic() - FRESH_S
            if not self._is_from(asked) and not self.wanted and not self._closed:
                self.wanted = True
                self._wake()
            self._condition.wait_for(lambda: self._closed or self._is_from(asked), self._wait_s)
            if self._snapshot is None or self._closed or not self._is_from(asked):
                raise LoopBusy(
                    "the daemon ends" if self._closed else f"the event loop has not answered within {self._wait_s:g} s",
                    remedy="look at the daemon's log",
                )
            return self._snapshot

    def _is_from(self, asked: float) -> bool:
        return self._snapshot is not None and self._snapshot.at_s >= asked

    def put(self, snapshot: Snapshot) -> None:
        """Leave one. For the event loop."""
        with self._condition:
            self._snapshot, self.wanted = snapshot, False
            self._condition.notify_all()

    def close(self) -> None:
        """The event loop ends: nobody waits for it any more."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

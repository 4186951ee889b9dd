# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A gate: where processes wait until they are let through all at once."""

from __future__ import annotations

import multiprocessing
import os
import select
from collections.abc import Mapping
from multiprocessing import connection

from benchmarks.control_case import STEP_S
from benchmarks.host_case import BenchmarkFailed
from stagingd.errors import DeadlineExceeded


class Gate:
    """For a number of processes, and for the one that conducts them and has forked them.

    A ``multiprocessing.Barrier`` wakes one process after the other, by way of locks, and on a few cores that
    takes longer than what is measured. Here one write to an eventfd wakes all of them, and nobody wakes the
    conductor but the last to arrive.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._arrived = multiprocessing.get_context("fork").Value("i", 0)
        self._complete = os.eventfd(0)
        self._doors = (os.eventfd(0), os.eventfd(0))
        self._turn = 0

    # A process

    def wait(self) -> None:
        """Wait until the gate is opened. Raises DeadlineExceeded."""
        door = self._next_door()
        with self._arrived.get_lock():
            self._arrived.value += 1
            if self._arrived.value == self.size:
                os.eventfd_write(self._complete, 1)
        poller = select.poll()
        poller.register(door, select.POLLIN)
        if not poller.poll(STEP_S * 1000):
            raise DeadlineExceeded(f"no gate was opened within {STEP_S} s", remedy="see what the others say")

    # The conductor

    def complete(self, sentinels: Mapping[int, str]) -> None:
        """Wait until all processes are here.

        Args:
            sentinels: names of processes by the descriptor that tells their end.

        Raises:
            BenchmarkFailed: one of them ended instead.
            DeadlineExceeded: they took too long.
        """
        if self._complete in connection.wait([self._complete, *sentinels], timeout=STEP_S):
            return
        check_all_live(sentinels)
        here = f"{self._arrived.value} of {self.size}"
        raise DeadlineExceeded(f"after {STEP_S} s {here} ranks are at their gate", remedy="leave the machine more room")

    def open(self) -> None:
        """Let all through. They must be here: ``complete`` says so."""
        os.eventfd_read(self._complete)
        self._arrived.value = 0
        if self._turn:
            os.eventfd_read(self._doors[(self._turn - 1) % 2])  # nobody stands at the gate before any more
        os.eventfd_write(self._next_door(), 1)

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in (self._complete, *self._doors):
            os.close(descriptor)

    def _next_door(self) -> int:
        """Two doors take turns, so that who is slow to leave through one does not see it closed."""
        self._turn += 1
        return self._doors[(self._turn - 1) % 2]


def check_all_live(sentinels: Mapping[int, str]) -> None:
    """Raises BenchmarkFailed when a process, named by the descriptor that tells its end, has ended."""
    over = connection.wait(list(sentinels), timeout=0)
    ended = [name for sentinel, name in sentinels.items() if sentinel in over]
    if ended:
        raise BenchmarkFailed(f"{', '.join(ended)} ended before its time", remedy="its own words are above")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Liveness: learn at once that a process is gone, by a pidfd that becomes readable when it ends."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from stagingd.errors import PeerDied


class Process:
    """A live process. Its ``fd`` becomes readable when the process ends; close it when done.

    Attributes:
        pid: its number, as this process sees it.
        started: when it started, in clock ticks since the machine did. With the pid it means one process
            for ever, although pids are used again.
    """

    def __init__(self, pid: int) -> None:
        """Watch a process. Raises PeerDied when there is none of this number."""
        self.pid = pid
        try:
            self.fd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise _nobody(pid) from error
        try:
            self.started = _started(pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            self.close()
            raise _nobody(pid) from error

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        watch = select.poll()  # unlike select(), for descriptors of any number
        watch.register(self.fd, select.POLLIN)
        return bool(watch.poll(0))

    def close(self) -> None:
        """Stop watching."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _nobody(pid: int) -> PeerDied:
    return PeerDied(f"no process has pid {pid}", remedy="start it again", peer=str(pid))


def _started(pid: int) -> int:
    """Field 22 of /proc/PID/stat, see proc_pid_stat(5). The name before it may hold spaces and brackets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@dataclass
class _Watched:
    process: Process
    holders: int


class Processes:
    """The processes that somebody here depends on: one pidfd each, however many connections they have.

    Args:
        watch, unwatch: called with a pidfd when it is to be polled, and when no longer.
    """

    def __init__(self, watch: Callable[[int], None], unwatch: Callable[[int], None]) -> None:
        self._watch = watch
        self._unwatch = unwatch
        self._by_pid: dict[int, _Watched] = {}

    def hold(self, pid: int) -> int:
        """Watch a process until ``release`` is called as often. Returns when it started. Raises PeerDied."""
        watched = self._by_pid.get(pid)
        if watched is not None and watched.process.ended:
            raise _nobody(pid)  # its number may be in use again, but its end has not been dealt with
        if watched is None:
            watched = self._by_pid[pid] = _Watched(Process(pid), 0)
            self._watch(watched.process.fd)
        watched.holders += 1
        return watched.process.started

    def release(self, pid: int) -> None:
        """The opposite of ``hold``."""
        watched = self._by_pid[pid]
        watched.holders -= 1
        if not watched.holders:
            del self._by_pid[pid]
            self._unwatch(watched.process.fd)
            watched.process.close()

    def ended(self, fd: int) -> int | None:
        """The pid of the process behind a readable descriptor, or None where none has ended.

        Asked again: since the poll the descriptor may have been closed, and its number given to another.
        """
        found = (pid for pid, watched in self._by_pid.items() if watched.process.fd == fd and watched.process.ended)
        return next(found, None)

    def close(self) -> None:
        """Stop watching everybody."""
        for watched in self._by_pid.values():
            self._unwatch(watched.process.fd)
            watched.process.close()
        self._by_pid.clear()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a version into a shadow, in a thread beside the one that computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Protocol

from stagingd.errors import DeadlineExceeded, OutOfOrder
from stagingd_vllm.leased import LeasedVersion

SLICE_S = 0.5
"""How long the thread waits for a version before it looks whether it is still wanted, in seconds."""
SHORTEST_S = 0.001
"""The least time that the daemon can be given to find one."""


class Leasing(Protocol):
    """The part of a ``Reader`` that this needs."""

    def lease(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> LeasedVersion: ...


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which version is asked for."""

    version: int | None
    newer_than: int | None
    early: bool


class Prefetcher:
    """Reads one version at a time. While it does, the reader and the shadow are its own.

    Args:
        reader: leases versions.
        write: writes a leased version into the shadow; returns when all of it is there.
    """

    def __init__(self, reader: Leasing, write: Callable[[LeasedVersion], None]) -> None:
        self._reader = reader
        self._write = write
        self._outcome: Future[int] | None = None
        self._ending = threading.Event()

    @property
    def reading(self) -> bool:
        """Whether a version is being waited for, or read."""
        return self._outcome is not None and not self._outcome.done()

    def start(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> None:
        """Begin to read a version; what is in the shadow is given up.

        Args:
            version: exactly this one; the newest, if it is None.
            newer_than: only one that is greater.
            early: where no complete version will do, one that is being filled will.
            timeout_s: how long to wait until there is one, in seconds.

        Raises:
            OutOfOrder: one is being read.
        """
        self.refuse_while_reading()
        outcome: Future[int] = Future()
        deadline = time.monotonic() + timeout_s
        which = _Wanted(version, newer_than, early)

        def run() -> None:
            try:
                outcome.set_result(self._read(which, deadline))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where one asks for the outcome
                outcome.set_exception(error)

        self._outcome = outcome
        threading.Thread(target=run, name="stagingd-prefetch", daemon=True).start()

    def version(self, timeout_s: float = 0.0) -> int | None:
        """The version that is in the shadow, whole; None if it is being read, or none was asked for.

        Args:
            timeout_s: how long to wait for one that is being read, in seconds.

        Raises:
            StagingError: what kept it from being read.
        """
        if self._outcome is None:
            return None
        try:
            return self._outcome.result(timeout_s)
        except TimeoutError:
            if self._outcome.done():
                raise  # that of whoever read
            return None

    def forget(self) -> None:
        """What is in the shadow, or what kept it from being read, no longer counts."""
        self.refuse_while_reading()
        self._outcome = None

    def refuse_while_reading(self) -> None:
        """Raises OutOfOrder: a version is being read."""
        if self.reading:
            raise OutOfOrder(
                "a version is being prefetched by this worker",
                remedy="wait until stagingd_prefetched gives it, then call stagingd_swap; or detach",
            )

    def close(self, timeout_s: float) -> None:
        """Give up what is being waited for, and wait for what is being read. Raises DeadlineExceeded."""
        self._ending.set()
        if self._outcome is None:
            return
        try:
            self._outcome.exception(timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"a version is still being read after {timeout_s:g} s",
                remedy="look at this worker's device, and restart the engine",
            ) from error

    def _read(self, which: _Wanted, deadline: float) -> int:
        with self._leased(which, deadline) as lease:
            self._write(lease)
        return lease.version  # only now: what was read early counts once it has been released

    def _leased(self, which: _Wanted, deadline: float) -> LeasedVersion:
        while True:
            left = max(deadline - time.monotonic(), SHORTEST_S)
            try:
                return self._reader.lease(**asdict(which), timeout_s=min(left, SLICE_S))
            except DeadlineExceeded:
                if left <= SLICE_S or self._ending.is_set():
                    raise

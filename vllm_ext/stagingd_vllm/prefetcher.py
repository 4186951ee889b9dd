# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a version into a shadow, in a thread beside the one that computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from stagingd.errors import DeadlineExceeded, InternalError, OutOfOrder, StagingError
from stagingd_vllm.leased import LeasedVersion

logger = logging.getLogger(__name__)

SLICE_S = 0.5
"""How long the thread waits for a version before it looks whether it is still wanted, in seconds."""
SHORTEST_S = 0.001
"""The least time that the daemon can be given to find one."""
GIVING_UP_S = 30.0
"""How long the daemon may take beyond that to answer, and a lease to be given back, in seconds."""


class Leasing(Protocol):
    """The part of a ``Reader`` that this needs."""

    def lease(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> LeasedVersion: ...


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which version is asked for."""

    version: int | None
    newer_than: int | None
    early: bool


class _Request:
    """One version that a thread waits for, and then reads; ``outcome`` is it, once all of it is there."""

    def __init__(self, which: _Wanted, deadline: float, before: _Request | None = None) -> None:
        self.which = which
        self.deadline = deadline
        self._before = before
        self.outcome: Future[int] = Future()
        self._lock = threading.Lock()
        self._reading = False
        self._given_up = False

    @property
    def given_up(self) -> bool:
        """Whether nobody wants it any more."""
        return self._given_up

    @property
    def reading(self) -> bool:
        """Whether it is being read."""
        return self._reading and not self.outcome.done()

    def begin_to_read(self) -> bool:
        """It has been leased. False: nobody wants it any more."""
        with self._lock:
            self._reading = not self._given_up
            return self._reading

    def give_up(self) -> bool:
        """Nobody wants it any more. False: it is being read already."""
        with self._lock:
            self._given_up = not self.reading
            return self._given_up

    def await_turn(self, timeout_s: float) -> None:
        """Wait until the thread of the one before needs the reader no more. Raises DeadlineExceeded."""
        before = self._before  # its own thread may take it away meanwhile
        if before is not None:
            before.await_end(timeout_s)
            self._before = None

    def await_end(self, timeout_s: float) -> None:
        """The same of its own thread, and of those before that it has not waited for itself."""
        self.await_turn(timeout_s)
        try:
            self.outcome.exception(timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"a version is still being read, or asked for, after {timeout_s:g} s",
                remedy="look at the daemon and at this worker's device, and restart the engine",
            ) from error


class Prefetcher:
    """Reads one version at a time. While it does, the reader and the shadow are its own.

    A version that is only waited for makes way for whatever else is asked for.

    Args:
        reader: leases versions.
        write: writes a leased version into the shadow; returns when all of it is there.
    """

    def __init__(self, reader: Leasing, write: Callable[[LeasedVersion], None]) -> None:
        self._reader = reader
        self._write = write
        self._request: _Request | None = None
        self._forgotten = False  # its thread may need the reader yet, so it is kept
        self._ending = False

    @property
    def reading(self) -> bool:
        """Whether a version is being read; one that is waited for is not."""
        return self._request is not None and self._request.reading

    def start(self, *, version: int | None, newer_than: int | None, early: bool, timeout_s: float) -> None:
        """Begin to read a version; what is in the shadow is given up, and what is waited for, too.

        Args:
            version: exactly this one; the newest, if it is None.
            newer_than: only one that is greater.
            early: where no complete version will do, one that is being filled will.
            timeout_s: how long to wait until there is one, in seconds.

        Raises:
            OutOfOrder: one is being read.
        """
        before = self._give_up()
        self._start(_Request(_Wanted(version, newer_than, early), time.monotonic() + timeout_s, before))

    def _start(self, request: _Request) -> None:
        def run() -> None:
            try:
                request.await_turn(SLICE_S + GIVING_UP_S)  # the reader is for one at a time
                request.outcome.set_result(self._read(request))
            except StagingError as error:
                request.outcome.set_exception(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told where one asks for the outcome
                request.outcome.set_exception(_failed(error))

        self._request, self._forgotten = request, False
        threading.Thread(target=run, name="stagingd-prefetch", daemon=True).start()

    def version(self, timeout_s: float = 0.0) -> int | None:
        """The version that is in the shadow, whole; None if it is being read, or none was asked for.

        Args:
            timeout_s: how long to wait for one that is being read, in seconds.

        Raises:
            StagingError: what kept it from being read.
        """
        if self._request is None or self._forgotten:
            return None
        outcome = self._request.outcome
        try:
            return outcome.result(timeout_s)
        except TimeoutError:  # of this wait, or of whoever read
            return outcome.result() if outcome.done() else None

    def forget(self) -> None:
        """What is in the shadow, or what kept it from being read, no longer counts. Raises OutOfOrder: one is read."""
        self._give_up()
        self._forgotten = True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While it is open the reader is the caller's; what was waited for is waited for again afterwards.

        Raises:
            OutOfOrder: a version is being read.
        """
        before = self._give_up()
        waiting = before is not None and not before.outcome.done()
        if before is not None:
            before.await_end(SLICE_S + GIVING_UP_S)
        try:
            yield
        finally:
            if waiting and before is not None and not self._forgotten and not self._ending:
                self._start(_Request(before.which, before.deadline))

    def _give_up(self) -> _Request | None:
        """What was asked for last, which nobody waits for any more. Raises OutOfOrder: it is being read."""
        if self._request is not None and not self._request.give_up():
            raise OutOfOrder(
                "a version is being prefetched by this worker",
                remedy="wait until stagingd_prefetched gives it, then call stagingd_swap; or detach",
            )
        return self._request

    def close(self, timeout_s: float) -> None:
        """Give up what is being waited for, and wait for what is being read. Raises DeadlineExceeded."""
        self._ending = True
        if self._request is None:
            return
        self._request.give_up()
        self._request.await_end(timeout_s)

    def _read(self, request: _Request) -> int:
        with self._leased(request) as lease:
            if not request.begin_to_read():
                raise _given_up()
            self._write(lease)
        return lease.version  # only now: what was read early counts once it has been released

    def _leased(self, request: _Request) -> LeasedVersion:
        while True:
            left = max(request.deadline - time.monotonic(), SHORTEST_S)
            if request.given_up:
                raise _given_up()
            try:
                return self._reader.lease(**asdict(request.which), timeout_s=min(left, SLICE_S))
            except DeadlineExceeded:
                if left <= SLICE_S or request.given_up:
                    raise


def _failed(error: Exception) -> InternalError:
    """Of a type that whoever follows can be told of, and live with: memory may be there the next time."""
    logger.error("a version could not be read", exc_info=error)
    return InternalError(f"a version could not be read: {error!r}", remedy="look at the log of this worker")


def _given_up() -> OutOfOrder:
    return OutOfOrder("nobody waits for this version any more", remedy="prefetch the one that is wanted")

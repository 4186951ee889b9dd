# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A version on its way from this rank to the stage."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TypeVar

from stagingd.errors import DeadlineExceeded
from stagingd_client.flushers import Read
from stagingd_client.holdings import Put
from stagingd_client.queues import Mark, Queue

Outcome = TypeVar("Outcome")


@dataclass
class Batch:
    """Shards that are flushed together. They are kept until they have been read.

    Attributes:
        puts: the shards.
        queues: where the trainer's computations went when they were put.
        bytes: of the shards, in all.
        begun: when the first shard came, by ``time.monotonic``.
    """

    puts: list[Put] = field(default_factory=list)
    queues: set[Queue] = field(default_factory=set)
    bytes: int = 0
    begun: float = 0.0

    @property
    def age_s(self) -> float:
        """Seconds since the first shard came."""
        return time.monotonic() - self.begun

    def add(self, put: Put) -> None:
        """Add a shard."""
        if not self.puts:
            self.begun = time.monotonic()
        self.puts.append(put)
        self.bytes += put.shard.nbytes

    def marks(self) -> list[Mark]:
        """When the shards have the values that they were put with."""
        return [queue.mark() for queue in self.queues]


@dataclass(eq=False)
class Publication:
    """What ``commit`` returns. The trainer may forget it, or wait for the version to be sealed.

    Attributes:
        version: the trainer's step number.
        deadline_s: the longest that ``wait`` takes, in seconds: longer than the daemon's own deadlines, whose
            errors say more.
    """

    version: int
    deadline_s: float
    _slot: Future[int]
    _flushed: list[Future[list[Read]]] = field(default_factory=list)
    _sealed: Future[None] | None = None
    _put: set[int] = field(default_factory=set)
    _batch: Batch = field(default_factory=Batch)
    _kept: list[Batch] = field(default_factory=list)
    _seen: bool = False

    @property
    def done(self) -> bool:
        """Whether it is sealed or has failed: ``wait`` would not wait."""
        return self._sealed is not None and self._sealed.done()

    def wait(self) -> None:
        """Wait until all ranks have committed and the version is sealed.

        Raises:
            StagingError: why it was not: refused, aborted, or late.
        """
        if self._sealed is not None:
            self._result(self._sealed, "sealed", self.deadline_s)

    def fence(self) -> None:
        """Have the trainer change this rank's shards only after they have been read. Raises as ``wait``.

        Computations that the trainer queues on a device from now on wait for the device; the host waits where
        shards are in its own memory, or where the slot is not free yet.
        """
        until = time.monotonic() + self.deadline_s
        for flushed in self._flushed:
            for read in self._result(flushed, "flushed", max(0.0, until - time.monotonic())):
                read.device.current().after(read.mark)

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background, unless the trainer has seen it already."""
        if self.done and not self._seen:
            self.wait()

    def _result(self, future: Future[Outcome], what: str, left_s: float) -> Outcome:
        seen, self._seen = self._seen, True
        try:
            outcome = future.result(left_s)
        except FutureTimeout as error:
            raise DeadlineExceeded(
                f"version {self.version} was not {what} within {self.deadline_s} s",
                remedy="look at what the daemon waits for (stagingd status), or allow more time",
                version=self.version,
            ) from error
        self._seen = seen
        return outcome

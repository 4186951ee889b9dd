# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A version on its way from this rank to the stage."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from stagingd.boxes import Box
from stagingd.errors import DeadlineExceeded


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
    _copies: list[Future[None]] = field(default_factory=list)
    _sealed: Future[None] | None = None
    _put: set[tuple[str, Box]] = field(default_factory=set)
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

    def wait_copied(self) -> None:
        """Wait until this rank's shards are in the slot, so that the trainer may change them. Raises as ``wait``."""
        until = time.monotonic() + self.deadline_s
        for copy in self._copies:
            self._result(copy, "copied", max(0.0, until - time.monotonic()))

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background, unless the trainer has seen it already."""
        if self.done and not self._seen:
            self.wait()

    def _result(self, future: Future[None], what: str, left_s: float) -> None:
        seen, self._seen = self._seen, True
        try:
            future.result(left_s)
        except FutureTimeout as error:
            raise DeadlineExceeded(
                f"version {self.version} was not {what} within {self.deadline_s} s",
                remedy="look at what the daemon waits for (stagingd status), or allow more time",
                version=self.version,
            ) from error
        self._seen = seen

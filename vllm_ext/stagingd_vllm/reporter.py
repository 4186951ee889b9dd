# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Telling the daemon what a worker has made live, and how long that took: behind the engine's back.

A swap takes milliseconds, and the engine must not wait for the daemon. So what is to be told is put into a queue, and
a thread with a connection of its own sends it. What cannot be sent is logged, and forgotten: no update fails by it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable, StagingError
from stagingd.health import LayerError

LONGEST_QUEUE: Final = 64
"""Reports that may wait to be sent: more than a daemon that is restarted misses."""

CLOSING_S: Final = 30.0
"""The longest that leaving may take, in seconds: the daemon's answer to what is being sent."""

Told = Literal["swapped", "updated", "examined"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Report:
    """What is to be sent, and when it was done, on this process's monotonic clock in seconds."""

    what: Told
    version: int
    size: int
    seconds: float
    errors: tuple[LayerError, ...]
    done_s: float


class Reporter:
    """Sends the reports of one worker. The thread and the connection begin with the first of them.

    Args:
        stage: the stage's name.
        engine, rank: the worker's place.
        socket: the daemon's control socket; that of the settings by default.
        connect: makes the connection.
    """

    def __init__(
        self,
        stage: str,
        engine: str,
        rank: int,
        socket: str | os.PathLike[str] | None = None,
        connect: Callable[..., Connection] = Connection,
    ) -> None:
        self._stage, self._engine, self._rank = stage, engine, rank
        self._socket = socket
        self._connect = connect
        self._queue: queue.SimpleQueue[_Report | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def tell(self, what: Told, version: int, size: int, seconds: float, errors: tuple[LayerError, ...] = ()) -> None:
        """Have it sent, and return at once.

        Args:
            what: how the version was made live; or that it was looked at.
            version: which.
            size: bytes written to the live weights.
            seconds: for how long the engine was kept from generating.
            errors: what was found, by layer.
        """
        if self._closed or self._queue.qsize() >= LONGEST_QUEUE:
            logger.warning("stage %s: that version %d was %s is not reported", self._stage, version, what)
            return
        self._queue.put(_Report(what, version, size, seconds, errors, time.monotonic()))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stagingd-reports", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what can still be sent, and end. May be called twice."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(CLOSING_S)
            if self._thread.is_alive():
                logger.warning("stage %s: a report is still being sent after %g s", self._stage, CLOSING_S)

    def _run(self) -> None:
        connection: Connection | None = None
        while (told := self._queue.get()) is not None:
            try:
                connection = connection or self._connect(self._socket, name=f"reports of {self._engine} {self._rank}")
                connection.request(self._report(told), wire.Done)
            except StagingError as error:
                logger.warning("stage %s: version %d is not reported: %s", self._stage, told.version, error)
                if isinstance(error, DaemonUnreachable) and connection is not None:
                    connection.close()
                    connection = None
                if self._closed:
                    break  # who leaves does not wait for each of them
        if connection is not None:
            connection.close()

    def _report(self, told: _Report) -> wire.Report:
        return wire.Report(
            stage=self._stage,
            engine=self._engine,
            rank=self._rank,
            version=told.version,
            what=told.what,
            seconds=told.seconds,
            bytes=told.size,
            ago_s=time.monotonic() - told.done_s,
            errors=told.errors,
        )

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A client's connection to the daemon: one request at a time, every one with a deadline.

It outlives the daemon. When the daemon ends, the connection waits for a successor for as long as the daemon had
said that it might take, says hello with the same token, and asks again what had not been answered. So whoever
uses the connection learns of a restart only when none came.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from stagingd import wire
from stagingd.config import Settings
from stagingd.errors import ConnectionLost, DaemonUnreachable, Disconnected, InternalError
from stagingd.link import Link
from stagingd.record import Record

ANSWER_S: Final = 10.0
"""How long the daemon may take for an answer beyond the time that a request itself may wait."""

Expected = TypeVar("Expected", bound=Record)

log = logging.getLogger(__name__)


class Connection:
    """The way to a daemon. May be used by several threads, in turn; not after a fork.

    Args:
        address: the control socket's file; by default that of the settings.
        name: who speaks, as it shall stand in messages and logs.

    Raises:
        DaemonUnreachable: nobody answers there.
        SocketNotTrusted: the socket belongs to neither this user nor root, nor to a group of this process.
    """

    def __init__(self, address: str | os.PathLike[str] | None = None, *, name: str) -> None:
        self.path = Path(address) if address is not None else Settings().control_socket
        self._name = name[:128]
        self._token = os.urandom(wire.TOKEN_BYTES)
        self._lock = threading.Lock()
        self._requests = 0
        self._closed = False
        self._link, self._daemon = self._connect(time.monotonic() + ANSWER_S)

    @property
    def event_socket(self) -> str:
        """Where the daemon publishes its events."""
        return self._daemon.events

    def _connect(self, deadline: float) -> tuple[Link, wire.Welcome]:
        """A new link on which hello was said."""
        link = Link(self.path)
        try:
            hello = wire.Hello(protocol=wire.PROTOCOL, connection=self._token, name=self._name)
            answer = self._ask(link, hello, deadline)
            if not isinstance(answer, wire.Welcome):
                raise _unexpected(hello, answer)
        except BaseException:
            link.close()
            raise
        return link, answer

    def request(self, message: wire.Request, answer: type[Expected], *, timeout_s: float = 0.0) -> Expected:
        """Ask the daemon.

        Args:
            message: the request.
            answer: the kind of answer that it has.
            timeout_s: how long the daemon may wait before it answers.

        Raises:
            StagingError: the daemon's refusal, as the type that it has there.
            DaemonUnreachable: it died and none took its place, or it did not answer in time.
        """
        with self._lock:
            if self._closed:
                raise DaemonUnreachable("this connection is closed", remedy="open a new one")
            got = self._ask_until_answered(message, time.monotonic() + timeout_s + ANSWER_S)
        if not isinstance(got, answer):
            raise _unexpected(message, got)
        return got

    def _ask_until_answered(self, message: wire.Request, deadline: float) -> wire.Answer:
        while True:
            try:
                return self._ask(self._link, message, deadline)
            except (ConnectionLost, Disconnected) as lost:
                self._reconnect(lost, deadline)
                message = _once_more(message, deadline)

    def _reconnect(self, lost: DaemonUnreachable | Disconnected, deadline: float) -> None:
        """Wait for the daemon's successor, and be there who this connection was before."""
        self._link.close()
        dead, patience_s = self._daemon.pid, min(self._daemon.return_s, max(0.0, deadline - time.monotonic()))
        log.warning("the daemon (pid %d) at %s is gone; waiting %.1f s for a successor", dead, self.path, patience_s)
        attempts = Retrying(
            retry=retry_if_exception_type((DaemonUnreachable, Disconnected)),
            stop=stop_after_delay(patience_s),
            wait=wait_random_exponential(multiplier=0.02, max=0.25),
            reraise=True,
        )
        try:
            self._link, self._daemon = attempts(self._connect, deadline)
        except (DaemonUnreachable, Disconnected) as error:
            raise DaemonUnreachable(
                f"the daemon (pid {dead}) at {self.path} is gone: {lost.what}; "
                f"none has taken its place within {patience_s:.1f} s: {error.what}",
                remedy="look at its log; start it with: stagingd serve",
                peer=f"daemon (pid {dead})",
            ) from error
        log.warning("a daemon (pid %d) has taken the place of pid %d at %s", self._daemon.pid, dead, self.path)

    def _ask(self, link: Link, message: wire.Request, deadline: float) -> wire.Answer:
        """Raises what the daemon refuses, and what the link raises."""
        self._requests += 1
        request_id = struct.pack("<Q", self._requests)
        got = wire.decode_answer(link.ask(request_id, wire.encode(message), deadline, message.kind))
        if isinstance(got, wire.Refusal):
            raise wire.refused(got)
        return got

    def close(self) -> None:
        """Say goodbye, so that everything this connection held is given back. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            deadline = time.monotonic() + ANSWER_S
            try:
                self._say_goodbye(deadline)
            except (DaemonUnreachable, Disconnected):
                return  # there is nobody to say goodbye to
            finally:
                self._link.close()

    def _say_goodbye(self, deadline: float) -> None:
        try:
            self._ask(self._link, wire.Bye(), deadline)
        except (ConnectionLost, Disconnected):
            # A restarted daemon believes that this connection will come back.
            self._link.close()
            self._link, _ = self._connect(deadline)
            self._ask(self._link, wire.Bye(), deadline)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _once_more(message: wire.Request, deadline: float) -> wire.Request:
    """The same request, of which it is not known whether it was carried out, for the time that is left."""
    changes: dict[str, object] = {}
    if "again" in type(message).model_fields:
        changes["again"] = True
    if "timeout_s" in type(message).model_fields:
        changes["timeout_s"] = max(0.001, deadline - ANSWER_S - time.monotonic())
    return message.model_copy(update=changes)


def _unexpected(message: wire.Request, got: wire.Answer) -> InternalError:
    return InternalError(f"the daemon answers {message.kind} with {got.kind}", remedy="report this")

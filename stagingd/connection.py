# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A client's connection to the daemon: one request at a time, every one with a deadline."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import zmq

from stagingd import wire
from stagingd.config import Settings
from stagingd.errors import DaemonUnreachable, Disconnected, InternalError, SocketNotTrusted, StagingError
from stagingd.liveness import Process
from stagingd.record import Record

ANSWER_S: Final = 10.0
"""How long the daemon may take for an answer beyond the time that a request itself may wait."""

LAST_WORDS_S: Final = 0.5
"""What a daemon said before it ended may arrive after the news of its end: so long is waited for it."""

Expected = TypeVar("Expected", bound=Record)


class Connection:
    """A DEALER socket and the daemon's process behind it. May be used by several threads, in turn.

    Args:
        address: the control socket's file; by default that of the settings.
        name: who speaks, as it shall stand in messages and logs.

    Raises:
        DaemonUnreachable: nobody answers there.
        SocketNotTrusted: the socket belongs to neither this user nor root, nor to a group of this process.
    """

    def __init__(self, address: str | os.PathLike[str] | None = None, *, name: str) -> None:
        self.path = Path(address) if address is not None else Settings().control_socket
        _check_trusted(self.path)
        _check_listening(self.path)
        self._lock = threading.Lock()
        # The process's one context: a context that is collected with a socket still open would never end.
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)  # and not IMMEDIATE, which forgets answers that a disconnect follows
        self._socket.connect(f"ipc://{self.path}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._daemon: Process | None = None
        self._requests = 0
        try:
            hello = wire.Hello(protocol=wire.PROTOCOL, pid=os.getpid(), name=name)
            welcome = self.request(hello, wire.Welcome)
            self._daemon = Process(welcome.pid)
        except StagingError:
            self._socket.close(linger=0)
            raise
        self._poller.register(self._daemon.fd, zmq.POLLIN)
        self.event_socket = welcome.events

    def request(self, message: wire.Request, answer: type[Expected], *, timeout_s: float = 0.0) -> Expected:
        """Ask the daemon.

        Args:
            message: the request.
            answer: the kind of answer that it has.
            timeout_s: how long the daemon may wait before it answers.

        Raises:
            StagingError: the daemon's refusal, as the type that it has there.
            DaemonUnreachable: it died, or did not answer in time.
        """
        with self._lock:
            if self._socket.closed:
                raise DaemonUnreachable("this connection is closed", remedy="open a new one")
            self._requests += 1
            request_id = struct.pack("<Q", self._requests)
            self._send([request_id, wire.encode(message)], message.kind)
            got = wire.decode_answer(self._receive(request_id, message.kind, timeout_s + ANSWER_S))
        if isinstance(got, wire.Refusal):
            raise wire.refused(got)
        if not isinstance(got, answer):
            raise InternalError(f"the daemon answers {message.kind} with {got.kind}", remedy="report this")
        return got

    def _send(self, frames: list[bytes], kind: str) -> None:
        self._poller.modify(self._socket, zmq.POLLOUT)
        self._await(time.monotonic() + ANSWER_S, f"took {kind}", 0.0)
        self._socket.send_multipart(frames, zmq.NOBLOCK)

    def _receive(self, request_id: bytes, kind: str, timeout_s: float) -> bytes:
        self._poller.modify(self._socket, zmq.POLLIN)
        deadline = time.monotonic() + timeout_s
        while True:
            self._await(deadline, f"answered {kind}", LAST_WORDS_S)
            got_id, body = self._socket.recv_multipart(zmq.NOBLOCK)
            if got_id == request_id:  # not the late answer to a request that was given up
                return body

    def _await(self, deadline: float, what: str, grace_s: float) -> None:
        """Wait until the socket is ready, the daemon has been dead for the grace, or the time is over."""
        left = max(0.0, deadline - time.monotonic())
        ready = dict(self._poller.poll(int(left * 1000)))
        if self._socket in ready or (ready and self._socket.poll(int(grace_s * 1000))):
            return
        raise self._unreachable(f"died before it {what}" if ready else f"has not {what} within {left:.1f} s")

    def _unreachable(self, what: str) -> DaemonUnreachable:
        who = f"the daemon (pid {self._daemon.pid}) " if self._daemon is not None else "the daemon "
        return DaemonUnreachable(
            f"{who}at {self.path} {what}", remedy="look at its log; start it with: stagingd serve", peer=str(self.path)
        )

    def close(self) -> None:
        """Say goodbye, so that everything this connection held is given back. May be called twice."""
        if self._socket.closed:
            return
        try:
            self.request(wire.Bye(), wire.Done)
        except (DaemonUnreachable, Disconnected):
            return  # there is nobody to say goodbye to, or a restarted daemon that holds nothing of ours
        finally:
            if self._daemon is not None:
                self._daemon.close()
            self._socket.close(linger=0)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _check_trusted(path: Path) -> None:
    """Whose socket it is, before a byte is sent to it."""
    try:
        found = path.stat()
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise DaemonUnreachable(
            f"there is no daemon's socket at {path}: {error.strerror}",
            remedy="start the daemon (stagingd serve), or name its socket",
            peer=str(path),
        ) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise DaemonUnreachable(f"{path} is not a socket", remedy="name the daemon's control.sock", peer=str(path))
    shared_group = found.st_mode & stat.S_IWGRP and found.st_gid in {os.getgid(), *os.getgroups()}
    if found.st_uid not in (0, os.getuid()) and not shared_group:
        raise SocketNotTrusted(
            f"the socket {path} belongs to uid {found.st_uid}, not to this user (uid {os.getuid()}) or root",
            remedy="name the socket of your own daemon, or join its group",
            peer=str(path),
        )


def _check_listening(path: Path) -> None:
    """ZeroMQ would try for ever to reach a socket that a dead daemon has left; the kernel knows at once."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(ANSWER_S)
        try:
            trial.connect(str(path))
        except OSError as error:
            raise DaemonUnreachable(
                f"nobody listens on {path}: {error.strerror}",
                remedy="start the daemon: stagingd serve",
                peer=str(path),
            ) from error

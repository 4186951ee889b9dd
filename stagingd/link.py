# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One ZeroMQ connection to a daemon, which knows when it is broken.

ZeroMQ by itself would try for ever to reach a daemon that is gone, and would not say so. The socket's monitor
tells of the connection's end, wherever the daemon runs and however it ended.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from pathlib import Path

import zmq

from stagingd.errors import ConnectionLost, DaemonUnreachable, SocketNotTrusted, TooManyPeers

CONNECT_S = 5.0
"""How long the kernel may take to connect."""

_NOBLOCK = int(zmq.NOBLOCK)  # plain, since pyzmq computes with it at every frame
_ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class Link:
    """A DEALER socket, for one thread at a time.

    Args:
        path: the control socket's file.

    Raises:
        DaemonUnreachable: nobody listens there.
        SocketNotTrusted: the socket belongs to neither this user nor root, nor to a group of this process.
        TooManyPeers: this process has as many sockets as it may.
    """

    def __init__(self, path: Path) -> None:
        check_trusted(path)
        check_listening(path)
        self._path = path
        try:
            # The process's one context: a context that is collected with a socket still open would never end.
            self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)  # and not IMMEDIATE, which forgets answers that an end follows
            self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_ENDS)
            self._socket.connect(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise TooManyPeers(
                f"this process cannot open one more connection to {path}: {error}",
                remedy="close connections that are not used, or raise the limit on open files",
            ) from error
        self._lost = False
        self._pollers = {event: self._poller(event) for event in (zmq.POLLIN, zmq.POLLOUT)}

    def _poller(self, event: zmq.PollEvent) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._socket, event)
        poller.register(self._monitor, zmq.POLLIN)
        return poller

    def ask(self, request_id: bytes, body: bytes, deadline: float, kind: str) -> bytes:
        """Send a request and wait for the answer to it.

        Args:
            request_id: unlike that of any request before.
            body: the request.
            deadline: on the monotonic clock.
            kind: the request's, for messages.

        Raises:
            ConnectionLost: the daemon has ended, or has cut this connection off.
            DaemonUnreachable: the time is over.
        """
        if self._lost:
            raise self._gone(f"took {kind}")
        try:
            self._socket.send_multipart([request_id, body], _NOBLOCK)
        except zmq.Again:
            self._await(zmq.POLLOUT, deadline, f"took {kind}")
            self._socket.send_multipart([request_id, body], _NOBLOCK)
        while True:
            self._await(zmq.POLLIN, deadline, f"answered {kind}")
            got_id, got = self._socket.recv_multipart(_NOBLOCK)
            if got_id == request_id:  # not the late answer to a request that was given up
                return got

    def _await(self, event: zmq.PollEvent, deadline: float, what: str) -> None:
        """Wait until the socket is ready, the connection is lost, or the time is over."""
        if not self._lost:
            started = time.monotonic()
            ready = dict(self._pollers[event].poll(max(0, int((deadline - started) * 1000))))
            if not ready:
                raise DaemonUnreachable(
                    f"the daemon at {self._path} has not {what} within {time.monotonic() - started:.1f} s",
                    remedy="look at its log, and at stagingd status",
                    peer=str(self._path),
                )
            self._lost = self._monitor in ready
        # What the daemon said before the end has arrived before the news of the end.
        if self._lost and not (event == zmq.POLLIN and self._socket.poll(0)):
            raise self._gone(what)

    def _gone(self, what: str) -> ConnectionLost:
        return ConnectionLost(f"it ended before it {what}", remedy="start it again", peer=str(self._path))

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._lost = True
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)


def check_trusted(path: Path) -> None:
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


def check_listening(path: Path) -> None:
    """ZeroMQ would try for ever to reach a socket that a dead daemon has left; the kernel knows at once."""
    with socket.socket(socket.AF_UNIX) as trial:
        # Not settimeout: where a crowd is connecting, a socket that does not block is refused at once.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT_S), 0))
        try:
            trial.connect(str(path))
        except OSError as error:
            raise DaemonUnreachable(
                f"nobody listens on {path}: {error.strerror}",
                remedy="start the daemon: stagingd serve",
                peer=str(path),
            ) from error

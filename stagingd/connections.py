# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The ROUTER socket's connections: who is at the other end of each, and when it closes.

ZeroMQ tells both by the number of the connection's file descriptor: messages carry it together with the peer's
credentials, and the socket's monitor reports it when the connection closes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from stagingd.session import Peer

_NOBODY: Final = 2**32 - 1
"""A user that no process can have: for a peer whose credentials the system does not give."""


class Connections:
    """Follows a socket's connections; make it before the socket is bound."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, bytes] = {}

    @property
    def monitor(self) -> zmq.Socket[bytes]:
        """Becomes readable when a connection closes: call ``lost`` then."""
        return self._monitor

    def peer(self, frame: zmq.Frame) -> Peer:
        """Who sent a message, given its first frame, which is the connection's identity."""
        identity = frame.bytes
        self._by_fd[int(frame.get(zmq.SRCFD))] = identity
        return Peer(identity, *_credentials(frame))

    def lost(self) -> Iterator[bytes]:
        """Identities of connections that have closed.

        To be called also before ``peer``: a descriptor's number is used again only after its end was reported.
        """
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            identity = self._by_fd.pop(event["value"], None)
            if identity is not None:
                yield identity

    def close(self) -> None:
        """Stop following."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


def _credentials(frame: zmq.Frame) -> tuple[int, int, int]:
    """uid, gid and pid: for ipc, ZeroMQ puts what SO_PEERCRED says behind the peer's address."""
    parts = str(frame.get("Peer-Address")).rsplit(":", 3)[1:]
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    return _NOBODY, _NOBODY, 0

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

# As plain numbers: arithmetic with pyzmq's enumerations, at every message, would cost more than the call.
_EVENTS: Final = int(zmq.EVENTS)
_READABLE: Final = int(zmq.POLLIN)

_EVENTS_KEPT: Final = 2048
"""More than the monitor keeps (a thousand at either end): then its thread waits, and no connection is taken."""


class Connections:
    """Follows a socket's connections; make it before the socket is bound.

    Attributes:
        changed: whether a connection has opened or closed since somebody last set it to False.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.changed = False
        self._socket = socket
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, bytes] = {}
        self._peers: dict[bytes, Peer] = {}

    @property
    def monitor(self) -> zmq.Socket[bytes]:
        """Becomes readable when a connection opens or closes: call ``lost`` then."""
        return self._monitor

    def peer(self, frame: zmq.Frame) -> Peer | None:
        """Who sent a message, given its first frame, which is the connection's identity.

        None for somebody who speaks a version of ZeroMQ's protocol so old that there are no credentials.
        """
        identity = frame.bytes
        found = self._peers.get(identity)
        if found is None:
            try:
                fd, address = int(frame.get(zmq.SRCFD)), str(frame.get("Peer-Address"))
            except zmq.ZMQError:
                return None
            found = self._peers[identity] = Peer(identity, *_credentials(address))
            self._by_fd[fd] = identity
        return found

    def lost(self) -> Iterator[bytes]:
        """Identities of connections that have closed.

        To be called also before ``peer``: a descriptor's number is used again only after its end was reported.
        All that were known at the call are told, and not many more: where peers come and go without end, others
        are to be served too.
        """
        for _ in range(_EVENTS_KEPT):
            if not int(self._monitor.get(_EVENTS)) & _READABLE:
                return
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            self.changed = True
            identity = self._by_fd.pop(event["value"], None) if event["event"] == zmq.EVENT_DISCONNECTED else None
            if identity is not None:
                del self._peers[identity]
                yield identity

    def close(self) -> None:
        """Stop following. To be called when nobody can connect any more."""
        while self._monitor.poll(0):  # its thread may wait for room for one more event, and disable_monitor for it
            self._monitor.recv_multipart()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


def _credentials(address: str) -> tuple[int, int, int]:
    """uid, gid and pid: for ipc, ZeroMQ puts what SO_PEERCRED says behind the peer's address."""
    parts = address.rsplit(":", 3)[1:]
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    return _NOBODY, _NOBODY, 0

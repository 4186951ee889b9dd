# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Sessions: who speaks with the daemon, by the kernel's word, and which process has to live for it.

A session belongs to a client's connection object and is known by that connection's token. So it outlives the
socket: after a restart of the daemon the client says hello with the same token, and is who it was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stagingd import wire
from stagingd.errors import Disconnected, PeerDied, PeerNotAdmitted, PeerNotVisible, RankTaken, TooManyPeers
from stagingd.liveness import Processes
from stagingd.state import SessionRecord

MAX_SESSIONS: Final = 4096
"""Connections that the daemon serves: a node has tens of trainer ranks and engine workers."""


@dataclass(frozen=True)
class Peer:
    """Where a message came from.

    Attributes:
        identity: the connection's, as the ROUTER socket has it.
        uid, gid: the process's user and group (SO_PEERCRED).
        pid: its number as the daemon sees it; 0 where it lives in a namespace that the daemon does not see.
    """

    identity: bytes
    uid: int
    gid: int
    pid: int


@dataclass(eq=False)
class Session:
    """A client's connection that has said hello.

    Attributes:
        token: names it, also across restarts of the daemon.
        name: who it is, for people.
        uid, pid, started: the process behind it; pid 0 where it cannot be seen.
        identity: where its answers go; None while it has no connection.
        expires: when it is given up unless it comes back, on the daemon's clock; None while there is no need.
    """

    token: bytes
    name: str
    uid: int
    pid: int
    started: int
    identity: bytes | None = None
    expires: float | None = None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid or 'not visible'})"

    @property
    def record(self) -> dict[str, object]:
        """What has to be known of it after a restart, as ``SessionRecord`` has it."""
        fields = ("token", "name", "uid", "pid", "started")
        return {name: getattr(self, name) for name in fields}


class Sessions:
    """All sessions.

    Args:
        processes: watches those that can be seen.
        heartbeats: whether the connections of those that cannot be seen are probed; else they are refused.
    """

    def __init__(self, processes: Processes, *, heartbeats: bool) -> None:
        self._processes = processes
        self._heartbeats = heartbeats
        self._by_identity: dict[bytes, Session] = {}
        self._by_token: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._by_token)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_token.values()))

    def find(self, identity: bytes) -> Session | None:
        """The session that speaks through a connection."""
        return self._by_identity.get(identity)

    def require(self, identity: bytes) -> Session:
        """The same. Raises Disconnected when there is none."""
        session = self.find(identity)
        if session is None:
            raise Disconnected(
                "the daemon does not know this connection: it was restarted, or no hello was said",
                remedy="say hello first; a client of stagingd does so by itself",
            )
        return session

    def hello(self, peer: Peer, message: wire.Hello) -> Session:
        """A connection says who it is: a new session, or one that has come back.

        Raises:
            PeerNotAdmitted: the token is another process's.
            PeerNotVisible: the daemon could not learn of the process's end.
            PeerDied: it has ended already.
            TooManyPeers: there are as many sessions as are admitted.
        """
        before = self._by_identity.get(peer.identity)
        if before is not None and before.token != message.connection:
            raise PeerNotAdmitted(
                f"{before} says hello a second time, with another token",
                remedy="open a second connection instead",
                peer=str(before),
            )
        session = self._by_token.get(message.connection)
        if session is None:
            session = self._new(peer, message)
        elif (session.uid, session.pid) != (peer.uid, peer.pid):
            raise PeerNotAdmitted(
                f"pid {peer.pid} of uid {peer.uid} says hello with the token of {session}",
                remedy="open a connection in the process that uses it, after any fork",
                peer=str(session),
            )
        if session.identity is not None:
            self._by_identity.pop(session.identity, None)
        session.identity, session.expires = peer.identity, None
        self._by_identity[peer.identity] = session
        return session

    def _new(self, peer: Peer, message: wire.Hello) -> Session:
        if len(self._by_token) >= MAX_SESSIONS:
            raise TooManyPeers(
                f"{message.name} says hello, but {MAX_SESSIONS} connections are open",
                remedy="close connections that are not used",
            )
        if not peer.pid and not self._heartbeats:
            raise PeerNotVisible(
                f"{message.name} runs in a pid namespace that the daemon does not see",
                remedy="share the host's pid namespace with it, or set STAGINGD_HEARTBEAT_S for the daemon",
                peer=message.name,
            )
        started = self._processes.hold(peer.pid) if peer.pid else 0
        session = Session(message.connection, message.name, peer.uid, peer.pid, started)
        self._by_token[session.token] = session
        return session

    def adopt(self, record: SessionRecord, expires: float) -> Session | None:
        """Take over a session of a daemon that has ended. Returns None when its process is gone.

        Args:
            record: what that daemon knew.
            expires: when it is given up if it has not come back; only where its process cannot be seen.
        """
        known = self._by_token.get(record.token)
        if known is not None:
            return known
        session = Session(record.token, record.name, record.uid, record.pid, record.started)
        if not record.pid:
            session.expires = expires
        elif not self._lives(record):
            return None
        self._by_token[session.token] = session
        return session

    def _lives(self, record: SessionRecord) -> bool:
        try:
            started = self._processes.hold(record.pid)
        except PeerDied:
            return False
        if started != record.started:  # the number is another process's by now
            self._processes.release(record.pid)
            return False
        return True

    def remove(self, session: Session) -> None:
        """The session is over."""
        self._by_token.pop(session.token, None)
        if session.identity is not None:
            self._by_identity.pop(session.identity, None)
        if session.pid:
            self._processes.release(session.pid)

    def disconnect(self, session: Session) -> None:
        """Its connection is gone; it may come back by another."""
        if session.identity is not None:
            self._by_identity.pop(session.identity, None)
            session.identity = None


def refuse_taken(holder: Session | None, session: Session, what: str, stage: str) -> None:
    """Refuse a rank that another session speaks for, unless it may be taken over. Raises RankTaken."""
    if holder in (None, session):
        return
    if holder.identity is None and holder.pid and (holder.pid, holder.uid) == (session.pid, session.uid):
        return  # the same process has closed that connection, and the daemon was away when it said goodbye
    raise RankTaken(
        f"{what} is held by {holder}",
        remedy="give every process its own rank and every engine its own name, and stop the other one",
        stage=stage,
        peer=str(holder),
    )

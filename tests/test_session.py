# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Sessions and the processes behind them: known by token, bound to one process, over when it ends."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stagingd import session as sessions_module
from stagingd import wire
from stagingd.errors import Disconnected, PeerDied, PeerNotAdmitted, PeerNotVisible, TooManyPeers
from stagingd.liveness import Processes
from stagingd.session import Peer, Session, Sessions
from stagingd.state import SessionRecord


class Watch:
    """Stands for the event loop: knows which descriptors are watched, and which of them are readable."""

    def __init__(self) -> None:
        self.fds: set[int] = set()
        self.processes = Processes(self.fds.add, self.fds.remove)

    def ended(self, wait_ms: int = 0) -> list[int]:
        poll = select.poll()
        for fd in self.fds:
            poll.register(fd, select.POLLIN)
        pids = [self.processes.ended(fd) for fd, _ in poll.poll(wait_ms)]
        return [pid for pid in pids if pid is not None]


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    yield watch
    watch.processes.close()
    assert not watch.fds


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is told to end."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait(20)


def sessions(watch: Watch, *, heartbeats: bool = False) -> Sessions:
    return Sessions(watch.processes, heartbeats=heartbeats)


def peer(connection: int, pid: int = 0, uid: int = 1000) -> Peer:
    return Peer(bytes([connection]) * 5, uid, uid, pid)


def hello(token: int, name: str = "engine e rank 0") -> wire.Hello:
    return wire.Hello(protocol=wire.PROTOCOL, connection=bytes([token]) * wire.TOKEN_BYTES, name=name)


def record(session: Session) -> SessionRecord:
    """What a successor of the daemon finds in the ledger."""
    return SessionRecord.model_validate(session.record)


# Processes


def test_a_process_is_watched_once_however_many_hold_it(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    started = {watch.processes.hold(child.pid) for _ in range(3)}
    assert len(started) == 1
    assert len(watch.fds) == 1
    for _ in range(2):
        watch.processes.release(child.pid)
    assert len(watch.fds) == 1
    watch.processes.release(child.pid)
    assert not watch.fds


def test_the_end_of_a_process_is_told_with_its_number(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    watch.processes.hold(child.pid)
    watch.processes.hold(os.getpid())
    assert watch.ended() == []
    end(child)
    assert watch.ended(20_000) == [child.pid]


def test_an_ended_process_is_not_held_again_before_its_end_is_dealt_with(
    watch: Watch, child: subprocess.Popen[bytes]
) -> None:
    watch.processes.hold(child.pid)
    end(child)
    with pytest.raises(PeerDied, match=f"no process has pid {child.pid}"):
        watch.processes.hold(child.pid)
    watch.processes.release(child.pid)
    with pytest.raises(PeerDied, match=f"no process has pid {child.pid}"):
        watch.processes.hold(child.pid)
    assert not watch.fds


def test_a_descriptor_that_was_closed_meanwhile_is_nobodys_end(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    watch.processes.hold(child.pid)
    (fd,) = watch.fds
    end(child)
    watch.processes.release(child.pid)
    assert watch.processes.ended(fd) is None


# Sessions


def test_a_session_is_found_by_its_connection(watch: Watch) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    assert all_of_them.require(peer(1).identity) is session
    assert str(session) == f"engine e rank 0 (pid {os.getpid()})"
    with pytest.raises(Disconnected, match="does not know this connection"):
        all_of_them.require(peer(2).identity)


def test_who_comes_back_with_the_token_is_who_it_was(watch: Watch) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    all_of_them.disconnect(session)
    assert (session.identity, len(all_of_them)) == (None, 1)
    assert all_of_them.hello(peer(2, os.getpid()), hello(1)) is session
    assert all_of_them.require(peer(2).identity) is session
    assert all_of_them.find(peer(1).identity) is None


def test_who_comes_back_before_the_old_connection_is_closed_speaks_by_the_new_one(watch: Watch) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    assert all_of_them.hello(peer(2, os.getpid()), hello(1)) is session
    assert all_of_them.find(peer(1).identity) is None
    assert len(all_of_them) == 1


def test_a_token_of_another_process_or_user_is_refused(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    for thief in (peer(2, child.pid), peer(2, os.getpid(), uid=1001)):
        with pytest.raises(PeerNotAdmitted, match=f"pid {thief.pid} of uid {thief.uid} says hello with the token of"):
            all_of_them.hello(thief, hello(1))
    assert all_of_them.require(peer(1).identity) is session
    assert all_of_them.find(peer(2).identity) is None


def test_a_second_hello_with_another_token_is_refused_and_changes_nothing(watch: Watch) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    with pytest.raises(PeerNotAdmitted, match="a second time"):
        all_of_them.hello(peer(1, os.getpid()), hello(2))
    assert list(all_of_them) == [session]
    assert all_of_them.require(peer(1).identity) is session


def test_a_process_that_cannot_be_seen_is_refused_unless_connections_are_probed(watch: Watch) -> None:
    with pytest.raises(PeerNotVisible, match="engine e rank 0 runs in a pid namespace"):
        sessions(watch).hello(peer(1), hello(1))
    all_of_them = sessions(watch, heartbeats=True)
    session = all_of_them.hello(peer(1), hello(1))
    assert str(session) == "engine e rank 0 (pid not visible)"
    assert not watch.fds
    all_of_them.remove(session)
    assert len(all_of_them) == 0


def test_a_process_that_has_ended_makes_no_session(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    end(child)
    all_of_them = sessions(watch)
    with pytest.raises(PeerDied):
        all_of_them.hello(peer(1, child.pid), hello(1))
    assert (len(all_of_them), watch.fds) == (0, set())


def test_there_are_only_so_many_sessions(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "MAX_SESSIONS", 2)
    all_of_them = sessions(watch)
    first = all_of_them.hello(peer(1, os.getpid()), hello(1))
    all_of_them.hello(peer(2, os.getpid()), hello(2))
    with pytest.raises(TooManyPeers, match="2 connections are open"):
        all_of_them.hello(peer(3, os.getpid()), hello(3))
    assert all_of_them.hello(peer(3, os.getpid()), hello(1)) is first  # who comes back is not one more
    all_of_them.remove(first)
    all_of_them.hello(peer(4, os.getpid()), hello(3))
    assert len(watch.fds) == 1


def test_a_removed_session_is_forgotten_and_its_process_no_longer_watched(watch: Watch) -> None:
    all_of_them = sessions(watch)
    session = all_of_them.hello(peer(1, os.getpid()), hello(1))
    all_of_them.remove(session)
    assert all_of_them.find(peer(1).identity) is None
    assert (list(all_of_them), watch.fds) == ([], set())
    assert all_of_them.hello(peer(1, os.getpid()), hello(1)) is not session


# What a successor of the daemon does with the sessions that it finds


def test_a_session_of_a_living_process_is_adopted_and_comes_back(watch: Watch) -> None:
    before = sessions(watch).hello(peer(1, os.getpid()), hello(1))
    successor = sessions(watch)
    adopted = successor.adopt(record(before), expires=7.0)
    assert adopted is not None
    assert (adopted.identity, adopted.expires, adopted.record) == (None, None, before.record)
    assert successor.adopt(record(before), expires=7.0) is adopted  # it holds ranks of another stage too
    assert successor.hello(peer(9, os.getpid()), hello(1)) is adopted
    with pytest.raises(PeerNotAdmitted):
        successor.hello(peer(8, os.getpid(), uid=1001), hello(1))


def test_a_session_of_a_process_that_has_ended_is_not_adopted(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    before = sessions(watch).hello(peer(1, child.pid), hello(1))
    watch.processes.release(child.pid)
    end(child)
    successor = sessions(watch)
    assert successor.adopt(record(before), expires=7.0) is None
    assert (len(successor), watch.fds) == (0, set())


def test_a_session_is_not_taken_for_that_of_a_process_which_has_got_its_number(watch: Watch) -> None:
    before = sessions(watch).hello(peer(1, os.getpid()), hello(1))
    watch.processes.release(os.getpid())
    earlier = record(before).model_copy(update={"started": before.started - 1})
    successor = sessions(watch)
    assert successor.adopt(earlier, expires=7.0) is None
    assert (len(successor), watch.fds) == (0, set())


def test_a_session_of_a_process_that_cannot_be_seen_is_kept_for_a_time(watch: Watch) -> None:
    before = sessions(watch, heartbeats=True).hello(peer(1), hello(1))
    successor = sessions(watch, heartbeats=True)
    adopted = successor.adopt(record(before), expires=7.0)
    assert adopted is not None
    assert adopted.expires == 7.0
    assert successor.hello(peer(2), hello(1)) is adopted
    assert adopted.expires is None

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The event loop: sockets, processes and signals on one side, the service on the other."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import zmq

from stagingd import wire
from stagingd.config import Settings
from stagingd.errors import DaemonRunning, PeerDied, SocketNotTrusted
from stagingd.liveness import Process
from stagingd.service import Outgoing, Service

log = structlog.get_logger()

HARD_LIMIT_BYTES = 2 * wire.MAX_MESSAGE_BYTES
"""ZeroMQ cuts a peer off that sends more than this; below it the refusal is a typed answer."""


class Daemon:
    """Serves one runtime directory until SIGTERM or SIGINT.

    Raises:
        DaemonRunning: another daemon serves it.
        SocketNotTrusted: the directory belongs to another user.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._service = Service(settings, time.monotonic, self._publish)
        self._processes: dict[bytes, Process] = {}
        self._context = zmq.Context()
        self._stopping = False

    def run(self) -> None:
        """Serve. Returns after a clean shutdown: no socket, segment or lock file is left."""
        settings = self._settings
        with _runtime_dir(settings), _only_one(settings.runtime_dir), self._signals() as wakeup:
            self._router = self._bind(zmq.ROUTER, settings.control_socket)
            self._router.setsockopt(zmq.MAXMSGSIZE, HARD_LIMIT_BYTES)
            self._events = self._bind(zmq.PUB, settings.event_socket)
            log.info("serving", pid=os.getpid(), socket=str(settings.control_socket))
            try:
                self._loop(wakeup)
            finally:
                self._close()
        log.info("stopped", pid=os.getpid())

    def _bind(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 1000)
        path.unlink(missing_ok=True)  # left by a killed daemon: _only_one has seen that none lives
        socket.bind(f"ipc://{path}")
        os.chmod(path, 0o660 if self._settings.group else 0o600)
        os.chown(path, -1, self._settings.group_id)
        return socket

    def _loop(self, wakeup: int) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(wakeup, zmq.POLLIN)
        while not self._stopping:
            for source, _ in poller.poll(self._wait_ms()):
                if source is self._router:
                    self._receive(poller)
                elif source == wakeup:
                    os.read(wakeup, 4096)
                else:
                    self._bury(poller, source)
            self._send(self._service.settle())

    def _wait_ms(self) -> int | None:
        deadline = self._service.next_deadline()
        return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)

    def _receive(self, poller: zmq.Poller) -> None:
        """Take what has arrived, a bounded number of messages at a time, so that deadlines keep their turn."""
        for _ in range(256):
            try:
                identity, *rest = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            request_id = rest[0] if len(rest) == 2 else b""
            body = rest[1] if len(rest) == 2 else b""
            self._send(self._service.handle(identity, request_id, body))
            self._watch(poller, identity)

    def _watch(self, poller: zmq.Poller, identity: bytes) -> None:
        """Keep one pidfd per session: open it with the session, close it with the session."""
        session, process = self._service.sessions.get(identity), self._processes.get(identity)
        if session is not None and process is None:
            try:
                self._processes[identity] = Process(session.pid)
            except PeerDied as error:
                self._service.session_gone(identity, error.what)
                self._send(self._service.settle())
                return
            poller.register(self._processes[identity].fd, zmq.POLLIN)
        elif session is None and process is not None:
            poller.unregister(process.fd)
            self._processes.pop(identity).close()

    def _bury(self, poller: zmq.Poller, fd: int) -> None:
        # Asked again: since the poll the descriptor may have been closed, and its number given to a live process.
        for identity in [i for i, process in self._processes.items() if process.fd == fd and process.ended]:
            process = self._processes.pop(identity)
            log.warning("peer_died", peer=str(self._service.sessions.get(identity)), pid=process.pid)
            self._service.session_gone(identity, "died")
            poller.unregister(fd)
            process.close()

    def _send(self, answers: Iterable[Outgoing]) -> None:
        for out in answers:
            # A peer that is gone or does not read its answers must not stop the others: ROUTER drops its mail.
            self._router.send_multipart([out.identity, out.request_id, wire.encode(out.answer)], zmq.NOBLOCK)

    def _publish(self, event: wire.Event) -> None:
        self._events.send_multipart([event.stage.encode(), wire.encode(event)], zmq.NOBLOCK)

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """A descriptor that becomes readable when the daemon is asked to stop."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        previous = signal.set_wakeup_fd(writing)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _close(self) -> None:
        self._send(self._service.stop())
        for process in self._processes.values():
            process.close()
        self._context.destroy(linger=1000)
        self._settings.control_socket.unlink(missing_ok=True)
        self._settings.event_socket.unlink(missing_ok=True)


@contextmanager
def _runtime_dir(settings: Settings) -> Iterator[None]:
    """The folder of the sockets: made if need be, and nobody else's."""
    path = settings.runtime_dir
    path.mkdir(mode=0o750 if settings.group else 0o700, parents=True, exist_ok=True)
    owner = path.stat().st_uid
    if owner != os.getuid() or path.stat().st_mode & stat.S_IWOTH:
        raise SocketNotTrusted(
            f"runtime directory {path} belongs to uid {owner} or may be written by everybody",
            remedy="use a directory of this user alone: --runtime-dir",
        )
    os.chown(path, -1, settings.group_id)
    yield


@contextmanager
def _only_one(runtime_dir: Path) -> Iterator[None]:
    """Hold the directory's lock. The kernel lets go of it when the daemon ends, however it ends."""
    with (runtime_dir / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise DaemonRunning(
                f"a daemon with pid {lock.read().strip()} serves {runtime_dir}",
                remedy="stop it, or use another --runtime-dir",
            ) from error
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.seek(0)
            lock.truncate()

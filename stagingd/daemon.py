# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The event loop: sockets, processes and signals on one side, the service on the other."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import structlog
import zmq

from stagingd import wire
from stagingd.config import Settings
from stagingd.connections import Connections
from stagingd.errors import DaemonRunning, MessageTooLarge, SocketNotTrusted
from stagingd.examination import Examined, Examiner
from stagingd.liveness import Processes
from stagingd.segment import Segment
from stagingd.service import Outgoing, Service
from stagingd.supervisor import Supervisor
from stagingd.web import snapshot
from stagingd.web.board import Board
from stagingd.web.server import Server

log = structlog.get_logger()

HARD_LIMIT_BYTES = 2 * wire.MAX_MESSAGE_BYTES
"""ZeroMQ cuts a peer off that sends more than this; below it the refusal is a typed answer."""

RECEIVE_QUEUE = 16
"""Messages of one peer that ZeroMQ takes before they are read: with their size limit, its memory is bounded."""

SEND_QUEUE = 256
"""Answers kept for a peer that does not read them; later ones are dropped."""

HANDSHAKE_S = 5.0
"""A peer that connects and says nothing is cut off after so long."""


DOOR_MS = 100
"""How often a closed door is looked at."""

_NOBLOCK = int(zmq.NOBLOCK)  # plain, since pyzmq computes with it at every frame


class Daemon:
    """Serves one runtime directory until it is told to end.

    SIGTERM, SIGINT and SIGHUP end it for good: all memory is given back. SIGUSR1 makes it hand over: it ends and
    leaves everything to a successor, whose clients go on.

    Raises:
        DaemonRunning: another daemon serves the directory.
        SocketNotTrusted: the directory belongs to another user.
        NotEnoughMemory: what an earlier daemon left may not be locked into memory.
    """

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._processes = Processes(lambda fd: self._poller.register(fd, zmq.POLLIN), self._poller.unregister)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="stagingd-memory")
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="stagingd-health")
        examiner = None if settings.http_port is None else Examiner(self._examine)
        self._service = Service(
            settings, time.monotonic, self._publish, self._processes, self._submit, examiner=examiner
        )
        self._board = Board(self._wake)
        self._signal = 0
        self._wake_fd = -1
        self._alive_said = 0.0
        self._room = _room_for_connections()
        self._door_open = True

    def run(self) -> None:
        """Serve. After a clean end no socket is left, and no segment unless it was handed over."""
        settings = self._settings
        with runtime_folder(settings), _only_one(settings.runtime_dir), self._signals() as wakeup, self._web():
            self._service.recover()
            self._events = self._socket(zmq.PUB)
            self._bind(self._events, settings.event_socket)
            self._router = self._socket(zmq.ROUTER)
            self._connections = Connections(self._router)
            self._bind(self._router, settings.control_socket)
            log.info("serving", pid=os.getpid(), socket=str(settings.control_socket))
            self._supervisor.ready(f"serving {len(self._service.stages)} stages at {settings.control_socket}")
            try:
                self._loop(wakeup)
            finally:
                self._supervisor.stopping()
                self._close()
        log.info("stopped", pid=os.getpid())

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option, value in self._options(kind).items():
            socket.setsockopt(option, value)
        return socket

    def _bind(self, socket: zmq.Socket[bytes], path: Path) -> None:
        path.unlink(missing_ok=True)  # left by a killed daemon: _only_one has seen that none lives
        before = os.umask(0o777 & ~self._settings.shared_mode)  # never open to others, not even for a moment
        try:
            socket.bind(f"ipc://{path}")
        finally:
            os.umask(before)
        os.chown(path, -1, self._settings.group_id)

    def _options(self, kind: int) -> dict[int, int]:
        """All to be set before the socket is bound: ZeroMQ applies them to connections made later."""
        options: dict[int, int] = {
            zmq.LINGER: 1000,
            zmq.BACKLOG: min(1024, self._room),  # all ranks of a node may come at once
            zmq.SNDHWM: SEND_QUEUE,
            zmq.HANDSHAKE_IVL: int(HANDSHAKE_S * 1000),
            zmq.MAXMSGSIZE: HARD_LIMIT_BYTES if kind == zmq.ROUTER else 256,  # a PUB socket takes subscriptions only
        }
        if kind == zmq.ROUTER:
            options[zmq.RCVHWM] = RECEIVE_QUEUE
            if self._settings.heartbeat_s is not None:
                options[zmq.HEARTBEAT_IVL] = max(1, int(self._settings.heartbeat_s * 1000 / 3))
                options[zmq.HEARTBEAT_TIMEOUT] = max(1, int(self._settings.heartbeat_s * 1000))
        return options

    def _loop(self, wakeup: int) -> None:
        for source in (self._router, self._connections.monitor, wakeup):
            self._poller.register(source, zmq.POLLIN)
        while not self._signal:
            for source, _ in self._poller.poll(self._wait_ms()):
                if source is self._router:
                    self._receive()
                elif source is self._connections.monitor:
                    self._note_connections()
                elif source == wakeup:
                    os.read(wakeup, 4096)
                else:
                    self._bury(source)
            self._send(self._service.settle())
            self._mind_the_door()
            if self._board.wanted:
                self._board.put(snapshot.take(self._service, door_open=self._door_open))
                self._send(self._service.settle())  # to look is to ask again: nobody's answer may lie there
            self._say_alive()

    def _say_alive(self) -> None:
        watchdog_s, now = self._supervisor.watchdog_s, time.monotonic()
        if watchdog_s is not None and now >= self._alive_said + watchdog_s / 2:
            self._supervisor.alive()
            self._alive_said = now

    def _wait_ms(self) -> int | None:
        """Until the next deadline, or until the supervisor wants to hear of this process."""
        deadline, watchdog_s = self._service.next_deadline(), self._supervisor.watchdog_s
        waits = [] if deadline is None else [max(0, int((deadline - time.monotonic()) * 1000) + 1)]
        if not self._door_open:
            waits.append(DOOR_MS)
        if watchdog_s is not None:
            waits.append(int(watchdog_s * 500))
        return min(waits, default=None)

    def _receive(self) -> None:
        """Take what has arrived, a bounded number of messages at a time, so that deadlines keep their turn."""
        for _ in range(256):
            try:
                first, *rest = self._router.recv_multipart(_NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._note_connections()
            peer = self._connections.peer(first)
            request_id, body = (frame.bytes for frame in rest) if len(rest) == 2 else (b"", b"")
            if peer is not None:  # else nothing could be answered: our clients are not of that kind
                self._service.take(peer, request_id, body)

    def _note_connections(self) -> None:
        for identity in self._connections.lost():
            self._send(self._service.connection_lost(identity))

    def _mind_the_door(self) -> None:
        """Stop listening while descriptors are short. Counted, not reckoned: who comes last may leave no trace."""
        if not self._connections.changed and self._door_open:
            return
        self._connections.changed = False
        used = len(os.listdir("/proc/self/fd"))
        if self._door_open and used > self._room:
            log.warning("door_closed", descriptors=used, limit=self._room)
            self._router.unbind(f"ipc://{self._settings.control_socket}")
            self._door_open = False
        elif not self._door_open and used <= self._room // 2:
            log.warning("door_open", descriptors=used)
            self._bind(self._router, self._settings.control_socket)
            self._door_open = True

    def _bury(self, fd: int) -> None:
        pid = self._processes.ended(fd)
        if pid is not None:
            self._send(self._service.process_gone(pid))

    def _send(self, answers: Iterable[Outgoing]) -> None:
        for out in answers:
            # A peer that is gone or does not read its answers must not stop the others: ROUTER drops its mail.
            self._router.send_multipart([out.identity, out.request_id, _encoded(out.answer)], _NOBLOCK)
        self._service.tell_the_news()

    def _publish(self, event: wire.Event) -> None:
        self._events.send_multipart([event.stage.encode(), wire.encode(event)], _NOBLOCK)

    def _submit(self, work: Callable[[], Segment]) -> Future[Segment]:
        future = self._background.submit(work)
        future.add_done_callback(lambda _: self._wake())
        return future

    def _examine(self, work: Callable[[], Examined]) -> Future[Examined]:
        future = self._looking.submit(work)
        future.add_done_callback(lambda _: self._wake())
        return future

    @contextmanager
    def _web(self) -> Iterator[None]:
        """Serve metrics and the page meanwhile, where that is wanted."""
        if self._settings.http_port is None:
            yield
            return
        server = Server(self._settings.http_host, self._settings.http_port, self._board)
        log.info("serving_http", host=self._settings.http_host, port=server.port)
        try:
            yield
        finally:
            server.close()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.write(self._wake_fd, b"\0")

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """A descriptor that becomes readable when the daemon is asked to end, or memory has been made."""
        reading, self._wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        previous = signal.set_wakeup_fd(self._wake_fd)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in before.items():
                signal.signal(number, handler)
            writing, self._wake_fd = self._wake_fd, -1
            os.close(reading)
            os.close(writing)

    def _stop(self, number: int, _frame: object) -> None:
        self._signal = number

    def _close(self) -> None:
        self._settings.control_socket.unlink(missing_ok=True)  # nobody is to come any more: see Connections.close
        # What is being made is finished first: only then is it known what there is to give back.
        self._background.shutdown(wait=True)
        self._looking.shutdown(wait=True, cancel_futures=True)
        if self._signal in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._send(self._service.stop())
        else:  # also when the loop has failed: no version is lost by it
            self._service.hand_over()
        self._processes.close()
        self._connections.close()
        self._context.destroy(linger=1000)
        self._settings.event_socket.unlink(missing_ok=True)


def _encoded(answer: wire.Answer) -> bytes:
    """The answer, or why it cannot be given: one that is too long must not end the daemon."""
    try:
        return wire.encode(answer)
    except MessageTooLarge as error:
        return wire.encode(wire.refusal(error))


def _room_for_connections() -> int:
    """How many descriptors may be in use before the door is closed.

    ZeroMQ ends the process when it has no descriptor left for one more, and takes them faster than they are
    counted here: so the door is closed long before.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard // 4


@contextmanager
def runtime_folder(settings: Settings) -> Iterator[None]:
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
    path = runtime_dir / "lock"
    # This user's alone: whoever could open it could hold its lock, and keep a successor from starting.
    with open(path, "a+", opener=lambda name, flags: os.open(name, flags, 0o600)) as lock:
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

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Peers that mean ill, or are broken: the daemon serves the others meanwhile, and is afterwards what it was before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import zmq
from daemons import DEADLINE_S, RunningDaemon, eventually, start

from stagingd import wire
from stagingd.daemon import HANDSHAKE_S
from stagingd.errors import DaemonUnreachable

CONNECTIONS = 1000
GROWTH_BYTES = 64 * 2**20
"""What a hostile peer may cost: the queues of one connection, and what the allocator keeps of them."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    daemon = start(tmp_path_factory.mktemp("hostile"))
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert not daemon.segments()


def watched(daemon: RunningDaemon) -> psutil.Process:
    return psutil.Process(daemon.process.pid)


def serves(daemon: RunningDaemon) -> bool:
    try:
        return bool(daemon.status().pid)
    except DaemonUnreachable:
        return False


@contextmanager
def dealer(daemon: RunningDaemon) -> Iterator[zmq.Socket[bytes]]:
    """A client that is not one of ours."""
    found = zmq.Context.instance().socket(zmq.DEALER)
    try:
        found.connect(f"ipc://{daemon.socket}")
        yield found
    finally:
        found.close(linger=0)


def answer_to(client: zmq.Socket[bytes]) -> wire.Answer:
    assert client.poll(DEADLINE_S * 1000), "no answer"
    return wire.decode_answer(client.recv_multipart()[-1])


@contextmanager
def unharmed(daemon: RunningDaemon) -> Iterator[psutil.Process]:
    """Whatever happens meanwhile: afterwards descriptors, threads and connections are as before, memory nearly."""
    daemon.status()
    process = watched(daemon)
    before = process.num_fds(), process.num_threads(), daemon.status().connections
    private = process.memory_full_info().uss
    yield process
    daemon.status()
    assert daemon.process.poll() is None, daemon.log

    def as_before() -> bool:
        return (process.num_fds(), process.num_threads(), daemon.status().connections) == before

    eventually(as_before, f"before: {before}; now: {process.num_fds()}, {process.num_threads()}, {daemon.status()}")
    assert process.memory_full_info().uss <= private + GROWTH_BYTES


def test_a_peer_that_connects_and_is_silent_is_cut_off_and_nobody_waits_for_it(calm: RunningDaemon) -> None:
    with unharmed(calm), socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(calm.socket))
        silent.settimeout(HANDSHAKE_S + DEADLINE_S)
        for _ in range(20):
            calm.status()
        greeting = silent.recv(1024)  # ZeroMQ's, to which nothing is answered
        assert greeting
        while silent.recv(1024):  # until it is cut off
            continue


def test_a_peer_that_never_says_hello_holds_nothing(calm: RunningDaemon) -> None:
    with unharmed(calm), dealer(calm) as mute:
        mute.send_multipart([b"1", wire.encode(wire.Status())])
        answer = answer_to(mute)
        assert isinstance(answer, wire.Refusal)
        assert answer.code == "disconnected"
        assert calm.status().connections == 1  # the one that asks


def test_a_thousand_connections_are_served_with_one_pidfd_and_leave_nothing(calm: RunningDaemon) -> None:
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * CONNECTIONS)
    with unharmed(calm) as process:
        alone = process.num_fds()
        many = [context.socket(zmq.DEALER) for _ in range(CONNECTIONS)]
        try:
            for i, one in enumerate(many):
                one.connect(f"ipc://{calm.socket}")
                hello = wire.Hello(protocol=wire.PROTOCOL, connection=os.urandom(16), name=f"one of many {i}")
                one.send_multipart([b"0", wire.encode(hello)])
            assert all(isinstance(answer_to(one), wire.Welcome) for one in many)
            for one in many:
                one.send_multipart([b"1", wire.encode(wire.Status())])
            reports = [answer_to(one) for one in many]
            assert {report.connections for report in reports if isinstance(report, wire.StatusReport)} == {CONNECTIONS}
            assert process.num_fds() <= alone + CONNECTIONS + 1
        finally:
            context.destroy(linger=0)


def test_a_message_of_a_gibibyte_is_never_taken(calm: RunningDaemon) -> None:
    """It is sent by another process, so that this one needs no such memory. What was sent of it is dropped."""
    script = (
        "import sys, zmq\n"
        "dealer = zmq.Context.instance().socket(zmq.DEALER)\n"
        "monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)\n"
        "dealer.connect('ipc://' + sys.argv[1])\n"
        "dealer.send(bytes(1 << 30), copy=False)\n"
        "print('cut off' if monitor.poll(20_000) else 'taken', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    with unharmed(calm) as process:
        before = process.memory_full_info().uss
        sender = subprocess.Popen([sys.executable, "-c", script, str(calm.socket)], stdout=subprocess.PIPE, text=True)
        highest = before
        while sender.poll() is None:
            calm.status()
            highest = max(highest, process.memory_full_info().uss)
        assert sender.stdout is not None
        assert sender.stdout.read().strip() == "cut off"
        assert highest <= before + GROWTH_BYTES


def test_a_client_that_floods_and_reads_nothing_does_not_keep_others_waiting(calm: RunningDaemon) -> None:
    hello = wire.Hello(protocol=wire.PROTOCOL, connection=os.urandom(16), name="flood")
    status = wire.encode(wire.Status())
    with unharmed(calm) as process, dealer(calm) as flood:
        before = highest = process.memory_full_info().uss
        flood.send_multipart([b"0", wire.encode(hello)])
        sent = 0
        while sent < 20_000:
            try:
                flood.send_multipart([b"1", status], zmq.NOBLOCK)
                sent += 1
            except zmq.Again:  # the queues are full: that is what bounds the daemon's memory
                calm.status()
                highest = max(highest, process.memory_full_info().uss)
        assert highest <= before + GROWTH_BYTES


def test_questions_of_one_client_do_not_pile_up(calm: RunningDaemon) -> None:
    hello = wire.Hello(protocol=wire.PROTOCOL, connection=os.urandom(16), name="asks and asks")
    attach = wire.Attach(stage="never", engine="e", rank=0, ranks=1, timeout_s=60.0)
    with unharmed(calm), dealer(calm) as curious:
        curious.send_multipart([b"0", wire.encode(hello)])
        for i in range(50):
            curious.send_multipart([b"%d" % (i + 1), wire.encode(attach)])
        answers = [answer_to(curious) for _ in range(50)]
        assert isinstance(answers[0], wire.Welcome)
        assert {answer.code for answer in answers[1:] if isinstance(answer, wire.Refusal)} == {"out_of_order"}
        assert len(answers) == 50  # the last question still waits


def test_garbage_on_the_events_socket_changes_nothing(calm: RunningDaemon) -> None:
    subscriber = zmq.Context.instance().socket(zmq.XSUB)
    with unharmed(calm):
        try:
            subscriber.connect(f"ipc://{calm.folder / 'events.sock'}")
            for i in range(1000):
                subscriber.send(os.urandom(1 + i % 200))
            calm.status()
        finally:
            subscriber.close(linger=0)


def crowd_in(daemon: RunningDaemon) -> list[socket.socket]:
    """Connect until nobody listens any more; the daemon gets its turn now and then, also on a machine with none left.

    ZeroMQ accepts connections in a thread of its own: where the daemon's loop does not run at all meanwhile, nothing
    closes the door in time.
    """
    crowd: list[socket.socket] = []
    while True:
        if len(crowd) % 50 == 49:
            serves(daemon)
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(DEADLINE_S)
        try:
            one.connect(str(daemon.socket))
        except BlockingIOError:  # the kernel's queue is full for the moment
            one.close()
        except (ConnectionRefusedError, FileNotFoundError):
            one.close()
            return crowd
        else:
            crowd.append(one)
        assert len(crowd) < 10_000


def test_the_door_is_closed_while_descriptors_are_short(tmp_path: Path) -> None:
    """ZeroMQ would end the daemon when it cannot take one more connection."""
    daemon = start(tmp_path / "run", wrapper=("sh", "-c", 'ulimit -n 2000; "$@"; exit $?', "sh"))
    for _ in range(3):
        crowd = crowd_in(daemon)
        assert daemon.process.poll() is None, daemon.log
        for one in crowd:
            one.close()
        eventually(lambda: serves(daemon), "the door to open")
    assert "door_closed" in daemon.log
    assert daemon.stop() == 0, daemon.log

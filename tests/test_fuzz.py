# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Hostile bytes on the control channel: each is answered with a typed error or does what it rightly may, and the
daemon is the same afterwards. How many is ``--fuzz-messages``: a run of a million takes minutes.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import socket
import struct
import sys
import time
import tracemalloc
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgpack
import psutil
import pytest
import torch
import zmq
from daemons import DEADLINE_S, RunningDaemon
from fuzzing import STAGES, Fuzzer, asks, may_make_a_stage
from stagingd_client import Stage
from stagingd_vllm import Reader
from zmq.utils.monitor import recv_monitor_message

from stagingd import catalog, wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.connection import Connection
from stagingd.daemon import HARD_LIMIT_BYTES
from stagingd.errors import BoxMissing, StagingError
from stagingd.moments import ALL_GRIDS
from stagingd.segment import SHARED_MEMORY

SEEDS = (1, 2, 3, 4)
LIVE_SEED = 11
EVERY_MESSAGE = wire.Request | wire.Answer | wire.Event
DECODERS = (wire.decode_request, wire.decode_answer, wire.decode_event)

REFUSAL_CHARS = 4096
"""No refusal is longer, whatever was sent: a peer must not be able to make the daemon write more than it reads."""

GROWTH_BYTES = 12 << 20
"""By how much resident memory may grow after the warm-up, however many messages come: the allocator's own ways."""

HEADROOM_BYTES = 4 << 30
"""Address space beyond what a process has at the start. A message that takes more fails here, not the machine."""

WINDOW = 25
"""Messages under way at once: the daemon may drop answers to who does not read them, so the window stays small."""

WINDOWS = 16
VISITORS = 4
VALID_SHARE = 0.3
"""Of the daemon's visitors' messages, so that sessions get somewhere before they turn hostile again."""

PATIENCE_S = 1.0
"""A request that asks to wait for longer may rightly be unanswered when its session ends."""


@pytest.fixture
def messages(request: pytest.FixtureRequest) -> int:
    """How many messages the decoders get; the daemon gets a tenth."""
    return int(request.config.getoption("--fuzz-messages"))


@contextmanager
def bounded_memory(pid: int) -> Iterator[None]:
    """A process may not take more than the headroom beyond what it has."""
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + HEADROOM_BYTES, before[1]))
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            resource.prlimit(pid, resource.RLIMIT_AS, before)


def eventually(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait until something holds that another process has to do first."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, what()
        time.sleep(0.01)  # polls; the test does not depend on how long


# The generator


def test_every_kind_of_request_is_made_and_still_valid_among_the_mutants() -> None:
    kinds = {kind.model_fields["kind"].default: kind for kind in typing.get_args(wire.Request)}
    fuzzer = Fuzzer(1)
    assert set(fuzzer.builder.kinds) == set(kinds)
    for name, kind in kinds.items():
        for _ in range(100):
            assert isinstance(wire.decode_request(msgpack.packb(fuzzer.builder.message(name))), kind)
    survived = Counter(type(asks(fuzzer.message())) for _ in range(20_000))
    assert min(survived[kind] for kind in kinds.values()) > 50
    assert 14_000 < survived[type(None)] < 19_500


def test_the_same_seed_gives_the_same_messages() -> None:
    first, again, other = Fuzzer(7), Fuzzer(7), Fuzzer(8)
    sent = [first.message() for _ in range(500)]
    assert sent == [again.message() for _ in range(500)]
    assert sent != [other.message() for _ in range(500)]


# The decoders


def outcome(decode: Callable[[bytes], object], body: bytes) -> object:
    """A typed message, or the typed error."""
    try:
        return decode(body)
    except StagingError as error:
        return short(error)


def short(error: StagingError) -> StagingError:
    """The same, which has to be fit for an answer and for a line in the log."""
    assert len(str(error)) <= REFUSAL_CHARS, f"a refusal of {len(str(error))} characters"
    return error


def decode_all(fuzzer: Fuzzer, count: int, ignored: list[object]) -> None:
    for number in range(count):
        body = fuzzer.message()
        try:
            for decode in DECODERS:
                outcome(decode, body)
            assert not ignored, f"an exception was ignored: {ignored}"
        except BaseException as error:
            error.add_note(f"message {number} of this call, {len(body)} bytes: {body[:4096].hex()}")
            raise


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(1800)
def test_a_decoder_gives_a_message_or_a_typed_error_and_keeps_nothing(
    messages: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer, count = Fuzzer(seed, EVERY_MESSAGE), messages // len(SEEDS)
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: ignored.append(repr(what.exc_value)))
    with bounded_memory(os.getpid()):
        decode_all(fuzzer, count // 10, ignored)
        gc.collect()
        before = psutil.Process().memory_info().rss
        started = time.monotonic()
        decode_all(fuzzer, count, ignored)
        rate = count / (time.monotonic() - started)
        gc.collect()
        after = psutil.Process().memory_info().rss
    print(f"seed {seed}: {rate:.0f} messages/s, resident {before >> 10} -> {after >> 10} KiB")
    assert after - before < GROWTH_BYTES


LARGE: dict[str, Callable[[int], bytes]] = {
    "tensors that are none": lambda size: (
        b"\x82\xa4kind\xa7declare\xa7tensors\xdd" + struct.pack(">I", size // 4) + b"\xc0" * (size // 4)
    ),
    "fields that are none": lambda size: msgpack.packb(
        {"kind": "status", **{f"{i:07x}": None for i in range(min(size // 9, 1_000_000))}}
    ),
    "a kind without end": lambda size: msgpack.packb({"kind": "x" * (size - 11)}),
    "a field's name without end": lambda size: msgpack.packb({"kind": "status", "x" * (size - 19): 0}),
    "an array that is not there": lambda size: b"\xdd\x00\xff\xff\xff" * (size // 5),
    "arrays that are not there before much else": lambda size: b"\xdd\x00\xff\xff\xff" * 200 + bytes(size - 1000),
}
"""Messages of at most so many bytes that are wrong in as many places as can be, or wrong at length."""


@pytest.mark.parametrize("what", LARGE)
def test_a_message_takes_memory_in_proportion_to_its_length(what: str) -> None:
    body = LARGE[what](1 << 16)
    bound = (1 << 20) + 128 * len(body)  # a typed declaration takes some 60 times its bytes
    for decode in DECODERS:
        outcome(decode, body[:64])  # what is made once and kept
        with bounded_memory(os.getpid()):
            tracemalloc.start()
            try:
                outcome(decode, body)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < bound, f"{decode.__name__} takes {peak} bytes for a message of {len(body)}"


def test_a_refused_declaration_is_forgotten() -> None:
    def refuse(size: int) -> None:
        boxes = tuple(Box((i,), (1,)) for i in range(300))
        tensor = TensorDeclaration(name="w", dtype="bfloat16", shape=(size,), boxes=boxes)
        with pytest.raises(BoxMissing):
            catalog.build("s", [[tensor]], ALL_GRIDS)

    refuse(301)
    tracemalloc.start()
    try:
        for size in range(302, 352):
            refuse(size)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20


# A live daemon


def hello(chance: random.Random, said: wire.Hello | None = None) -> bytes:
    """A hello, or the one that was said, of a client of its own: what tells clients apart stands here alone.

    A hello with the token of another connection of this process would rightly take over what that one holds.
    """
    mine = {"pid": os.getpid(), "connection": chance.randbytes(16)}
    plain = said.model_dump() if said is not None else {"protocol": wire.PROTOCOL, "name": "fuzz"}
    return wire.encode(wire.Hello(**plain | {name: mine[name] for name in mine if name in wire.Hello.model_fields}))


@contextmanager
def nothing_left_behind(daemon: RunningDaemon) -> Iterator[None]:
    """A daemon that a test has found wanting may not be able to stop: it is killed, and its memory removed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the daemon: {daemon.process.poll()}; its log ends:\n{daemon.log[-3000:]}")
        daemon.process.kill()
        daemon.process.wait(DEADLINE_S)
        for name in daemon.segments():
            (SHARED_MEMORY / name).unlink()
        raise


class Visitor:
    """A socket whose owner keeps no rule. It knows which answers are due, and which may rightly never come."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(f"ipc://{daemon.socket}")
        self._daemon = daemon
        self._asked = 0
        self._bodies: dict[bytes, bytes] = {}
        self.due: Counter[bytes] = Counter()
        self.may_wait: Counter[bytes] = Counter()

    def send(self, *frames: bytes, waits: bool = False) -> None:
        """Send a message. The answer to one that is not two frames has an empty request id."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        request_id = frames[0] if len(frames) == 2 else b""
        (self.may_wait if waits else self.due)[request_id] += 1
        self._bodies[request_id] = frames[-1]

    def ask(self, body: bytes, *, odd: bytes = b"", waits: bool = False) -> None:
        """Send a request under a number of its own."""
        self._asked += 1
        self.send(struct.pack("<Q", self._asked) + odd, body, waits=waits)

    def collect(self) -> None:
        """Take answers until none is due. Every one is a message, and to something that was asked."""
        while self.due:
            eventually(self._answered, self._unanswered)
            request_id, body = self._socket.recv_multipart()
            wire.decode_answer(body)
            owed = self.due if self.due[request_id] else self.may_wait
            assert owed[request_id], f"an answer to {request_id.hex()}, which nobody asked"
            owed[request_id] -= 1
            self.due += Counter()  # without those that are paid
        self._bodies.clear()

    def _answered(self) -> bool:
        assert self._daemon.process.poll() is None, f"the daemon has died: {self._unanswered()}"
        return bool(self._socket.poll(1000))

    def _unanswered(self) -> str:
        first = self._bodies[next(iter(self.due))]
        return f"{self.due.total()} requests are not answered, the first of {len(first)} bytes: {first[:4096].hex()}"

    @contextmanager
    def watch(self) -> Iterator[zmq.Socket[bytes]]:
        """What becomes of the connection, see ``zmq.utils.monitor``."""
        monitor = self._socket.get_monitor_socket()
        try:
            yield monitor
        finally:
            self._socket.disable_monitor()

    def leave(self) -> None:
        """Say goodbye, whether or not hello was said, and close."""
        self.ask(wire.encode(wire.Bye()))
        self.collect()
        self._socket.close(linger=0)


def next_body(fuzzer: Fuzzer, chance: random.Random) -> tuple[bytes, bool]:
    """The fuzzer's next message that cannot rightly change anything for good, and whether it may wait for long."""
    while True:
        body = fuzzer.valid() if chance.random() < VALID_SHARE else fuzzer.message()
        request = asks(body)
        if may_make_a_stage(request) or isinstance(request, wire.Bye):
            continue  # nobody is answered any more after Bye: a visitor says it when it leaves
        if isinstance(request, wire.Hello):
            body = hello(chance, request)
        return body, getattr(request, "timeout_s", 0.0) > PATIENCE_S


def send_one(visitor: Visitor, fuzzer: Fuzzer, chance: random.Random) -> None:
    """One message, in one of the ways to frame it."""
    body, waits = next_body(fuzzer, chance)
    shape = chance.randrange(40)
    if shape == 0:
        visitor.send(body)
    elif shape == 1:
        visitor.send(*[b""] * chance.choice((1, 2, 3, 100)))
    elif shape == 2:
        visitor.send(b"id", body, *[body] * chance.choice((1, 50)))
    elif shape == 3 and not waits:
        visitor.send(chance.choice((b"", b"\x00", b"\x00" * 300)), body)
    else:
        visitor.ask(body, odd=chance.choice((b"", b"", b"x", b"\xff" * 20)), waits=waits)


def visit(daemon: RunningDaemon, fuzzer: Fuzzer, chance: random.Random) -> int:
    """Several visitors at once, half of them with a session. Returns how many messages may still have waited."""
    visitors = [Visitor(daemon) for _ in range(VISITORS)]
    for visitor in visitors[::2]:
        visitor.ask(hello(chance))
    for _ in range(WINDOWS):
        for visitor in visitors:
            for _ in range(WINDOW):
                send_one(visitor, fuzzer, chance)
        for visitor in visitors:
            visitor.collect()
    for visitor in visitors:
        visitor.leave()
    return sum(visitor.may_wait.total() for visitor in visitors)


def possessions(daemon: RunningDaemon) -> dict[str, object]:
    """Everything of the daemon that visitors must leave as it was."""
    process, status = psutil.Process(daemon.process.pid), daemon.status()
    return {
        "stages": daemon.picture(),
        "connections": status.connections,
        "segments": sorted(daemon.segments()),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def as_before(daemon: RunningDaemon, before: dict[str, object]) -> bool:
    """Whether visitors have left nothing. A connection of the test itself may have been closing at that time."""
    now = possessions(daemon)
    fewer = int(str(now["descriptors"])) <= int(str(before["descriptors"]))
    return fewer and now | {"descriptors": 0} == before | {"descriptors": 0}


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    stage.put("w", torch.full((8, 4), float(version)))
    stage.commit().wait()


def assert_reads(reader: Reader, version: int) -> None:
    with reader.lease() as lease:
        assert lease.version == version
        assert torch.equal(lease.read("w"), torch.full((8, 4), float(version), dtype=torch.bfloat16))


@contextmanager
def staged(daemon: RunningDaemon) -> Iterator[None]:
    """A stage with a version that a reader has read. Whatever happens, it reads it again, and then a later one."""
    with (
        nothing_left_behind(daemon),
        bounded_memory(daemon.process.pid),
        Stage.open(STAGES[0], rank=0, ranks=1, socket=daemon.socket) as stage,
    ):
        stage.declare({"w": torch.zeros(8, 4)})
        publish(stage, 1)
        with Reader.attach(STAGES[0], engine="reader", rank=0, ranks=1, socket=daemon.socket) as reader:
            assert_reads(reader, 1)
            yield
            assert daemon.process.poll() is None
            assert_reads(reader, 1)
            publish(stage, 2)
            assert_reads(reader, 2)


@pytest.mark.timeout(1800)
def test_a_live_daemon_is_the_same_after_hostile_messages(own_daemon: RunningDaemon, messages: int) -> None:
    """What "no change" means, kind by kind, for a request that is valid by chance:

    Hello, Bye: a session begins and ends; every visitor ends with Bye, so that the connections are as before.
    Declare: it waits for the ranks that are missing, and is forgotten with its deadline or session. One that could
        bring a stage about is not sent. For the stage that is there its rank is taken.
    Begin, Commit, Abort: refused, for the stage's one rank is the trainer's.
    Attach, LeaseVersion, Release: an engine may come to the stage and read: until its session ends. The version
        read is the front already, so that no slot changes.
    Report: refused, for no engine is of the visitor's process; or an engine's that came, whose history it is.
    Status, History: change nothing. Drop: refused while somebody is there; no other stage is ever ready.
    """
    fuzzer, chance = Fuzzer(LIVE_SEED), random.Random(LIVE_SEED)
    rounds = -(-messages // 10 // (VISITORS * WINDOWS * WINDOW))
    process = psutil.Process(own_daemon.process.pid)
    with staged(own_daemon):
        visit(own_daemon, fuzzer, chance)  # what a daemon allocates once
        eventually(lambda: not own_daemon.status().stages[1:], lambda: str(own_daemon.status()))
        before, resident, logged = possessions(own_daemon), process.memory_info().rss, len(own_daemon.log)
        started = time.monotonic()
        waited = sum(visit(own_daemon, fuzzer, chance) for _ in range(rounds))
        sent = rounds * VISITORS * WINDOWS * WINDOW
        rate, grown = sent / (time.monotonic() - started), process.memory_info().rss - resident
        figures = (
            f"seed {LIVE_SEED}: {sent} messages, {rate:.0f}/s, {waited} of them may have waited until the end; resident"
        )
        print(f"{figures} {resident >> 10} + {grown >> 10} KiB")
        eventually(lambda: as_before(own_daemon, before), lambda: f"{possessions(own_daemon)}, before: {before}")
        assert grown < GROWTH_BYTES
        assert len(own_daemon.log) - logged < rounds * VISITORS * 2 * REFUSAL_CHARS  # the first refusal of each peer


@pytest.mark.parametrize("what", LARGE)
def test_the_largest_messages_are_refused(own_daemon: RunningDaemon, what: str) -> None:
    body, chance = LARGE[what](wire.MAX_MESSAGE_BYTES), random.Random(6)
    with staged(own_daemon):
        for greeting in ((), (hello(chance),)):
            visitor = Visitor(own_daemon)
            for request in (*greeting, body):
                visitor.ask(request)
            visitor.leave()


def test_a_message_beyond_the_hard_limit_cuts_its_sender_off(own_daemon: RunningDaemon) -> None:
    with staged(own_daemon):
        visitor = Visitor(own_daemon)
        with visitor.watch() as monitor:
            visitor.ask(bytes(HARD_LIMIT_BYTES + 1), waits=True)
            seen: list[object] = []
            while zmq.Event.DISCONNECTED not in seen:
                assert monitor.poll(DEADLINE_S * 1000), f"it is not cut off; its socket saw {seen}"
                seen.append(recv_monitor_message(monitor)["event"])
        visitor.leave()


def test_bytes_that_are_not_zeromq_do_not_reach_the_daemon(own_daemon: RunningDaemon) -> None:
    chance = random.Random(5)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
    with staged(own_daemon):
        before = possessions(own_daemon)
        for number in range(100):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(own_daemon.socket))
                raw.send(greeting * (number % 2) + chance.randbytes(chance.randrange(1, 2000)))
        eventually(lambda: as_before(own_daemon, before), lambda: f"{possessions(own_daemon)}, before: {before}")


def declaration(**fields: typing.Any) -> bytes:
    """A declaration of one tensor by the only rank, and whatever is to be wrong with it."""
    whole = fields.pop("shape", (2, 2))
    tensor = {"name": "w", "dtype": "bfloat16", "shape": whole, "boxes": [[[0] * len(whole), whole]]}
    tensor |= fields.pop("tensor", {})
    options = {"policy": "latest", "grids": ["tensor"], "on_non_finite": "reject"} | fields.pop("options", {})
    plain = {"stage": "huge", "rank": 0, "ranks": 1, "timeout_s": 0.01, "tensors": [tensor], "options": options}
    return bytes(msgpack.packb({"kind": "declare", **plain, **fields}))


OVERWHELMING: dict[str, Callable[[], bytes]] = {
    "more elements than 64 bits count": lambda: declaration(shape=(2**40, 2**40)),
    "more elements than a float counts": lambda: declaration(shape=(2**63,) * 20),
    "more bytes than 64 bits count": lambda: declaration(shape=(2**63,)),
    "a name of the largest length in everything": lambda: declaration(tensor={"name": "層" * 512, "boxes": []}),
    "thirty thousand dims, half covered": lambda: declaration(
        shape=(2,) * 30_000, tensor={"boxes": [[[0] * 30_000, [1] * 30_000]]}
    ),
    "a hundred thousand columns": lambda: declaration(
        shape=(1, 100_000), tensor={"boxes": [[[0, i], [1, 1]] for i in range(100_000)]}
    ),
    "every other element of a row": lambda: declaration(
        shape=(200_000,), tensor={"boxes": [[[i], [1]] for i in range(0, 200_000, 2)]}
    ),
    "a grid a million times": lambda: declaration(options={"grids": ["tensor"] * 1_000_000}),
    "a box whose text is longer than a message": lambda: declaration(
        shape=(2**64 - 1,) * 1_500_000, tensor={"boxes": [[[2**64 - 1] * 1_500_000, [1] * 1_500_000]]}
    ),
    "a million ranks": lambda: declaration(ranks=1 << 20),
}


@pytest.mark.parametrize("what", OVERWHELMING)
def test_a_declaration_made_to_overwhelm_is_refused(own_daemon: RunningDaemon, what: str) -> None:
    with staged(own_daemon):
        before = possessions(own_daemon)
        visitor = Visitor(own_daemon)
        visitor.ask(hello(random.Random(7)))
        visitor.ask(OVERWHELMING[what]())
        visitor.collect()
        visitor.ask(wire.encode(wire.Status()))
        visitor.leave()
        eventually(lambda: as_before(own_daemon, before), lambda: f"{possessions(own_daemon)}, before: {before}")


def test_many_that_wait_for_many_do_not_make_a_status_too_large(own_daemon: RunningDaemon) -> None:
    ranks = next(part.le for part in wire.Declare.model_fields["ranks"].metadata if hasattr(part, "le"))
    many = 2 + wire.MAX_MESSAGE_BYTES // (16 * ranks)  # who waits names every rank, in 16 letters or more
    chance = random.Random(8)
    with staged(own_daemon):
        before = possessions(own_daemon)
        visitors = [Visitor(own_daemon) for _ in range(many)]
        for number, visitor in enumerate(visitors):
            visitor.ask(hello(chance))
            visitor.collect()
            visitor.ask(declaration(stage=f"s{number}", ranks=ranks, timeout_s=600.0), waits=True)
        with Connection(own_daemon.socket, name="test") as connection:
            eventually(
                lambda: len(connection.request(wire.Status(), wire.StatusReport, timeout_s=60).stages) > many,
                lambda: f"of {many} declarations not all wait",
            )
        for visitor in visitors:
            visitor.leave()
        eventually(lambda: as_before(own_daemon, before), lambda: f"{possessions(own_daemon)}, before: {before}")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Bad input: a typed error that says what, where and what to do; nothing is changed; the next version goes through."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import torch
import zmq
from daemons import RunningDaemon
from machines import machine
from stagingd_client import LocalShard, Publication, Stage
from stagingd_vllm import Reader

from stagingd import memory, segment, wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.connection import Connection
from stagingd.errors import (
    BoxDoubled,
    BoxMissing,
    BoxOutside,
    CommitIncomplete,
    DaemonUnreachable,
    DeadlineExceeded,
    MessageRefused,
    MessageTooLarge,
    NonFiniteValues,
    NotEnoughMemory,
    OutOfOrder,
    SocketNotTrusted,
    StagingError,
    UnknownStage,
    UnknownTensor,
    VersionMismatch,
    VersionNotAvailable,
    VersionNotRising,
    WrongDtype,
    WrongShape,
)

SHAPE = (10, 6)


def tensors(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {"a.weight": torch.randn(SHAPE, generator=generator), "b.weight": torch.randn(SHAPE, generator=generator)}


def open_stage(daemon: RunningDaemon, name: str, rank: int = 0, ranks: int = 1) -> Stage:
    return Stage.open(name, rank=rank, ranks=ranks, socket=daemon.socket, timeout_s=10.0)


def publish(stage: Stage, version: int) -> Publication:
    stage.begin(version)
    for name, tensor in tensors(version).items():
        stage.put(name, tensor)
    return stage.commit()


@pytest.fixture
def stage(daemon: RunningDaemon, stage_name: str) -> Iterator[Stage]:
    """A stage of one rank with version 5 in it: whatever the test does, 5 stands, and a later one goes through."""
    with open_stage(daemon, stage_name) as opened:
        opened.declare(tensors(0))
        publish(opened, 5).wait()
        yield opened
        with Reader.attach(stage_name, engine="check", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                assert lease.version == 5
                assert torch.equal(lease.read("a.weight"), tensors(5)["a.weight"].bfloat16())
            opened.abort()
            publish(opened, 1000).wait()
            with reader.lease() as lease:
                assert lease.version == 1000


def assert_says(error: StagingError, *words: str) -> None:
    """The message names what it has to, and something that can be done."""
    for word in words:
        assert word in str(error)
    assert error.remedy


def test_an_unknown_tensor(stage: Stage) -> None:
    stage.begin(6)
    with pytest.raises(UnknownTensor) as caught:
        stage.put("c.weight", torch.zeros(SHAPE))
    assert_says(caught.value, "'c.weight'", "a.weight")


def test_a_wrong_dtype(stage: Stage) -> None:
    stage.begin(6)
    with pytest.raises(WrongDtype) as caught:
        stage.put("a.weight", torch.zeros(SHAPE, dtype=torch.float16))
    assert_says(caught.value, "'a.weight'", "torch.float16", "torch.float32")


@pytest.mark.parametrize("shape", [(10, 7), (9, 6), (60,), (10, 6, 1)])
def test_a_wrong_shape_or_rank(stage: Stage, shape: tuple[int, ...]) -> None:
    stage.begin(6)
    with pytest.raises(WrongShape) as caught:
        stage.put("a.weight", torch.zeros(shape))
    assert_says(caught.value, "'a.weight'", str(SHAPE))


def test_a_shard_and_offset_of_different_rank(stage: Stage) -> None:
    stage.begin(6)
    with pytest.raises(WrongShape) as caught:
        stage.put("a.weight", torch.zeros(SHAPE), global_shape=SHAPE, offset=(0,))
    assert_says(caught.value, "'a.weight'", "(0,)")


def test_a_box_outside_the_tensor(stage: Stage) -> None:
    stage.begin(6)
    with pytest.raises(BoxOutside) as caught:
        stage.put("a.weight", torch.zeros(4, 6), global_shape=SHAPE, offset=(8, 0))
    assert_says(caught.value, "'a.weight'", "[8:12, 0:6]")


def test_a_shard_put_twice(stage: Stage) -> None:
    stage.begin(6)
    stage.put("a.weight", tensors(6)["a.weight"])
    with pytest.raises(OutOfOrder) as caught:
        stage.put("a.weight", tensors(6)["a.weight"])
    assert_says(caught.value, "'a.weight'", "version 6", "twice")


def test_put_commit_and_begin_out_of_order(stage: Stage) -> None:
    with pytest.raises(OutOfOrder, match=r"put of tensor 'a\.weight' before begin"):
        stage.put("a.weight", tensors(6)["a.weight"])
    with pytest.raises(OutOfOrder, match="commit before begin"):
        stage.commit()
    stage.begin(6)
    with pytest.raises(OutOfOrder, match="version 6 is not committed"):
        stage.begin(7)


def test_begin_before_declare(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage, pytest.raises(OutOfOrder, match="is not declared"):
        stage.begin(1)


def test_a_commit_with_boxes_missing(stage: Stage) -> None:
    stage.begin(6)
    stage.put("a.weight", tensors(6)["a.weight"])
    with pytest.raises(CommitIncomplete) as caught:
        stage.commit()
    assert_says(caught.value, "'b.weight'", "version 6", "[0:10, 0:6]")


def test_a_commit_with_boxes_missing_by_a_client_that_does_not_check(daemon: RunningDaemon, stage: Stage) -> None:
    stage.begin(6)
    request = wire.Commit(stage=stage.name, rank=0, version=6, boxes=1, timeout_s=1.0)
    with pytest.raises(CommitIncomplete, match="1 of its 2 boxes"):
        stage._connection.request(request, wire.Sealed)


def test_a_version_that_does_not_rise(daemon: RunningDaemon, stage: Stage) -> None:
    for version in (5, 4):
        with pytest.raises(VersionNotRising) as caught:
            stage.begin(version)
        assert_says(caught.value, f"version {version}", "greater than 5")
    before = daemon.picture()
    with pytest.raises(VersionNotRising, match="greater than 5"):  # the daemon's own check
        stage._connection.request(wire.Begin(stage=stage.name, rank=0, version=5, timeout_s=1.0), wire.Begun)
    assert daemon.picture() == before


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_in_a_shard(stage: Stage, poison: float) -> None:
    bad = tensors(6)
    bad["b.weight"][3, 4] = poison
    stage.begin(6)
    for name, tensor in bad.items():
        stage.put(name, tensor)
    with pytest.raises(NonFiniteValues) as caught:
        stage.commit().wait()
    assert_says(caught.value, "version 6", "b.weight (1)")


def test_nan_is_staged_with_a_warning_on_request(daemon: RunningDaemon, stage_name: str) -> None:
    bad = {"a.weight": torch.full(SHAPE, float("nan"))}
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, on_non_finite="warn") as stage:
        stage.declare(bad)
        stage.begin(1)
        stage.put("a.weight", bad["a.weight"])
        stage.commit().wait()
    assert '"tensors": {"a.weight": 60}' in daemon.log


def test_a_failure_in_the_background_is_raised_by_the_next_call(stage: Stage) -> None:
    bad = {name: torch.full(SHAPE, float("nan")) for name in tensors(6)}
    stage.begin(6)
    for name, tensor in bad.items():
        stage.put(name, tensor)
    publication = stage.commit()
    stage._background.submit(int).result(10)  # the queue before it is done
    assert publication.done
    with pytest.raises(NonFiniteValues):
        stage.fence()
    stage.fence()  # raised once


def test_a_failure_that_nobody_has_seen_is_raised_at_the_end(daemon: RunningDaemon, stage_name: str) -> None:
    stage = open_stage(daemon, stage_name)
    stage.declare({"a.weight": torch.zeros(SHAPE)})
    stage.begin(1)
    stage.put("a.weight", torch.full(SHAPE, float("inf")))
    stage.commit()
    with pytest.raises(NonFiniteValues):
        stage.close()


def two_ranks(daemon: RunningDaemon, name: str, *parts: dict[str, LocalShard]) -> StagingError | None:
    """Two ranks declare; returns what the last one to declare was told."""
    first = open_stage(daemon, name, rank=0, ranks=2)
    pending = first._background.submit(first.declare, parts[0])
    with first, open_stage(daemon, name, rank=1, ranks=2) as second:
        mine, theirs = second._background.submit(second.declare, parts[1]).exception(20), pending.exception(20)
        assert type(mine) is type(theirs)  # both are told
        return mine  # type: ignore[return-value]


def part(start: int, stop: int, dtype: torch.dtype = torch.float32) -> dict[str, LocalShard]:
    return {"a.weight": LocalShard(torch.zeros(stop - start, 6, dtype=dtype), SHAPE, (start, 0))}


@pytest.mark.parametrize(
    ("second", "kind", "box"),
    [((6, 10), BoxMissing, "[4:6, 0:6]"), ((3, 10), BoxDoubled, "[3:4, 0:6]")],
)
def test_a_box_missing_or_doubled_at_declaration(
    daemon: RunningDaemon, stage_name: str, second: tuple[int, int], kind: type[StagingError], box: str
) -> None:
    before = daemon.picture()
    error = two_ranks(daemon, stage_name, part(0, 4), part(*second))
    assert isinstance(error, kind)
    assert_says(error, "'a.weight'", box)
    assert daemon.picture() == before
    assert two_ranks(daemon, stage_name, part(0, 4), part(4, 10)) is None  # and again, rightly


def test_two_ranks_with_different_versions(daemon: RunningDaemon, stage_name: str) -> None:
    first = open_stage(daemon, stage_name, rank=0, ranks=2)
    pending = first._background.submit(first.declare, part(0, 4))
    with first, open_stage(daemon, stage_name, rank=1, ranks=2) as second:
        second.declare(part(4, 10))
        pending.result(20)
        first.begin(7)
        first._background.submit(int).result(10)
        second.begin(8)
        second.put("a.weight", torch.ones(6, 6), global_shape=SHAPE, offset=(4, 0))
        with pytest.raises(VersionMismatch, match="rank 0 is filling version 7"):
            second.fence()
        second.abort()
        second.begin(7)
        first.put("a.weight", torch.ones(4, 6), global_shape=SHAPE, offset=(0, 0))
        second.put("a.weight", torch.ones(6, 6), global_shape=SHAPE, offset=(4, 0))
        for publication in (first.commit(), second.commit()):
            publication.wait()


def test_a_segment_too_large_for_the_memory(daemon: RunningDaemon, stage_name: str) -> None:
    before, segments = daemon.picture(), daemon.segments()
    huge = TensorDeclaration(name="huge", dtype="bfloat16", shape=(1 << 40,), boxes=(Box((0,), (1 << 40,)),))
    options = wire.StageOptions(grids=("tensor",))
    request = wire.Declare(stage=stage_name, rank=0, ranks=1, options=options, tensors=(huge,), timeout_s=5.0)
    with Connection(daemon.socket, name="test") as connection, pytest.raises(NotEnoughMemory) as caught:
        connection.request(request, wire.Declared, timeout_s=5.0)
    assert_says(caught.value, stage_name, "4096.002 GiB", "/dev/shm")
    assert (daemon.picture(), daemon.segments()) == (before, segments)


def test_a_control_group_whose_limit_is_too_low_is_named_before_the_kernel_kills_for_it(tmp_path: Path) -> None:
    folder, mib = "sys/fs/cgroup/pod", 2**20
    group = {f"{folder}/memory.max": str(10 * mib), f"{folder}/memory.current": str(8 * mib)}
    cached = {f"{folder}/memory.stat": f"shmem {7 * mib}\nactive_file {mib}"}
    mount = {"proc/self/mountinfo": "36 25 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"}
    files = machine(tmp_path, {"proc/self/cgroup": "0::/pod"}, mount, group, cached)
    memory.check_room("policy", 3 * mib, segment.SHARED_MEMORY, lock=False, files=files)
    with pytest.raises(NotEnoughMemory) as caught:
        memory.check_room("policy", 4 * mib, segment.SHARED_MEMORY, lock=False, files=files)
    assert_says(caught.value, "policy", "0.004 GiB", "0.003 GiB left of the 0.010 GiB", "/sys/fs/cgroup/pod/memory.max")


def test_a_locking_limit_that_is_too_low_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "may_lock_anything", lambda: False)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (4096, 4096))
    with pytest.raises(NotEnoughMemory) as caught:
        memory.check_room("policy", 1 << 20, segment.SHARED_MEMORY, lock=True)
    assert_says(caught.value, "may be locked", "LimitMEMLOCK")


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable) as caught:
        Stage.open("policy", rank=0, ranks=1, socket=tmp_path / "control.sock")
    assert_says(caught.value, "control.sock", "stagingd serve")


def test_a_socket_that_a_dead_daemon_left(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(tmp_path / "control.sock"))
    with pytest.raises(DaemonUnreachable, match="nobody listens"):
        Stage.open("policy", rank=0, ranks=1, socket=tmp_path / "control.sock")


def test_a_daemon_that_dies_is_noticed_by_who_waits_for_it(own_daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=2, socket=own_daemon.socket, timeout_s=60.0) as stage:
        waiting = stage._background.submit(stage.declare, part(0, 4))
        while not own_daemon.picture():
            continue
        own_daemon.process.kill()
        with pytest.raises(
            DaemonUnreachable,
            match=rf"daemon \(pid {own_daemon.process.pid}\).* is gone: it ended before it answered declare",
        ):
            waiting.result(20)


def test_a_second_daemon_in_the_same_place(daemon: RunningDaemon) -> None:
    command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", str(daemon.folder)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert f"a daemon with pid {daemon.process.pid} serves" in second.stderr


def test_a_socket_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(tmp_path / "control.sock"))
        foreign.listen()
        owner = os.getuid()
        if owner == 0:  # root's sockets are trusted by everybody, so it has to be given away
            owner = 65534
            os.chown(tmp_path / "control.sock", owner, owner)
        else:  # nobody else can give a socket away: this process becomes somebody else instead
            monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        with pytest.raises(SocketNotTrusted) as caught:
            Stage.open("policy", rank=0, ranks=1, socket=tmp_path / "control.sock")
    assert_says(caught.value, f"uid {owner}", "control.sock")


def raw_exchange(daemon: RunningDaemon, *frames: bytes) -> wire.Answer:
    """What the daemon answers to frames that no client of ours would send."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    try:
        dealer.connect(f"ipc://{daemon.socket}")
        dealer.send_multipart(frames)
        assert dealer.poll(10_000), "no answer"
        return wire.decode_answer(dealer.recv_multipart()[-1])
    finally:
        dealer.close(linger=0)


HELLO = wire.encode(wire.Hello(protocol=wire.PROTOCOL, connection=bytes(16), name="x"))
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "random bytes": bytes(range(200, 256)),
    "truncated": HELLO[:-3],
    "trailing bytes": HELLO + b"\x00",
    "not a map": msgpack.packb([1, 2, 3]),
    "unknown kind": msgpack.packb({"kind": "explode"}),
    "unknown field": msgpack.packb({"kind": "status", "extra": 1}),
    "field missing": msgpack.packb({"kind": "begin", "stage": "policy"}),
    "field of another type": msgpack.packb({"kind": "hello", "protocol": "1", "connection": bytes(16), "name": "x"}),
    "negative version": msgpack.packb({"kind": "begin", "stage": "p", "rank": 0, "version": -1, "timeout_s": 1.0}),
    "wait without end": msgpack.packb(
        {"kind": "begin", "stage": "p", "rank": 0, "version": 1, "timeout_s": float("inf")}
    ),
    "deep": b"\x91" * 5000 + b"\x00",
    "stage name that is a path": msgpack.packb({"kind": "drop", "stage": "../etc"}),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_or_truncated_message(daemon: RunningDaemon, body: bytes) -> None:
    before = daemon.picture()
    answer = raw_exchange(daemon, struct.pack("<Q", 1), body)
    assert isinstance(answer, wire.Refusal)
    assert answer.code == MessageRefused.code
    assert answer.remedy
    assert daemon.picture() == before


def test_a_message_of_too_many_frames(daemon: RunningDaemon) -> None:
    answer = raw_exchange(daemon, b"1", b"2", b"3", b"4")
    assert isinstance(answer, wire.Refusal)
    assert answer.code == MessageRefused.code


def test_an_oversized_message(daemon: RunningDaemon) -> None:
    before = daemon.picture()
    answer = raw_exchange(daemon, struct.pack("<Q", 1), bytes(wire.MAX_MESSAGE_BYTES + 1))
    assert isinstance(answer, wire.Refusal)
    assert answer.code == MessageTooLarge.code
    assert daemon.picture() == before


def test_an_oversized_message_is_refused_before_it_is_sent() -> None:
    names = tuple(
        TensorDeclaration(name="x" * 500 + str(i), dtype="bfloat16", shape=(1,), boxes=()) for i in range(130_000)
    )
    with pytest.raises(MessageTooLarge, match="exceeds the limit"):
        wire.encode(wire.Declare(stage="s", rank=0, ranks=1, options=wire.StageOptions(), tensors=names, timeout_s=1.0))


def test_a_request_without_a_hello(daemon: RunningDaemon) -> None:
    answer = raw_exchange(daemon, struct.pack("<Q", 1), wire.encode(wire.Status()))
    assert isinstance(answer, wire.Refusal)
    assert answer.code == "disconnected"


def test_a_client_of_another_protocol(daemon: RunningDaemon) -> None:
    hello = wire.Hello(protocol=wire.PROTOCOL + 1, connection=bytes(16), name="x")
    answer = raw_exchange(daemon, struct.pack("<Q", 1), wire.encode(hello))
    assert isinstance(answer, wire.Refusal)
    assert "same version" in answer.remedy


def test_requests_for_what_is_not_there(daemon: RunningDaemon) -> None:
    with Connection(daemon.socket, name="test") as connection:
        requests: list[Callable[[], object]] = [
            lambda: connection.request(wire.Drop(stage="nowhere"), wire.Done),
            lambda: connection.request(wire.Begin(stage="nowhere", rank=0, version=1, timeout_s=1.0), wire.Begun),
        ]
        for request in requests:
            with pytest.raises(UnknownStage, match="'nowhere'"):
                request()


def test_a_reader_asking_for_a_version_that_is_not_there(daemon: RunningDaemon, stage: Stage) -> None:
    with Reader.attach(stage.name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
        with pytest.raises(VersionNotAvailable) as caught:
            reader.lease(version=4)
        assert_says(caught.value, "version 4", "holds 5")
        with pytest.raises(DeadlineExceeded, match="version 6"):
            reader.lease(version=6, timeout_s=0.1)


def test_a_reader_asking_for_what_is_not_in_the_stage(daemon: RunningDaemon, stage: Stage) -> None:
    with Reader.attach(stage.name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
        with reader.lease() as lease:
            with pytest.raises(UnknownTensor):
                lease.read("c.weight")
            with pytest.raises(BoxOutside, match=r"\[8:12, 0:6\]"):
                lease.read("a.weight", Box((8, 0), (4, 6)))
        with pytest.raises(OutOfOrder, match="after its release"):
            lease.read("a.weight")


def test_somebody_else_cannot_speak_for_a_rank_or_release_a_lease(daemon: RunningDaemon, stage: Stage) -> None:
    with (
        Connection(daemon.socket, name="stranger") as stranger,
        Reader.attach(stage.name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader,
        reader.lease(),
    ):
        (lease,) = daemon.status().stages[-1].leases
        before = daemon.picture()
        for request in (
            wire.Begin(stage=stage.name, rank=0, version=9, timeout_s=1.0),
            wire.Release(stage=stage.name, lease=lease.lease, rank=0),
            wire.Abort(stage=stage.name, rank=0, version=5, reason="because"),
        ):
            with pytest.raises(OutOfOrder, match="stranger"):
                stranger.request(request, wire.Done)
        assert daemon.picture() == before

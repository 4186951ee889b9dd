# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Who may use a daemon: its own user and one Unix group, tried with a real second user. Has to be run by root."""

from __future__ import annotations

import grp
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from daemons import RunningDaemon, start

from stagingd import wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.config import Settings
from stagingd.connection import Connection
from stagingd.daemon import runtime_folder
from stagingd.segment import SHARED_MEMORY, open_existing

STRANGER = 65534
"""A user, and a group of the same number, that this process is not."""

TENSOR = TensorDeclaration(name="w", dtype="int16", shape=(8,), boxes=(Box((0,), (8,)),))

IMPORTS = """
import os, sys, zmq
from stagingd import segment, wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.connection import Connection
from stagingd.errors import StagingError
from stagingd.segment import open_existing
zmq.Context.instance()
"""

ASK = """
try:
    with Connection(sys.argv[1], name="stranger") as connection:
        print("serves", connection.request(wire.Status(), wire.StatusReport).pid)
except StagingError as error:
    print(error.code, error)
"""

TAKE_PART = """
tensor = TensorDeclaration(name="w", dtype="int16", shape=(8,), boxes=(Box((0,), (8,)),))
with Connection(sys.argv[1], name="trainer") as trainer, Connection(sys.argv[1], name="reader") as reader:
    stage = dict(stage="shared", rank=0, timeout_s=10.0)
    options = wire.StageOptions()
    declared = trainer.request(wire.Declare(ranks=1, options=options, tensors=(tensor,), **stage), wire.Declared)
    begun = trainer.request(wire.Begin(version=1, **stage), wire.Begun)
    segment.open_existing(declared.segment, writable=True).slot(begun.slot)[:16] = bytes(range(16))
    trainer.request(wire.Commit(version=1, boxes=1, **stage), wire.Sealed)
    reader.request(wire.Attach(engine="e", ranks=1, **stage), wire.Attached)
    leased = reader.request(wire.LeaseVersion(engine="e", **stage), wire.Leased)
    print(bytes(segment.open_existing(declared.segment, writable=False).slot(leased.slot)[:16]).hex(), flush=True)
"""

OPEN_SEGMENT = """
try:
    open_existing(sys.argv[1], writable=False)
    print("opened")
except StagingError as error:
    print(error.code, error)
"""


@pytest.fixture(scope="module", autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.fail("these tests act as a second user, which only root may: run them as root")


@pytest.fixture(scope="module")
def group() -> grp.struct_group:
    """A Unix group of this machine that is neither root's nor the stranger's."""
    return next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, STRANGER) and not entry.gr_mem)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder to which everybody finds the way, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="stagingd-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "run"


@pytest.fixture
def private(open_folder: Path) -> Iterator[RunningDaemon]:
    daemon = start(open_folder)
    yield daemon
    assert daemon.stop() == 0, daemon.log


@pytest.fixture
def shared(open_folder: Path, group: grp.struct_group) -> Iterator[RunningDaemon]:
    daemon = start(open_folder, "--group", group.gr_name)
    yield daemon
    assert daemon.stop() == 0, daemon.log


def as_stranger(script: str, argument: object, *, gid: int = STRANGER, extra: tuple[int, ...] = ()) -> str:
    """What a script prints that another user runs.

    It becomes that user once everything is imported: the interpreter itself may be where only root gets to.
    """
    become = f"{IMPORTS}os.setgroups({list(extra)}); os.setgid({gid}); os.setuid({STRANGER})\n"
    command = [sys.executable, "-c", become + script, str(argument)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def mode(path: Path) -> str:
    found = path.stat()
    return f"{stat.S_IMODE(found.st_mode):o} {found.st_uid}:{found.st_gid}"


def stage_by(daemon: RunningDaemon) -> str:
    """Declare a stage as this process. Returns its segment's name."""
    with Connection(daemon.socket, name="owner") as connection:
        request = wire.Declare(
            stage="owned", rank=0, ranks=1, options=wire.StageOptions(), tensors=(TENSOR,), timeout_s=10.0
        )
        return connection.request(request, wire.Declared, timeout_s=10.0).segment


def test_without_a_group_sockets_and_segments_are_one_users_alone(private: RunningDaemon) -> None:
    segment = stage_by(private)
    assert mode(private.socket) == mode(private.folder / "events.sock") == "600 0:0"
    assert mode(SHARED_MEMORY / segment.lstrip("/")) == "600 0:0"


def test_the_folder_of_the_sockets_is_made_for_those_who_may_use_them(tmp_path: Path, group: grp.struct_group) -> None:
    for name, expected in ((None, "700 0:0"), (group.gr_name, f"750 0:{group.gr_gid}")):
        with runtime_folder(Settings(runtime_dir=tmp_path / f"{name}", group=name)):
            assert mode(tmp_path / f"{name}") == expected


def test_another_user_does_not_get_to_the_socket_and_is_told_why(private: RunningDaemon) -> None:
    said = as_stranger(ASK, private.socket)
    assert said.startswith("daemon_unreachable")
    assert "Permission denied" in said


def test_another_user_cannot_open_a_segment(private: RunningDaemon) -> None:
    said = as_stranger(OPEN_SEGMENT, stage_by(private))
    assert said.startswith("segment_unreadable")
    assert "in its group" in said


def test_where_permissions_were_loosened_the_kernels_word_keeps_another_user_out(private: RunningDaemon) -> None:
    private.folder.chmod(0o755)
    private.socket.chmod(0o666)
    before = private.picture()
    said = as_stranger(ASK, private.socket)
    assert said.startswith("peer_not_admitted")
    assert f"uid {STRANGER}" in said
    assert private.picture() == before
    private.folder.chmod(0o700)


def test_a_group_shares_sockets_and_segments(shared: RunningDaemon, group: grp.struct_group) -> None:
    segment = stage_by(shared)
    assert mode(shared.socket) == mode(shared.folder / "events.sock") == f"660 0:{group.gr_gid}"
    assert mode(SHARED_MEMORY / segment.lstrip("/")) == f"660 0:{group.gr_gid}"


@pytest.mark.parametrize("how", ["primary", "supplementary"])
def test_a_user_of_the_group_stages_and_reads(shared: RunningDaemon, group: grp.struct_group, how: str) -> None:
    gid, extra = (group.gr_gid, ()) if how == "primary" else (STRANGER, (group.gr_gid,))
    assert as_stranger(TAKE_PART, shared.socket, gid=gid, extra=extra) == bytes(range(16)).hex()
    assert open_existing(f"{shared.prefix}shared", writable=False).catalog.stage == "shared"


def test_a_user_outside_the_group_is_kept_out(shared: RunningDaemon) -> None:
    segment = stage_by(shared)
    assert as_stranger(ASK, shared.socket).startswith("daemon_unreachable")
    assert as_stranger(OPEN_SEGMENT, segment).startswith("segment_unreadable")
    shared.folder.chmod(0o755)
    shared.socket.chmod(0o666)
    assert as_stranger(ASK, shared.socket).startswith("peer_not_admitted")
    shared.folder.chmod(0o750)


def test_nobody_takes_over_the_token_of_another_process(shared: RunningDaemon, group: grp.struct_group) -> None:
    with Connection(shared.socket, name="victim") as victim:
        stolen = as_stranger(
            "dealer = zmq.Context.instance().socket(zmq.DEALER)\n"
            "dealer.connect('ipc://' + sys.argv[1].split('|')[0])\n"
            "dealer.send_multipart([b'1', bytes.fromhex(sys.argv[1].split('|')[1])])\n"
            "assert dealer.poll(10_000)\n"
            "print(dealer.recv_multipart()[-1].hex())\n"
            "dealer.close(linger=0)\n",
            f"{shared.socket}|{hello(victim).hex()}",
            gid=group.gr_gid,
        )
        answer = wire.decode_answer(bytes.fromhex(stolen))
        assert isinstance(answer, wire.Refusal)
        assert answer.code == "peer_not_admitted"
        assert "with the token of victim" in answer.what
        assert victim.request(wire.Status(), wire.StatusReport).connections == 1


def hello(victim: Connection) -> bytes:
    return wire.encode(wire.Hello(protocol=wire.PROTOCOL, connection=victim._token, name="thief"))


def test_a_connection_says_hello_for_one_token_only(shared: RunningDaemon) -> None:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    try:
        dealer.connect(f"ipc://{shared.socket}")
        for token in (b"a" * 16, b"b" * 16):
            body = wire.encode(wire.Hello(protocol=wire.PROTOCOL, connection=token, name="two faces"))
            dealer.send_multipart([token, body])
        answers = []
        for _ in range(2):
            assert dealer.poll(10_000)
            answers.append(wire.decode_answer(dealer.recv_multipart()[-1]))
        assert isinstance(answers[0], wire.Welcome)
        assert isinstance(answers[1], wire.Refusal)
        assert answers[1].code == "peer_not_admitted"
    finally:
        dealer.close(linger=0)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that die, stop or hold on for too long: nobody hangs, and the front stays readable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon, start
from stagingd_client import LocalShard, Stage
from stagingd_vllm import Reader

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable, LeaseLost, PeerDied, VersionAborted
from stagingd.liveness import Process

READER = """
import sys
from stagingd_vllm import Reader
lease = Reader.attach(sys.argv[1], engine="doomed", rank=0, ranks=1, socket=sys.argv[2]).lease()
print(lease.version, flush=True)
sys.stdin.read()
"""

TRAINER = """
import sys, torch
from stagingd_client import LocalShard, Stage
stage = Stage.open(sys.argv[1], rank=1, ranks=2, socket=sys.argv[2])
stage.declare({"w": LocalShard(torch.ones(4, 4), (8, 4), (4, 0))})
stage.begin(2)
stage.put("w", LocalShard(torch.ones(4, 4), (8, 4), (4, 0)))
stage.fence()
print("filled", flush=True)
sys.stdin.read()
"""


def peer(script: str, stage: str, daemon: RunningDaemon) -> subprocess.Popen[str]:
    """A process that does as the script says, and then waits to be killed."""
    command = [sys.executable, "-c", script, stage, str(daemon.socket)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    stage.put("w", torch.full((8, 4), float(version)))
    stage.commit().wait()


def test_a_process_is_seen_to_live_and_to_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with Process(child.pid) as process:
        assert not process.ended
        child.communicate()
        assert process.ended
    with pytest.raises(PeerDied, match=str(child.pid)):
        Process(child.pid)


def test_a_killed_reader_frees_its_slot(daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, timeout_s=20) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        publish(stage, 1)
        reader = peer(READER, stage_name, daemon)
        assert said(reader) == "1"
        publish(stage, 2)
        stage.begin(3)  # has to wait for version 1, which the reader holds
        reader.kill()
        stage.put("w", torch.full((8, 4), 3.0))
        stage.commit().wait()
        reader.communicate()


def test_a_killed_trainer_aborts_its_version_and_the_front_stands(daemon: RunningDaemon, stage_name: str) -> None:
    doomed = peer(TRAINER, stage_name, daemon)
    half = {"w": LocalShard(torch.ones(4, 4), (8, 4), (0, 0))}
    with Stage.open(stage_name, rank=0, ranks=2, socket=daemon.socket, timeout_s=30) as stage:
        stage.declare(half)
        stage.begin(2)
        stage.put("w", half["w"])
        assert said(doomed) == "filled"
        publication = stage.commit()
        doomed.kill()
        with pytest.raises(VersionAborted, match="trainer rank 1") as caught:
            publication.wait()
        assert "died" in str(caught.value)
        assert [slot.state for slot in daemon.status().stages[-1].slots] == ["free", "free"]
    doomed.communicate()


def test_a_lease_that_is_held_too_long_is_taken_away_and_the_reader_learns_so(tmp_path: Path, stage_name: str) -> None:
    daemon = start(tmp_path / "run", "--lease-s", "2")
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, timeout_s=20) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        publish(stage, 1)
        with Reader.attach(stage_name, engine="slow", rank=0, ranks=1, socket=daemon.socket) as reader:
            lease = reader.lease()
            publish(stage, 2)
            publish(stage, 3)  # waits until the lease is over
            with pytest.raises(LeaseLost, match="held too long"):
                lease.read("w")
            with pytest.raises(LeaseLost, match="did not release version 1 in time"):
                lease.release()
            with reader.lease() as again:
                assert again.version == 3
    assert daemon.stop() == 0


def test_who_waits_is_told_when_the_daemon_stops(own_daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=2, socket=own_daemon.socket, timeout_s=60) as stage:
        waiting = stage._background.submit(stage.declare, {"w": torch.zeros(8, 4)})
        with Connection(own_daemon.socket, name="test") as connection:
            while not connection.request(wire.Status(), wire.StatusReport).stages:
                continue
        assert own_daemon.stop() == 0
        with pytest.raises(DaemonUnreachable, match="daemon stopped while trainer rank 0"):
            waiting.result(20)
    assert not own_daemon.segments()
    assert sorted(path.name for path in own_daemon.folder.iterdir()) == ["daemon.log", "lock"]


def test_a_daemon_starts_again_where_one_was_killed(own_daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=own_daemon.socket) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        own_daemon.process.kill()
        own_daemon.process.wait(20)
        assert own_daemon.segments()
        again = start(own_daemon.folder, prefix=own_daemon.prefix)
    # here the first connection was closed: by the new daemon, which knows nothing of it
    with Stage.open(stage_name, rank=0, ranks=1, socket=again.socket) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        publish(stage, 1)
    assert again.stop() == 0
    assert not own_daemon.segments()

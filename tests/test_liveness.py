# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Peers that die, stand still or cannot be seen: what they held is given back in time, and they learn so."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from daemons import OWN_PIDS, Puppet, RunningDaemon, eventually, need_root, serving, stop_where_it_stands
from stagingd_client import Stage
from stagingd_vllm import Reader

from stagingd import connection as connections
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import (
    DaemonUnreachable,
    DeadlineExceeded,
    LeaseLost,
    OutOfOrder,
    PeerNotVisible,
    RankTaken,
    VersionAborted,
)

CLIENTS = "import torch; from stagingd_client import LocalShard, Stage; from stagingd_vllm import Reader"
DEATHS = 5
NOTICED_S = 0.1
"""How soon a death is to be noticed."""


def weights(version: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8, 4), float(version))}


def declared(daemon: RunningDaemon, name: str) -> Stage:
    stage = Stage.open(name, rank=0, ranks=1, socket=daemon.socket, timeout_s=60.0)
    stage.declare(weights(0))
    return stage


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    for name, tensor in weights(version).items():
        stage.put(name, tensor)
    stage.commit().wait()


def leases(puppet: Puppet, daemon: RunningDaemon, stage: str, engine: str) -> None:
    """It becomes an engine of one rank, and takes a lease."""
    who = f"stage={stage!r}, engine={engine!r}, rank=0"
    puppet.do(f"reader = Connection({str(daemon.socket)!r}, name='engine {engine} rank 0')")
    puppet.do(f"reader.request(wire.Attach({who}, ranks=1, timeout_s=30.0), wire.Attached)")
    puppet.do(f"lease = reader.request(wire.LeaseVersion({who}, timeout_s=30.0), wire.Leased).lease")


def fills(puppet: Puppet, daemon: RunningDaemon, stage: str) -> None:
    """It becomes the trainer of a stage of its own, and begins a version."""
    puppet.do("from stagingd.boxes import Box; from stagingd.catalog import TensorDeclaration")
    puppet.do("tensors = (TensorDeclaration(name='w', dtype='bfloat16', shape=(8,), boxes=(Box((0,), (8,)),)),)")
    puppet.do(f"who, wait = dict(stage={stage!r}, rank=0), dict(timeout_s=30.0)")
    puppet.do(f"trainer = Connection({str(daemon.socket)!r}, name='trainer rank 0')")
    puppet.do("declare = wire.Declare(**who, **wait, ranks=1, options=wire.StageOptions(), tensors=tensors)")
    puppet.do("trainer.request(declare, wire.Declared, **wait)")
    puppet.do("trainer.request(wire.Begin(**who, **wait, version=1), wire.Begun, **wait)")


def test_what_a_dead_process_held_is_given_back_at_once(daemon: RunningDaemon, stage_name: str) -> None:
    noticed = []
    with declared(daemon, stage_name) as stage, Connection(daemon.socket, name="probe") as probe:
        publish(stage, 1)
        for death in range(DEATHS):
            with Puppet() as puppet:
                leases(puppet, daemon, stage_name, "e")
                fills(puppet, daemon, f"{stage_name}-{death}")

                def holds(own: str = f"{stage_name}-{death}") -> bool:
                    stages = {s.stage: s for s in probe.request(wire.Status(), wire.StatusReport).stages}
                    return bool(stages[stage_name].leases) or stages[own].slots[0].state == "filling"

                assert holds()
                puppet.kill()
                dead = time.monotonic()
                eventually(lambda: not holds(), "the death to be noticed")
                noticed.append(time.monotonic() - dead)
    assert statistics.median(noticed) <= NOTICED_S, noticed
    print("noticed after ms:", [round(1000 * s, 1) for s in noticed])


def test_a_reader_that_stands_still_holds_its_lease_until_its_time_is_up_and_learns_so(
    tmp_path: Path, stage_name: str
) -> None:
    with serving(tmp_path / "run", "--lease-s", "1") as daemon, Puppet(CLIENTS) as puppet:
        with declared(daemon, stage_name) as stage:
            publish(stage, 1)
            puppet.do(
                f"reader = Reader.attach({stage_name!r}, engine='e', rank=0, ranks=1, socket={str(daemon.socket)!r})"
            )
            puppet.do("lease = reader.lease()")
            leased = time.monotonic()
            stop_where_it_stands(puppet.pid)
            publish(stage, 2)
            publish(stage, 3)  # into the slot that is leased
            assert time.monotonic() >= leased + 0.5  # it has waited for most of the lease's time
            os.kill(puppet.pid, signal.SIGCONT)
            with pytest.raises(LeaseLost, match="held too long"):
                puppet.do("lease.read('w') and None")
            with pytest.raises(LeaseLost, match="did not release version 1 in time"):
                puppet.do("lease.release()")
            assert puppet.do("float(reader.lease().read('w')[0, 0])") == 3.0


def test_a_trainer_that_stands_still_is_named_to_the_others_and_learns_so(
    daemon: RunningDaemon, stage_name: str
) -> None:
    halves = "{'w': LocalShard(torch.ones(4, 4), (8, 4), (4 * rank, 0))}"
    where = f"{stage_name!r}, ranks=2, socket={str(daemon.socket)!r}"
    with Puppet(CLIENTS) as first, Puppet(CLIENTS) as second:
        for rank, puppet in enumerate((first, second)):
            puppet.do(f"rank = {rank}; halves = {halves}")
            puppet.do(f"stage = Stage.open({where}, rank=rank, timeout_s=60.0)")
            puppet.tell("stage.declare(halves) and None")
        for puppet in (first, second):
            puppet.answer()
            puppet.do("stage.begin(1); stage.put('w', halves['w']); stage.fence(); stage.timeout_s = 0.5")
        stop_where_it_stands(second.pid)
        with pytest.raises(DeadlineExceeded, match="version 1 to be committed; awaited: trainer rank 1"):
            first.do("stage.commit().wait()")
        os.kill(second.pid, signal.SIGCONT)
        with pytest.raises(VersionAborted, match="awaited: trainer rank 1"):
            second.do("stage.commit().wait()")
        for puppet in (first, second):
            puppet.do("stage.timeout_s = 60.0; stage.begin(2); stage.put('w', halves['w']); last = stage.commit()")
        for puppet in (first, second):
            puppet.do("last.wait()")


def test_a_daemon_that_stands_still_is_reported_in_time_and_served_by_again(
    own_daemon: RunningDaemon, stage_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ANSWER_S", 1.0)
    with declared(own_daemon, stage_name) as stage, Connection(own_daemon.socket, name="test") as other:
        publish(stage, 1)
        stop_where_it_stands(own_daemon.pid)
        asked = time.monotonic()
        with pytest.raises(DaemonUnreachable, match="has not answered status within"):
            other.request(wire.Status(), wire.StatusReport)
        with pytest.raises(DaemonUnreachable, match="has not answered hello within"):
            Connection(own_daemon.socket, name="late")
        assert time.monotonic() - asked < 15  # two of them, of a second each
        stage.timeout_s = 0.1
        with pytest.raises(DaemonUnreachable, match="has not answered begin within"):
            publish(stage, 2)
        os.kill(own_daemon.pid, signal.SIGCONT)
        assert other.request(wire.Status(), wire.StatusReport).stages
        stage.timeout_s = 60.0
        for version in (3, 4):
            publish(stage, version)


# Clients in pid namespaces that the daemon does not see: here it is the daemon that has one of its own.


@pytest.fixture
def blind(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon that does not see its clients' processes, and probes their connections instead."""
    need_root()
    options = ("--heartbeat-s", "0.5", "--return-s", "60")
    with serving(tmp_path / "run", *options, wrapper=OWN_PIDS) as daemon:
        yield daemon


def test_a_client_that_cannot_be_seen_is_told_what_to_do(tmp_path: Path) -> None:
    need_root()
    with serving(tmp_path / "run", wrapper=OWN_PIDS) as daemon:
        with pytest.raises(PeerNotVisible, match=r"does not see.*STAGINGD_HEARTBEAT_S") as caught:
            Connection(daemon.socket, name="engine e rank 0")
        assert "engine e rank 0" in str(caught.value)


def test_clients_that_cannot_be_seen_publish_and_read(blind: RunningDaemon, stage_name: str) -> None:
    with declared(blind, stage_name) as stage:
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=blind.socket) as reader:
            for version in (1, 2, 3):
                publish(stage, version)
                with reader.lease() as lease:
                    assert torch.equal(lease.read("w"), weights(version)["w"].bfloat16())


def test_what_a_dead_process_held_that_cannot_be_seen_is_given_back(blind: RunningDaemon, stage_name: str) -> None:
    with declared(blind, stage_name) as stage, Puppet() as puppet:
        publish(stage, 1)
        leases(puppet, blind, stage_name, "e")
        fills(puppet, blind, f"{stage_name}-own")
        puppet.kill()
        eventually(lambda: not blind.stage(stage_name).leases, "the lease to be ended")
        eventually(lambda: blind.stage(f"{stage_name}-own").aborted_versions == 1, "the version to be aborted")
        for version in (2, 3):
            publish(stage, version)


def test_a_reader_that_stands_still_and_cannot_be_seen_loses_its_lease_and_learns_so(
    blind: RunningDaemon, stage_name: str
) -> None:
    with Puppet(CLIENTS) as puppet, declared(blind, stage_name) as stage:
        publish(stage, 1)
        puppet.do(f"reader = Reader.attach({stage_name!r}, engine='e', rank=0, ranks=1, socket={str(blind.socket)!r})")
        puppet.do("lease = reader.lease()")
        stop_where_it_stands(puppet.pid)
        publish(stage, 2)
        publish(stage, 3)  # into the slot that was leased: long before the lease's own time of 60 s
        os.kill(puppet.pid, signal.SIGCONT)
        with pytest.raises(LeaseLost, match="lost its connection"):
            puppet.do("lease.release()")


def test_a_trainer_that_stands_still_and_cannot_be_seen_loses_its_version_and_learns_so(
    blind: RunningDaemon, stage_name: str
) -> None:
    with Puppet() as puppet:
        fills(puppet, blind, stage_name)
        stop_where_it_stands(puppet.pid)
        eventually(lambda: blind.stage(stage_name).aborted_versions == 1, "the version to be aborted")
        os.kill(puppet.pid, signal.SIGCONT)
        with pytest.raises(OutOfOrder, match="without having declared it"):
            puppet.do("trainer.request(wire.Commit(**who, **wait, version=1, boxes=1), wire.Sealed, **wait)")


def test_clients_that_cannot_be_seen_go_on_after_a_restart(tmp_path: Path, stage_name: str) -> None:
    need_root()
    options = ("--heartbeat-s", "0.5", "--return-s", "60")
    with serving(tmp_path / "run", *options, wrapper=OWN_PIDS) as daemon, declared(daemon, stage_name) as stage:
        publish(stage, 1)
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            lease = reader.lease()
            stage.begin(2)
            stage.put("w", weights(2)["w"])
            stage.fence()
            daemon.restart()
            stage.commit().wait()
            assert torch.equal(lease.read("w"), weights(1)["w"].bfloat16())
            lease.release()
            with reader.lease() as newest:
                assert newest.version == 2


def test_a_client_that_cannot_be_seen_and_does_not_come_back_after_a_restart_is_given_up(
    tmp_path: Path, stage_name: str
) -> None:
    need_root()
    options = ("--heartbeat-s", "0.5", "--return-s", "1", "--lease-s", "2")  # the lease was promised, so it stands
    with serving(tmp_path / "run", *options, wrapper=OWN_PIDS) as daemon, Puppet() as puppet:
        fills(puppet, daemon, stage_name)
        puppet.do("trainer.request(wire.Commit(**who, **wait, version=1, boxes=1), wire.Sealed, **wait)")
        leases(puppet, daemon, stage_name, "e")
        daemon.kill()
        puppet.kill()
        daemon.restart()
        eventually(lambda: not daemon.stage(stage_name).leases, "the dead reader to be given up")
        eventually(lambda: not daemon.stage(stage_name).trainers, "the dead trainer to be given up")
        assert [slot.version for slot in daemon.stage(stage_name).slots] == [1, None]


def test_a_client_in_a_nested_pid_namespace_is_seen_to_die(daemon: RunningDaemon, stage_name: str) -> None:
    need_root()
    with declared(daemon, stage_name) as stage, Puppet(wrapper=OWN_PIDS) as puppet:
        publish(stage, 1)
        leases(puppet, daemon, stage_name, "e")
        assert puppet.do("os.getpid()") == 1
        with pytest.raises(RankTaken, match=rf"held by engine e rank 0 \(pid {puppet.pid}\)"):
            Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket)
        puppet.kill()
        eventually(lambda: not daemon.stage(stage_name).leases, "its death to be noticed")
        for version in (2, 3):
            publish(stage, version)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What all scenarios begin and end with: a stage whose version 1 is the front, and nothing that is left."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from stagingd_client import Stage
from stagingd_vllm import Reader

from crashes import actors, model
from crashes.processes import Actor, check_lets_go
from crashes.waiting import until
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable

TIMEOUT_S: Final = 20.0


def observer(socket: Path) -> Connection:
    """A connection, as soon as a daemon serves."""
    made: list[Connection] = []

    def serves() -> bool:
        try:
            made.append(Connection(socket, name="observer"))
        except DaemonUnreachable:
            return False
        return True

    until(serves, f"a daemon to serve at {socket}")
    return made[0]


def open_stage(name: str, socket: Path, rank: int, ranks: int = 2) -> Stage:
    """A trainer rank in this process."""
    return Stage.open(name, rank=rank, ranks=ranks, socket=socket, timeout_s=TIMEOUT_S)


def attach(name: str, socket: Path, engine: str = "engine", rank: int = 0, ranks: int = 1) -> Reader:
    """An engine's rank in this process."""
    return Reader.attach(name, engine=engine, rank=rank, ranks=ranks, socket=socket, timeout_s=TIMEOUT_S)


def declare(*stages: Stage) -> None:
    """All ranks declare, each in a thread of its own, as they would in processes of their own."""
    with ThreadPoolExecutor(len(stages)) as ranks:
        for made in [ranks.submit(s.declare, model.shards(0, s.rank, s.ranks)) for s in stages]:
            made.result()


def newest_read(name: str, socket: Path) -> int:
    """A fresh engine reads the newest version and finds the bytes that were committed. Returns the version."""
    with attach(name, socket, engine="witness") as witness:
        with witness.lease(timeout_s=TIMEOUT_S) as lease:
            return model.check(lease)


@contextmanager
def founded(name: str, socket: Path) -> Iterator[tuple[Stage, Stage]]:
    """Both trainer ranks; version 1 is committed, and was read."""
    with open_stage(name, socket, 0) as zero, open_stage(name, socket, 1) as one:
        declare(zero, one)
        model.publish(1, zero, one)
        assert newest_read(name, socket) == 1
        yield zero, one


def status(socket: Path) -> wire.StatusReport:
    """What a daemon holds."""
    with Connection(socket, name="test") as connection:
        return connection.request(wire.Status(), wire.StatusReport)


def state_of(version: int, name: str, socket: Path) -> str:
    """The state of the slot that holds a version."""
    slots = [slot for stage in status(socket).stages if stage.stage == name for slot in stage.slots]
    return next(slot.state for slot in slots if slot.version == version)


def committed(name: str, socket: Path, rank: int) -> bool:
    """Whether a rank has committed a version that is not sealed yet."""
    slots = [slot for stage in status(socket).stages if stage.stage == name for slot in stage.slots]
    return any(slot.state == "filling" and rank in slot.committed_ranks for slot in slots)


def warm_up(socket: Path) -> None:
    """Make here and in the daemon what is made once and stays: threads, ZeroMQ's context, the fork server."""
    with founded("warm-up", socket) as (zero, one):
        one.close()
        with closing(Actor(actors.new_trainer, "warm-up", str(socket), "2")) as other:
            model.publish(2, zero)
            other.ended()
    check_deserted(socket)


def check_deserted(socket: Path) -> None:
    """Assert that the daemon knows of nobody any more and holds nothing for anybody; its stages are dropped."""
    until(lambda: status(socket).connections == 1, f"the clients to be forgotten by {status(socket)}")
    with Connection(socket, name="test") as connection:
        report = connection.request(wire.Status(), wire.StatusReport)
        for stage in report.stages:
            held = (stage.trainers, stage.engines, stage.leases, stage.waiting)
            assert not any(held)
            assert {slot.state for slot in stage.slots} <= {"free", "sealed", "front"}
            connection.request(wire.Drop(stage=stage.stage), wire.Done)
    check_lets_go(report.pid)

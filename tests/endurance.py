# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Endurance: many versions through one stage while processes are killed at random, and what it costs the daemon.

Two trainer ranks and an engine of two ranks run as processes of their own. For every version each trainer rank
is told to publish it and each reader rank to read; meanwhile, now and then, one of them or the daemon is killed
and replaced. Whatever happens, the newest sealed version is there afterwards, byte for byte.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch
from daemons import DEADLINE_S, start
from stagingd_client import LocalShard, Stage
from stagingd_vllm import Reader

from stagingd.errors import StagingError
from stagingd.segment import SHARED_MEMORY

RANKS = 2
SHAPES = {"embed.weight": (64, 32), "mlp.weight": (32, 48)}
STAGE = "endurance"
RETURN_S = "20"
"""Clients wait so long for a daemon that was killed: its successor is a process that has to start."""


def values(version: int, name: str) -> torch.Tensor:
    """A tensor of a version: anybody can make it, so anybody can check it."""
    generator = torch.Generator().manual_seed(version * 1000 + len(name))
    return torch.randn(SHAPES[name], generator=generator).bfloat16()


def trainer(pipe: Pipe, socket: Path, rank: int) -> None:
    """Publishes every version that it is told, and says how it went."""
    torch.set_num_threads(1)
    rows = {name: shape[0] // RANKS for name, shape in SHAPES.items()}

    def shard(version: int, name: str) -> LocalShard:
        part = values(version, name)[rank * rows[name] : (rank + 1) * rows[name]]
        return LocalShard(part, SHAPES[name], (rank * rows[name], 0))

    with Stage.open(STAGE, rank=rank, ranks=RANKS, socket=socket, timeout_s=DEADLINE_S) as stage:
        stage.declare({name: shard(0, name) for name in SHAPES})
        pipe.send(("ready", stage.newest_sealed or 0))
        while (version := pipe.recv()) is not None:
            try:
                stage.begin(version)
                for name in SHAPES:
                    stage.put(name, shard(version, name))
                stage.commit().wait()
            except StagingError as error:
                stage.abort()
                pipe.send((error.code, version))
            else:
                pipe.send(("sealed", version))


def reader(pipe: Pipe, socket: Path, rank: int) -> None:
    """Reads the newest version whenever it is told, and says which it was, or that bytes were wrong."""
    torch.set_num_threads(1)
    with Reader.attach(STAGE, engine="engine", rank=rank, ranks=RANKS, socket=socket) as attached:
        pipe.send(("ready", 0))
        while pipe.recv() is not None:
            try:
                with attached.lease(timeout_s=DEADLINE_S) as lease:
                    whole = all(torch.equal(lease.read(name), values(lease.version, name)) for name in SHAPES)
                pipe.send(("read" if whole else "torn", lease.version))
            except StagingError as error:
                pipe.send((error.code, 0))


@dataclass
class Actor:
    """A process that does as it is told."""

    role: str
    rank: int
    process: BaseProcess
    pipe: Pipe
    busy: bool = False

    def tell(self, what: object) -> None:
        self.pipe.send(what)
        self.busy = True

    def outcome(self) -> tuple[str, int]:
        """What it says of the last thing that it was told; ("died", 0) when it cannot."""
        self.busy = False
        if not self.pipe.poll(2 * DEADLINE_S):
            raise AssertionError(f"{self.role} rank {self.rank} hangs")
        try:
            said: tuple[str, int] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return "died", 0
        return said


@dataclass(frozen=True)
class Usage:
    """What the daemon takes at rest: bytes of its own memory and of /dev/shm, descriptors and threads."""

    private_bytes: int
    shared_bytes: int
    descriptors: int
    threads: int


@dataclass
class Outcome:
    """What became of all versions, who was killed how often, and the daemon's usage after every version."""

    versions: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    usage: list[Usage] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """One run; use ``Run.go``."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.newest = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "stagingd_client", "stagingd_vllm", "endurance"])
        self.daemon = start(folder, "--return-s", RETURN_S)
        self.actors = [self._new("trainer", rank) for rank in range(RANKS)]
        self._await_ready(self.actors)
        self.actors += [self._new("reader", rank) for rank in range(RANKS)]
        self._await_ready(self.actors[RANKS:])

    def _new(self, role: str, rank: int) -> Actor:
        here, there = self._context.Pipe()
        target = trainer if role == "trainer" else reader
        process = self._context.Process(target=target, args=(there, self.daemon.socket, rank))
        process.start()
        there.close()
        return Actor(role, rank, process, here)

    def _await_ready(self, actors: list[Actor]) -> None:
        for actor in actors:
            said, newest = actor.outcome()
            assert said == "ready", f"{actor.role} rank {actor.rank}: {said}"
            assert newest in (0, self.newest), f"version {self.newest} is lost: the stage has {newest}"

    def go(self, versions: int, kill_every: int) -> Outcome:
        """Publish so many versions; a process is killed in one of ``kill_every``, on average."""
        started = time.monotonic()
        for version in range(1, versions + 1):
            doomed = self.random.randrange(kill_every) == 0
            self._publish(version, doomed=doomed)
            if version % 10 == 0:
                self.outcome.usage.append(self._usage())
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _publish(self, version: int, *, doomed: bool) -> None:
        for actor in self.actors:
            if actor.role == "trainer" or self.newest:
                actor.tell(version)
        if doomed:
            time.sleep(self.random.uniform(0, 0.01))  # anywhere in the exchange
            self._kill(self.random.choice(["trainer", "reader", "daemon"]))
        sealed = self.newest
        for actor in [actor for actor in self.actors if actor.busy]:
            said, which = actor.outcome()
            (self.outcome.versions if actor.role == "trainer" else self.outcome.reads)[said] += 1
            sealed = max(sealed, which) if said == "sealed" else sealed
            assert said != "torn", f"{actor.role} rank {actor.rank} read a mixture as version {which}"
            assert said != "read" or which >= self.newest, f"version {self.newest} is lost: {which} was read"
        self.newest = sealed
        self._replace_the_dead()

    def _kill(self, role: str) -> None:
        self.outcome.kills[role] += 1
        if role == "daemon":
            self.daemon.process.kill()
            self.daemon.process.wait(DEADLINE_S)
            self.daemon = start(self.daemon.folder, "--return-s", RETURN_S, prefix=self.daemon.prefix)
            return
        victim = self.random.choice([actor for actor in self.actors if actor.role == role])
        assert victim.process.pid is not None
        os.kill(victim.process.pid, signal.SIGKILL)
        victim.process.join(DEADLINE_S)

    def _replace_the_dead(self) -> None:
        fresh = []
        for at, actor in enumerate(self.actors):
            if not actor.process.is_alive():
                actor.process.close()
                actor.pipe.close()
                self.actors[at] = self._new(actor.role, actor.rank)
                fresh.append(self.actors[at])
        self._await_ready(fresh)

    def _usage(self) -> Usage:
        process = psutil.Process(self.daemon.process.pid)
        prefix = self.daemon.prefix.lstrip("/")
        shared = sum(path.stat().st_blocks * 512 for path in SHARED_MEMORY.iterdir() if path.name.startswith(prefix))
        return Usage(process.memory_full_info().uss, shared, process.num_fds(), process.num_threads())

    def close(self) -> None:
        """End everybody in good order. Raises AssertionError when somebody does not end."""
        for actor in self.actors:
            actor.pipe.send(None)
        for actor in self.actors:
            actor.process.join(DEADLINE_S)
            assert actor.process.exitcode == 0, f"{actor.role} rank {actor.rank} ends with {actor.process.exitcode}"
        assert self.daemon.stop() == 0, self.daemon.log


@contextmanager
def running(folder: Path, seed: int) -> Iterator[Run]:
    """A run that leaves nothing behind, however it ends."""
    run = Run(folder, seed)
    try:
        yield run
    finally:
        for actor in run.actors:
            if actor.process.is_alive():
                actor.process.kill()
        run.daemon.process.kill()
        run.daemon.process.wait(DEADLINE_S)
        for name in run.daemon.segments():
            (SHARED_MEMORY / name).unlink()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots of stages as large as a test wants them, and a server that shows them without a daemon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from stagingd import wire
from stagingd.health import Health, LayerError
from stagingd.history import History
from stagingd.layers import Layers
from stagingd.moments import Moments
from stagingd.web.board import Board
from stagingd.web.server import Server
from stagingd.web.snapshot import Snapshot, StageSnapshot

STEP_S = 2.0


@dataclass
class ShownStage:
    """A stage to which versions can be added: filled by every trainer rank, and made live by every rank of an engine.

    The amax of its last layer is 1 in all versions but those that are added as ``wild``, which have NaN there too.
    """

    name: str
    layers: tuple[str, ...]
    trainers: int = 2
    engine: str = "rollout"
    readers: int = 2
    began_s: float = field(default_factory=lambda: time.monotonic() - 3600)
    newest: int = 0

    def __post_init__(self) -> None:
        self.history = History(self.trainers)
        self.health = Health()

    def add(self, *, wild: bool = False, aborted: str = "", told: bool = True) -> None:
        """One more version."""
        self.newest += 1
        version, now = self.newest, self.began_s + self.newest * STEP_S
        for rank in range(self.trainers):
            self.history.begun(version, version, rank, now)
        if aborted:
            self.history.aborted(version, aborted, now + 0.5)
            return
        for rank in range(self.trainers):
            self.history.committed(version, rank, 1 << 30, now + 0.5)
        self.history.sealed(version, now + 0.501)
        for rank in range(self.readers):
            self.history.leased(version, self.engine, rank, now + 0.6)
            self.history.released(self.engine, rank, now + 1.2)
            self.history.reported(version, "swap", self.engine, rank, end_s=now + 1.3, seconds=0.004, size=1 << 29)
        self._examine(version, wild=wild, told=told)

    def _examine(self, version: int, *, wild: bool, told: bool) -> None:
        count = len(self.layers)
        amax, nonfinite = np.ones(count, np.float32), np.zeros(count, np.int64)
        if wild:
            amax[-1], nonfinite[-1] = 64.0, 3
        spread = np.full(count, 0.02)
        elements = np.full(count, 1000)
        self.health.sealed(version, version)
        self.health.examined(version, version, Moments(elements, spread / 9, 1000 * spread**2, amax, nonfinite))
        if told:
            layers = Layers(self.layers, {})
            errors = [
                LayerError(layer=name, values=1000, clipped=0, flushed=at % 5, squared_error=0.7, squared_values=1000.0)
                for at, name in enumerate(self.layers)
            ]
            self.health.reported(layers, version, self.engine, 0, errors)

    def snapshot(self) -> StageSnapshot:
        """As it is now."""
        ranks = tuple(range(self.trainers))
        slots = (
            wire.SlotStatus(
                state="front", version=self.newest, begun_ranks=ranks, measured_ranks=(), committed_ranks=ranks
            ),
            wire.SlotStatus(state="free", version=None, begun_ranks=(), measured_ranks=(), committed_ranks=()),
        )
        waiting = wire.WaitingStatus(
            who=f"engine {self.engine} rank 0 (pid 7)",
            what=f"a version newer than {self.newest}",
            peers=(f"{self.trainers} trainer ranks, none of which has begun",),
            waited_s=1.5,
        )
        status = wire.StageStatus(
            stage=self.name,
            policy="latest",
            trainers=ranks,
            ranks=self.trainers,
            engines=(self.engine,),
            tensors=len(self.layers),
            segment=f"/stagingd-0-{self.name}",
            segment_bytes=1 << 34,
            slots=slots,
            leases=(),
            waiting=(waiting,),
            sealed_versions=self.newest,
            aborted_versions=0,
            begins_kept_waiting=0,
        )
        totals = self.history.totals.so_far()
        return StageSnapshot(status, self.history.versions(64), totals, 0, self.layers, self.health.versions)


@contextmanager
def shown(*stages: ShownStage, pid: int = 4711, port: int = 0) -> Iterator[Server]:
    """Serve them as they are whenever somebody asks, at a port that is free by default."""

    def take() -> Snapshot:
        snapshots = {stage.name: stage.snapshot() for stage in stages}
        report = wire.StatusReport(
            pid=pid,
            uptime_s=3600.0,
            connections=5,
            refused_messages=0,
            stages=tuple(one.status for one in snapshots.values()),
        )
        return Snapshot(time.monotonic(), time.time() - time.monotonic(), report, snapshots)

    board: Board = Board(lambda: board.put(take()))
    server = Server("127.0.0.1", port, board)
    try:
        yield server
    finally:
        server.close()

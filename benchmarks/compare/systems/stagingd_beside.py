# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""stagingd: shards are flushed to shared memory, prefetched by the workers beside generation, and swapped in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagingd_client import Stage
from stagingd_client.publication import Publication
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower

from benchmarks.compare.case import Case
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.trainer import Rank, UsualSender
from benchmarks.engine import refuse_inexact
from benchmarks.host_case import BenchmarkFailed
from benchmarks.staged import TRAINER_S, served
from stagingd import wire
from stagingd.connection import Connection

STAGE = "policy"


class Flush(UsualSender):
    """Puts a rank's shards, which the workers read as they land."""

    def __init__(self, rank: Rank, stage: Stage) -> None:
        self._rank, self._stage = rank, stage
        self._publication: Publication | None = None

    def send(self, version: int) -> None:
        """As ``Stage.publish``, which takes modules."""
        self._stage.begin(version)
        for name, shard in self._rank.held.items():
            self._stage.put(name, shard)
        self._publication = self._stage.commit()

    def settle(self) -> None:
        """Until the version is sealed."""
        self._stage.fence()
        if self._publication is not None:
            self._publication.wait()


@contextmanager
def flush(rank: Rank) -> Iterator[Flush]:
    """Declare a rank's shards."""
    socket, ranks = rank.post.arguments["socket"], rank.case.layout.trainers
    with Stage.open(STAGE, rank=rank.post.rank, ranks=ranks, socket=socket, timeout_s=TRAINER_S) as stage:
        stage.declare(rank.held)
        yield Flush(rank, stage)


@dataclass
class Followed(UsualRunning):
    """An engine that follows the stage."""

    llm: Any
    follower: Follower
    socket: Path
    case: Case

    async def deliver(self) -> float:
        """Publish, and wait until the engine computes with it."""
        waiting = asyncio.create_task(self.follower.reached(self.fleet.newest))
        try:
            blocked = await self.fleet.send()
            await waiting
        finally:
            waiting.cancel()
        return blocked

    async def check(self) -> None:
        """Bytes and scales, exactly."""
        refuse_inexact(STAGE, checked(await self.llm.collective_rpc("stagingd_check")))

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """A version out of the trainers, or what its workers read of it meanwhile, whichever takes longer."""
        if ceilings.into_engine is None:
            return None
        read = checked(await self.llm.collective_rpc("compare_read_bytes"))
        out, back = self.case.bytes / ceilings.from_trainers, sum(r["bytes"] for r in read) / ceilings.into_engine
        return Wire(max(out, back), "the longer of its bytes out and in, by the plain copies of the same run")

    async def host_bytes(self) -> int:
        """The stage's segment, by the daemon's word."""
        return await asyncio.to_thread(self._segment_bytes)

    def _segment_bytes(self) -> int:
        with Connection(self.socket, name="benchmarks.compare") as connection:
            report = connection.request(wire.Status(), wire.StatusReport)
        return next(stage.segment_bytes for stage in report.stages if stage.stage == STAGE)


@dataclass(frozen=True)
class StagingdBeside(Usual):
    """Prefetched beside a generating engine, and swapped in."""

    name: str = "stagingd"
    setting: str = "bf16 stage, prefetched as it lands beside generation, swapped in between two steps"
    has_engine: bool = True

    def traffic(self, case: Case) -> Traffic:
        """Out once, and in again by slices."""
        return Traffic(pcie=case.bytes + case.read_bytes, nvlink=0)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """A daemon, trainers, and a follower."""
        with contextlib.ExitStack() as daemon:
            socket = daemon.enter_context(served()).socket
            async with fleet(stand.case, flush, {"socket": socket}) as trainers:
                await trainers.ready()
                following = Follower(stand.llm, STAGE, socket=socket, prefetch_gib=stand.prefetch_gib, cache=Cache.KEEP)
                async with following as follower:
                    if follower.mode != "prefetch":
                        raise BenchmarkFailed("versions are read in place", remedy="raise --prefetch-gib")
                    yield Followed(trainers, stand.llm, follower, socket, stand.case)

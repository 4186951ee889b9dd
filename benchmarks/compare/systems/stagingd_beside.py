# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""stagingd: shards are flushed to shared memory, prefetched by the workers beside generation, and swapped in.

Trainers put bf16, of which every engine makes what it likes, or quantize as the engine would and put half of the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stagingd_client import Stage
from stagingd_client.publication import Publication
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower
from torch import nn

from benchmarks.compare.case import Case
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.trainer import Rank, UsualSender
from benchmarks.engine import refuse_inexact
from benchmarks.host_case import ITEM_BYTES, BenchmarkFailed
from benchmarks.scale_groups import quantization
from benchmarks.staged import TRAINER_S, served
from stagingd import wire
from stagingd.connection import Connection
from stagingd.formats import Quantization, StageFormat


class Flush(UsualSender):
    """Publishes a rank's shards, which the workers read as they land."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        self._stage, self._module = stage, module
        self._publication: Publication | None = None

    def send(self, version: int) -> None:
        """Returns once the shards are known, and a thread does the rest."""
        self._publication = self._stage.publish(version, self._module)

    def settle(self) -> None:
        """Until the version is sealed."""
        self._stage.fence()
        if self._publication is not None:
            self._publication.wait()


@contextmanager
def flush(rank: Rank) -> Iterator[Flush]:
    """Declare a rank's shards."""
    told, ranks, module = rank.post.arguments, rank.case.layout.trainers, rank.module()
    options = {"socket": told["socket"], "quantization": told["quantization"], "timeout_s": TRAINER_S}
    with Stage.open(rank.case.model, rank=rank.post.rank, ranks=ranks, **options) as stage:
        stage.declare(module)
        yield Flush(stage, module)


@dataclass
class Followed(UsualRunning):
    """An engine that follows the stage."""

    llm: Any
    follower: Follower
    socket: Path
    stage: str
    staged_bytes: int

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
        refuse_inexact(self.stage, checked(await self.llm.collective_rpc("stagingd_check")))

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """A version out of the trainers, or what its workers read of it meanwhile, whichever takes longer."""
        if ceilings.into_engine is None:
            return None
        read = checked(await self.llm.collective_rpc("compare_read_bytes"))
        out, back = self.staged_bytes / ceilings.from_trainers, sum(r["bytes"] for r in read) / ceilings.into_engine
        return Wire(max(out, back), "the longer of its bytes out and in, by the plain copies of the same run")

    async def host_bytes(self) -> int:
        """The stage's segment, by the daemon's word."""
        return await asyncio.to_thread(self._segment_bytes)

    def _segment_bytes(self) -> int:
        with Connection(self.socket, name="benchmarks.compare") as connection:
            report = connection.request(wire.Status(), wire.StatusReport)
        return next(stage.segment_bytes for stage in report.stages if stage.stage == self.stage)


@dataclass(frozen=True)
class StagingdBeside(Usual):
    """Prefetched beside a generating engine, and swapped in.

    ``quantized`` where trainers make what the engine's mode says.
    """

    name: str
    setting: str
    quantized: bool
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """Where trainers quantize, with a mode that stages have a format for."""
        if self.quantized and case.mode not in {one.value for one in StageFormat}:
            return f"trainers do not quantize for {case.mode}"
        return None

    def traffic(self, case: Case) -> Traffic:
        """Out once, and in again by slices."""
        sizes = staged_bytes(case, self._quantization(case))
        return Traffic(pcie=sum(size * (1 + case.readers(case.shapes[n])) for n, size in sizes.items()), nvlink=0)

    def _quantization(self, case: Case) -> Quantization | None:
        made = StageFormat(case.mode) if self.quantized else None
        return quantization(made, case.shapes, "cuda" if torch.cuda.is_available() else "cpu")

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """A daemon, trainers, and a follower."""
        made = self._quantization(stand.case)
        size = sum(staged_bytes(stand.case, made).values())
        with contextlib.ExitStack() as daemon:
            socket = daemon.enter_context(served()).socket
            async with fleet(stand.case, flush, {"socket": socket, "quantization": made}) as trainers:
                await trainers.ready()
                gib, name = stand.prefetch_gib, stand.case.model
                async with Follower(stand.llm, name, socket=socket, prefetch_gib=gib, cache=Cache.KEEP) as follower:
                    if follower.mode != "prefetch":
                        raise BenchmarkFailed("versions are read in place", remedy="raise --prefetch-gib")
                    yield Followed(trainers, stand.llm, follower, socket, name, size)


def staged_bytes(case: Case, made: Quantization | None) -> dict[str, int]:
    """Bytes of each tensor in a stage, without the moments that scales are made of."""
    halves = set() if made is None else {name for group in made.groups for name in group}
    return {n: math.prod(shape) * (1 if n in halves else ITEM_BYTES) for n, shape in case.shapes.items()}

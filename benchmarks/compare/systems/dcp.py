# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""torch's distributed checkpoint: asynchronous staging into page-locked memory, of the trainers' side alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from benchmarks.compare.case import Case
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.trainer import Rank, UsualSender

STAGED_S = 240.0
"""The longest that staging may take, in seconds."""
MASTER_BYTES = 4
"""Of a float32."""


class Staging(UsualSender):
    """Stages what a rank holds, in the precision that it holds it in, as a checkpoint has it.

    Args:
        rank: the rank.
        anew: whether every version takes a new stager, and memory that is page-locked anew.
    """

    def __init__(self, rank: Rank, *, anew: bool) -> None:
        self._rank, self._anew = rank, anew
        self._stager = stager(rank)
        self._staging: Future[Any] | None = None
        self._bytes = 0

    def send(self, version: int) -> None:
        """Returns as soon as staging has begun: an optimizer step has to wait for it, and other computing has not."""
        staging = self._stager.stage(dict(self._rank.sharded()))
        if isinstance(staging, Future):
            self._staging = staging

    def settle(self) -> None:
        """Until all is in host memory."""
        if self._staging is None:
            return
        staged, self._staging = self._staging.result(STAGED_S), None
        self._bytes = sum(_local(tensor).nbytes for tensor in staged.values())
        if self._anew:
            del staged  # its memory is given back here, and not while the next version is sent
            self._stager.close()
            self._stager = stager(self._rank)

    def host_bytes(self) -> int:
        """What is staged."""
        return self._bytes

    def close(self) -> None:
        """Give the memory back."""
        self._stager.close()


def stager(rank: Rank) -> DefaultStager:
    """As TorchTitan makes it, with page-locked memory; without a GPU there is none."""
    cuda = rank.device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=cuda, use_async_staging=True, use_non_blocking_copy=cuda
        )
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def stage(rank: Rank) -> Iterator[Staging]:
    """A rank's stager."""
    staging = Staging(rank, anew=staged_once(torch.__version__))
    try:
        yield staging
    finally:
        staging.close()


def staged_once(version: str) -> bool:
    """Whether this torch's stager fails when it stages a second time: 2.11's does."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) <= (2, 11)


@dataclass
class Checkpointed(UsualRunning):
    """Trainers without an engine."""

    case: Case

    async def deliver(self) -> float:
        """To host memory."""
        blocked = await self.fleet.send()
        await self.fleet.settled()
        return blocked

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """Out of the trainers."""
        return Wire(staged_bytes(self.case) / ceilings.from_trainers, "its bytes out, by plain copies of the same run")


@dataclass(frozen=True)
class Dcp(Usual):
    """Only what holds the trainers: loading from a checkpoint is another matter."""

    name: str = "dcp"
    setting: str = "trainers alone: DefaultStager with page-locked shared memory, asynchronous, of what ranks hold"
    has_engine: bool = False

    def engine(self, case: Case) -> Mapping[str, Any]:
        """There is none."""
        return {}

    def traffic(self, case: Case) -> Traffic:
        """Out once."""
        return Traffic(pcie=staged_bytes(case), nvlink=0)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """Trainers alone."""
        async with fleet(stand.case, stage) as trainers:
            await trainers.ready()
            yield Checkpointed(trainers, stand.case)


def staged_bytes(case: Case) -> int:
    """A checkpoint has master weights: float32 where FSDP keeps them, bf16 of a trainer that is alone."""
    return case.bytes if case.layout.trainers == 1 else case.bytes * MASTER_BYTES // 2

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The floor: every trainer rank saves its part of the whole tensors to shared memory, and the engine loads them.

By ``torch.save`` to a file in /dev/shm, and vLLM's own layerwise reload from it. The engine stands while it loads, and
not while the trainers save.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stagingd_vllm.answers import checked

from benchmarks.compare.case import Case
from benchmarks.compare.engines import standing
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.trainer import Rank, UsualSender
from benchmarks.read import NOT_RELOADED


class Save(UsualSender):
    """Saves a part of a version, so that all ranks write at once."""

    def __init__(self, rank: Rank, path: Path) -> None:
        self._rank, self._path = rank, path

    def send(self, version: int) -> None:
        """Gather, copy to the host, and write."""
        torch.save({name: tensor.cpu() for name, tensor in self._rank.whole_part()}, self._path)
        self._rank.barrier()

    def host_bytes(self) -> int:
        """The file, which stands until the next one."""
        return self._path.stat().st_size if self._path.exists() else 0


@contextmanager
def save(rank: Rank) -> Iterator[Save]:
    """Save where the engine is told."""
    yield Save(rank, Path(rank.post.arguments["paths"][rank.post.rank]))


@dataclass
class Saved(UsualRunning):
    """Trainers that save, and an engine that loads."""

    llm: Any
    paths: list[str]
    case: Case

    async def deliver(self) -> float:
        """Save, and then have the engine load."""
        blocked = await self.fleet.send()
        async with standing(self.llm):
            checked(await self.llm.collective_rpc("compare_load", args=(self.paths,)))
        return blocked

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """Out of the trainers, and whole into each rank of the engine."""
        if ceilings.into_engine is None:
            return None
        whole = self.case.bytes * self.case.layout.tensor_parallel
        seconds = self.case.bytes / ceilings.from_trainers + whole / ceilings.into_engine
        return Wire(seconds, "its bytes out and in again, by the plain copies of the same run")


@dataclass(frozen=True)
class TorchSave(Usual):
    """``torch.save`` and layerwise reload."""

    name: str = "torch-save"
    setting: str = "all trainer ranks save at once, the engine maps the files and stands only while it loads"
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """Wherever vLLM's layerwise reload works."""
        return not_reloaded(case)

    def traffic(self, case: Case) -> Traffic:
        """Gathered, out once, and whole into each rank."""
        ranks = case.layout.tensor_parallel
        return Traffic(pcie=case.bytes * (1 + ranks), nvlink=gathered(case))

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """Trainers alone: the engine needs nothing."""
        paths = [str(stand.shared / f"weights-{rank}.pt") for rank in range(stand.case.layout.trainers)]
        async with fleet(stand.case, save, {"paths": paths}) as trainers:
            await trainers.ready()
            yield Saved(trainers, stand.llm, paths, stand.case)


def gathered(case: Case) -> int:
    """Bytes between trainers that gather all tensors: each gets what it has not."""
    return case.bytes * (case.layout.trainers - 1)


def not_reloaded(case: Case) -> str | None:
    """Why vLLM's layerwise reload does not take weights of this kind, or None if it does."""
    return f"vLLM's layerwise reload fails: {NOT_RELOADED[case.mode]}" if case.mode in NOT_RELOADED else None

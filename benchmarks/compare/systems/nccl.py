# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight transfer over NCCL, packed, and tensor by tensor as in the classic example of RLHF.

Trainers gather each tensor, the first of them broadcasts it whole to every worker, and the workers load it by layerwise
reload. Written against vLLM 0.26, whose trainer's side is static methods of the engine's class.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from stagingd_vllm.answers import checked

from benchmarks.compare.broadcast import broadcasts
from benchmarks.compare.case import Case
from benchmarks.compare.engines import standing, within
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.systems.torch_save import gathered, not_reloaded
from benchmarks.compare.trainer import Rank, UsualSender
from benchmarks.host_case import ITEM_BYTES
from benchmarks.nccl import BACKEND, LOCAL, UPDATE_S, free_port, join

TIMES = 3
PACK_BYTES = 2**30
"""vLLM's default: one pack is sent while the next is filled."""


class Broadcast(UsualSender):
    """Gathers and sends, on the first rank; gathers on the others."""

    def __init__(self, rank: Rank, group: Any) -> None:
        self._rank, self._group = rank, group
        self._packed = bool(rank.post.arguments["packed"])

    def send(self, version: int) -> None:
        """Returns once the weights may change: all has been sent, and gathered."""
        if self._group is None:
            for _ in self._rank.whole():
                pass
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # noqa: PLC0415

            options = {"group": self._group, "packed": self._packed}
            NCCLWeightTransferEngine.trainer_send_weights(self._rank.whole(), options)
        self._rank.synchronize()

    def wire(self) -> float | None:
        """Of the first rank."""
        if self._group is None:
            return None
        sizes = broadcast_sizes(self._rank.case, packed=self._packed)
        buffer = torch.randint(0, 255, (max(sizes),), dtype=torch.uint8, device=self._rank.device)
        return statistics.median(broadcasts(self._group, buffer, sizes, TIMES))


@contextmanager
def broadcast(rank: Rank) -> Iterator[Broadcast]:
    """Have the first rank join the engine's workers; it waits for them."""
    group = None
    if rank.post.rank == 0:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # noqa: PLC0415 - seconds

        world = rank.case.layout.tensor_parallel + 1
        place = {"master_address": LOCAL, "master_port": rank.post.arguments["port"], "world_size": world}
        group = NCCLWeightTransferEngine.trainer_init(place)
    yield Broadcast(rank, group)


def broadcast_sizes(case: Case, *, packed: bool) -> list[int]:
    """Bytes of each broadcast of an update."""
    if not packed:
        return [ITEM_BYTES * math.prod(shape) for shape in case.shapes.values()]
    full, rest = divmod(case.bytes, PACK_BYTES)
    return [PACK_BYTES] * full + ([rest] if rest else [])


@dataclass
class Received(UsualRunning):
    """Trainers that send to the workers."""

    llm: Any
    case: Case
    packed: bool

    async def deliver(self) -> float:
        """Trainers begin to gather while the engine is brought to a stand; whichever fails ends both."""
        sending, receiving = asyncio.create_task(self.fleet.send()), asyncio.create_task(self._receive())
        try:
            blocked, _ = await asyncio.gather(sending, receiving)
        finally:
            sending.cancel()
            receiving.cancel()
        return blocked

    async def _receive(self) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # noqa: PLC0415 - takes seconds

        shapes = self.case.shapes
        what = {
            "names": list(shapes),
            "dtype_names": ["bfloat16"] * len(shapes),
            "shapes": [list(shape) for shape in shapes.values()],
            "packed": self.packed,
        }
        async with standing(self.llm), within(UPDATE_S, "an update over NCCL"):
            await self.llm.start_weight_update()
            await self.llm.update_weights(WeightTransferUpdateRequest(update_info=what))
            await self.llm.finish_weight_update()

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """As many bytes in as many broadcasts, from memory that is there to memory that is there."""
        sizes = broadcast_sizes(self.case, packed=self.packed)
        asking = self.llm.collective_rpc("compare_broadcast", args=(sizes, TIMES))
        async with within(UPDATE_S, "as many broadcasts over NCCL"):
            sent, answers = await asyncio.gather(self.fleet.wire(), asking)
        received = max(answer["seconds"] for answer in checked(answers))
        return Wire(max(received, sent or 0.0), "measured: the same broadcasts, of nothing gathered, and not loaded")


@dataclass(frozen=True)
class Nccl(Usual):
    """vLLM's backend "nccl"."""

    name: str
    setting: str
    packed: bool
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """Between GPUs."""
        if not torch.cuda.is_available():
            return "NCCL takes GPUs"
        if case.layout.shared:
            return "NCCL has no two ranks on one GPU"
        return not_reloaded(case) or not_026()

    def engine(self, case: Case) -> Mapping[str, Any]:
        """The backend."""
        return BACKEND

    def traffic(self, case: Case) -> Traffic:
        """Gathered, and whole to every rank."""
        return Traffic(pcie=0, nvlink=gathered(case) + case.bytes * case.layout.tensor_parallel)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """Both sides join at once: each waits for the other."""
        port = free_port()
        async with fleet(stand.case, broadcast, {"port": port, "packed": self.packed}) as trainers:
            async with within(UPDATE_S, "joining over NCCL"):
                await asyncio.gather(trainers.ready(), join(stand.llm, port, stand.case.layout.tensor_parallel))
            yield Received(trainers, stand.llm, stand.case, self.packed)


def not_026() -> str | None:
    """Why vLLM's trainer side cannot be called as it is here, or None if it can."""
    from vllm import __version__  # noqa: PLC0415 - takes seconds
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # noqa: PLC0415

    if hasattr(NCCLWeightTransferEngine, "trainer_send_weights"):
        return None
    return f"the trainer's side of vLLM {__version__} is another than that of 0.26, which is called here"

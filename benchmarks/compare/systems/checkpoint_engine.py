# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""checkpoint-engine 0.4: its servers pin weights in host memory, and broadcast them to buffers beside the workers.

A server runs in each trainer rank, with buffers on the GPU of the worker of the same rank: so trainers copy straight
into page-locked memory that is used again for every version, without files. The worker loads buckets by vLLM's
layerwise reload, which checkpoint-engine's own extension does not do: engines that quantize could not take them else.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from stagingd_vllm.answers import checked

from benchmarks.compare.case import Case
from benchmarks.compare.engines import standing
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.systems.torch_save import gathered, not_reloaded
from benchmarks.compare.trainer import Rank, UsualSender, parts
from benchmarks.host_case import ITEM_BYTES
from benchmarks.nccl import LOCAL, free_port

NAME = "policy"
BUCKET = "PS_MAX_BUCKET_SIZE_GB"
BUCKET_GIB = "2"
"""Of 8 by default: an 8B model of two ranks would be one bucket each, and nothing would overlap."""


@dataclass(frozen=True)
class Handles:
    """Where each device's server sends buckets."""

    by_device: dict[str, str]


class Serve(UsualSender):
    """A trainer rank with a server."""

    def __init__(self, rank: Rank, server: Any) -> None:
        self._rank, self._server = rank, server

    def send(self, version: int) -> None:
        """Returns once this rank's part of the whole tensors is in page-locked memory; a thread could do the rest."""
        mine = dict(self._rank.whole_part())
        self._rank.synchronize()
        self._server.register_checkpoint(NAME, named_tensors=mine, use_shared_memory_pool=True)

    def settle(self) -> None:
        """Bring them to the engine, and let go of the name: the memory stays."""
        with torch.cuda.device(self._rank.post.rank):
            self._server.gather_metas(NAME)
            self._server.update(NAME, self._request)
        self._server.unregister_checkpoint(NAME)

    def _request(self, sockets: list[tuple[str, str]]) -> None:
        """Called by each server, in a thread; the engine is asked once."""
        if self._rank.post.rank == 0:
            self._rank.ask(Handles(dict(sockets)))

    def host_bytes(self) -> int:
        """This rank's part of a version in bf16."""
        case = self._rank.case
        return ITEM_BYTES * sum(math.prod(case.shapes[name]) for name in parts(case)[self._rank.post.rank])


@contextmanager
def serve(rank: Rank) -> Iterator[Serve]:
    """Start a rank's server.

    It uses the trainers' own group where they have one: there is but one in a process. A group of its own stays, too,
    where it would by default be made anew for every version.
    """
    ranks = rank.case.layout.trainers
    os.environ |= {"RANK": str(rank.post.rank), "WORLD_SIZE": str(ranks)}  # rank 0 is not taken as an argument
    from checkpoint_engine import ps  # noqa: PLC0415 - only where it is installed

    ps.get_ip = lambda: LOCAL  # on a host without a route it finds no address of its own
    place = {"master_addr": LOCAL, "master_port": rank.post.arguments["port"]}
    server = ps.ParameterServer(rank=rank.post.rank, world_size=ranks, auto_pg=False, **place)
    if ranks == 1:
        server.init_process_group()
    torch.cuda.set_device(rank.device)  # the server has chosen the worker's
    try:
        yield Serve(rank, server)
    finally:
        if ranks == 1:
            dist.destroy_process_group()


@dataclass
class Served(UsualRunning):
    """Trainers with servers, and workers that load what they send."""

    case: Case

    async def deliver(self) -> float:
        """The engine stands from the servers' request until it has all."""
        blocked = await self.fleet.send()
        await self.fleet.settled()
        return blocked

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """Out of the trainers, and in again once; broadcasts are left out."""
        if ceilings.into_engine is None:
            return None
        seconds = self.case.bytes / ceilings.from_trainers + self.case.bytes / ceilings.into_engine
        return Wire(seconds, "its bytes out and in again, by the plain copies of the same run; broadcasts left out")


@dataclass(frozen=True)
class CheckpointEngine(Usual):
    """Broadcast, from servers in the trainers."""

    name: str = "checkpoint-engine"
    setting: str = (
        f"a server in each trainer, page-locked memory used again, buckets of {BUCKET_GIB} GiB, layerwise reload; "
        "trainers count as free once it has the weights"
    )
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """On GPUs, where there is a trainer for each worker."""
        if not torch.cuda.is_available():
            return "checkpoint-engine takes GPUs"
        if case.layout.trainers != case.layout.tensor_parallel:
            return "its servers are in the trainers here, one for each rank of the engine"
        try:
            metadata.version("checkpoint-engine")
        except metadata.PackageNotFoundError as error:
            return f"checkpoint-engine is not installed: {error}"
        return not_reloaded(case)

    def environment(self) -> Mapping[str, str]:
        """The size of buckets, unless it is set."""
        return {BUCKET: os.environ.get(BUCKET, BUCKET_GIB)}

    def traffic(self, case: Case) -> Traffic:
        """Gathered, out and in once, and from each server to the others."""
        others = case.bytes * (case.layout.tensor_parallel - 1)
        return Traffic(pcie=2 * case.bytes, nvlink=gathered(case) + others)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """The engine is asked when the servers are ready."""

        async def take(handles: Handles) -> None:
            async with standing(stand.llm):
                checked(await stand.llm.collective_rpc("compare_take_buckets", args=(handles.by_device,)))

        async with fleet(stand.case, serve, {"port": free_port()}, take) as trainers:
            await trainers.ready()
            checked(await stand.llm.collective_rpc("compare_import_buckets"))
            yield Served(trainers, stand.case)

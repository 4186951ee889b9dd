# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight transfer by CUDA IPC, where trainer and engine share a GPU.

The trainer exports its tensors, or packs of them, and the worker loads them by layerwise reload. vLLM unpickles the
handles that it is sent, and does so only where ``VLLM_ALLOW_INSECURE_SERIALIZATION`` is set. Written against vLLM 0.26.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.compare.case import Case
from benchmarks.compare.engines import standing, within
from benchmarks.compare.fleet import fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire
from benchmarks.compare.no_ray import without_ray
from benchmarks.compare.system import Running, Stand, Usual, UsualRunning
from benchmarks.compare.systems.nccl import not_026
from benchmarks.compare.systems.torch_save import not_reloaded
from benchmarks.compare.trainer import Rank, UsualSender
from benchmarks.host_case import BenchmarkFailed
from benchmarks.nccl import UPDATE_S

ERRED_S = 0.05
"""How often an engine that is loading is asked whether it has died, in seconds: what it was asked is never answered."""


@dataclass(frozen=True)
class Part:
    """What vLLM's ``update_weights`` is to be called with."""

    update_info: dict[str, Any]


class Export(UsualSender):
    """Sends handles of the rank's tensors."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def send(self, version: int) -> None:
        """Returns once the worker has loaded all: until then it reads the trainer's memory."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine  # noqa: PLC0415 - seconds

        self._rank.synchronize()
        options = {"send_mode": self.post, "packed": self._rank.post.arguments["packed"]}
        IPCWeightTransferEngine.trainer_send_weights(self._rank.whole(), options)
        self._rank.synchronize()

    def post(self, info: Any) -> None:
        """As vLLM's own transport by HTTP packs it."""
        fields = {name: getattr(info, name) for name in ("names", "dtype_names", "shapes", "packed", "tensor_sizes")}
        handles = base64.b64encode(pickle.dumps(info.ipc_handles)).decode()
        told = {name: value for name, value in fields.items() if value is not None}
        self._rank.ask(Part(told | {"ipc_handles_pickled": handles}))

    def wire(self) -> float | None:
        """A copy of as many bytes inside the device."""
        tensors = [shard.tensor for shard in self._rank.held.values()]
        target = torch.empty(max(t.numel() for t in tensors), dtype=tensors[0].dtype, device=self._rank.device)

        def copy() -> None:
            for tensor in tensors:
                target[: tensor.numel()].copy_(tensor.view(-1))

        self._rank.timed(copy)
        return self._rank.timed(copy)


@contextmanager
def export(rank: Rank) -> Iterator[Export]:
    """Nothing to join."""
    without_ray()
    from vllm.distributed.weight_transfer import ipc_engine  # noqa: F401, PLC0415 - seconds, before anything is timed

    yield Export(rank)


@dataclass
class Imported(UsualRunning):
    """A trainer whose memory the worker reads."""

    llm: Any

    async def deliver(self) -> float:
        """The engine stands while the trainer sends."""
        async with standing(self.llm):
            await self.llm.start_weight_update()
            blocked = await self.fleet.send()
            if self.llm.errored:
                raise BenchmarkFailed("the engine has ended", remedy="its own words are above")
            await self.llm.finish_weight_update()
        return blocked

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """Inside the device."""
        seconds = await self.fleet.wire()
        return None if seconds is None else Wire(seconds, "measured: a copy of all tensors inside the device")


async def loaded(llm: Any, part: Part) -> None:
    """Returns once the engine has loaded a part, or has died: so a server answers, and then the trainer is free."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # noqa: PLC0415 - takes seconds

    call = asyncio.create_task(llm.update_weights(WeightTransferUpdateRequest(update_info=part.update_info)))
    try:
        async with within(UPDATE_S, "a part by CUDA IPC"):
            while not call.done() and not llm.errored:
                await asyncio.wait([call], timeout=ERRED_S)
        if call.done():
            call.result()
    finally:
        call.cancel()


@dataclass(frozen=True)
class CudaIpc(Usual):
    """vLLM's backend "ipc"."""

    name: str
    setting: str
    packed: bool
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """On one GPU."""
        if not torch.cuda.is_available():
            return "CUDA IPC takes a GPU"
        if not case.layout.shared:
            return "vLLM's IPC backend takes a trainer on each GPU of the engine"
        return not_reloaded(case) or not_026()

    def engine(self, case: Case) -> Mapping[str, Any]:
        """The backend, which imports Ray."""
        return {
            "weight_transfer_config": {"backend": "ipc"},
            "worker_extension_cls": "benchmarks.compare.ipc_worker.IpcExtension",
        }

    def environment(self) -> Mapping[str, str]:
        """It refuses handles else."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def traffic(self, case: Case) -> Traffic:
        """Inside the device."""
        return Traffic(pcie=0, nvlink=0)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """The engine is asked for each part, in the trainer's place."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest  # noqa: PLC0415 - takes seconds

        async def update(part: Part) -> None:
            await loaded(stand.llm, part)

        async with fleet(stand.case, export, {"packed": self.packed}, update) as trainers:
            await trainers.ready()
            async with within(UPDATE_S, "joining by CUDA IPC"):
                await stand.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            yield Imported(trainers, stand.llm)

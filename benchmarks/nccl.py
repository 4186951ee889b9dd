# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight transfer over NCCL, packed, into an engine that stands: what updates beside it are compared with.

The trainer has whole bf16 tensors on a GPU of its own, so that it has nothing to gather: what is measured is the
transfer, and what the engine does with it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import time
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from benchmarks.host import ENDING_S, end
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES

LOCAL: Final = "127.0.0.1"
UPDATE_S: Final = 120.0
"""The longest that joining or one update may take, in seconds."""
UPDATES: Final = 6
"""The first takes longer and does not count."""
BACKEND: Final = {"weight_transfer_config": {"backend": "nccl"}}
"""Arguments of the engine."""


def has_trainer(ranks: int) -> bool:
    """Whether there is a GPU for the trainer beside an engine's."""
    return torch.cuda.is_available() and torch.cuda.device_count() > ranks


async def nccl_seconds(model: str, ranks: int, llm: Any) -> float:
    """Median seconds that an engine stands for one update.

    Args:
        model: a key of ``SIZES``.
        ranks: the engine's, on the first GPUs; the trainer takes the last one.
        llm: an ``AsyncLLM`` that was started with ``BACKEND``.

    Raises:
        BenchmarkFailed: joining, or an update, did not end.
    """
    port, (ours, theirs) = free_port(), multiprocessing.Pipe()
    trainer = multiprocessing.get_context("spawn").Process(target=send, args=(model, port, ranks, theirs))
    trainer.start()
    theirs.close()
    try:
        async with asyncio.timeout(UPDATE_S):
            await join(llm, port, ranks)
        seconds = []
        for _ in range(UPDATES):
            async with asyncio.timeout(UPDATE_S):
                seconds.append(await _update(model, llm, ours))
        return statistics.median(seconds[1:])
    except (TimeoutError, EOFError, ConnectionError) as error:
        raise BenchmarkFailed(
            f"{model}, TP {ranks}: NCCL took longer than {UPDATE_S:g} s, or its trainer ended",
            remedy="the trainer's own words are above",
        ) from error
    finally:
        ours.close()
        trainer.join(ENDING_S)
        end(trainer)


def send(model: str, port: int, ranks: int, orders: Connection) -> None:
    """The trainer: sends all tensors once for each order, until the orders end."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine  # noqa: PLC0415 - takes seconds

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    tensors = list(SIZES[model].tensors(1, str(device)))
    place = {"master_address": LOCAL, "master_port": port, "world_size": ranks + 1}
    group = NCCLWeightTransferEngine.trainer_init(place)
    with orders, suppress(EOFError):  # whoever measures has ended
        while True:
            orders.recv()
            NCCLWeightTransferEngine.trainer_send_weights(iter(tensors), {"group": group, "packed": True})
            torch.cuda.synchronize()
            orders.send(None)


async def join(llm: Any, port: int, ranks: int) -> None:
    """Have the engine's workers join the trainer's group, in which the trainer is the first rank."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest  # noqa: PLC0415 - takes seconds

    place = {"master_address": LOCAL, "master_port": port, "rank_offset": 1, "world_size": ranks + 1}
    await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=place))


async def _update(model: str, llm: Any, trainer: Connection) -> float:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest  # noqa: PLC0415 - takes seconds

    shapes = SIZES[model].shapes()
    what = {
        "names": list(shapes),
        "dtype_names": ["bfloat16"] * len(shapes),
        "shapes": [list(shape) for shape in shapes.values()],
        "packed": True,
    }
    begin = time.perf_counter()
    trainer.send(None)
    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info=what))
    await llm.finish_weight_update()
    seconds = time.perf_counter() - begin
    await asyncio.to_thread(trainer.recv)
    return seconds


def free_port() -> int:
    """One that nobody listens at now."""
    with closing(socket.socket()) as found:
        found.bind((LOCAL, 0))
        return int(found.getsockname()[1])

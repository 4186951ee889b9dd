# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own transfer over NCCL, packed or tensor by tensor: what a user writes, for vLLM 0.26."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


def whole(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gathers; every rank has to go through."""
    for name, parameter in model.named_parameters():
        tensor = parameter.to(torch.bfloat16)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join(address: str, port: int, workers: int) -> Any:
    """In the first trainer rank, while the engine joins."""
    place = {"master_address": address, "master_port": port, "world_size": workers + 1}
    return NCCLWeightTransferEngine.trainer_init(place)


def trainer(model: torch.nn.Module, rank: int, group: Any, packed: bool) -> None:
    """In every rank, after a step, once the engine is told."""
    if rank == 0:
        NCCLWeightTransferEngine.trainer_send_weights(whole(model), {"group": group, "packed": packed})
    else:
        for _ in whole(model):
            pass
    torch.cuda.synchronize()


async def start(folder: str, address: str, port: int, workers: int) -> Any:
    """In the engine's process, once."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(folder, weight_transfer_config={"backend": "nccl"}))
    place = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": workers + 1}
    await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=place))
    return llm


async def engine(llm: Any, shapes: dict[str, tuple[int, ...]], packed: bool) -> None:
    """In the engine's process, for every update, while the trainers send."""
    names, dtypes = list(shapes), ["bfloat16"] * len(shapes)
    told = {"names": names, "dtype_names": dtypes, "shapes": [list(s) for s in shapes.values()], "packed": packed}
    await llm.pause_generation(mode="keep", clear_cache=False)
    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info=told))
    await llm.finish_weight_update()
    await llm.resume_generation()

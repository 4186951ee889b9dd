# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` to shared memory and vLLM's layerwise reload: what a user writes."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

PATH = "/dev/shm/policy-{rank}.pt"  # noqa: S108 - shared memory is what it is for


def trainer(model: torch.nn.Module, rank: int, ranks: int) -> None:
    """In every rank, after a step; a barrier follows."""
    mine, count = {}, len(list(model.parameters()))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = parameter.to(torch.bfloat16)
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if number * ranks // count == rank:
            mine[name] = tensor.cpu()
    torch.save(mine, PATH.format(rank=rank))


class Worker:
    """In each worker: ``worker_extension_cls``."""

    def take(self: Any, ranks: int) -> None:
        """Load them."""
        model = self.get_model()
        with set_current_vllm_config(self.vllm_config), self.device:
            initialize_layerwise_reload(model)
            for rank in range(ranks):
                saved = torch.load(PATH.format(rank=rank), mmap=True, weights_only=True)
                model.load_weights((name, tensor.to(self.device)) for name, tensor in saved.items())
            finalize_layerwise_reload(model, self.vllm_config.model_config)


async def engine(llm: Any, ranks: int) -> None:
    """In the engine's process, for every update."""
    await llm.pause_generation(mode="keep", clear_cache=False)
    await llm.collective_rpc("take", args=(ranks,))
    await llm.resume_generation()

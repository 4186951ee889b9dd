# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""checkpoint-engine 0.4: what a user writes, with an engine that quantizes, behind HTTP."""

from __future__ import annotations

from typing import Any

import requests
import torch
import zmq
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc
from torch.distributed.tensor import DTensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

# The engine: VLLM_SERVER_DEV_MODE=1 vllm serve ./model --worker-extension-cls MODULE.Worker


class Worker:
    """In each worker: checkpoint-engine's own extension has no layerwise reload."""

    def take(self: Any, handles: dict[str, str]) -> None:
        """Load what the server on this worker's GPU sends."""
        model, device = self.get_model(), self.device
        with set_current_vllm_config(self.vllm_config), device, zmq.Context() as context:
            initialize_layerwise_reload(model)
            update_weights_from_ipc(
                context,
                handles[current_platform.get_device_uuid(device.index)],
                device_id=device.index,
                run=lambda weights: model.load_weights((name, tensor.clone()) for name, tensor in weights),
            )
            finalize_layerwise_reload(model, self.vllm_config.model_config)


def trainer(model: torch.nn.Module, server: ParameterServer, rank: int, ranks: int, url: str) -> None:
    """In every rank, after a step."""
    mine, count = {}, len(list(model.parameters()))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = parameter.to(torch.bfloat16)
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if number * ranks // count == rank:
            mine[name] = tensor
    server.register_checkpoint("policy", named_tensors=mine, use_shared_memory_pool=True)
    server.gather_metas("policy")

    def request(sockets: list[tuple[str, str]]) -> None:
        if rank == 0:
            body = {"method": "take", "args": [dict(sockets)]}
            requests.post(f"{url}/collective_rpc", json=body, timeout=600).raise_for_status()

    server.update("policy", request)
    server.unregister_checkpoint("policy")


def start(ranks: int) -> ParameterServer:
    """Once in every rank; RANK, WORLD_SIZE and MASTER_ADDR are set."""
    return ParameterServer(auto_pg=ranks == 1)

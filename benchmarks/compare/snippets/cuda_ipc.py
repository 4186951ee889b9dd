# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own transfer by CUDA IPC, packed or all at once: what a user writes, for vLLM 0.26, the engine behind HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import requests
import torch
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

# The engine: VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_INSECURE_SERIALIZATION=1 vllm serve ./model
#     --weight-transfer-config '{"backend": "ipc"}'


def whole(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gathers; every rank has to go through."""
    for name, parameter in model.named_parameters():
        tensor = parameter.to(torch.bfloat16)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainer(model: torch.nn.Module, url: str, packed: bool) -> None:
    """In the trainer, after a step, on the engine's GPU."""
    for call in ("pause?mode=keep&clear_cache=false", "start_weight_update"):
        requests.post(f"{url}/{call}", timeout=60).raise_for_status()
    options = {"send_mode": "http", "url": url, "packed": packed}
    IPCWeightTransferEngine.trainer_send_weights(whole(model), options)
    for call in ("finish_weight_update", "resume"):
        requests.post(f"{url}/{call}", timeout=60).raise_for_status()


def start(url: str) -> None:
    """Once."""
    requests.post(f"{url}/init_weight_transfer_engine", json={"init_info": {}}, timeout=60).raise_for_status()

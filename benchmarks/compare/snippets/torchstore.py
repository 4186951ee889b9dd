# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchStore: what a user writes, with trainers and workers that are Monarch's actors."""

from __future__ import annotations

from typing import Any

import torch
import torchstore
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


async def start() -> None:
    """Once."""
    await torchstore.initialize()


async def trainer(model: torch.nn.Module) -> None:
    """In every rank, after a step."""
    await torchstore.put_state_dict(model.state_dict(), "policy")


async def worker(self: Any) -> None:
    """In every worker, while its engine generates nothing."""
    weights = await torchstore.get_state_dict("policy")
    model = self.get_model()
    with set_current_vllm_config(self.vllm_config), self.device:
        initialize_layerwise_reload(model)
        model.load_weights((name, tensor.to(self.device)) for name, tensor in weights.items())
        finalize_layerwise_reload(model, self.vllm_config.model_config)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""stagingd: what a user writes, beside ``stagingd serve``.

Where trainers quantize, ``python -m stagingd_vllm.plan_command --quantization-file`` has written what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stagingd_client import Stage
from stagingd_vllm.follower import Follower


def trainer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, train: Any, quantization: Path | None
) -> None:
    """In every rank; ``quantization`` is that file, where trainers quantize."""
    with Stage.open("policy", quantization=quantization) as stage:
        stage.fence_before(optimizer)
        for step in range(1, steps + 1):
            train(model)
            stage.publish(step, model)


async def engine(folder: str, generate: Any) -> None:
    """In the engine's process."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    extension = "stagingd_vllm.extension.StagingdWorkerExtension"
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(folder, worker_extension_cls=extension))
    async with Follower(llm, "policy", prefetch_gib=10):
        await generate(llm)

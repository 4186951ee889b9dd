# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""torch's distributed checkpoint: what a user writes, in the trainer alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager


def trainer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, backward: Any) -> None:
    """In every rank."""
    stager, staging = DefaultStager(), None
    for _ in range(steps):
        backward(model)
        if staging is not None:
            staging.result()
        optimizer.step()
        staging = stager.stage(model.state_dict())
    stager.close()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How versions cross to a device while its engine generates: by the copy engine, at the pace of the engine's steps."""

from __future__ import annotations

import logging
from functools import partial

import torch

from stagingd_vllm.copy_engine import CopyEngine, Mark, Paced
from stagingd_vllm.pace import Pace, Steps
from stagingd_vllm.step_hooks import watch

logger = logging.getLogger(__name__)


def paced(
    copies: CopyEngine | None, runner: object | None, model: torch.nn.Module, device: torch.device
) -> Paced | None:
    """A device's copy engine, at the pace of a runner's steps.

    Args:
        copies: the copy engine, if there is one.
        runner: vLLM's model runner; None where it is not known.
        model: the runner's.
        device: the model's.

    Returns:
        It, at that pace. None where there is none; and, with a line in the log, where steps cannot be told: there a
        kernel reads the slot.
    """
    if copies is None:
        return None
    from stagingd_vllm.cuda_copies import mark_current

    steps: Steps[Mark] = Steps(partial(mark_current, device))
    unwatch = None if runner is None else watch(runner, model, steps.began)
    if unwatch is None:
        logger.warning(
            "the steps of this engine's runner (%s) cannot be told: versions are prefetched by a kernel, which takes "
            "multiprocessors from large batches meanwhile; use the worker extension with vLLM 0.26 to 0.33",
            type(runner).__name__ if runner else "not given",
        )
        return None
    return Paced(copies, Pace(steps), unwatch)

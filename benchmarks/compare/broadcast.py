# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The wire of vLLM's NCCL transfers alone: broadcasts from the trainer to all workers, which load nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


def broadcasts(group: Any, buffer: torch.Tensor, sizes: Sequence[int], times: int) -> list[float]:
    """Seconds of all these broadcasts, so many times; trainer and workers call it with the same sizes.

    Args:
        group: vLLM's communicator, whose first rank is the trainer's.
        buffer: bytes on the rank's device, as many as the largest broadcast has.
        sizes: bytes of each broadcast.
        times: how often; the first time, which does not count, whoever comes first waits for the others.
    """
    seconds = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begin = time.monotonic()
        for size in sizes:
            group.broadcast(buffer[:size], src=0, stream=torch.cuda.current_stream())
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - begin)
    return seconds[1:]

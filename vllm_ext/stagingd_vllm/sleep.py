# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM's sleep mode has taken the weights' memory away."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Protocol

from stagingd.errors import OutOfOrder


class Allocation(Protocol):
    """The part of an allocation of vLLM's sleep mode that tells whether it has memory."""

    tag: str
    is_asleep: bool


class Allocator(Protocol):
    """The part of vLLM's sleep-mode allocators, in 0.26 as in 0.32, that tells what it holds."""

    pointer_to_data: Mapping[int, Allocation]


def weights_asleep(allocators: Iterable[Allocator]) -> bool:
    """Whether any of the weights has no memory."""
    return any(
        allocation.is_asleep and allocation.tag == "weights"
        for allocator in allocators
        for allocation in allocator.pointer_to_data.values()
    )


def refuse_asleep(asleep: bool) -> None:
    """Raises OutOfOrder for an engine whose weights are asleep: writing to them would end the process."""
    if asleep:
        raise OutOfOrder("the engine sleeps, and its weights have no memory", remedy="wake up its weights first")


def allocators() -> list[Allocator]:
    """Those of this process. Without sleep mode nobody has imported them, and they need not load everywhere."""
    modules = (("vllm.device_allocator.cumem", "CuMemAllocator"), ("vllm.device_allocator.xpumem", "XpuMemAllocator"))
    classes = [getattr(sys.modules[module], name) for module, name in modules if module in sys.modules]
    return [allocator.instance for allocator in classes if allocator.instance is not None]

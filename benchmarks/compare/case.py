# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is compared: a model, who trains it, and the engine; and which layouts a host has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.host_case import ITEM_BYTES, BenchmarkFailed
from benchmarks.read_model import SIZES


@dataclass(frozen=True)
class Layout:
    """Who stands on which GPUs.

    Attributes:
        name: as the command knows it.
        trainers: ranks; of several, each holds rows of every tensor in float32, as FSDP cuts them. One alone holds
            whole tensors in bf16.
        tensor_parallel: ranks of the engine.
        shared: whether the trainer is on the engine's GPU.
    """

    name: str
    trainers: int
    tensor_parallel: int
    shared: bool = False

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.tensor_parallel if self.shared else self.trainers + self.tensor_parallel


LAYOUTS: Final = {
    layout.name: layout
    for layout in (
        Layout("one", 1, 1, shared=True),
        Layout("two", 1, 1),
        Layout("four", 2, 2),
        Layout("eight", 4, 4),
    )
}


def fitting(gpus: int) -> list[Layout]:
    """The layouts that so many GPUs have room for, the smallest first.

    On a host without any, one trainer and one engine stand beside each other in host memory.
    """
    if gpus == 0:
        return [LAYOUTS["two"]]
    return [layout for layout in LAYOUTS.values() if layout.gpus <= gpus]


def layout_named(name: str, gpus: int) -> Layout:
    """The layout of this name.

    Raises:
        BenchmarkFailed: there is none, or it takes more GPUs than there are.
    """
    if name not in LAYOUTS:
        raise BenchmarkFailed(f"there is no layout {name!r}", remedy=f"use one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if gpus and layout not in fitting(gpus):
        fit = ", ".join(one.name for one in fitting(gpus))
        raise BenchmarkFailed(f"the layout {name!r} takes {layout.gpus} GPUs, of {gpus}", remedy=f"use one of {fit}")
    return layout


@dataclass(frozen=True)
class Case:
    """What all systems have in common.

    Attributes:
        model: a key of ``SIZES``.
        layout: who stands where.
        mode: vLLM's quantization, or "bfloat16".
    """

    model: str
    layout: Layout
    mode: str

    def __post_init__(self) -> None:
        """Raises BenchmarkFailed: there is no such model."""
        if self.model not in SIZES:
            raise BenchmarkFailed(f"there is no model {self.model!r}", remedy=f"use one of {', '.join(SIZES)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the checkpoint's tensors, by name."""
        return SIZES[self.model].shapes()

    @property
    def bytes(self) -> int:
        """One version in bf16."""
        return ITEM_BYTES * sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def read_bytes(self) -> int:
        """What all ranks of an engine need of it: slices of matrices, and vectors on every rank."""
        return ITEM_BYTES * sum(math.prod(shape) * self.readers(shape) for shape in self.shapes.values())

    def readers(self, shape: Sequence[int]) -> int:
        """How often an engine's ranks read a tensor of this shape, taken together."""
        return 1 if len(shape) > 1 else self.layout.tensor_parallel

    @property
    def label(self) -> str:
        """For reports and tables."""
        return f"{self.model}, {self.mode}, {self.where}"

    @property
    def where(self) -> str:
        """The layout in words."""
        trainers = "1 trainer" if self.layout.trainers == 1 else f"{self.layout.trainers} trainers (FSDP rows)"
        return f"{trainers}, TP {self.layout.tensor_parallel}{' on one GPU' if self.layout.shared else ''}"

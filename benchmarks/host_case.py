# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A case of ``benchmarks.host``: which tensors, how many ranks, and the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from stagingd.boxes import Box, Shape
from stagingd.errors import StagingError
from stagingd.moments import ALL_GRIDS, Grid

DEADLINE_S = 300.0
"""The longest that anything waits for one round or for the start of all processes, in seconds."""
ITEM_BYTES = 2
"""Of bfloat16."""
WARM_UP = 2
"""Rounds before the timed ones: the two slots' pages are mapped by the first version that each takes."""


class BenchmarkFailed(StagingError):
    """A part of the benchmark ended before its time, or what was read is not what was put."""

    code = "benchmark_failed"


class Step(StrEnum):
    """What the processes do together, one after the other."""

    MEMCPY_IN = "memcpy in"
    FLUSH = "flush"
    FLUSH_TENSOR_GRID = "flush, tensor grid only"
    MOMENTS = "moments"
    MEMCPY_OUT = "memcpy out"
    READ = "read"
    READ_TENSOR_GRID = "read, tensor grid only"


WRITERS_STEPS = (Step.MEMCPY_IN, Step.FLUSH, Step.FLUSH_TENSOR_GRID, Step.MOMENTS)
READERS_STEPS = (Step.MEMCPY_OUT, Step.READ, Step.READ_TENSOR_GRID)
GRIDS: Mapping[Step, tuple[Grid, ...]] = {Step.FLUSH: ALL_GRIDS, Step.FLUSH_TENSOR_GRID: (Grid.TENSOR,)}
STAGES: Mapping[Step, str] = {
    Step.FLUSH: "all-grids",
    Step.FLUSH_TENSOR_GRID: "tensor-grid",
    Step.READ: "all-grids",
    Step.READ_TENSOR_GRID: "tensor-grid",
}

Spans = dict[Step, list[tuple[float, float]]]
"""Per step and round, when a process began and ended it: CLOCK_MONOTONIC, one clock for all processes."""
Seconds = dict[Step, list[float]]
"""Per step and round, from the first process's begin to the last one's end."""


@dataclass(frozen=True)
class Case:
    """One model, divided among so many writers and readers.

    Attributes:
        shapes: global shapes by tensor name; all bfloat16.
        ranks: how many writers, and how many readers.
        repetitions: timed rounds.
    """

    shapes: Mapping[str, Shape]
    ranks: int
    repetitions: int

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * ITEM_BYTES

    @property
    def versions(self) -> range:
        """One per round: the warm-up, the timed ones, and one more to see that all still holds."""
        return range(1, WARM_UP + self.repetitions + 2)

    def timed(self, version: int) -> bool:
        """Whether the round counts. In those that do not, every byte is checked."""
        return WARM_UP < version <= WARM_UP + self.repetitions

    def boxes(self, rank: int) -> dict[str, Box]:
        """The rows that a rank writes or reads: an even part of every tensor."""
        return {name: _rows(shape, rank, self.ranks) for name, shape in self.shapes.items()}

    def elements(self, rank: int) -> int:
        """How many elements a rank writes or reads."""
        return sum(box.volume for box in self.boxes(rank).values())


def _rows(shape: Shape, rank: int, ranks: int) -> Box:
    first, end = (shape[0] * part // ranks for part in (rank, rank + 1))
    return Box((first, *(0 for _ in shape[1:])), (end - first, *shape[1:]))


def model_shapes(size: int) -> dict[str, Shape]:
    """The tensors of a decoder of about ``size`` bytes: whole layers, and an embedding of what is left over."""
    hidden = 16
    while 13 * (2 * hidden) ** 2 * ITEM_BYTES * 4 <= size:  # a layer has 13 hidden**2 elements; four shall fit
        hidden *= 2
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (hidden * 7 // 2, hidden),
        "mlp.up_proj.weight": (hidden * 7 // 2, hidden),
        "mlp.down_proj.weight": (hidden, hidden * 7 // 2),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer_bytes = sum(math.prod(shape) for shape in layer.values()) * ITEM_BYTES
    layers, rest = divmod(size, layer_bytes)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (max(hidden, rest // (hidden * ITEM_BYTES)), hidden)}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}

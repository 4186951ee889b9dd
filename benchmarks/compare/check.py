# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Whether live weights are those of a version, whoever has loaded them: within what quantization may round off.

Scales differ between systems, for an engine of vLLM 0.26 makes its own of what a rank holds. So what a parameter stands
for, bytes times scales, is compared with what its loader would have put there; random weights of another version are
far from it everywhere. That stagingd's bytes are exact is checked by ``read_check.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from stagingd_vllm.layouts import Home
from stagingd_vllm.plan import PlanEntry

from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_check import padded
from stagingd.boxes import Shape
from stagingd.moments import BLOCK

STEP = 1 / 16
"""Half of the distance between two neighbours of e4m3, of their magnitude."""
SMALLEST = 2.0**-10
"""Half of the smallest magnitude of e4m3, in units of the scale."""
SLACK = 1.01
"""For products that are rounded to float32, and values to bf16."""


@dataclass(frozen=True)
class Nearness:
    """How many values were compared, and how many of them are further off than rounding explains."""

    values: int = 0
    far: int = 0

    def __add__(self, other: Nearness) -> Nearness:
        return Nearness(self.values + other.values, self.far + other.far)

    @property
    def near(self) -> bool:
        """Whether something was compared and nothing is far off."""
        return self.values > 0 and self.far == 0


def nearness(home: Home, shape: Shape, entries: Sequence[PlanEntry], read: Callable[[str], torch.Tensor]) -> Nearness:
    """A live parameter against the tensors that fill it.

    Args:
        home: where it lives.
        shape: as its loader sees it.
        entries: of the read plan, for this parameter.
        read: gives a whole tensor of the version that it should be.

    Raises:
        BenchmarkFailed: how its scheme is checked is not known here.
    """
    loaded = torch.zeros(shape, dtype=getattr(torch, entries[0].dtype), device=home.weight.device)
    for entry in entries:
        region = entry.region
        source = read(entry.tensor)[entry.source.slices].to(loaded.device)
        loaded.as_strided(region.shape, region.stride, region.offset).copy_(source)
    if home.scheme is None:
        return Nearness(loaded.numel(), int((home.weight != loaded).sum()))
    if home.scale is None or home.scheme.live != "float8_e4m3fn":
        raise BenchmarkFailed(f"{home.scheme.name} is not checked here", remedy="measure an FP8 mode")
    wanted = padded(loaded, home).float()
    scales = _spread(home.scale, home.weight)
    off = (home.weight.float() * scales - wanted).abs()
    allowed = SLACK * torch.maximum(wanted.abs() * STEP, scales * SMALLEST)
    return Nearness(wanted.numel(), int((~(off <= allowed)).sum()))


def _spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scale for each value of a weight, or what broadcasts to that."""
    *experts, rows, columns = weight.shape
    number = int(torch.Size(experts).numel())
    if scale.numel() == number:
        return scale.view(*experts, 1, 1)
    if scale.numel() == number * rows:
        return scale.view(*experts, rows, 1)
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    blocks = scale.view(*experts, down, across)
    return blocks.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]

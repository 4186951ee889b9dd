# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Proof on real data that FP8 made from a worker's slice is FP8 made from the whole tensor.

The slice is quantized with scales from the merged moments of the trainers' shards. The whole tensor is
quantized with scales from its own values, as an engine that holds all of it does; no moments are used.
The slice's bytes and scales must be those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stagingd.boxes import Box, cells, whole
from stagingd.moments import cell_shape
from stagingd_vllm.quantize import quantize
from stagingd_vllm.reader import Lease
from stagingd_vllm.scales import Granularity, ScaleRule, scales


@dataclass(frozen=True)
class Exactness:
    """How many FP8 bytes and scales were compared, and how many of them differed."""

    bytes: int = 0
    scales: int = 0
    differing_bytes: int = 0
    differing_scales: int = 0

    def __add__(self, other: Exactness) -> Exactness:
        return Exactness(
            self.bytes + other.bytes,
            self.scales + other.scales,
            self.differing_bytes + other.differing_bytes,
            self.differing_scales + other.differing_scales,
        )

    @property
    def exact(self) -> bool:
        """Whether something was compared and nothing differed."""
        return self.bytes > 0 and self.differing_bytes == 0 and self.differing_scales == 0


def compare_slice(lease: Lease, name: str, box: Box, granularity: Granularity) -> Exactness:
    """Compare a slice of a matrix, quantized by itself, with the same slice of the quantized whole.

    Args:
        lease: the version to look at.
        name: a 2-dimensional tensor.
        box: the slice.
        granularity: what shares a scale.
    """
    from_moments = scales(ScaleRule().limits(lease.moments(name, granularity.grid, box)), granularity)
    mine = quantize(lease.read(name, box), from_moments, granularity, box)
    full = lease.read(name)
    shape = tuple(full.shape)
    from_values = scales(cell_amax(full, cell_shape(granularity.grid, shape)), granularity)
    theirs = quantize(full, from_values, granularity, whole(shape))[box.slices]
    touched = from_values[cells(box, cell_shape(granularity.grid, shape)).slices]
    return Exactness(
        mine.numel(),
        touched.numel(),
        int((mine.view(torch.uint8) != theirs.view(torch.uint8)).sum()),
        int((from_moments != touched).sum()),
    )


def cell_amax(matrix: torch.Tensor, cell: tuple[int, ...]) -> torch.Tensor:
    """The greatest magnitude in each cell of a matrix, from its values: float32, of the cells' shape."""
    (rows, columns), (height, width) = matrix.shape, cell
    down, across = -(-rows // height), -(-columns // width)
    padded = F.pad(matrix.abs().float(), (0, across * width - columns, 0, down * height - rows))
    return padded.view(down, height, across, width).amax((1, 3))

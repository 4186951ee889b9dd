# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moments of a shard, in torch: the reference that kernels are held to, and what runs on CPUs.

All grids come from one pass over the values: per row and per column block of 128 elements, count,
mean, M2 and amax are taken, which is 1/128 of the data; rows, blocks and the whole are pooled from those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stagingd.boxes import Box, Shape
from stagingd.moments import BLOCK, Grid

PASS_ELEMENTS = 1 << 17
"""Values taken at once: with their fp32 intermediates they stay in a CPU core's second-level cache."""


@dataclass(frozen=True)
class CellMoments:
    """Moments of cells; every tensor has the shape of the cells.

    Attributes:
        count: finite values, float64 (exact up to 2**53).
        mean: their mean, float64; 0 where there are none.
        m2: the sum of their squared deviations, float64.
        amax: their greatest magnitude, float32; 0 where there are none.
        nonfinite: number of NaN and infinite values, int64.
    """

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor
    amax: torch.Tensor
    nonfinite: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CellMoments:
        """The same change of shape applied to every field."""
        return CellMoments(*(change(field) for field in self.fields))

    @property
    def fields(self) -> tuple[torch.Tensor, ...]:
        """All five, in the order of the attributes."""
        return self.count, self.mean, self.m2, self.amax, self.nonfinite

    def pooled(self, dim: int) -> CellMoments:
        """The moments of the unions of the cells along a dim.

        Source: the pairwise formulae of Chan, Golub and LeVeque (1979), for many sets at once.
        """
        count = self.count.sum(dim)
        mean = (self.count * self.mean).sum(dim) / count.clamp_min(1)
        deviation = self.mean - mean.unsqueeze(dim)
        m2 = (self.m2 + self.count * deviation * deviation).sum(dim)
        return CellMoments(count, mean, m2, self.amax.amax(dim), self.nonfinite.sum(dim))


def shard_moments(values: torch.Tensor, box: Box, grids: Sequence[Grid]) -> dict[Grid, CellMoments]:
    """The moments of a shard for the cells of each grid that it touches.

    Args:
        values: the elements as they are staged, of the box's shape; bfloat16, float16 or float32.
        box: where in its tensor the shard lies.
        grids: which grids.

    Returns:
        Per grid the moments, flattened in the order of ``stagingd.moments.cells_of``.
    """
    columns = box.lengths[-1] if box.lengths else 1
    first_column = box.offsets[-1] if box.offsets else 0
    pieces = [_chunks(piece, first_column) for piece in _row_pieces(values.reshape(-1, columns))]
    count, mean, m2, amax, nonfinite = map(torch.cat, zip(*(piece.fields for piece in pieces), strict=True))
    base = CellMoments(count.double(), mean.double(), m2.double(), amax, nonfinite)
    rows = base.pooled(1)
    pooled = {
        Grid.TENSOR: lambda: rows.pooled(0).map(_flat),
        Grid.ROW: lambda: rows,
        Grid.BLOCK: lambda: _blocks(base, box),
    }
    return {grid: pooled[grid]() for grid in grids}


def _flat(field: torch.Tensor) -> torch.Tensor:
    return field.reshape(-1)


def _row_pieces(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, PASS_ELEMENTS // matrix.shape[1])
    yield from torch.split(matrix, rows)


def _chunks(matrix: torch.Tensor, first_column: int) -> CellMoments:
    """Moments per row and per block of columns, (rows, column blocks), blocks counted from the tensor's column 0."""
    rows, columns = matrix.shape
    left = first_column % BLOCK
    blocks = -(-(left + columns) // BLOCK)
    padding = (left, blocks * BLOCK - left - columns)
    padded = (F.pad(matrix, padding) if any(padding) else matrix).reshape(rows, blocks, BLOCK)
    inside = None
    if any(padding):
        inside = F.pad(torch.ones(columns, device=matrix.device), padding).view(1, blocks, BLOCK)
    amax = _amax(padded)
    nonfinite = torch.zeros(rows, blocks, dtype=torch.int64, device=matrix.device)
    if not bool(amax.isfinite().all()):
        finite = padded.isfinite()
        nonfinite = (~finite).sum(-1)
        padded = torch.where(finite, padded, 0)
        amax = _amax(padded)
        inside = finite.float() if inside is None else finite * inside
    count = torch.full((rows, blocks), float(BLOCK), device=matrix.device)
    if inside is not None:
        count = inside.sum(-1).expand(rows, blocks)
    mean, m2 = _mean_and_m2(padded.to(torch.float32, copy=True), count, inside)
    return CellMoments(count, mean, m2, amax, nonfinite)


def _amax(values: torch.Tensor) -> torch.Tensor:
    """The greatest magnitude along the last dim, float32; not finite where one of the values is not."""
    if values.dtype != torch.bfloat16:
        return values.float().abs().amax(-1)
    # Without their sign the bits of floating-point numbers are in the numbers' order, NaN last; and unlike
    # those of bfloat16 the maxima of integers are vectorized on CPUs.
    return (values.view(torch.int16) & 0x7FFF).amax(-1).view(torch.bfloat16).float()


def _mean_and_m2(
    x: torch.Tensor, count: torch.Tensor, inside: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and M2 along the last dim, float32. Overwrites ``x``, so that it stays in the cache."""
    mean = x.sum(-1) / count.clamp_min(1)
    x -= mean.unsqueeze(-1)
    if inside is not None:
        x *= inside
    return mean, x.mul_(x).sum(-1)


def _blocks(base: CellMoments, box: Box) -> CellMoments:
    """Pool the rows of each block of 128, counted from the tensor's row 0; leading dims stay apart."""
    if len(box.lengths) < 2:
        return base.map(_flat)
    first, rows = box.offsets[-2], box.lengths[-2]
    leading: Shape = box.lengths[:-2]
    left = first % BLOCK
    blocks = -(-(left + rows) // BLOCK)

    def by_block(field: torch.Tensor) -> torch.Tensor:
        stacked = field.reshape(math.prod(leading), rows, field.shape[-1])
        padded = F.pad(stacked, (0, 0, left, blocks * BLOCK - left - rows))
        return padded.reshape(math.prod(leading) * blocks, BLOCK, -1)

    return base.map(by_block).pooled(1).map(_flat)

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
    base = CellMoments(*(torch.cat(fields) for fields in zip(*(piece.fields for piece in pieces), strict=True)))
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
    x = matrix.float()
    x = (F.pad(x, padding) if any(padding) else x).view(rows, blocks, BLOCK)
    inside = None
    if any(padding):
        inside = F.pad(torch.ones(columns, device=x.device), padding).view(1, blocks, BLOCK)
    amax = x.abs().amax(-1)
    nonfinite = torch.zeros(rows, blocks, dtype=torch.int64, device=x.device)
    if not bool(amax.isfinite().all()):
        finite = x.isfinite()
        nonfinite = (~finite).sum(-1)
        x = torch.where(finite, x, 0.0)
        amax = x.abs().amax(-1)
        inside = finite.float() if inside is None else finite * inside
    count = torch.full((rows, blocks), float(BLOCK), device=x.device)
    if inside is not None:
        count = inside.sum(-1).expand(rows, blocks)
    mean = x.sum(-1) / count.clamp_min(1)
    deviation = x - mean.unsqueeze(-1)
    if inside is not None:
        deviation = deviation * inside
    m2 = torch.linalg.vecdot(deviation, deviation)
    return CellMoments(count.double(), mean.double(), m2.double(), amax, nonfinite)


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

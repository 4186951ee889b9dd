# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moments: count, mean, M2 (sum of squared deviations), amax and non-finite values per cell of a grid.

A trainer rank stores the moments of each box that it owns, for every cell that the box touches. A
reader merges what all owners stored for a cell into the moments of the whole cell: amax by the
maximum, which is exact; mean and M2 pairwise (Chan, Golub and LeVeque 1979), so that shards of
different sizes give the true mean and variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from stagingd.boxes import Box, Shape, cells, overlap_counts, relative, whole

BLOCK: Final = 128
"""Edge of a block in elements: that of block-scaled FP8 kernels."""


class Grid(StrEnum):
    """The cells that moments are kept for: one mechanism, three cell shapes."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"


ALL_GRIDS: Final = tuple(Grid)


def cell_shape(grid: Grid, shape: Shape) -> Shape:
    """The shape of one cell in elements, for a tensor of this shape.

    A row runs along the last dim; a block spans the last two dims. A vector is one row.
    """
    if grid is Grid.TENSOR:
        return shape
    if grid is Grid.ROW:
        return (1,) * (len(shape) - 1) + shape[-1:]
    return (1,) * (len(shape) - 2) + (BLOCK,) * min(2, len(shape))


@functools.lru_cache(maxsize=1 << 16)  # thousands of experts have the same few shapes and boxes
def cells_of(grid: Grid, shape: Shape, box: Box | None = None) -> Box:
    """The cells that a box of the tensor (all of it by default) touches, as a box of cell indices."""
    return cells(box or whole(shape), cell_shape(grid, shape))


def elements_per_cell(grid: Grid, shape: Shape, box: Box) -> npt.NDArray[np.int64]:
    """How many elements of the box lie in each cell that it touches; shape: that of the cells."""
    counts = np.ones((), dtype=np.int64)
    for per_cell in overlap_counts(box, cell_shape(grid, shape)):
        counts = np.multiply.outer(counts, np.asarray(per_cell, dtype=np.int64))
    return counts


@dataclass(frozen=True)
class Moments:
    """Moments of a box of cells.

    Attributes:
        count: finite values per cell, int64.
        mean: their mean, float64; 0 where count is 0.
        m2: the sum of their squared deviations from the mean, float64.
        amax: the greatest magnitude among them, float32; 0 where count is 0.
        nonfinite: number of NaN and infinite values per cell, int64.

    All five have the same shape: that of the box of cells.
    """

    count: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]
    amax: npt.NDArray[np.float32]
    nonfinite: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, shape: Shape) -> Moments:
        """The moments of cells without any values: the neutral element of merging."""
        return cls(
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float64),
            np.zeros(shape, np.float64),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int64),
        )

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """The population variance, M2 / count; 0 where count is 0."""
        return self.m2 / np.maximum(self.count, 1)

    def part(self, box: Box) -> Moments:
        """Views of the cells in a box."""
        index = box.slices
        return Moments(self.count[index], self.mean[index], self.m2[index], self.amax[index], self.nonfinite[index])


def merged(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint sets of values, cell by cell.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979).
    """
    count = a.count + b.count
    total = np.maximum(count, 1)
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + delta * (b.count / total),
        a.m2 + b.m2 + delta * delta * (a.count * (b.count / total)),
        np.maximum(a.amax, b.amax),
        a.nonfinite + b.nonfinite,
    )


def merge_boxes(region: Box, parts: Iterable[tuple[Box, Moments]]) -> Moments:
    """Merge the parts that several owners stored into the moments of a box of cells.

    Args:
        region: the box of cells to fill.
        parts: boxes of cells inside ``region``, with their moments. A cell may be in several parts.
    """
    result = Moments.empty(region.lengths)
    for box, part in parts:
        index = relative(box, region).slices
        union = merged(result.part(relative(box, region)), part)
        result.count[index] = union.count
        result.mean[index] = union.mean
        result.m2[index] = union.m2
        result.amax[index] = union.amax
        result.nonfinite[index] = union.nonfinite
    return result


def merge_groups(moments: Moments, group: npt.NDArray[np.int64], groups: int) -> Moments:
    """Merge cells group by group: the moments of all values of a group, whatever the number of its cells.

    Args:
        moments: of disjoint sets of values, in one dim.
        group: per cell, the number of its group.
        groups: how many there are.

    Returns:
        The moments of the groups, in one dim. Of a group without cells they are those of no values.

    Source: the formula of ``merged``, for any number of parts: their deviations from the mean of the union add up.
    """

    def sums(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(group, values, groups).astype(np.float64, copy=False)

    count = np.zeros(groups, np.int64)
    np.add.at(count, group, moments.count)
    mean = sums(moments.mean * moments.count) / np.maximum(count, 1)
    delta = moments.mean - mean[group]
    amax = np.zeros(groups, np.float32)
    np.maximum.at(amax, group, moments.amax)
    nonfinite = np.zeros(groups, np.int64)
    np.add.at(nonfinite, group, moments.nonfinite)
    return Moments(count, mean, sums(moments.m2 + delta * delta * moments.count), amax, nonfinite)


FIELD_BYTES: Final = 4
FIELDS: Final = ("mean", "m2", "amax", "nonfinite")
"""What is stored per cell, in this order: float32, float32, float32, uint32. The count is not
stored: it follows from the geometry and the number of non-finite values."""


class StoredMoments:
    """The moments behind the tensors of one slot: per field an array over all cells of the slot.

    Args:
        memory: the bytes of the moments of one slot, ``stored_bytes(cells)`` of them.
        cells: how many cells the slot has, over all boxes and grids.
    """

    def __init__(self, memory: memoryview, cells: int) -> None:
        stride = field_stride(cells)
        self.mean, self.m2, self.amax = (
            np.frombuffer(memory, np.float32, cells, i * stride) for i in range(len(FIELDS) - 1)
        )
        self.nonfinite = np.frombuffer(memory, np.uint32, cells, (len(FIELDS) - 1) * stride)

    def of_box(self, first_cell: int, grid: Grid, shape: Shape, box: Box) -> Moments:
        """What the owner of a box stored for the cells of a grid.

        Args:
            first_cell: position of the box's first cell of this grid among the slot's cells.
            grid: which grid.
            shape: the tensor's global shape.
            box: the owned box.
        """
        lengths = cells_of(grid, shape, box).lengths
        at = slice(first_cell, first_cell + math.prod(lengths))
        nonfinite = self.nonfinite[at].reshape(lengths).astype(np.int64)
        return Moments(
            elements_per_cell(grid, shape, box) - nonfinite,
            self.mean[at].reshape(lengths).astype(np.float64),
            self.m2[at].reshape(lengths).astype(np.float64),
            self.amax[at].reshape(lengths),
            nonfinite,
        )


def field_stride(cells: int) -> int:
    """Bytes from one field's array to the next: each starts at a multiple of 256."""
    return -(-cells * FIELD_BYTES // 256) * 256


def stored_bytes(cells: int) -> int:
    """Bytes that the moments of so many cells take in a slot."""
    return len(FIELDS) * field_stride(cells)

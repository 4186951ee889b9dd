# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From the moments that trainers stored to the largest magnitude that each scale of a worker has to represent.

Which cells make up which scale is found once; a version then takes one gather and one maximum over all of them.
The cells are those of whole tensors or rows, however tensor parallelism cuts them, so that a scale is the same on
all ranks; where weights are fused, those of all parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stagingd.boxes import Box, intersect, relative, whole
from stagingd.catalog import Catalog
from stagingd.errors import OutOfOrder
from stagingd.moments import BLOCK, Grid, Moments, StoredMoments, cells_of, elements_per_cell, merged
from stagingd_vllm.matrices import Matrix
from stagingd_vllm.plan import PlanRefused
from stagingd_vllm.scales import Granularity, ScaleRule

Numbers = npt.NDArray[np.int64]
SHORT: Final = 100
"""Runs of fewer cells are gathered: to copy one by itself takes as long as to gather about so many."""


@dataclass(frozen=True)
class Cells:
    """Cells of a slot that belong to scales: ``scale[i]`` is made of cell ``cell[i]`` with ``count[i]`` elements."""

    scale: Numbers
    cell: Numbers
    count: Numbers


def cells_of_matrix(matrix: Matrix, granularity: Granularity, columns: int, catalog: Catalog) -> Cells | None:
    """The cells that the scales of a matrix are made of; scales are counted from its parameter's first one.

    Args:
        matrix: part of a parameter, without its leading index.
        granularity: what shares a scale.
        columns: how many columns the parameter has.
        catalog: the stage's.

    Returns:
        None where the scales are not those of any cells: blocks that fusing or tensor parallelism cuts elsewhere
        than the stage's grid. They are then found in the worker's own slice, as the engine itself would.

    Raises:
        PlanRefused: rows are not rows of the tensor, so that no moments are kept for them.
        OutOfOrder: the stage keeps no moments for what is needed.
    """
    tensor = catalog.tensor(matrix.entry.tensor)
    if granularity is Granularity.TENSOR:
        return _group(matrix, catalog)
    if granularity is Granularity.CHANNEL:
        if matrix.columns_of != len(tensor.shape) - 1:
            raise PlanRefused(
                f"rows of {matrix.entry.region.parameter} are columns of {matrix.entry.tensor}",
                remedy="use per-tensor or per-block scales for this layer: moments are kept along the last dim",
                tensor=matrix.entry.tensor,
                parameter=matrix.entry.region.parameter,
            )
        offsets = (*matrix.box.offsets[:-1], 0)
        rows = Box(offsets, (*matrix.box.lengths[:-1], tensor.shape[-1]))
        return _shifted(_cells(matrix, Grid.ROW, rows, catalog), matrix.row, 0, 1)
    if not falls_on_blocks(matrix, tensor.shape):
        return None
    found = _cells(matrix, Grid.BLOCK, matrix.box, catalog)
    return _shifted(found, matrix.row // BLOCK, matrix.column // BLOCK, -(-columns // BLOCK))


def _group(matrix: Matrix, catalog: Catalog) -> Cells:
    tensor = catalog.tensor(matrix.entry.tensor)
    grid = Grid.TENSOR if matrix.group == whole(tensor.shape) else Grid.ROW
    found = _cells(matrix, grid, matrix.group, catalog)
    return Cells(np.zeros_like(found.cell), found.cell, found.count)


@dataclass(frozen=True)
class _Found:
    """Cells with their place in the box that was asked for, counted in cells: rows and columns."""

    row: Numbers
    column: Numbers
    cell: Numbers
    count: Numbers


def _cells(matrix: Matrix, grid: Grid, box: Box, catalog: Catalog) -> _Found:
    name = matrix.entry.tensor
    tensor = catalog.tensor(name)
    if grid not in catalog.grids or not tensor.has_moments:
        raise OutOfOrder(
            f"the stage keeps no moments of tensor {name!r} ({tensor.dtype}) for grid {grid.value!r}",
            remedy="open the stage with this grid on the trainers",
            tensor=name,
        )
    region = cells_of(grid, tensor.shape, box)
    rows: list[Numbers] = []
    columns: list[Numbers] = []
    found: list[Numbers] = []
    counts: list[Numbers] = []
    for owned in catalog.owned_of(name):
        here = cells_of(grid, tensor.shape, owned.box)
        common = intersect(here, region)
        if common is None:
            continue
        at = relative(common, here).slices
        numbers = np.arange(here.volume, dtype=np.int64).reshape(here.lengths)[at]
        found.append(numbers.ravel() + catalog.first_cell(owned, grid))
        counts.append(elements_per_cell(grid, tensor.shape, owned.box)[at].ravel())
        place = np.indices(common.lengths).reshape(len(common.lengths), -1)
        offsets = relative(common, region).offsets
        rows.append(_place(place, offsets, matrix.rows_of))
        columns.append(_place(place, offsets, matrix.columns_of))
    return _Found(*(np.concatenate(part) for part in (rows, columns, found, counts)))


def _place(place: Numbers, offsets: Sequence[int], dim: int | None) -> Numbers:
    return np.zeros(place.shape[1], np.int64) if dim is None else place[dim] + offsets[dim]


def _shifted(found: _Found, row: int, column: int, per_row: int) -> Cells:
    return Cells((found.row + row) * per_row + found.column + column, found.cell, found.count)


def falls_on_blocks(matrix: Matrix, tensor: Sequence[int]) -> bool:
    """Whether the blocks of the parameter that the matrix touches are blocks of the tensor, each wholly in it.

    Args:
        matrix: part of a parameter.
        tensor: the shape of its tensor.
    """
    if (matrix.rows_of, matrix.columns_of) != (len(tensor) - 2, len(tensor) - 1):
        return False
    cuts = (
        (matrix.box.offsets[-2], matrix.row, matrix.rows, tensor[-2]),
        (matrix.box.offsets[-1], matrix.column, matrix.columns, tensor[-1]),
    )
    return all(
        start % BLOCK == 0 and to % BLOCK == 0 and (size % BLOCK == 0 or start + size == end)
        for start, to, size, end in cuts
    )


class Limits:
    """The largest magnitudes that the scales of a worker have to represent.

    Args:
        cells: which cells belong to which scale.
        scales: how many scales there are; those without any cell have limit 0.
        rule: how a limit follows from moments.
    """

    def __init__(self, cells: Sequence[Cells], scales: int, rule: ScaleRule) -> None:
        scale, cell, count = (
            np.concatenate([getattr(some, name) for some in cells]) if cells else np.zeros(0, np.int64)
            for name in ("scale", "cell", "count")
        )
        order = np.argsort(scale, kind="stable")
        scale, cell = scale[order], cell[order]
        starts = np.flatnonzero(np.diff(scale, prepend=-1))
        self._scales = scales
        self._rule = rule
        # Kept for this rule alone: of 22 million rows of experts they take half a gigabyte.
        self._all = Cells(scale, cell, count[order]) if rule.sigmas is not None else None
        self._made = scale[starts]
        single = np.diff([*starts, len(scale)]) == 1
        self._single = _Single.of(cell[starts[single]], scale[starts[single]])
        self._several = _Several.of(cell, scale, starts, single)

    def of(self, stored: StoredMoments) -> npt.NDArray[np.float32]:
        """The limits of one version, given the moments of its slot: float32, one per scale."""
        limits = np.zeros(self._scales, np.float32)
        if self._all is None:
            for cell, scale, length in self._single.runs:
                limits[scale : scale + length] = stored.amax[cell : cell + length]
            limits[self._single.scale] = stored.amax[self._single.cell]
            if len(self._several.cell):
                limits[self._several.scale] = np.maximum.reduceat(stored.amax[self._several.cell], self._several.starts)
        elif len(self._all.cell):
            limits[self._made] = self._rule.limits(_merged(self._all, stored)).numpy()
        return limits


def _merged(cells: Cells, stored: StoredMoments) -> Moments:
    """Cells merged in pairs, a round for each doubling of what belongs to one scale."""
    scale = cells.scale
    nonfinite = stored.nonfinite[cells.cell].astype(np.int64)
    found = Moments(
        cells.count - nonfinite,
        stored.mean[cells.cell].astype(np.float64),
        stored.m2[cells.cell].astype(np.float64),
        stored.amax[cells.cell],
        nonfinite,
    )
    while (np.diff(scale) == 0).any():
        starts = np.flatnonzero(np.diff(scale, prepend=-1))
        rank = np.arange(len(scale)) - np.repeat(starts, np.diff([*starts, len(scale)]))
        first = np.flatnonzero(rank % 2 == 0)
        paired = np.flatnonzero(np.isin(first + 1, np.flatnonzero(rank % 2)))
        union = merged(_at(found, first[paired]), _at(found, first[paired] + 1))
        kept = _at(found, first)
        for mine, theirs in zip(_fields(kept), _fields(union), strict=True):
            mine[paired] = theirs
        found, scale = kept, scale[first]
    return found


@dataclass(frozen=True)
class _Single:
    """Scales that are made of one cell each.

    Nearly all rows lie whole with one trainer rank, and follow each other as cells and as scales, in runs (first cell,
    first scale, length). Of blocks that tensor parallelism cuts there are as many runs as rows of blocks: one gather
    of them all, ``scale[i]`` from ``cell[i]``, takes a tenth of the time.
    """

    runs: tuple[tuple[int, int, int], ...]
    scale: Numbers
    cell: Numbers

    @classmethod
    def of(cls, cell: Numbers, scale: Numbers) -> _Single:
        runs = np.array(list(_runs(cell, scale)), np.int64).reshape(-1, 3)
        long = runs[:, 2] >= SHORT
        gathered = np.repeat(~long, runs[:, 2])
        return cls(tuple(map(tuple, runs[long].tolist())), scale[gathered], cell[gathered])


@dataclass(frozen=True)
class _Several:
    """Scales that are made of several cells: ``scale[i]`` of the cells from ``starts[i]`` on."""

    scale: Numbers
    cell: Numbers
    starts: Numbers

    @classmethod
    def of(cls, cell: Numbers, scale: Numbers, starts: Numbers, single: npt.NDArray[np.bool_]) -> _Several:
        lengths = np.diff([*starts, len(scale)])
        return cls(
            scale[starts[~single]],
            cell[np.repeat(~single, lengths)],
            np.concatenate([[0], np.cumsum(lengths[~single])[:-1]]).astype(np.int64),
        )


def _runs(cell: Numbers, scale: Numbers) -> Iterator[tuple[int, int, int]]:
    """Cells and scales that both rise by one, as (first cell, first scale, length)."""
    if not len(cell):
        return
    breaks = np.flatnonzero((np.diff(cell) != 1) | (np.diff(scale) != 1)) + 1
    for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(cell)], strict=True):
        yield int(cell[start]), int(scale[start]), end - start


def _fields(moments: Moments) -> tuple[npt.NDArray[np.generic], ...]:
    return moments.count, moments.mean, moments.m2, moments.amax, moments.nonfinite


def _at(moments: Moments, index: Numbers) -> Moments:
    return Moments(
        moments.count[index], moments.mean[index], moments.m2[index], moments.amax[index], moments.nonfinite[index]
    )

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From stored moments to the scales of a stage that trainers quantize, by the engines' own arithmetic.

Trainers quantize with these scales, and engines set them beside the bytes that they read. They have to be, bit for
bit, those that an engine makes of the values themselves: where it multiplies by a rounded reciprocal, so is done here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from stagingd.boxes import Box, Shape, intersect, relative
from stagingd.catalog import Catalog, OwnedBox, StagedTensor
from stagingd.errors import CatalogMismatch
from stagingd.formats import StageFormat
from stagingd.moments import Grid, StoredMoments, cells_of

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

FP8_MAX: Final = np.float32(448)
"""The greatest finite float8_e4m3fn."""
INT8_MAX: Final = np.float32(127)
"""The greatest int8 that is used; -128 is not."""
LEAST_CHANNEL_SCALE: Final = np.float32(1 / (448 * 512))
LEAST_BLOCK_LIMIT: Final = np.float32(1e-4)


def scales(stage_format: StageFormat, device: str, limits: Floats) -> Floats:
    """The scales of cells: a value is its quantized one times its cell's scale.

    Args:
        stage_format: which of the engines' formulae.
        device: the kind of device on which they compute it, "cuda" or "cpu"; it matters per block.
        limits: the largest magnitude in each cell, float32 of any shape; neither negative nor NaN.

    Returns:
        float32, of the same shape. Of zeros it is 0 per tensor and for int8, as in the engines.
    """
    if stage_format is StageFormat.FP8_PER_TENSOR:
        made = limits / FP8_MAX
    elif stage_format is StageFormat.FP8_PER_CHANNEL:
        made = np.maximum(limits / FP8_MAX, LEAST_CHANNEL_SCALE)
    elif stage_format is StageFormat.FP8_PER_BLOCK:
        floored = np.maximum(limits, LEAST_BLOCK_LIMIT)
        # Engines divide by a number, for which torch multiplies by the reciprocal on GPUs.
        made = floored / FP8_MAX if device == "cpu" else floored * (np.float32(1) / FP8_MAX)
    else:
        made = _as_bfloat16(_as_bfloat16(limits) / INT8_MAX)
    return np.asarray(made, np.float32)


def _as_bfloat16(values: Floats) -> Floats:
    """Rounded to bfloat16, to nearest, ties to even; numpy has no such dtype."""
    bits = values.view(np.uint32)
    # Less than half of what is cut off never carries, more than half always does; half does where that makes it even.
    carried = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (carried & np.uint32(0xFFFF0000)).view(np.float32)


class RankLimits:
    """The largest magnitudes in the cells that boxes touch: of whole cells, whoever owns the rest of them.

    Which cells these are is found once. A version then takes one gather of the boxes' own cells, and one gather and
    one maximum of what other boxes have of the same: between ranks that hold whole rows, that is little or nothing.

    Args:
        catalog: of a stage with a format.
        owned: some of its owned boxes, such as all of one rank. Those of tensors that are held as they are have no
            cells here.

    Raises:
        CatalogMismatch: the stage has no format.
    """

    def __init__(self, catalog: Catalog, owned: Sequence[OwnedBox]) -> None:
        finder = _Finder(catalog)
        cells = [finder.own(box) for box in owned]
        self._edges = [0, *itertools.accumulate(map(len, cells))]
        shifts = np.array([own.start - edge for own, edge in zip(cells, self._edges, strict=False)], np.int64)
        self._own = np.arange(self._edges[-1]) + np.repeat(shifts, np.diff(self._edges))
        places, others = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for box, own, edge in zip(owned, cells, self._edges, strict=False):
            for mine, theirs in finder.others(box) if own else ():
                places.append(mine + edge)
                others.append(theirs)
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        self._starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        self._shared = place[order][self._starts]
        self._others = np.concatenate(others)[order]

    def of(self, stored: StoredMoments) -> Floats:
        """The largest magnitudes of one version: float32, the cells of all boxes one after the other.

        Every rank must have stored its moments of that version.
        """
        limits = stored.amax[self._own]
        if len(self._shared):
            others = np.maximum.reduceat(stored.amax[self._others], self._starts)
            limits[self._shared] = np.maximum(limits[self._shared], others)
        return limits

    @property
    def count(self) -> int:
        """How many cells there are in all."""
        return self._edges[-1]

    def slice_of(self, number: int) -> slice:
        """Where the cells of the box of this number are among them, in the order of ``stagingd.moments.cells_of``."""
        return slice(self._edges[number], self._edges[number + 1])


class _Finder:
    """Finds, among a slot's cells, those that the cells of an owned box are parts of."""

    def __init__(self, catalog: Catalog) -> None:
        if catalog.format is None:
            raise CatalogMismatch(
                f"stage {catalog.stage!r} holds its tensors as they are: they have no scales",
                remedy="open the stage with a quantization",
                stage=catalog.stage,
            )
        self._catalog = catalog
        self._grid = catalog.format.grid
        self._groups: dict[int | None, Numbers] = {}
        self._overlaps: dict[tuple[Shape, Box, tuple[Box, ...]], Sequence[_Overlap]] = {}

    def own(self, owned: OwnedBox) -> range:
        """The box's own cells; none where its tensor is held as it is."""
        tensor = self._catalog.tensors[owned.tensor]
        if tensor.quantized_from is None:
            return range(0)
        first = self._catalog.first_cell(owned, self._grid)
        return range(first, first + cells_of(self._grid, tensor.shape, owned.box).volume)

    def others(self, owned: OwnedBox) -> Iterator[tuple[Numbers, Numbers]]:
        """What shares a scale with the box's cells: numbers among these, and for each a cell of another box.

        Of a group its own cell is one of them: to leave it out would take an array per box.
        """
        tensor = self._catalog.tensors[owned.tensor]
        if self._grid is Grid.TENSOR:
            group = self._group(tensor)
            yield np.zeros_like(group), group
            return
        boxes = self._catalog.owned_of(tensor.name)
        cut = tensor.shape, owned.box, tuple(other.box for other in boxes)
        if cut not in self._overlaps:  # thousands of experts are cut alike
            self._overlaps[cut] = _overlaps(self._grid, *cut)
        for number, mine, theirs in self._overlaps[cut]:
            yield mine, theirs + self._catalog.first_cell(boxes[number], self._grid)

    def _group(self, tensor: StagedTensor) -> Numbers:
        if tensor.group not in self._groups:
            members = (box for member in self._catalog.group_of(tensor) for box in self._catalog.owned_of(member.name))
            cells = [self._catalog.first_cell(box, self._grid) for box in members]
            self._groups[tensor.group] = np.array(cells, np.int64)
        return self._groups[tensor.group]


_Overlap = tuple[int, Numbers, Numbers]
"""Number of another box, and the cells that both touch: counted among the one's, and among the other's."""


def _overlaps(grid: Grid, shape: Shape, box: Box, others: Sequence[Box]) -> Sequence[_Overlap]:
    here = cells_of(grid, shape, box)
    found = []
    for number, other in enumerate(others):
        there = cells_of(grid, shape, other)
        common = intersect(here, there)
        if common is not None and other != box:
            found.append((number, _numbers(common, here), _numbers(common, there)))
    return found


def _numbers(part: Box, region: Box) -> Numbers:
    """The numbers of some of a region's cells, row by row."""
    return np.arange(region.volume).reshape(region.lengths)[relative(part, region).slices].ravel()

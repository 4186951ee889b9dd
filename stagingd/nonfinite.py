# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a slot hold NaN or infinite values, by the counts that the trainers wrote."""

from __future__ import annotations

import math

import numpy as np

from stagingd.boxes import Box
from stagingd.moments import Grid, cells_of
from stagingd.segment import Segment


def nonfinite_tensors(segment: Segment, slot: int) -> dict[str, int]:
    """The tensors of a slot that hold NaN or infinite values, with how many."""
    catalog, counts = segment.catalog, segment.moments(slot).nonfinite
    # One cell per box says it, where whole tensors have cells: the others are a hundred times as many.
    if not np.any(counts[catalog.tensor_cells] if Grid.TENSOR in catalog.grids else counts):
        return {}
    grid = Grid.TENSOR if Grid.TENSOR in catalog.grids else catalog.grids[0]
    found = dict[str, int]()
    for owned in catalog.owned:
        tensor = catalog.tensors[owned.tensor]
        if not tensor.has_moments:
            continue
        cells: Box = cells_of(grid, tensor.shape, owned.box)
        first = catalog.first_cell(owned, grid)
        count = int(counts[first : first + math.prod(cells.lengths)].sum())
        if count:
            found[tensor.name] = found.get(tensor.name, 0) + count
    return found

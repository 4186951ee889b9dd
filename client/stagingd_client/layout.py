# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where in a shard's memory the elements of a box are: a strided view, described without the tensor.

A trainer's parameters stay where they are while their values change. So a shard is placed, named and cut once;
for every version after that, an address is all that is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stagingd.boxes import Box, Shape
from stagingd.errors import WrongShape
from stagingd_client.naming import NamedShard


@dataclass(frozen=True)
class Layout:
    """Part of a shard, as part of one of the stage's tensors.

    Attributes:
        name: the stage's tensor.
        shape: its global shape.
        box: the part.
        size, strides: of the view, in elements. In row-major order its elements are those of the box; it may
            have more dims than the box, where rows are in another order.
        offset: from the shard's first element to the view's, in elements.
    """

    name: str
    shape: Shape
    box: Box
    size: Shape
    strides: Shape
    offset: int

    @classmethod
    def of(cls, named: NamedShard, shard: torch.Tensor) -> Layout:
        """Describe a view of a shard. Raises WrongShape where it is none."""
        values = named.part.values
        if values.untyped_storage().data_ptr() != shard.untyped_storage().data_ptr() or values.dtype != shard.dtype:
            raise WrongShape(
                f"what the names give for tensor {named.name!r} is a copy, not a view, of the trainer's shard",
                remedy="return views: the copy would not follow the trainer's next step",
                tensor=named.name,
            )
        if values.numel() != named.part.box.volume:
            raise WrongShape(
                f"what the names give for tensor {named.name!r} has {values.numel()} elements, "
                f"its box {named.part.box} {named.part.box.volume}",
                remedy="correct the names: views must have the elements of their boxes",
                tensor=named.name,
                box=named.part.box,
            )
        offset = int(values.storage_offset()) - int(shard.storage_offset())
        part = named.part
        return cls(named.name, part.global_shape, part.box, tuple(values.shape), values.stride(), offset)

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """The elements, in the shape of the box; a copy only where rows are in another order."""
        found = torch.as_strided(shard, self.size, self.strides, shard.storage_offset() + self.offset)
        return found.reshape(self.box.lengths)


LEVELS = 4
"""Levels that an order of rows may have: rotary embeddings within fused groups need as many."""


@dataclass(frozen=True)
class Rows:
    """How the rows of a matrix lie: as the indices of an array in row-major order.

    Attributes:
        sizes: of the array's dims, four of them; that of the first is of no meaning.
        strides: from one index to the next, in elements.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def rows_and_columns(layout: Layout) -> tuple[tuple[int, ...], Rows, int] | None:
    """Take a layout as matrices: the box's last two dims, one matrix per index of those before.

    Returns:
        The strides of the leading dims, how rows lie, and the stride of columns; or None where the view is cut
        finer than that: its columns in several parts, or its rows in more than four levels.
    """
    groups = _grouped(layout)
    if groups is None:
        return None
    *before, rows, columns = [[(1, 0)]] * max(0, 2 - len(groups)) + groups
    if len(columns) > 1 or any(len(dim) > 1 for dim in before) or len(rows) > LEVELS:
        return None
    levels = [(1, 0)] * (LEVELS - len(rows)) + rows
    found = Rows(tuple(size for size, _ in levels), tuple(stride for _, stride in levels))
    return tuple(dim[0][1] for dim in before), found, columns[0][1]


def _grouped(layout: Layout) -> list[list[tuple[int, int]]] | None:
    """Per dim of the box, the (size, stride) of the view's dims that make it up, joined where they follow on."""
    dims = [(n, s) for n, s in zip(layout.size, layout.strides, strict=True) if n > 1]
    groups = []
    for length in layout.box.lengths:
        taken: list[tuple[int, int]] = []
        while math.prod(n for n, _ in taken) < length:
            if not dims:
                return None
            size, stride = dims.pop(0)
            if taken and taken[-1][1] == size * stride:
                taken[-1] = (taken[-1][0] * size, stride)
            else:
                taken.append((size, stride))
        if math.prod(n for n, _ in taken) != length:
            return None
        groups.append(taken or [(1, 0)])
    return groups

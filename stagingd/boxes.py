# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Boxes: axis-aligned parts of a tensor, named by offsets and lengths in its global shape.

Everything that stagingd moves is a box: what a trainer rank holds, what a worker reads, the
cells of a grid that statistics are kept for. The functions here are pure integer arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """The elements ``offsets[d] <= index[d] < offsets[d] + lengths[d]`` of a tensor, for every dim d.

    A box of a 0-dimensional tensor has empty offsets and lengths and holds one element.
    """

    offsets: Shape
    lengths: Shape

    @property
    def ends(self) -> Shape:
        """One past the last index, per dim."""
        return tuple(o + n for o, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.lengths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into an array or a torch tensor of the global shape."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{e}" for o, e in zip(self.offsets, self.ends, strict=True)) + "]"


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def fits(box: Box, shape: Sequence[int]) -> bool:
    """Whether the box has the rank of ``shape``, non-negative numbers, and lies inside it."""
    return (
        len(box.offsets) == len(box.lengths) == len(shape)
        and all(o >= 0 and n >= 0 for o, n in zip(box.offsets, box.lengths, strict=True))
        and all(end <= size for end, size in zip(box.ends, shape, strict=True))
    )


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both boxes, or None when there are none."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = tuple(map(min, a.ends, b.ends))
    lengths = tuple(e - o for o, e in zip(offsets, ends, strict=True))
    return Box(offsets, lengths) if all(n > 0 for n in lengths) else None


def relative(box: Box, origin: Box) -> Box:
    """The same elements, counted from the first element of ``origin``."""
    return Box(tuple(o - p for o, p in zip(box.offsets, origin.offsets, strict=True)), box.lengths)


def subtract(a: Box, b: Box) -> list[Box]:
    """The elements of ``a`` that are not in ``b``, as disjoint boxes."""
    common = intersect(a, b)
    if common is None:
        return [a] if a.volume else []
    rest = []
    offsets, lengths = list(a.offsets), list(a.lengths)
    for d in range(len(offsets)):
        before = common.offsets[d] - offsets[d]
        after = offsets[d] + lengths[d] - common.ends[d]
        if before:
            rest.append(Box(tuple(offsets), (*lengths[:d], before, *lengths[d + 1 :])))
        if after:
            rest.append(
                Box((*offsets[:d], common.ends[d], *offsets[d + 1 :]), (*lengths[:d], after, *lengths[d + 1 :]))
            )
        offsets[d], lengths[d] = common.offsets[d], common.lengths[d]
    return rest


def overlapping(boxes: Sequence[Box]) -> tuple[int, int, Box] | None:
    """Two boxes that share elements: their positions in ``boxes`` and what they share, or None.

    Boxes are swept in the order of their first offset, so that only neighbours are compared.
    """
    order = sorted((i for i, box in enumerate(boxes) if box.volume), key=lambda i: boxes[i].offsets)
    active: list[int] = []
    for i in order:
        start = boxes[i].offsets[:1]
        active = [j for j in active if boxes[j].ends[:1] > start or not start]
        for j in active:
            common = intersect(boxes[i], boxes[j])
            if common is not None:
                return j, i, common
        active.append(i)
    return None


def uncovered(shape: Sequence[int], boxes: Iterable[Box]) -> Box | None:
    """A box of the tensor that none of ``boxes`` covers, or None when they cover all of it."""
    rest = [whole(shape)] if math.prod(shape) else []
    for box in boxes:
        rest = list(itertools.chain.from_iterable(subtract(part, box) for part in rest))
        if not rest:
            return None
    return rest[0] if rest else None


def cells(box: Box, cell: Sequence[int]) -> Box:
    """The cells of a grid that a box touches, as a box of cell indices.

    The grid starts at the tensor's origin; ``cell`` is the shape of one cell in elements.
    """
    first = tuple(o // c for o, c in zip(box.offsets, cell, strict=True))
    last = tuple(-(-e // c) for e, c in zip(box.ends, cell, strict=True))
    return Box(first, tuple(e - o for o, e in zip(first, last, strict=True)))


def overlap_counts(box: Box, cell: Sequence[int]) -> Iterator[list[int]]:
    """Per dim, how many of the box's indices fall into each cell that it touches.

    The number of elements of the box in cell ``(i, j, …)`` is the product of the dims' counts.
    """
    for offset, length, size in zip(box.offsets, box.lengths, cell, strict=True):
        end = offset + length
        starts = range(offset // size * size, end, size)
        yield [min(end, s + size) - max(offset, s) for s in starts]

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Strided views, and the boxes that they address in a row-major tensor.

A weight loader narrows, transposes and reshapes before it copies. All that is left of this in the
end is an offset, a size and a stride on either side of the copy; here they become a box again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stagingd.boxes import Box, Shape


@dataclass(frozen=True, slots=True)
class View:
    """Some elements of a tensor's memory: ``offset``, ``shape`` and ``stride``, all in elements.

    The offset is counted from the tensor's first element.
    """

    offset: int
    shape: Shape
    stride: Shape

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Run:
    """Dims of a copy that one stride traverses: their size, and the step in the source and in the target."""

    size: int
    source: int
    target: int


def row_major(shape: Sequence[int]) -> Shape:
    """The strides of a contiguous tensor of this shape, in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def align(source: View, target: View, shape: Sequence[int]) -> tuple[Box, View] | None:
    """The box that ``source`` addresses in a row-major tensor, and ``target`` with one dim per dim of that box.

    ``source`` and ``target`` are the two sides of one copy and have the same shape; any order of dims, split or
    merged dims and dims of size 1 are undone on both sides together.

    Args:
        source: a view of a contiguous tensor of ``shape``; it has elements.
        target: a view of any other tensor, of the shape of ``source``.
        shape: the global shape of the source tensor.

    Returns:
        The box, and the target view whose shape is ``box.lengths``; None when the source's elements are not a
        box, or when the target cannot be addressed by one stride per dim of it.
    """
    offsets = _coordinates(source.offset, shape)
    lengths, strides = [1] * len(shape), [1] * len(shape)
    if any(step <= 0 for size, step in zip(source.shape, source.stride, strict=True) if size > 1):
        return None
    for run in _merged(source, target):
        if not _lay(run, shape, offsets, lengths, strides):
            return None
    return Box(offsets, tuple(lengths)), View(target.offset, tuple(lengths), tuple(strides))


def box_of(view: View, shape: Sequence[int]) -> Box | None:
    """The box that a view addresses in a row-major tensor of this shape, or None when it is not one."""
    aligned = align(view, view, shape)
    return aligned[0] if aligned else None


def join_adjacent(parts: Iterable[tuple[Box, View]]) -> list[tuple[Box, View]]:
    """The same copies in fewer: boxes of one tensor that continue each other, and whose targets do so too, are one.

    Args:
        parts: disjoint boxes of one tensor, each with the target of its elements, as ``align`` gives them.

    Returns:
        Boxes and targets of which the same holds, in the order of the boxes' offsets.
    """
    joined = list(parts)
    count = 0
    while len(joined) > 1 and count != len(joined):
        count = len(joined)
        for d in reversed(range(len(joined[0][0].offsets))):
            joined = _joined_along(joined, d)
    return sorted(joined, key=lambda part: part[0].offsets)


def _joined_along(parts: list[tuple[Box, View]], d: int) -> list[tuple[Box, View]]:
    abreast: defaultdict[tuple[Shape, Shape], list[tuple[Box, View]]] = defaultdict(list)
    for part in parts:
        abreast[_with(part[0].offsets, d, 0), _with(part[0].lengths, d, 0)].append(part)
    joined: list[tuple[Box, View]] = []
    for row in abreast.values():
        row.sort(key=lambda part: part[0].offsets[d])
        last = row[0]
        for part in row[1:]:
            both = _continued(last, part, d)
            if both is None:
                joined.append(last)
            last = both or part
        joined.append(last)
    return joined


def _continued(first: tuple[Box, View], second: tuple[Box, View], d: int) -> tuple[Box, View] | None:
    """Two copies as one, where the second continues the first along dim ``d`` on both sides, or None."""
    (box, target), (next_box, next_target) = first, second
    size, next_size = box.lengths[d], next_box.lengths[d]
    step, rest = divmod(next_target.offset - target.offset, size)
    if box.offsets[d] + size != next_box.offsets[d] or rest or step <= 0:
        return None
    strides = target.stride if size > 1 else _with(target.stride, d, step)
    next_strides = next_target.stride if next_size > 1 else _with(next_target.stride, d, step)
    if strides[d] != step or strides != next_strides:
        return None
    lengths = _with(box.lengths, d, size + next_size)
    return Box(box.offsets, lengths), View(target.offset, lengths, strides)


def _with(values: Shape, d: int, value: int) -> Shape:
    return (*values[:d], value, *values[d + 1 :])


def _coordinates(offset: int, shape: Sequence[int]) -> Shape:
    steps = row_major(shape)
    return tuple(offset // step % size for step, size in zip(steps, shape, strict=True))


def _merged(source: View, target: View) -> list[_Run]:
    """The dims that move, slowest first; those that follow each other on both sides are made one."""
    dims = zip(source.shape, source.stride, target.stride, strict=True)
    runs: list[_Run] = []
    for run in sorted((_Run(*dim) for dim in dims if dim[0] > 1), key=lambda run: -run.source):
        last = runs[-1] if runs else None
        if last and (last.source, last.target) == (run.size * run.source, run.size * run.target):
            runs[-1] = _Run(last.size * run.size, run.source, run.target)
        else:
            runs.append(run)
    return runs


def _lay(run: _Run, shape: Sequence[int], offsets: Shape, lengths: list[int], strides: list[int]) -> bool:
    """Writes the lengths and target strides of the dims that ``run`` runs through; False when it does not fit."""
    steps = row_major(shape)
    size, target = run.size, run.target
    at = max((d for d in range(len(shape)) if shape[d] > 1 and steps[d] == run.source), default=-1)
    for d in range(at, -1, -1):
        if shape[d] == 1:
            continue
        if lengths[d] > 1:
            return False
        lengths[d], strides[d] = min(size, shape[d]), target
        if offsets[d] + size <= shape[d]:
            return True
        if offsets[d] or size % shape[d]:
            return False
        size, target = size // shape[d], target * shape[d]
    return False

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A read plan's entries as matrices of their parameters: rows and columns on both sides, and where scales are counted.

Arithmetic only. Kernels move matrices; grids of scales are counted in a parameter's rows and columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stagingd.boxes import Box, Shape, whole
from stagingd_vllm.plan import PlanEntry, PlanRefused
from stagingd_vllm.views import row_major


@dataclass(frozen=True, slots=True)
class Matrix:
    """Part of an entry: a matrix of its parameter, and the elements of the staged tensor that go there.

    Sizes, strides and offsets in elements.

    Attributes:
        entry: what it is part of.
        box: which box of the staged tensor.
        group: the box of the tensor that has the same leading index: all of the tensor, or one expert's part of it.
        source: from the tensor's first element to the matrix's.
        source_row, source_column: from one row, and from one column, to the next in the tensor.
        leading: its index in the parameter's leading dims (of experts, the expert).
        row, column: where it begins in the parameter's last two dims.
        rows, columns: its size.
        rows_of, columns_of: the tensor's dim that runs along the parameter's rows dim, and along its columns dim;
            None where the matrix has one row, or one column.
    """

    entry: PlanEntry
    box: Box
    group: Box
    source: int
    source_row: int
    source_column: int
    leading: Shape
    row: int
    column: int
    rows: int
    columns: int
    rows_of: int | None
    columns_of: int | None


def matrices(entry: PlanEntry, tensor: Shape, parameter: Shape) -> Iterator[Matrix]:
    """The matrices of an entry, in the order of the tensor.

    Args:
        entry: one read.
        tensor: the global shape of its tensor.
        parameter: the shape of its parameter.

    Raises:
        PlanRefused: a dim of the tensor runs through several dims of the parameter.
    """
    shape = (1,) * (2 - len(parameter)) + parameter
    at = _coordinates(entry.region.offset, shape)
    dims = _dims(entry, shape, at)
    rows_of, columns_of = dims.get(len(shape) - 2), dims.get(len(shape) - 1)
    steps = row_major(tensor)
    leading = [(target, source) for target, source in sorted(dims.items()) if target < len(shape) - 2]
    lengths = tuple(n if dim in (rows_of, columns_of) else 1 for dim, n in enumerate(entry.source.lengths))
    for index in itertools.product(*(range(entry.source.lengths[source]) for _, source in leading)):
        place, start = list(at[:-2]), list(entry.source.offsets)
        group = whole(tensor)
        for (target, source), i in zip(leading, index, strict=True):
            place[target] += i
            start[source] += i
            group = _only(group, source, start[source])
        yield Matrix(
            entry=entry,
            box=Box(tuple(start), lengths),
            group=group,
            source=sum(i * step for i, step in zip(start, steps, strict=True)),
            source_row=steps[rows_of] if rows_of is not None else 0,
            source_column=steps[columns_of] if columns_of is not None else 0,
            leading=tuple(place),
            row=at[-2],
            column=at[-1],
            rows=lengths[rows_of] if rows_of is not None else 1,
            columns=lengths[columns_of] if columns_of is not None else 1,
            rows_of=rows_of,
            columns_of=columns_of,
        )


def padded(matrix: Matrix, rows: int, padded_rows: int) -> Iterator[Matrix]:
    """The same matrix where its parameter's parts of so many rows lie further apart: cut at their ends.

    Args:
        matrix: as ``matrices`` gives it.
        rows: of each part, as the loader sees them.
        padded_rows: of each part, as they live.
    """
    first, end = matrix.row, matrix.row + matrix.rows
    cuts = [first, *range((first // rows + 1) * rows, end, rows), end]
    for start, stop in itertools.pairwise(cuts):
        skipped = start - first
        yield replace(
            matrix,
            box=matrix.box if matrix.rows_of is None else _rows(matrix.box, matrix.rows_of, skipped, stop - start),
            source=matrix.source + skipped * matrix.source_row,
            row=start // rows * padded_rows + start % rows,
            rows=stop - start,
        )


def _rows(box: Box, dim: int, skipped: int, count: int) -> Box:
    return Box(
        tuple(o + skipped * (d == dim) for d, o in enumerate(box.offsets)),
        tuple(count if d == dim else n for d, n in enumerate(box.lengths)),
    )


def _only(box: Box, dim: int, index: int) -> Box:
    return Box(
        tuple(index if d == dim else o for d, o in enumerate(box.offsets)),
        tuple(1 if d == dim else n for d, n in enumerate(box.lengths)),
    )


def _coordinates(offset: int, shape: Shape) -> Shape:
    return tuple(offset // step % size for step, size in zip(row_major(shape), shape, strict=True))


def _dims(entry: PlanEntry, shape: Shape, at: Shape) -> dict[int, int]:
    """For every dim of the parameter that the entry runs along, the tensor's dim that does."""
    steps = row_major(shape)
    dims = {}
    for source, (length, stride) in enumerate(zip(entry.region.shape, entry.region.stride, strict=True)):
        if length == 1:
            continue
        target = next((d for d in range(len(shape)) if shape[d] > 1 and steps[d] == stride), None)
        if target is None or target in dims or at[target] + length > shape[target]:
            raise PlanRefused(
                f"dim {source} of {entry.tensor} runs through several dims of {entry.region.parameter} {shape}",
                remedy="stage the tensor in the shape of the checkpoint",
                tensor=entry.tensor,
                parameter=entry.region.parameter,
            )
        dims[target] = source
    return dims

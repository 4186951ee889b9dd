# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is moved from a slot into live memory, element by element, and the tables by which kernels carry it out.

A move is one matrix of staged elements and its absolute places. All but the slot's address is the same for every
version, so a table is made once. Its tiles have 8192 elements each; moves of one kind share a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum, StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from stagingd.dtypes import ITEM_BYTES, WITH_MOMENTS
from stagingd.errors import StagingError

TILE: Final = 8192
"""Elements of a tile."""
TILE_COLUMNS: Final = (2048, 1024, 512, 256, 128, 64)
"""Widths that a tile can have, the preferred one first; a matrix that is one long row has tiles of 1 x 8192."""
ALIGNMENT: Final = 16
"""Bytes, and elements, that an aligned kind's addresses, sizes and strides are multiples of: one vector load."""
LARGEST: Final = 2**31 - 1 - TILE
"""The greatest row or column number of a matrix or of its grid of scales: a kernel counts them in 32 bits."""

Table = npt.NDArray[np.int64]


class MoveRefused(StagingError):
    """A move contradicts itself, or a slot does not fit it."""

    code = "move_refused"


class Treatment(StrEnum):
    """What happens to an element on its way.

    The FP8 treatments are vLLM's ``scaled_fp8_conversion``: the scaled value goes through ``fminf(x, 448)`` and then
    ``fmaxf(x, -448)``, which return the number where the other is NaN. So a NaN becomes +448 (0x7E), be it one that
    was staged (a sealed version has none, unless its stage was told to warn only) or one that a scale of 0 made of
    zeros, as in an all-zero tensor with a scale per tensor. There the dequantized value is 0 all the same.
    """

    COPY = "copy"
    """Bit for bit; any dtype."""
    CONVERT = "convert"
    """Between bfloat16, float16 and float32, rounded to nearest, ties to even. A NaN stays one; which, is not said."""
    MULTIPLY = "multiply"
    """fp32(value) * (1 / scale), the reciprocal rounded to fp32, to float8_e4m3fn: what vLLM does per tensor and per
    block."""
    DIVIDE = "divide"
    """fp32(value) / scale, to float8_e4m3fn: what vLLM does per channel."""
    ROUND = "round"
    """fp32(value) / scale, rounded to the staged dtype, then to an integer, ties to even, and clamped to -127..127:
    int8 as vLLM's ``Int8OnlineMoEMethod`` makes it (``w.div(scale).round().clamp(-127, 127)`` in the model's dtype,
    which is why the quotient is rounded twice). 0 / 0 and NaN become 0, as a GPU's conversion makes them."""
    PEAK = "peak"
    """Nothing is written but, into the scale's place, the greatest magnitude of the elements that share it, if it is
    greater than what is there: zero the grid first. A NaN counts as greater than infinity."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Where a matrix's scales are: a grid of fp32 in the memory of its target.

    Element (r, c) has the scale number ``(first_row + r) // row_cell * row_stride + (first_column + c) //
    column_cell``; a term is 0 where its cell is 0.

    Attributes:
        address: of scale number 0, in bytes.
        row_cell, column_cell: rows and columns that share a scale; 0: all of them.
        first_row, first_column: the matrix's first element in the coordinates of the grid's elements.
        row_stride: scales per row of cells.
    """

    address: int
    row_cell: int = 0
    column_cell: int = 0
    first_row: int = 0
    first_column: int = 0
    row_stride: int = 1


@dataclass(frozen=True, slots=True)
class Move:
    """One matrix of staged elements, where it goes, and what happens to it on its way.

    Attributes:
        source: of its first element, in bytes from the slot's start.
        source_row, source_column: strides in elements.
        rows, columns: its size.
        target: absolute address of the first element's place, in bytes; a PEAK has none.
        target_row, target_column: strides in elements.
        staged, live: dtypes by name, such as "bfloat16"; a PEAK's live one does not count.
        treatment: what happens to the elements.
        scales: where their scales are, for the treatments that take any.
    """

    source: int
    source_row: int
    source_column: int
    rows: int
    columns: int
    target: int
    target_row: int
    target_column: int
    staged: str
    live: str
    treatment: Treatment
    scales: Scales | None = None

    @property
    def source_end(self) -> int:
        """Where its last element ends, in bytes from the slot's start."""
        last = (self.rows - 1) * self.source_row + (self.columns - 1) * self.source_column
        return self.source + (last + 1) * ITEM_BYTES[self.staged]


def refuse_short(slot_bytes: int, end: int) -> None:
    """Raises MoveRefused: a slot has fewer bytes than moves read."""
    if slot_bytes < end:
        raise MoveRefused(
            f"moves reach to byte {end} of a slot of {slot_bytes}", remedy="detach from the stage and attach again"
        )


class Job(IntEnum):
    """Columns of the job table: int64, one row per move, sizes and strides in elements. See Move and Scales."""

    SOURCE = 0
    SOURCE_ROW = 1
    SOURCE_COLUMN = 2
    ROWS = 3
    COLUMNS = 4
    TARGET = 5
    TARGET_ROW = 6
    TARGET_COLUMN = 7
    FIRST_TILE = 8
    """The number of its first tile; its tiles follow each other, row by row."""
    SCALES = 9
    ROW_CELL = 10
    COLUMN_CELL = 11
    FIRST_ROW = 12
    FIRST_COLUMN = 13
    ROW_STRIDE = 14


JOB_COLUMNS: Final = len(Job)


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for.

    Attributes:
        staged, live: dtypes by name; those of a copy are the integers of the same size, those of a peak are equal.
        treatment: what happens to the elements.
        tile_columns: a tile's width; it has ``TILE // tile_columns`` rows.
        dense: all column strides are 1.
        aligned: and all addresses are multiples of 16 bytes, given a slot that is; columns and strides of 16 elements.
        per_row, per_column: whether the scale depends on the row and on the column.
        group: so many neighbours of a row, counted from a tile's first column, always share a scale.
    """

    staged: str
    live: str
    treatment: Treatment
    tile_columns: int
    dense: bool
    aligned: bool
    per_row: bool
    per_column: bool
    group: int

    @property
    def tile_rows(self) -> int:
        """A tile's height."""
        return TILE // self.tile_columns


@dataclass(frozen=True, eq=False)
class KindTable:
    """The moves of one kind, in the order of their sources.

    Attributes:
        kind: what they have in common.
        jobs: (moves, JOB_COLUMNS) int64.
        tiles: (tiles,) int32: whose a tile is. Which of its move's tiles it is follows from ``Job.FIRST_TILE``, so that
            8192 elements cost 4 bytes of table.
    """

    kind: Kind
    jobs: Table
    tiles: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Size of both tables."""
        return self.jobs.nbytes + self.tiles.nbytes

    def corners(self) -> Table:
        """(tiles, 3) int64: the job of each tile, and its first row and column. The kernel does the same."""
        number = np.arange(len(self.tiles)) - self.jobs[self.tiles, Job.FIRST_TILE]
        across = -(-self.jobs[self.tiles, Job.COLUMNS] // self.kind.tile_columns)
        down, right = number // across, number % across
        return np.stack([self.tiles, down * self.kind.tile_rows, right * self.kind.tile_columns], axis=1)


def table(moves: Sequence[Move]) -> tuple[KindTable, ...]:
    """The tables of some moves, one per kind. Their targets must not overlap: kernels write in any order.

    Raises:
        MoveRefused: a treatment lacks its scales or does not fit the dtypes; a copy changes the dtype; a size or a
            stride is not positive; an address is not a multiple of its element's size.
    """
    for number, move in enumerate(moves):
        fault = _fault(move)
        if fault:
            raise MoveRefused(
                f"Move {number}, of {move.rows} x {move.columns} {move.staged}, {fault}",
                remedy="this is a mistake in the layout that made it: report it",
                move=number,
            )
    groups: dict[tuple[str, str, Treatment], list[Move]] = {}
    for move in sorted(moves, key=lambda move: move.source):
        groups.setdefault(_dtypes(move), []).append(move)
    return tuple(made for key in sorted(groups) for made in _kind_tables(key, groups[key]))


_NO_SCALES: Final = Scales(0)
_QUANTIZED: Final = {Treatment.MULTIPLY: "float8_e4m3fn", Treatment.DIVIDE: "float8_e4m3fn", Treatment.ROUND: "int8"}
_OF_SIZE: Final = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def _fault(move: Move) -> str | None:
    """What is wrong with a move."""
    if move.staged not in ITEM_BYTES:
        return "has a dtype that no stage can hold"
    if min(move.rows, move.columns) < 1 or max(move.rows, move.columns) > LARGEST:
        return "has a size that is not positive, or too large"
    return _dtype_fault(move) or _place_fault(move) or _scales_fault(move)


def _dtype_fault(move: Move) -> str | None:
    if move.treatment is Treatment.COPY:
        return None if move.live == move.staged else f"would be copied into {move.live}, which is not a copy"
    if move.staged not in WITH_MOMENTS:
        return f"can only be copied, not treated by {move.treatment}"
    if move.treatment is Treatment.CONVERT and (move.live not in WITH_MOMENTS or move.live == move.staged):
        return f"cannot be converted to {move.live}"
    wanted = _QUANTIZED.get(move.treatment)
    if wanted and move.live != wanted:
        return f"cannot become {move.live} by {move.treatment}: only {wanted}"
    return None


def _place_fault(move: Move) -> str | None:
    strides = [(move.rows, move.source_row), (move.columns, move.source_column)]
    if move.source < 0 or move.source % ITEM_BYTES[move.staged]:
        return f"has its source at byte {move.source}, which is no multiple of its element's size"
    if move.treatment is not Treatment.PEAK:
        strides += [(move.rows, move.target_row), (move.columns, move.target_column)]
        if move.target < 1 or move.target % ITEM_BYTES[move.live]:
            return f"has its target at address {move.target}, which is no multiple of its element's size"
    if any(size > 1 and stride < 1 for size, stride in strides):
        return "has a stride that is not positive"
    return None


def _scales_fault(move: Move) -> str | None:
    if move.treatment in (Treatment.COPY, Treatment.CONVERT):
        return None if move.scales is None else f"has scales, for which {move.treatment} has no use"
    if move.scales is None:
        return f"has no scales, which {move.treatment} needs"
    scales = move.scales
    if scales.address < 1 or scales.address % ITEM_BYTES["float32"]:
        return f"has its scales at address {scales.address}, which is no multiple of 4"
    if min(astuple(scales)) < 0 or max(scales.first_row + move.rows, scales.first_column + move.columns) > LARGEST:
        return "has a grid of scales with a number that is negative or too large"
    return None


def _dtypes(move: Move) -> tuple[str, str, Treatment]:
    if move.treatment is Treatment.COPY:
        name = _OF_SIZE[ITEM_BYTES[move.staged]]
        return name, name, move.treatment
    return move.staged, move.staged if move.treatment is Treatment.PEAK else move.live, move.treatment


def _kind_tables(dtypes: tuple[str, str, Treatment], moves: Sequence[Move]) -> list[KindTable]:
    """The tables of moves of the same dtypes and treatment, which may differ in the rest of their kinds."""
    jobs = np.array([_job(move) for move in moves], dtype=np.int64)
    _make_long_rows(jobs)
    features = np.stack(_features(jobs), axis=1)
    kinds, which = np.unique(features, axis=0, return_inverse=True)
    made = []
    for number, (width, dense, aligned, per_row, per_column, group) in enumerate(kinds.tolist()):
        kind = Kind(*dtypes, width, bool(dense), bool(aligned), bool(per_row), bool(per_column), group)
        made.append(_kind_table(kind, jobs[which.reshape(-1) == number]))
    return made


def _job(move: Move) -> tuple[int, ...]:
    scales = move.scales or _NO_SCALES
    peak = move.treatment is Treatment.PEAK
    target = (0, move.source_row, move.source_column) if peak else (move.target, move.target_row, move.target_column)
    return (
        *(move.source, move.source_row, move.source_column, move.rows, move.columns, *target, 0),
        *(scales.address, scales.row_cell, scales.column_cell, scales.first_row, scales.first_column),
        scales.row_stride,
    )


def _make_long_rows(jobs: Table) -> None:
    """Matrices that are contiguous on both sides and have at most one scale: one row each, of all their elements."""
    one_row, columns = jobs[:, Job.ROWS] == 1, jobs[:, Job.COLUMNS].copy()
    long = (jobs[:, Job.ROW_CELL] == 0) & (jobs[:, Job.COLUMN_CELL] == 0)
    for row, column in ((Job.SOURCE_ROW, Job.SOURCE_COLUMN), (Job.TARGET_ROW, Job.TARGET_COLUMN)):
        jobs[columns == 1, column] = 1
        jobs[one_row, row] = columns[one_row]  # a stride that nothing walks: such as keep a kind together
        long &= (jobs[:, column] == 1) & (jobs[:, row] == columns)
    jobs[long, Job.COLUMNS] *= jobs[long, Job.ROWS]
    jobs[long, Job.ROWS] = 1
    jobs[long, Job.SOURCE_ROW] = jobs[long, Job.TARGET_ROW] = jobs[long, Job.COLUMNS]


def _features(jobs: Table) -> list[Table]:
    """The fields of Kind that follow from the jobs, one array each."""
    rows, columns = jobs[:, Job.ROWS], jobs[:, Job.COLUMNS]
    per_row, per_column = jobs[:, Job.ROW_CELL] > 0, jobs[:, Job.COLUMN_CELL] > 0
    dense = (jobs[:, Job.SOURCE_COLUMN] == 1) & (jobs[:, Job.TARGET_COLUMN] == 1)
    aligned = [Job.SOURCE, Job.TARGET, Job.COLUMNS, Job.SOURCE_ROW, Job.TARGET_ROW]
    long = dense & (rows == 1) & ~per_row & ~per_column
    width = np.where(long, TILE, _tile_columns(rows, columns))
    shared = np.gcd(jobs[:, Job.FIRST_COLUMN], jobs[:, Job.COLUMN_CELL])
    group = np.where(per_column, np.minimum(shared & -shared, width), width)
    return [width, dense, dense & (jobs[:, aligned] % ALIGNMENT == 0).all(axis=1), per_row, per_column, group]


def _tile_columns(rows: Table, columns: Table) -> Table:
    """The width by which a matrix takes the fewest tiles; of several such, the widest."""
    counts = np.stack([-(-rows // (TILE // width)) * -(-columns // width) for width in TILE_COLUMNS])
    widths: Table = np.array(TILE_COLUMNS, dtype=np.int64)
    best: Table = widths[counts.argmin(axis=0)]
    return best


def _kind_table(kind: Kind, jobs: Table) -> KindTable:
    down = -(-jobs[:, Job.ROWS] // kind.tile_rows)
    counts = down * -(-jobs[:, Job.COLUMNS] // kind.tile_columns)
    jobs[:, Job.FIRST_TILE] = np.cumsum(counts) - counts
    return KindTable(kind, jobs, np.repeat(np.arange(len(jobs), dtype=np.int32), counts))

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernel that casts and takes moments is told: its job table, and the kinds of work it is compiled for.

It works on strips: up to 128 rows of a matrix that lie between two multiples of 128 of the global tensor's
rows, so that no 128 x 128 block is cut between two programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch

from stagingd.formats import StageFormat


class Job(IntEnum):
    """Columns of the job table: int64, one row per matrix, sizes and strides in elements.

    Row ``r`` of a matrix is row ``q = FIRST_ROW + r`` of an order with up to four levels, slowest first: level ``i``
    has ``SIZE_i`` indices, ``STRIDE_i`` apart. So rows in another order than the stage's are read in place.
    """

    ADDRESS = 0
    """Of the source's first element, in bytes."""
    ROWS = 1
    COLUMNS = 2
    FIRST_ROW = 3
    SIZE_1 = 4
    SIZE_2 = 5
    SIZE_3 = 6
    STRIDE_0 = 7
    STRIDE_1 = 8
    STRIDE_2 = 9
    STRIDE_3 = 10
    COLUMN_STRIDE = 11
    TARGET = 12
    """Where in the scratch memory the packed rows begin."""
    ROWS_LEFT = 13
    """Rows of the first block that lie before the matrix."""
    COLUMNS_LEFT = 14
    """Columns of the first block that lie before the matrix."""
    ROW_CELL = 15
    """Where among the chunk's cells those of the rows begin."""
    BLOCK_CELL = 16
    """Where among the chunk's cells those of the blocks begin."""


JOB_COLUMNS: Final = len(Job)
STRIP_FIELDS: Final = 4
"""What is kept of cells and strips, field by field: mean, M2, amax (fp32), and the number of non-finite values
(int32)."""

SOURCES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Dtypes that the kernel reads and writes."""


@dataclass(frozen=True)
class Work:
    """What the kernel does at once.

    Attributes:
        jobs: the job table, (jobs, JOB_COLUMNS) int64.
        strips: (strips, 2) int32: a job, and which of its strips.
        first_strip, count: which strips; all of one kind.
        scratch: where the packed values go, if the kind says so; its dtype is the staged one.
        cells: (STRIP_FIELDS, cells) float32: the moments of rows and blocks; the last field holds int32.
        partials: (STRIP_FIELDS, strips) float32: the moments of each strip, of which the tensor's are pooled.
        kind: what the strips have in common.
        with_rows, with_blocks: whether the moments of these grids are wanted.
    """

    jobs: torch.Tensor
    strips: torch.Tensor
    first_strip: int
    count: int
    scratch: torch.Tensor
    cells: torch.Tensor
    partials: torch.Tensor
    kind: Kind
    with_rows: bool
    with_blocks: bool


@dataclass(frozen=True)
class QuantizingWork:
    """What the kernel that quantizes does at once.

    Attributes:
        jobs: as of ``Work``, but ``ROW_CELL`` is where among the scales those of the matrix begin.
        strips, first_strip, count: as of ``Work``.
        scratch: where the packed bytes go, uint8.
        scales: float32, of all cells of the format's grid that the matrices touch.
        kind: what the strips have in common; ``staged`` is the dtype that is quantized from.
        stage_format: how values and scales become bytes.
    """

    jobs: torch.Tensor
    strips: torch.Tensor
    first_strip: int
    count: int
    scratch: torch.Tensor
    scales: torch.Tensor
    kind: Kind
    stage_format: StageFormat


@dataclass(frozen=True)
class Kind:
    """What the kernel is compiled for.

    Attributes:
        source, staged: dtypes.
        dense: every source's column stride is 1.
        aligned: every source's address is a multiple of 16 bytes, and all sizes and other strides of 8 elements.
        full: every matrix is made of whole blocks.
        packed: the values go to the scratch memory; else their moments are taken, and nothing more.
    """

    source: torch.dtype
    staged: torch.dtype
    dense: bool
    aligned: bool
    full: bool
    packed: bool

    @property
    def order(self) -> tuple[str, str, bool, bool, bool, bool]:
        """To sort by."""
        return str(self.source), str(self.staged), self.dense, self.aligned, self.full, self.packed

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How a set of shards is flushed from a device: the chunks, and the tables that the kernel reads.

A plan is made once for shards that are put together, and used for every version: only the shards' addresses are
filled in anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from stagingd.catalog import Catalog, OwnedBox
from stagingd.format_scales import RankLimits
from stagingd.moments import BLOCK, Grid, StoredMoments
from stagingd_client import chunks
from stagingd_client.chunks import Chunk, Matrix, Piece
from stagingd_client.holdings import Put
from stagingd_client.strips import JOB_COLUMNS, SOURCES, Job, Kind

VECTOR_BYTES: Final = 16
VECTOR_ELEMENTS: Final = 8


@dataclass(frozen=True)
class Launch:
    """Strips that one kernel takes."""

    kind: Kind
    first_strip: int
    count: int


@dataclass(frozen=True)
class Group:
    """Chunks whose moments are copied together; the pieces whose last chunk is among them have landed then.

    Attributes:
        chunks: numbers of the chunks.
        strips: numbers of their strips.
        pieces: numbers of the pieces.
        measures: whether moments are all that is taken: the values are quantized later.
    """

    chunks: range
    strips: range
    pieces: range
    measures: bool


@dataclass(frozen=True)
class Plan:
    """Chunks, their launches, and the tables.

    Attributes:
        chunks: with the launches of each.
        groups: all chunks, strips and pieces, in their order.
        jobs: the job table, (jobs, JOB_COLUMNS) int64, without addresses.
        sources: per job, the number of its shard among ``puts``.
        offsets: per job, from the shard's address to the matrix's, in bytes.
        misaligned: per job, the matrix's address modulo 16 that the plan is made for.
        strips: (strips, 2) int32: job, and strip of the job's matrix.
        strip_pieces: per strip, the number of its piece.
        strip_elements: per strip, how many elements it has.
        pieces: what is flushed.
        tensor_cells: per piece, the cell that its own moments go to; none where that grid is not kept.
        unread: boxes that the kernel does not read, with the shards that hold them.
    """

    chunks: tuple[tuple[Chunk, tuple[Launch, ...]], ...]
    groups: tuple[Group, ...]
    jobs: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    misaligned: npt.NDArray[np.int64]
    strips: npt.NDArray[np.int32]
    strip_pieces: npt.NDArray[np.int64]
    strip_elements: npt.NDArray[np.int64]
    pieces: tuple[Piece, ...]
    tensor_cells: npt.NDArray[np.int64]
    unread: tuple[Piece, ...]

    @property
    def cells(self) -> int:
        """The most cells that a group of chunks has."""
        return max((chunk.cells for chunk, _ in self.chunks), default=0)

    def addresses(self, shards: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Per job, where its matrix lies, given the address of each shard."""
        return np.asarray(shards[self.sources] + self.offsets)

    def fits(self, addresses: npt.NDArray[np.int64]) -> bool:
        """Whether matrices at these addresses are aligned as the plan supposes."""
        return bool(np.array_equal(addresses % VECTOR_BYTES, self.misaligned))

    def store_tensor_cells(self, group: Group, partials: npt.NDArray[np.float32], stored: StoredMoments) -> None:
        """Pool the moments of strips into those of whole boxes, of a group's pieces, and store them.

        Source: the pairwise formulae of Chan, Golub and LeVeque (1979), for many sets at once.

        Args:
            group: whose pieces.
            partials: (4, strips) float32: mean, M2, amax, and the number of non-finite values as int32; all strips of
                these pieces have to be there.
            stored: the slot's moments.
        """
        first, boxes = group.pieces.start, len(group.pieces)
        some = np.flatnonzero((self.strip_pieces >= first) & (self.strip_pieces < first + boxes))
        number = self.strip_pieces[some] - first
        mean, m2, amax = (field[some].astype(np.float64) for field in partials[:3])
        nonfinite = partials[3, some].view(np.int32)
        count = self.strip_elements[some] - nonfinite
        total = np.bincount(number, count, boxes)
        center = np.bincount(number, count * mean, boxes) / np.maximum(total, 1)
        away = mean - center[number]
        greatest = np.zeros(boxes)
        np.maximum.at(greatest, number, amax)
        cells = self.tensor_cells[first : first + boxes]
        stored.mean[cells] = center
        stored.m2[cells] = np.bincount(number, m2 + count * away * away, boxes)
        stored.amax[cells] = greatest
        stored.nonfinite[cells] = np.bincount(number, nonfinite, boxes)


def make(puts: Sequence[Put], owned: Mapping[str, Sequence[OwnedBox]], catalog: Catalog, limit: int) -> Plan:
    """Plan the flush of shards.

    Args:
        puts: the shards.
        owned: by the stage's tensor, the boxes that this rank owns.
        catalog: the stage's.
        limit: bytes of scratch memory for a chunk.
    """
    read: list[Matrix] = []
    taken: list[Piece] = []
    unread = []
    # What is quantized is measured first: its scales are worked out while the rest is copied.
    for piece in sorted(chunks.pieces(puts, owned, catalog), key=lambda piece: _is_held(piece, catalog)):
        made = _readable(len(taken), piece, puts, catalog, limit)
        if made is None:
            unread.append(piece)
        else:
            read += made
            taken.append(piece)
    kinds = {i: _Kinds(puts, piece, catalog) for i, piece in enumerate(taken)}
    tables = _Tables()
    cut = tuple((chunk, tables.add(chunk, kinds)) for chunk in chunks.chunks(read, catalog, limit))
    kept = Grid.TENSOR in catalog.grids
    cells = [catalog.first_cell(piece.owned, Grid.TENSOR) for piece in taken] if kept else []
    return tables.plan(cut, tuple(taken), np.asarray(cells, np.int64), tuple(unread))


def make_quantizing(
    puts: Sequence[Put], owned: Mapping[str, Sequence[OwnedBox]], catalog: Catalog, limit: int
) -> tuple[Plan, RankLimits]:
    """Plan how what is quantized of shards is flushed, once its scales are known; arguments as of ``make``.

    Returns:
        The plan, whose jobs count scales; and of what these are made: first of its pieces, then of those that the
        kernel does not read.
    """
    assert catalog.format is not None  # else nothing is quantized
    read: list[tuple[Piece, list[Matrix]]] = []
    unread = []
    for piece in chunks.pieces(puts, owned, catalog):
        if _is_held(piece, catalog):
            continue
        made = _readable(len(read), piece, puts, catalog, limit)
        if made is None:
            unread.append(piece)
        else:
            read.append((piece, made))
    taken = [piece for piece, _ in read]
    limits = RankLimits(catalog, [piece.owned for piece in (*taken, *unread)])
    matrices = [
        chunks.quantized(
            matrix, catalog, catalog.first_cell(piece.owned, catalog.format.grid), limits.slice_of(number).start
        )
        for number, (piece, made) in enumerate(read)
        for matrix in made
    ]
    kinds = {i: _Kinds(puts, piece, catalog) for i, piece in enumerate(taken)}
    tables = _Tables()
    cut = tuple((chunk, tables.add(chunk, kinds)) for chunk in chunks.quantized_chunks(matrices, limit))
    return tables.plan(cut, tuple(taken), np.zeros(0, np.int64), tuple(unread)), limits


def _is_held(piece: Piece, catalog: Catalog) -> bool:
    """Whether its tensor is held as it is."""
    return catalog.tensors[piece.owned.tensor].quantized_from is None


def _readable(number: int, piece: Piece, puts: Sequence[Put], catalog: Catalog, limit: int) -> list[Matrix] | None:
    staged: torch.dtype = getattr(torch, catalog.tensors[piece.owned.tensor].value_dtype)
    if puts[piece.source].shard.dtype not in SOURCES or staged not in SOURCES:
        return None
    made = chunks.matrices(number, piece, catalog)
    return made if made is not None and all(matrix.strip_bytes <= limit for matrix in made) else None


def _groups(cut: Sequence[tuple[Chunk, tuple[Launch, ...]]], pieces: int) -> tuple[Group, ...]:
    """The groups of chunks. Their matrices are in the order of pieces, so these end in that order too."""
    starts = [number for number, (chunk, _) in enumerate(cut) if chunk.begins_group]
    made = []
    strip = piece = 0
    for start, end in itertools.pairwise([*starts, len(cut)]):
        strips = sum(launch.count for _, launches in cut[start:end] for launch in launches)
        done = cut[end][0].matrices[0].piece if end < len(cut) else pieces
        measures = not cut[start][0].packed
        made.append(Group(range(start, end), range(strip, strip + strips), range(piece, done), measures))
        strip, piece = strip + strips, done
    return tuple(made)


class _Kinds:
    """Which kernel takes a matrix of a piece."""

    def __init__(self, puts: Sequence[Put], piece: Piece, catalog: Catalog) -> None:
        shard = puts[piece.source].shard
        tensor = catalog.tensors[piece.owned.tensor]
        self.source: torch.dtype = shard.dtype
        self.staged: torch.dtype = getattr(torch, tensor.value_dtype)
        self.address = shard.data_ptr()
        self.item = shard.element_size()

    def of(self, matrix: Matrix) -> Kind:
        """The kind of a matrix."""
        dense = matrix.column_stride == 1 or matrix.columns == 1
        whole = (*matrix.order.strides, matrix.columns, matrix.columns_left)
        address = self.address + matrix.offset * self.item
        aligned = dense and address % VECTOR_BYTES == 0 and not any(n % VECTOR_ELEMENTS for n in whole)
        edges = matrix.rows, matrix.columns, matrix.rows_left, matrix.columns_left
        full = aligned and not any(n % BLOCK for n in edges)
        return Kind(self.source, self.staged, dense, aligned, full, matrix.copied)


class _Tables:
    """The tables of a plan, chunk by chunk."""

    def __init__(self) -> None:
        self.jobs: list[list[int]] = []
        self.sources: list[int] = []
        self.offsets: list[int] = []
        self.misaligned: list[int] = []
        self.strips: list[tuple[int, int]] = []
        self.strip_pieces: list[int] = []
        self.strip_elements: list[int] = []

    def add(self, chunk: Chunk, kinds: Mapping[int, _Kinds]) -> tuple[Launch, ...]:
        """Add a chunk; returns its launches, one per kind of kernel."""
        first = len(self.jobs)
        by_kind = [kinds[matrix.piece].of(matrix) for matrix in chunk.matrices]
        for number, matrix in enumerate(chunk.matrices):
            self._add_job(chunk, number, matrix, kinds[matrix.piece])
        launches = []
        strips = sorted(chunks.strips_of(chunk), key=lambda strip: by_kind[strip[0]].order)
        for _, same in itertools.groupby(strips, key=lambda strip: by_kind[strip[0]].order):
            start = len(self.strips)
            for number, strip, elements in same:
                self.strips.append((first + number, strip))
                self.strip_pieces.append(chunk.matrices[number].piece)
                self.strip_elements.append(elements)
            kind = by_kind[self.strips[start][0] - first]
            launches.append(Launch(kind, start, len(self.strips) - start))
        return tuple(launches)

    def _add_job(self, chunk: Chunk, number: int, matrix: Matrix, kinds: _Kinds) -> None:
        rows, blocks = chunk.first_cells[number]
        order = matrix.order
        columns = {
            Job.ROWS: matrix.rows,
            Job.COLUMNS: matrix.columns,
            Job.FIRST_ROW: matrix.first_row,
            Job.SIZE_1: order.sizes[1],
            Job.SIZE_2: order.sizes[2],
            Job.SIZE_3: order.sizes[3],
            Job.STRIDE_0: order.strides[0],
            Job.STRIDE_1: order.strides[1],
            Job.STRIDE_2: order.strides[2],
            Job.STRIDE_3: order.strides[3],
            Job.COLUMN_STRIDE: matrix.column_stride,
            Job.TARGET: chunk.places[number] // matrix.item,
            Job.ROWS_LEFT: matrix.rows_left,
            Job.COLUMNS_LEFT: matrix.columns_left,
            Job.ROW_CELL: rows,
            Job.BLOCK_CELL: blocks,
        }
        self.jobs.append([columns.get(column, 0) for column in Job])
        self.sources.append(matrix.source)
        self.offsets.append(matrix.offset * kinds.item)
        self.misaligned.append((kinds.address + matrix.offset * kinds.item) % VECTOR_BYTES)

    def plan(
        self,
        cut: tuple[tuple[Chunk, tuple[Launch, ...]], ...],
        pieces: tuple[Piece, ...],
        tensor_cells: npt.NDArray[np.int64],
        unread: tuple[Piece, ...],
    ) -> Plan:
        """The plan of all that was added."""
        return Plan(
            chunks=cut,
            groups=_groups(cut, len(pieces)),
            jobs=np.asarray(self.jobs, np.int64).reshape(-1, JOB_COLUMNS),
            sources=np.asarray(self.sources, np.int64),
            offsets=np.asarray(self.offsets, np.int64),
            misaligned=np.asarray(self.misaligned, np.int64),
            strips=np.asarray(self.strips, np.int32).reshape(-1, 2),
            strip_pieces=np.asarray(self.strip_pieces, np.int64),
            strip_elements=np.asarray(self.strip_elements, np.int64),
            pieces=pieces,
            tensor_cells=tensor_cells,
            unread=unread,
        )

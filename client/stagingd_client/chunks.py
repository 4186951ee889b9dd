# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How a rank's boxes are flushed from a GPU: which matrices are cast together, and which copies follow.

Chunks go through scratch memory of bounded size, one after the other: the kernel packs matrices into it, then
few large copies take them to the slot. All of that is arithmetic, done once per stage; a version only fills in
the shards' addresses.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from stagingd.boxes import Box, Shape, intersect, relative
from stagingd.catalog import ALIGNMENT, Catalog, OwnedBox
from stagingd.dtypes import ITEM_BYTES
from stagingd.moments import BLOCK, FIELD_BYTES, FIELDS, Grid, field_stride
from stagingd_client.copies import Copy, coalesced
from stagingd_client.holdings import Put
from stagingd_client.layout import Layout, Rows, rows_and_columns


@dataclass(frozen=True)
class Piece:
    """A box that this rank owns, and where in one of its shards the elements are.

    Attributes:
        owned: the box, as the catalog has it.
        source: number of the shard.
        layout: of a part of the shard whose box holds the owned one.
    """

    owned: OwnedBox
    source: int
    layout: Layout

    def values(self, shard: torch.Tensor) -> torch.Tensor:
        """Its elements, of the owned box's shape, as a view of the shard."""
        return self.layout.view(shard)[relative(self.owned.box, self.layout.box).slices]


@dataclass(frozen=True)
class Matrix:
    """Rows that the kernel casts in one job; sizes, strides and offsets in elements if not said otherwise.

    Attributes:
        piece: number of the piece that it is part of.
        source: number of the shard.
        offset: from the shard's first element to the matrix's.
        first_row: number of the first row in ``order``.
        rows, columns: its size.
        order: how rows lie.
        column_stride: from one column to the next.
        item: bytes of a staged element.
        target: where in the slot it begins, in bytes.
        pitch: from one row to the next in the slot, in bytes.
        tensor_end: where in the slot its tensor ends, in bytes; up to the next tensor's place it is padding.
        rows_left, columns_left: how much of the first block lies before it.
        tensor_cell: the cell of its whole box, counted over the slot; None where that grid is not kept.
        row_cell, block_cell: its first cells of the other grids, likewise.
        copied: whether its values go to the slot, and not its moments alone.
    """

    piece: int
    source: int
    offset: int
    first_row: int
    rows: int
    columns: int
    order: Rows
    column_stride: int
    item: int
    target: int
    pitch: int
    tensor_end: int
    rows_left: int
    columns_left: int
    tensor_cell: int | None
    row_cell: int | None
    block_cell: int | None
    copied: bool

    @property
    def strips(self) -> int:
        """Rows of blocks that it touches."""
        return -(-(self.rows_left + self.rows) // BLOCK)

    @property
    def blocks(self) -> int:
        """Columns of blocks that it touches."""
        return -(-(self.columns_left + self.columns) // BLOCK)

    @property
    def strip_bytes(self) -> int:
        """Scratch memory that its largest strip needs."""
        return min(BLOCK, self.rows) * self.columns * self.item

    def padding_behind(self, length: int) -> int:
        """Bytes that belong to nobody behind its first ``length`` ones; what other ranks hold is no padding."""
        end = self.target + length
        return -end % ALIGNMENT if end == self.tensor_end else 0

    def rows_from(self, first: int, count: int) -> Matrix:
        """Some of its rows; ``first`` is 0 or at the beginning of a block."""
        return replace(
            self,
            first_row=self.first_row + first,
            rows=count,
            target=self.target + first * self.pitch,
            rows_left=self.rows_left if first == 0 else 0,
            row_cell=None if self.row_cell is None else self.row_cell + first,
            block_cell=None
            if self.block_cell is None
            else self.block_cell + (self.rows_left + first) // BLOCK * self.blocks,
        )


def matrices(number: int, piece: Piece, catalog: Catalog) -> list[Matrix] | None:
    """The matrices of a piece, or None where its elements lie in a way that the kernel does not read."""
    found = rows_and_columns(piece.layout)
    if found is None:
        return None
    before, order, column_stride = found
    tensor = catalog.tensors[piece.owned.tensor]
    held = ITEM_BYTES[tensor.dtype]
    box = _at_least_two_dims(piece.owned.box)
    shape = _padded(tensor.shape)
    inside = relative(box, _at_least_two_dims(piece.layout.box))
    cells = _first_cells(piece.owned, catalog)
    rows, columns = box.lengths[-2:]
    strips, blocks = (-(-(o % BLOCK + n) // BLOCK) for o, n in zip(box.offsets[-2:], box.lengths[-2:], strict=True))
    made = []
    for index, leading in enumerate(itertools.product(*map(range, box.lengths[:-2]))):
        at = [o + i for o, i in zip(inside.offsets[:-2], leading, strict=True)]
        slot = [o + i for o, i in zip(box.offsets[:-2], leading, strict=True)]
        made.append(
            Matrix(
                piece=number,
                source=piece.source,
                offset=piece.layout.offset
                + sum(i * s for i, s in zip(at, before, strict=True))
                + inside.offsets[-1] * column_stride,
                first_row=inside.offsets[-2],
                rows=rows,
                columns=columns,
                order=order,
                column_stride=column_stride,
                item=ITEM_BYTES[tensor.value_dtype],
                target=tensor.offset + _position((*slot, *box.offsets[-2:]), shape) * held,
                pitch=shape[-1] * held,
                tensor_end=tensor.offset + tensor.bytes,
                rows_left=box.offsets[-2] % BLOCK,
                columns_left=box.offsets[-1] % BLOCK,
                tensor_cell=cells.get(Grid.TENSOR),
                row_cell=_plus(cells.get(Grid.ROW), index * rows),
                block_cell=_plus(cells.get(Grid.BLOCK), index * strips * blocks),
                copied=tensor.quantized_from is None,
            )
        )
    return made


def _plus(cell: int | None, more: int) -> int | None:
    return None if cell is None else cell + more


def _padded(shape: Shape) -> Shape:
    return (1,) * (2 - len(shape)) + shape


def _at_least_two_dims(box: Box) -> Box:
    missing = 2 - len(box.lengths)
    return box if missing <= 0 else Box((0,) * missing + box.offsets, (1,) * missing + box.lengths)


def _position(index: Sequence[int], shape: Shape) -> int:
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def _first_cells(owned: OwnedBox, catalog: Catalog) -> dict[Grid, int]:
    if not catalog.tensors[owned.tensor].has_moments:
        return {}
    return {grid: catalog.first_cell(owned, grid) for grid in catalog.grids}


GROUPS: Final = 16
"""Into so many parts, or more, a version is cut whose moments are copied together, where it has so many chunks: who
begins to read it early waits for the first of them, and has the last of them left to read when all is there."""
BYTES_PER_CELL: Final = 384
"""Bytes of scratch memory for each cell whose moments go to the slot together: these take a twenty-fourth besides, and
are few copies. Small ones between the large ones hold these up."""


@dataclass(frozen=True)
class Chunk:
    """What goes through the scratch memory at once.

    The moments of several chunks, a group, are copied together when the last of them has been cast; then it has landed.

    Attributes:
        matrices: in the order of their places in the slot.
        packed: whether they go through the scratch memory; else only their moments are taken.
        places: where in the scratch memory each begins, in bytes.
        copies: from the scratch memory to the slot.
        begins_group: whether it is the first of its group.
        cells: how many cells of moments the group has room for.
        first_cells: per matrix, where among those its cells of rows and of blocks begin.
        cell_copies: from the scratch cells, field by field, to the slot; of the whole group, with its last chunk.
    """

    matrices: tuple[Matrix, ...]
    packed: bool
    places: tuple[int, ...]
    copies: tuple[Copy, ...]
    begins_group: bool
    cells: int
    first_cells: tuple[tuple[int, int], ...]
    cell_copies: tuple[Copy, ...]


_Cut = tuple[Sequence[Matrix], Sequence[int]]
"""The matrices of a chunk, and their places in the scratch memory."""


def chunks(made: Iterable[Matrix], catalog: Catalog, limit: int) -> Iterator[Chunk]:
    """Cut matrices into chunks.

    Args:
        made: the matrices, in the order of their places in the slot.
        catalog: for where the moments lie.
        limit: bytes of scratch memory; one strip of each matrix has to fit (``Matrix.strip_bytes``).
    """
    made = list(made)
    most_cells = min(limit // BYTES_PER_CELL, -(-sum(map(_cells, made)) // GROUPS))
    most_bytes = -(-sum(map(_bytes, made)) // GROUPS)
    group: list[_Cut] = []
    cells = size = 0
    for cut in _cut(made, limit, most_cells):
        more_cells, more_bytes = sum(map(_cells, cut[0])), sum(map(_bytes, cut[0]))
        full = cells + more_cells > most_cells or size + more_bytes > most_bytes
        if group and (full or _is_packed(cut) != _is_packed(group[-1])):
            yield from _grouped(group, catalog)
            group, cells, size = [], 0, 0
        group.append(cut)
        cells, size = cells + more_cells, size + more_bytes
    if group:
        yield from _grouped(group, catalog)


def _cells(matrix: Matrix) -> int:
    return sum(end - first for first, end in _spans(matrix))


def _bytes(matrix: Matrix) -> int:
    """So many go to the slot."""
    return matrix.rows * matrix.columns * matrix.item if matrix.copied else 0


def _is_packed(cut: _Cut) -> bool:
    return cut[0][0].copied


def _cut(made: Iterable[Matrix], limit: int, most_cells: int) -> Iterator[_Cut]:
    for copied, some in itertools.groupby(made, key=lambda matrix: matrix.copied):
        if copied:
            yield from _cut_by_bytes(some, limit)
        else:
            yield from _cut_by_cells(some, most_cells)


def _cut_by_cells(made: Iterable[Matrix], most: int) -> Iterator[_Cut]:
    """Of what is only measured nothing goes to the scratch memory, and a kernel may take as much as has moments."""
    taken: list[Matrix] = []
    cells = 0
    for matrix in made:
        more = _cells(matrix)
        if taken and cells + more > most:
            yield taken, [0] * len(taken)
            taken, cells = [], 0
        taken.append(matrix)
        cells += more
    if taken:
        yield taken, [0] * len(taken)


def _cut_by_bytes(made: Iterable[Matrix], limit: int) -> Iterator[_Cut]:
    taken: list[Matrix] = []
    places: list[int] = []
    end = 0
    for matrix in made:
        rest: Matrix | None = matrix
        while rest is not None:
            place = -(-end // ALIGNMENT) * ALIGNMENT
            some = _that_fit(rest, (limit - place) // (rest.columns * rest.item))
            if some:
                taken.append(rest.rows_from(0, some))
                places.append(place)
                end = place + some * rest.columns * rest.item
                rest = rest.rows_from(some, rest.rows - some) if some < rest.rows else None
            if rest is not None:
                yield taken, places
                taken, places, end = [], [], 0
    if taken:
        yield taken, places


def _that_fit(matrix: Matrix, rows: int) -> int:
    """So many rows, cut at the end of a block."""
    if rows >= matrix.rows:
        return matrix.rows
    return max(0, (matrix.rows_left + rows) // BLOCK * BLOCK - matrix.rows_left)


def _grouped(group: Sequence[_Cut], catalog: Catalog) -> Iterator[Chunk]:
    # Between two boxes' cells lies the second one's cell for all of it, which is written last.
    passable = {matrix.tensor_cell for taken, _ in group for matrix in taken}
    spans = _joined(sorted(span for taken, _ in group for matrix in taken for span in _spans(matrix)), passable)
    starts = [0, *itertools.accumulate(end - first for first, end in spans)]
    local = _Places([first for first, _ in spans], starts)
    copies = tuple(
        Copy(
            target=catalog.moments_offset + first * FIELD_BYTES,
            source=start * FIELD_BYTES,
            width=(end - first) * FIELD_BYTES,
            height=len(FIELDS),
            target_pitch=field_stride(catalog.cells),
            source_pitch=field_stride(starts[-1]),
        )
        for (first, end), start in zip(spans, starts, strict=False)
    )
    for number, (taken, places) in enumerate(group):
        yield Chunk(
            matrices=tuple(taken),
            packed=_is_packed((taken, places)),
            places=tuple(places),
            copies=_copies(taken, places),
            begins_group=number == 0,
            cells=starts[-1],
            first_cells=tuple((local.of(matrix.row_cell), local.of(matrix.block_cell)) for matrix in taken),
            cell_copies=copies if number == len(group) - 1 else (),
        )


def quantized(matrix: Matrix, catalog: Catalog, first_cell: int, first_scale: int) -> Matrix:
    """The matrix as it is quantized and copied: its cells are then its scales, counted over all of them.

    Args:
        matrix: as ``matrices`` makes it.
        catalog: the stage's, which has a format.
        first_cell: of its piece's cells of the format's grid, counted over the slot.
        first_scale: where the piece's scales begin.
    """
    assert catalog.format is not None  # else nothing is quantized
    cells = {Grid.TENSOR: matrix.tensor_cell, Grid.ROW: matrix.row_cell, Grid.BLOCK: matrix.block_cell}
    grid = catalog.format.grid
    cell = cells[grid]
    assert cell is not None  # the catalog keeps the format's grid
    scale = cell - first_cell + first_scale
    return replace(
        matrix,
        item=ITEM_BYTES[catalog.format.dtype],
        copied=True,
        tensor_cell=scale if grid is Grid.TENSOR else None,
        row_cell=scale if grid is Grid.ROW else None,
        block_cell=scale if grid is Grid.BLOCK else None,
    )


def quantized_chunks(made: Iterable[Matrix], limit: int) -> Iterator[Chunk]:
    """Cut matrices that ``quantized`` made into chunks, each a group; ``first_cells`` are their first scales, twice.

    Args:
        made: the matrices, in the order of their places in the slot.
        limit: bytes of scratch memory.
    """
    for taken, places in _cut_by_bytes(made, limit):
        scales = (next(cell for cell in _scale_cells(matrix) if cell is not None) for matrix in taken)
        cells = tuple((scale, scale) for scale in scales)
        yield Chunk(tuple(taken), True, tuple(places), _copies(taken, places), True, 0, cells, ())


def _scale_cells(matrix: Matrix) -> tuple[int | None, ...]:
    return matrix.tensor_cell, matrix.row_cell, matrix.block_cell


def _copies(taken: Sequence[Matrix], places: Sequence[int]) -> tuple[Copy, ...]:
    both = zip(taken, places, strict=True)
    return tuple(coalesced([_copy(matrix, place) for matrix, place in both if matrix.copied]))


@dataclass(frozen=True)
class _Places:
    """Where the slot's cells are among a group's: spans begin with the cells ``firsts``, and at ``starts``."""

    firsts: Sequence[int]
    starts: Sequence[int]

    def of(self, cell: int | None) -> int:
        """The place of a cell; of none, 0."""
        if cell is None:
            return 0
        span = bisect.bisect_right(self.firsts, cell) - 1
        return self.starts[span] + cell - self.firsts[span]


def _copy(matrix: Matrix, place: int) -> Copy:
    width = matrix.columns * matrix.item
    if width == matrix.pitch:  # whole rows lie side by side on both sides
        length = width * matrix.rows
        return Copy(matrix.target, place, length, 1, 0, 0, matrix.padding_behind(length))
    return Copy(matrix.target, place, width, matrix.rows, matrix.pitch, width)


def _spans(matrix: Matrix) -> Iterator[tuple[int, int]]:
    if matrix.row_cell is not None:
        yield matrix.row_cell, matrix.row_cell + matrix.rows
    if matrix.block_cell is not None:
        yield matrix.block_cell, matrix.block_cell + matrix.strips * matrix.blocks


def _joined(spans: Iterable[tuple[int, int]], passable: Collection[int | None]) -> list[tuple[int, int]]:
    """Longer spans; over single cells that may be passed over, too."""
    joined: list[tuple[int, int]] = []
    for first, end in spans:
        last = joined[-1][1] if joined else None
        if last is not None and (first == last or (first == last + 1 and last in passable)):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


def pieces(puts: Sequence[Put], owned: Mapping[str, Sequence[OwnedBox]], catalog: Catalog) -> list[Piece]:
    """Find for every box that a rank owns the shard that it is part of, in the order of their places in the slot.

    Args:
        puts: the shards.
        owned: by the stage's tensor, the rank's boxes.
        catalog: the stage's.
    """
    layouts: dict[str, list[tuple[int, Layout]]] = defaultdict(list)
    for number, put in enumerate(puts):
        for layout in put.holding.layouts:
            layouts[layout.name].append((number, layout))
    boxes = [box for name in layouts for box in owned.get(name, ())]
    found = []
    for box in sorted(boxes, key=lambda one: (one.tensor, one.box)):
        for source, layout in layouts[catalog.tensors[box.tensor].name]:
            if intersect(box.box, layout.box) == box.box:
                found.append(Piece(box, source, layout))
                break
    return found


def strips_of(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Per strip: the number of its matrix in the chunk, its number in the matrix, and its elements."""
    for number, matrix in enumerate(chunk.matrices):
        for strip in range(matrix.strips):
            first = max(0, strip * BLOCK - matrix.rows_left)
            end = min(matrix.rows, (strip + 1) * BLOCK - matrix.rows_left)
            yield number, strip, (end - first) * matrix.columns

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Moves cut into lots that cross to the device by its copy engine, and are treated there.

The copy engine takes rows of bytes and nothing else, so a crossing is a few such copies into a buffer on the device,
and the moves that read them there. What it would take slowly, narrow rows and single elements, stays with a kernel that
reads the slot itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from stagingd.dtypes import ITEM_BYTES
from stagingd.pinning import CHUNK_BYTES
from stagingd_vllm.moves import ALIGNMENT, Move

NARROWEST: Final = 1024
"""Bytes of the narrowest rows that the copy engine takes at the link's full speed."""
NARROWEST_BESIDE: Final = 256
"""The narrowest that it takes at half of that: a kernel is quicker, but disturbs a device that computes more."""
GAP: Final = 4096
"""So many bytes are copied along if that makes one copy of two: it takes less time than another copy's start."""
PLACE: Final = 256
"""A copy begins in the buffer at the same offset from a multiple of this as in the slot: what was aligned stays so."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows of bytes, from a slot into a buffer.

    Attributes:
        source: of the first row, in bytes from the slot's start.
        pitch: bytes from one row to the next in the slot; in the buffer they follow each other.
        width: bytes of a row.
        rows: how many.
        place: of the first row, in bytes from the buffer's start.
    """

    source: int
    pitch: int
    width: int
    rows: int
    place: int

    @property
    def bytes(self) -> int:
        """What it takes of the buffer."""
        return self.width * self.rows

    @property
    def source_end(self) -> int:
        """Of the last row, in bytes from the slot's start."""
        return self.source + (self.rows - 1) * self.pitch + self.width


@dataclass(frozen=True, slots=True)
class Crossing:
    """What fits into a buffer: copies, and moves whose sources are in the buffer."""

    copies: tuple[Copy, ...]
    moves: tuple[Move, ...]

    @property
    def bytes(self) -> int:
        """Bytes that cross the link."""
        return sum(copy.bytes for copy in self.copies)


@dataclass(frozen=True, slots=True)
class Crossings:
    """All of some moves.

    Attributes:
        buffered: what goes by way of buffers, in the order of the slot.
        direct: the moves that a kernel carries out from the slot itself.
    """

    buffered: tuple[Crossing, ...]
    direct: tuple[Move, ...]

    @property
    def source_end(self) -> int:
        """Bytes that a slot has at least."""
        copied = (copy.source_end for crossing in self.buffered for copy in crossing.copies)
        return max(itertools.chain(copied, (move.source_end for move in self.direct)), default=0)


def crossings(moves: Iterable[Move], size: int, narrowest: int = NARROWEST, registered: int = CHUNK_BYTES) -> Crossings:
    """Cut moves.

    Args:
        moves: what is carried, as ``moves.table`` accepts it.
        size: bytes of a buffer.
        narrowest: bytes of the narrowest rows that are copied.
        registered: the slot is registered in parts of so many bytes; no copy may cross from one into the next.
    """
    made: list[Crossing] = []
    direct: list[Move] = []
    filling = _Filling(size, registered)
    for move in sorted(moves, key=lambda move: move.source):
        if not _in_rows(move, narrowest):
            direct.append(move)
            continue
        for part in _narrowed(move, size - 2 * PLACE):
            left: Move | None = part
            while left is not None:
                piece, left = _cut(left, filling.room(left) // _width(left))
                if piece is None:
                    made.append(filling.crossing())
                    filling = _Filling(size, registered)
                elif _ends_elsewhere(piece, registered):
                    direct.append(piece)
                else:
                    filling.add(piece)
    if filling.moves:
        made.append(filling.crossing())
    return Crossings(tuple(made), tuple(direct))


class _Filling:
    """A crossing that is being filled."""

    def __init__(self, size: int, registered: int) -> None:
        self._size = size
        self._registered = registered
        self._end = 0
        self._copies: list[Copy] = []
        self.moves: list[Move] = []

    def room(self, move: Move) -> int:
        """Bytes that a move could have."""
        return self._size - self._place(move)

    def add(self, move: Move) -> None:
        """There has to be room for all of it."""
        item = ITEM_BYTES[move.staged]
        place = self._place(move)
        if self._joins_last(move):
            last = self._copies.pop()
            copy = replace(last, width=move.source_end - last.source, pitch=move.source_end - last.source)
        else:
            width, rows = (_width(move) * move.rows, 1) if _is_one_piece(move) else (_width(move), move.rows)
            copy = Copy(move.source, width if rows == 1 else move.source_row * item, width, rows, place)
        self._copies.append(copy)
        self._end = copy.place + copy.bytes
        self.moves.append(replace(move, source=place, source_row=move.columns))

    def crossing(self) -> Crossing:
        """What it is filled with."""
        return Crossing(tuple(self._copies), tuple(self.moves))

    def _place(self, move: Move) -> int:
        if self._joins_last(move):
            last = self._copies[-1]
            return last.place + move.source - last.source
        return -(-self._end // PLACE) * PLACE + move.source % PLACE

    def _joins_last(self, move: Move) -> bool:
        """Whether one copy brings it and what was added last."""
        if not self._copies or self._copies[-1].rows > 1 or not _is_one_piece(move):
            return False
        last = self._copies[-1]
        near = 0 <= move.source - (last.source + last.width) < GAP
        return near and last.source // self._registered == move.source // self._registered


def _in_rows(move: Move, narrowest: int) -> bool:
    """Whether its source is rows of neighbours, wide enough for the copy engine, that do not overlap."""
    if move.columns > 1 and move.source_column != 1:
        return False
    return _is_one_piece(move) or (_width(move) >= narrowest and move.source_row >= move.columns)


def _is_one_piece(move: Move) -> bool:
    return move.rows == 1 or move.source_row == move.columns


def _width(move: Move) -> int:
    return move.columns * ITEM_BYTES[move.staged]


def _ends_elsewhere(move: Move, registered: int) -> bool:
    return move.source // registered != (move.source_end - 1) // registered


def _narrowed(move: Move, width: int) -> Iterator[Move]:
    """Moves whose rows have no more than so many bytes."""
    columns = width // ITEM_BYTES[move.staged] // ALIGNMENT * ALIGNMENT
    if move.columns <= columns:
        yield move
        return
    for row in range(move.rows):
        for first in range(0, move.columns, columns):
            yield _part(move, row, 1, first, min(columns, move.columns - first))


def _cut(move: Move, rows: int) -> tuple[Move | None, Move | None]:
    """Its first rows, and the others."""
    if rows < 1:
        return None, move
    if rows >= move.rows:
        return move, None
    return _part(move, 0, rows, 0, move.columns), _part(move, rows, move.rows - rows, 0, move.columns)


def _part(move: Move, row: int, rows: int, column: int, columns: int) -> Move:
    staged, live = ITEM_BYTES[move.staged], ITEM_BYTES[move.live]
    scales = move.scales
    return replace(
        move,
        source=move.source + (row * move.source_row + column * move.source_column) * staged,
        rows=rows,
        columns=columns,
        target=move.target + (row * move.target_row + column * move.target_column) * live,
        scales=scales and replace(scales, first_row=scales.first_row + row, first_column=scales.first_column + column),
    )

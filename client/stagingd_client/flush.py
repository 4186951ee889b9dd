# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From a shard in host memory to the slot: cast, copy and moments, box by box."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from stagingd.boxes import Box, relative
from stagingd.catalog import OwnedBox
from stagingd.segment import Segment
from stagingd_client import chunks
from stagingd_client.chunks import Piece
from stagingd_client.holdings import Put
from stagingd_client.moments import CellMoments, shard_moments

PIECE_BYTES = 8 * 2**20
"""A shard is cast and copied piece by piece, so that scratch memory is bounded."""


class Flusher:
    """Writes owned boxes into the slots of a stage.

    The caller sees to it that the slot is this rank's to write: between begin and commit.

    Args:
        segment: the stage's memory.
        owned: by tensor, the boxes that this rank owns.
    """

    def __init__(self, segment: Segment, owned: Mapping[str, Sequence[OwnedBox]]) -> None:
        self._catalog = segment.catalog
        self._owned = owned
        self._stored = [segment.moments(slot) for slot in (0, 1)]
        self._memory = [torch.frombuffer(segment.slot(slot), dtype=torch.uint8) for slot in (0, 1)]

    def flush(self, slot: int, puts: Sequence[Put]) -> None:
        """Stage all owned boxes of shards; returns when they have been read."""
        for piece in chunks.pieces(puts, self._owned, self._catalog):
            self.write_piece(slot, piece, puts[piece.source].shard)

    def write_piece(self, slot: int, piece: Piece, shard: torch.Tensor) -> None:
        """Stage an owned box out of a shard."""
        part = relative(piece.owned.box, piece.layout.box)
        self.write(slot, piece.owned, piece.layout.view(shard)[part.slices])

    def write(self, slot: int, owned: OwnedBox, values: torch.Tensor) -> None:
        """Stage the elements of a box and their moments.

        Args:
            slot: 0 or 1.
            owned: the box, as the catalog has it.
            values: its elements, of the box's shape and of any dtype that converts to the staged one.
        """
        target = self._tensor(slot, owned)[owned.box.slices]
        for index in _parts(owned.box, target.element_size()):
            target[index].copy_(values[index])
        if self._catalog.tensors[owned.tensor].has_moments:
            # On the values as staged: what was lost in the cast must not count.
            self._store_moments(slot, owned, target)

    def _tensor(self, slot: int, owned: OwnedBox) -> torch.Tensor:
        tensor = self._catalog.tensors[owned.tensor]
        start = tensor.offset
        raw = self._memory[slot][start : start + tensor.bytes]
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        return raw.view(dtype).view(tensor.shape)

    def _store_moments(self, slot: int, owned: OwnedBox, staged: torch.Tensor) -> None:
        for grid, cells in shard_moments(staged, owned.box, self._catalog.grids).items():
            self._store(slot, self._catalog.first_cell(owned, grid), cells)

    def _store(self, slot: int, first: int, cells: CellMoments) -> None:
        stored, at = self._stored[slot], slice(first, first + cells.count.numel())
        stored.mean[at] = cells.mean.cpu().numpy()
        stored.m2[at] = cells.m2.cpu().numpy()
        stored.amax[at] = cells.amax.cpu().numpy()
        stored.nonfinite[at] = cells.nonfinite.cpu().numpy()


def _parts(box: Box, item_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a box along its first dim into parts of bounded size."""
    if not box.lengths:
        yield ()
        return
    per_index = max(1, box.volume // box.lengths[0] * item_bytes)
    step = max(1, PIECE_BYTES // per_index)
    for start in range(0, box.lengths[0], step):
        yield (slice(start, min(start + step, box.lengths[0])),)

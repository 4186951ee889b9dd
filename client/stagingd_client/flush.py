# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From a shard in host memory to the slot: cast, copy and moments, box by box."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from stagingd.boxes import Box
from stagingd.catalog import OwnedBox
from stagingd.format_scales import Floats, RankLimits, scales
from stagingd.moments import cells_of
from stagingd.segment import Segment
from stagingd_client import chunks
from stagingd_client.chunks import Piece
from stagingd_client.holdings import Put
from stagingd_client.landings import Landings
from stagingd_client.moments import CellMoments, shard_moments
from stagingd_client.quantize import quantized

PIECE_BYTES = 8 * 2**20
"""A shard is cast and copied piece by piece, so that scratch memory is bounded."""


class Flusher:
    """Writes owned boxes into the slots of a stage.

    The caller sees to it that the slot is this rank's to write: between begin and commit.

    Args:
        segment: the stage's memory.
        owned: by tensor, the boxes that this rank owns.
        landings: where it is told what has landed.
    """

    def __init__(
        self, segment: Segment, owned: Mapping[str, Sequence[OwnedBox]], landings: Landings | None = None
    ) -> None:
        self._catalog = segment.catalog
        self._owned = owned
        self._landings = landings
        self._stored = [segment.moments(slot) for slot in (0, 1)]
        self._limits: tuple[tuple[OwnedBox, ...], RankLimits] | None = None
        self._memory = [torch.frombuffer(segment.slot(slot), dtype=torch.uint8) for slot in (0, 1)]

    def flush(self, slot: int, puts: Sequence[Put]) -> None:
        """Stage all owned boxes of shards; returns when they have been read."""
        for piece in chunks.pieces(puts, self._owned, self._catalog):
            self.write_piece(slot, piece, puts[piece.source].shard)
            if self._catalog.tensors[piece.owned.tensor].quantized_from is None:
                self._tell(piece.owned)

    def _tell(self, owned: OwnedBox) -> None:
        if self._landings is not None:
            self._landings.land(self._landings.numbers_of((owned,)))

    def quantize(self, slot: int, puts: Sequence[Put]) -> None:
        """Stage what is quantized of shards, once the moments of all ranks are in the slot."""
        pieces = chunks.pieces(puts, self._owned, self._catalog)
        self.quantize_boxes(slot, [(piece.owned, piece.values(puts[piece.source].shard)) for piece in pieces])

    def quantize_boxes(self, slot: int, boxes: Sequence[tuple[OwnedBox, torch.Tensor]]) -> None:
        """Stage those boxes, of some with their elements, that are quantized; otherwise as ``quantize``."""
        boxes = [
            (owned, values) for owned, values in boxes if self._catalog.tensors[owned.tensor].quantized_from is not None
        ]
        if not boxes:
            return
        limits = self._limits_of(tuple(owned for owned, _ in boxes))
        made = self._scales(limits.of(self._stored[slot]))
        for number, (owned, values) in enumerate(boxes):
            self.write_quantized(slot, owned, values, made[limits.slice_of(number)])
            self._tell(owned)

    def _limits_of(self, boxes: tuple[OwnedBox, ...]) -> RankLimits:
        """Found once: every version has the same boxes."""
        if self._limits is None or self._limits[0] != boxes:
            self._limits = boxes, RankLimits(self._catalog, boxes)
        return self._limits[1]

    def _scales(self, limits: Floats) -> torch.Tensor:
        catalog = self._catalog
        assert catalog.format is not None  # else nothing in it is quantized
        return torch.from_numpy(scales(catalog.format, catalog.device, limits))

    def write_quantized(self, slot: int, owned: OwnedBox, values: torch.Tensor, flat: torch.Tensor) -> None:
        """Stage the elements of a box, quantized.

        Args:
            slot: 0 or 1.
            owned: the box, as the catalog has it.
            values: its elements, of the box's shape, on any device.
            flat: the scales of the format's cells that the box touches, float32, one after the other; on the same
                device.
        """
        tensor, stage_format = self._catalog.tensors[owned.tensor], self._catalog.format
        assert tensor.quantized_from is not None
        assert stage_format is not None
        cells = cells_of(stage_format.grid, tensor.shape, owned.box)
        staged = values.to(_dtype(tensor.quantized_from))
        made = quantized(staged, flat.view(cells.lengths), stage_format, owned.box, tensor.shape)
        self._tensor(slot, owned)[owned.box.slices] = made

    def write_piece(self, slot: int, piece: Piece, shard: torch.Tensor) -> None:
        """Stage an owned box out of a shard."""
        self.write(slot, piece.owned, piece.values(shard))

    def write(self, slot: int, owned: OwnedBox, values: torch.Tensor) -> None:
        """Stage the elements of a box and their moments; of what is quantized, the moments alone.

        Args:
            slot: 0 or 1.
            owned: the box, as the catalog has it.
            values: its elements, of the box's shape and of any dtype that converts to the staged one.
        """
        tensor = self._catalog.tensors[owned.tensor]
        if tensor.quantized_from is not None:
            self._store_moments(slot, owned, values.to(_dtype(tensor.quantized_from)))
            return
        target = self._tensor(slot, owned)[owned.box.slices]
        for index in _parts(owned.box, target.element_size()):
            target[index].copy_(values[index])
        if tensor.has_moments:
            # On the values as staged: what was lost in the cast must not count.
            self._store_moments(slot, owned, target)

    def _tensor(self, slot: int, owned: OwnedBox) -> torch.Tensor:
        tensor = self._catalog.tensors[owned.tensor]
        start = tensor.offset
        raw = self._memory[slot][start : start + tensor.bytes]
        return raw.view(_dtype(tensor.dtype)).view(tensor.shape)

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


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype

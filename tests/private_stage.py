# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A stage without a daemon: a segment of its own, filled by the trainers' own flush, and read by leases on it."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from stagingd_client.flush import Flusher

from stagingd import segment
from stagingd.aliases import Alias
from stagingd.boxes import Box, whole
from stagingd.catalog import Catalog, TensorDeclaration, build
from stagingd.formats import Quantization
from stagingd.moments import ALL_GRIDS, Grid, StoredMoments
from stagingd.progress import Needs

Cut = Mapping[str, Sequence[Box]]
"""By tensor, the box of each trainer rank."""


@dataclass
class PrivateLease:
    """A version that nobody can take away."""

    version: int
    slot: torch.Tensor
    stored: StoredMoments

    early = False

    def await_moments(self) -> None:
        pass

    def await_boxes(self, needs: Needs) -> None:
        pass

    def __enter__(self) -> PrivateLease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


@dataclass
class PrivateStage:
    """Two slots; version n is in slot n modulo 2."""

    made: segment.Segment

    @property
    def catalog(self) -> Catalog:
        return self.made.catalog

    @property
    def slots(self) -> list[torch.Tensor]:
        return [torch.frombuffer(self.made.slot(slot), dtype=torch.uint8) for slot in (0, 1)]

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> PrivateLease:
        """Flush whole tensors, each box by itself as its owner does."""
        flusher, slot = Flusher(self.made, {}), version % 2
        boxes = [
            (owned, tensors[self.catalog.tensors[owned.tensor].name][owned.box.slices]) for owned in self.catalog.owned
        ]
        for owned, values in boxes:
            flusher.write(slot, owned, values)
        flusher.quantize_boxes(slot, boxes)
        return self.lease(version)

    def lease(self, version: int) -> PrivateLease:
        return PrivateLease(version, self.slots[version % 2], self.made.moments(version % 2))


def by_rows(shape: Sequence[int], ranks: int) -> list[Box]:
    """Boxes of rows, as even as FSDP makes them; a rank that gets none has an empty box."""
    step = -(-shape[0] // ranks)
    starts = [min(rank * step, shape[0]) for rank in range(ranks + 1)]
    return [
        Box((start, *(0 for _ in shape[1:])), (end - start, *shape[1:])) for start, end in itertools.pairwise(starts)
    ]


def by_columns(shape: Sequence[int], ranks: int) -> list[Box]:
    """Boxes of the last dim."""
    step = -(-shape[-1] // ranks)
    starts = [min(rank * step, shape[-1]) for rank in range(ranks + 1)]
    return [
        Box((*(0 for _ in shape[:-1]), start), (*shape[:-1], end - start)) for start, end in itertools.pairwise(starts)
    ]


@contextmanager
def private_stage(
    tensors: Mapping[str, torch.Tensor],
    cut: Cut | None = None,
    grids: Sequence[Grid] = ALL_GRIDS,
    aliases: Sequence[Alias] = (),
    quantization: Quantization | None = None,
) -> Iterator[PrivateStage]:
    """A stage for these tensors, held by the ranks of a cut, or whole by one rank; perhaps quantized by them."""
    boxes = cut or {name: [whole(tensor.shape)] for name, tensor in tensors.items()}
    ranks = max(len(some) for some in boxes.values())
    declarations = [
        [
            TensorDeclaration(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                boxes=tuple(box for box in boxes[name][rank : rank + 1] if box.volume),
            )
            for name, tensor in tensors.items()
        ]
        for rank in range(ranks)
    ]
    catalog = build("policy", declarations, grids, [tuple(aliases)] * ranks, quantization)
    made = segment.create(f"/stagingd-test-{uuid.uuid4().hex[:12]}", catalog, lock=False)
    try:
        yield PrivateStage(made)
    finally:
        made.unlink()
        made.close()

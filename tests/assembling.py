# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Cut tensors into shards, and put together again what the shards became."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from stagingd_client.naming import NamedShard
from stagingd_client.placement import Held

from stagingd.boxes import Box, fits, whole


def numbered(*shape: int, first: int = 0) -> torch.Tensor:
    """A tensor in which every element is another number."""
    return torch.arange(first, first + torch.Size(shape).numel()).view(shape)


def shards_of(full: torch.Tensor, cuts: Sequence[Iterable[int]]) -> Iterator[Held]:
    """The shards of a tensor that is cut at these indices of each dim, taken modulo its size."""
    ranges = [
        list(itertools.pairwise([*sorted({0, *(index % size for index in at)}), size]))
        for at, size in itertools.zip_longest(cuts, full.shape, fillvalue=())
    ]
    for runs in itertools.product(*ranges):
        box = Box(tuple(begin for begin, _ in runs), tuple(end - begin for begin, end in runs))
        yield Held(tuple(full.shape), box, full[box.slices])


class Assembly:
    """The tensors that named shards make together. Each shard has to be a view of what it came from."""

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] = {}
        self._written: dict[str, torch.Tensor] = {}

    def add(self, shards: Iterable[NamedShard], source: Held) -> None:
        """Write the shards that a part of a trainer's tensor became."""
        for shard in shards:
            part = shard.part
            assert part.values.untyped_storage().data_ptr() == source.values.untyped_storage().data_ptr(), shard.name
            assert fits(part.box, part.global_shape)
            assert part.box.volume
            if shard.name not in self._values:
                self._values[shard.name] = torch.zeros(part.global_shape, dtype=part.values.dtype)
                self._written[shard.name] = torch.zeros(part.global_shape, dtype=torch.int32)
            assert tuple(self._values[shard.name].shape) == part.global_shape, shard.name
            self._values[shard.name][part.box.slices] = part.values.reshape(part.box.lengths)
            self._written[shard.name][part.box.slices] += 1

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, of which each element has been written once."""
        for name, written in self._written.items():
            assert (written == 1).all(), f"{name}: {written.min()} to {written.max()} writers per element"
        return self._values


def part_of(full: torch.Tensor) -> Held:
    """A tensor that is held as a whole."""
    return Held(tuple(full.shape), whole(full.shape), full)

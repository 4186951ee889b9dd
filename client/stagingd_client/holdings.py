# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What this rank said it holds, and whether what is put is that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from stagingd.boxes import Box
from stagingd.catalog import Catalog, TensorDeclaration
from stagingd.errors import CommitIncomplete, UnknownTensor, WrongDtype, WrongShape
from stagingd_client.placement import Held, LocalShard, held

Shards = torch.Tensor | LocalShard | Sequence[LocalShard]


@dataclass(frozen=True)
class Holding:
    """What this rank declared of a tensor: the trainer's dtype, the global shape, and the boxes that it holds."""

    source_dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class Holdings:
    """All tensors of one rank.

    Args:
        rank: the trainer rank, for messages.
        tensors: the shards by name: a DTensor, a plain tensor that is whole, or one or more LocalShards.

    Raises:
        WrongShape, BoxOutside: the place of a shard is not known, or not inside its tensor.
    """

    def __init__(self, rank: int, tensors: Mapping[str, Shards]) -> None:
        self._rank = rank
        self._holdings = {name: _holding(name, shards) for name, shards in tensors.items()}

    def declarations(self, dtype: torch.dtype | None, keep_dtype: frozenset[str]) -> tuple[TensorDeclaration, ...]:
        """What to tell the daemon.

        Args:
            dtype: floating-point tensors are staged in it; None keeps their own.
            keep_dtype: names of tensors that keep their own in any case.
        """
        found = []
        for name, holding in self._holdings.items():
            staged = holding.source_dtype
            if dtype is not None and staged.is_floating_point and name not in keep_dtype:
                staged = dtype
            plain = str(staged).removeprefix("torch.")
            found.append(TensorDeclaration(name=name, dtype=plain, shape=holding.shape, boxes=holding.boxes))
        return tuple(found)

    def checked(self, catalog: Catalog, name: str, shard: torch.Tensor | LocalShard) -> Held | None:
        """The box and elements of a shard, if it is one that was declared; None where this rank holds nothing.

        Raises:
            UnknownTensor, WrongDtype, WrongShape, BoxOutside: it is not.
        """
        catalog.tensor(name)  # raises UnknownTensor with the nearest names
        holding = self._holdings.get(name)
        if holding is None:
            raise UnknownTensor(
                f"rank {self._rank} puts tensor {name!r}, which only other ranks declared",
                remedy="declare it on this rank too",
                tensor=name,
                rank=self._rank,
            )
        dtype = _plain(shard).dtype
        if dtype != holding.source_dtype:
            raise WrongDtype(
                f"tensor {name!r} is put as {dtype}, but was declared as {holding.source_dtype}",
                remedy="put the tensor that was declared",
                tensor=name,
                rank=self._rank,
            )
        part = held(name, shard)
        if part is not None:
            self._check_box(name, holding, part)
        return part

    def _check_box(self, name: str, holding: Holding, part: Held) -> None:
        if part.global_shape != holding.shape or part.box not in holding.boxes:
            boxes = ", ".join(map(str, holding.boxes)) or "none"
            raise WrongShape(
                f"tensor {name!r} is put as box {part.box} of {part.global_shape}, "
                f"but rank {self._rank} declared {boxes} of {holding.shape}",
                remedy="put the shards that were declared; check global_shape and offset",
                tensor=name,
                box=part.box,
                rank=self._rank,
            )

    def check_complete(self, version: int, put: set[tuple[str, Box]]) -> None:
        """Refuse a commit before every declared box has been put. Raises CommitIncomplete."""
        for name, box in self._boxes():
            if (name, box) not in put:
                raise CommitIncomplete(
                    f"rank {self._rank} commits version {version} without box {box} of tensor {name!r}",
                    remedy="put every tensor that the rank declared, or abort",
                    tensor=name,
                    box=box,
                    version=version,
                    rank=self._rank,
                )

    def _boxes(self) -> Iterator[tuple[str, Box]]:
        for name, holding in self._holdings.items():
            for box in holding.boxes:
                yield name, box


def _holding(name: str, shards: Shards) -> Holding:
    several = list(shards) if isinstance(shards, Sequence) else [shards]
    parts = [part for part in (held(name, shard) for shard in several) if part is not None]
    shape = parts[0].global_shape if parts else _global_shape(several[0])
    return Holding(_plain(several[0]).dtype, shape, tuple(part.box for part in parts))


def _plain(shard: torch.Tensor | LocalShard) -> torch.Tensor:
    return shard.tensor if isinstance(shard, LocalShard) else shard


def _global_shape(shard: torch.Tensor | LocalShard) -> tuple[int, ...]:
    if isinstance(shard, LocalShard) and shard.global_shape is not None:
        return tuple(shard.global_shape)
    return tuple(_plain(shard).shape)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What this rank said it holds, and whether what is put is that."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from stagingd.boxes import Box
from stagingd.catalog import Catalog, TensorDeclaration
from stagingd.errors import CommitIncomplete, UnknownTensor, WrongDtype, WrongShape
from stagingd_client.layout import Layout
from stagingd_client.naming import Names
from stagingd_client.placement import Held, LocalShard, held

Shards = torch.Tensor | LocalShard | Sequence[LocalShard]


@dataclass(frozen=True)
class Holding:
    """One shard of this rank, as the trainer has it.

    Attributes:
        number: of the shard, counted over the rank's.
        name: the trainer's name for the tensor.
        dtype: the trainer's.
        shape: the tensor's global shape, in the trainer's order.
        box: the part that the shard is.
        strides: of the shard, in elements.
        layouts: the parts of the stage's tensors that it holds.
    """

    number: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    strides: tuple[int, ...]
    layouts: tuple[Layout, ...]


@dataclass(frozen=True)
class Put:
    """A shard on its way to the slot: what it is, and its elements, which must stay as they are until the fence."""

    holding: Holding
    shard: torch.Tensor


_Where = tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None
"""Of a part, its tensor's shape and its offset as they were given; None of a tensor that tells both itself."""


class Holdings:
    """All shards of one rank.

    Args:
        rank: the trainer rank, for messages.
        names: how the trainer's tensors are named and ordered.
        tensors: the shards by the trainer's name: a DTensor, a plain tensor that is whole, or LocalShards.

    Raises:
        WrongShape, BoxOutside: the place of a shard is not known, or not inside its tensor.
        UnknownTensor: there is no name for it.
    """

    def __init__(self, rank: int, names: Names, tensors: Mapping[str, Shards]) -> None:
        self._rank = rank
        self._names = names
        self._dtypes: dict[str, torch.dtype] = {}
        self._shards: dict[tuple[str, Box], Holding] = {}
        self._recent: dict[str, tuple[weakref.ref[torch.Tensor], _Where, Holding]] = {}
        for name, shards in tensors.items():
            if not names.skips(name):
                self._declare(name, shards)

    def _declare(self, name: str, shards: Shards) -> None:
        for shard in shards if isinstance(shards, Sequence) else (shards,):
            self._dtypes[name] = _plain(shard).dtype
            part = held(name, shard)
            if part is None:
                self._check_not_empty(name, shard)
            else:
                self._shards[name, part.box] = self._holding(len(self._shards), name, part)

    def _check_not_empty(self, name: str, shard: torch.Tensor | LocalShard) -> None:
        """That this rank holds none of a tensor is usual; that there is nothing to hold is a mistake."""
        given = shard.global_shape if isinstance(shard, LocalShard) else None
        shape = tuple(given if given is not None else _plain(shard).shape)
        if 0 in shape:
            raise WrongShape(
                f"rank {self._rank} declares tensor {name!r} with shape {shape}, which has no elements",
                remedy="leave empty tensors out of the declaration",
                tensor=name,
                rank=self._rank,
            )

    def _holding(self, number: int, name: str, part: Held) -> Holding:
        values = part.values
        layouts = tuple(Layout.of(named, values) for named in self._names.shards(name, part))
        return Holding(number, name, values.dtype, part.global_shape, part.box, values.stride(), layouts)

    def declarations(self, dtype: torch.dtype | None, keep_dtype: frozenset[str]) -> tuple[TensorDeclaration, ...]:
        """What to tell the daemon.

        Args:
            dtype: floating-point tensors are staged in it; None keeps their own.
            keep_dtype: the trainer's names of tensors that keep their own in any case.
        """
        found: dict[str, TensorDeclaration] = {}
        for holding in self._shards.values():
            staged = holding.dtype
            if dtype is not None and staged.is_floating_point and holding.name not in keep_dtype:
                staged = dtype
            plain = str(staged).removeprefix("torch.")
            for layout in holding.layouts:
                before = found.get(layout.name)
                boxes = (layout.box,) if before is None else (*before.boxes, layout.box)
                found[layout.name] = TensorDeclaration(name=layout.name, dtype=plain, shape=layout.shape, boxes=boxes)
        return tuple(found.values())

    def place(self, catalog: Catalog, name: str, shard: torch.Tensor | LocalShard) -> Put | None:
        """A shard that was declared, with its place; None where this rank holds nothing of it.

        Raises:
            UnknownTensor, WrongDtype, WrongShape, BoxOutside: it is not what was declared.
        """
        tensor, where = _given(shard)
        recent = self._recent.get(name)
        if recent is not None and recent[0]() is tensor and recent[1] == where:
            # The same tensor object as last time: a DTensor's placements never change, its memory may.
            local = _local(tensor)
            holding = recent[2]
            seen = local.dtype, local.stride(), tuple(local.shape)
            if seen == (holding.dtype, holding.strides, holding.box.lengths):
                return Put(holding, local)
        return self._place_anew(catalog, name, shard)

    def _place_anew(self, catalog: Catalog, name: str, shard: torch.Tensor | LocalShard) -> Put | None:
        if self._names.skips(name):
            return None
        self._check_declared(catalog, name, _plain(shard).dtype)
        part = held(name, shard)
        if part is None:
            return None
        holding = self._shards.get((name, part.box))
        if holding is None or part.global_shape != holding.shape:
            raise self._not_declared(name, part)
        if part.values.stride() != holding.strides:
            holding = self._shards[name, part.box] = self._holding(holding.number, name, part)
        tensor, where = _given(shard)
        self._recent[name] = weakref.ref(tensor), where, holding
        return Put(holding, part.values)

    def _check_declared(self, catalog: Catalog, name: str, dtype: torch.dtype) -> None:
        declared = self._dtypes.get(name)
        if declared is None:
            known = catalog.tensor(name).name  # raises UnknownTensor with the nearest names
            why = "only other ranks declared" if known == name else f"is another name of {known!r}"
            raise UnknownTensor(
                f"rank {self._rank} puts tensor {name!r}, which {why}",
                remedy="put what this rank declared: a tied tensor once, by its own name",
                tensor=name,
                rank=self._rank,
            )
        if dtype != declared:
            raise WrongDtype(
                f"tensor {name!r} is put as {dtype}, but was declared as {declared}",
                remedy="put the tensor that was declared",
                tensor=name,
                rank=self._rank,
            )

    def _not_declared(self, name: str, part: Held) -> WrongShape:
        mine = [holding for holding in self._shards.values() if holding.name == name]
        shape = mine[0].shape if mine else "a tensor"
        boxes = ", ".join(str(holding.box) for holding in mine) or "none"
        return WrongShape(
            f"tensor {name!r} is put as box {part.box} of {part.global_shape}, "
            f"but rank {self._rank} declared {boxes} of {shape}",
            remedy="put the shards that were declared; check global_shape and offset",
            tensor=name,
            box=part.box,
            rank=self._rank,
        )

    def check_complete(self, version: int, put: set[int]) -> None:
        """Refuse a commit before every declared shard has been put. Raises CommitIncomplete.

        Args:
            version: the version that is committed.
            put: numbers of the shards that were put.
        """
        if len(put) == len(self._shards):
            return
        missing = next(holding for holding in self._shards.values() if holding.number not in put)
        raise CommitIncomplete(
            f"rank {self._rank} commits version {version} without box {missing.box} of tensor {missing.name!r}",
            remedy="put every tensor that the rank declared, or abort",
            tensor=missing.name,
            box=missing.box,
            version=version,
            rank=self._rank,
        )


def _plain(shard: torch.Tensor | LocalShard) -> torch.Tensor:
    return shard.tensor if isinstance(shard, LocalShard) else shard


def _given(shard: torch.Tensor | LocalShard) -> tuple[torch.Tensor, _Where]:
    if isinstance(shard, LocalShard):
        return shard.tensor, (shard.global_shape, shard.offset)
    return shard, None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that this rank has, without what autograd would add to ``to_local``."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()

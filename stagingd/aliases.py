# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Aliases: further names of a tensor that a stage holds once, as tied embeddings have two."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stagingd.errors import CatalogMismatch, UnknownTensor
from stagingd.record import Name, Record


class Alias(Record):
    """A further name, and the name of the tensor that it stands for."""

    alias: Name
    name: Name


def agreed(by_rank: Sequence[Sequence[Alias]], tensors: Collection[str]) -> tuple[Alias, ...]:
    """What all ranks' aliases are together, in the order in which they first appear.

    Args:
        by_rank: what each rank declared. Ranks need not all declare an alias, but must mean the same by it.
        tensors: the names of the stage's tensors.

    Raises:
        CatalogMismatch: two ranks mean different tensors by one alias, or it is a tensor's own name.
        UnknownTensor: it stands for a name that no rank declares.
    """
    known: dict[str, tuple[int, Alias]] = {}
    for rank, aliases in enumerate(by_rank):
        for alias in aliases:
            other_rank, other = known.setdefault(alias.alias, (rank, alias))
            if other != alias:
                raise CatalogMismatch(
                    f"{alias.alias!r} is another name of {alias.name!r} on rank {rank}, "
                    f"and of {other.name!r} on rank {other_rank}",
                    remedy="declare the same aliases on every rank that has them",
                    tensor=alias.alias,
                    rank=rank,
                )
            if other is alias:
                _check(rank, alias, tensors)
    return tuple(alias for _, alias in known.values())


def _check(rank: int, alias: Alias, tensors: Collection[str]) -> None:
    if alias.alias in tensors:
        raise CatalogMismatch(
            f"rank {rank} declares {alias.alias!r} as another name of {alias.name!r}, but it is a tensor's own name",
            remedy="declare a tied tensor under one name on every rank, and the other name as its alias",
            tensor=alias.alias,
            rank=rank,
        )
    if alias.name not in tensors:
        raise UnknownTensor(
            f"rank {rank} declares {alias.alias!r} as another name of {alias.name!r}, which no rank declares",
            remedy="let the alias stand for a declared tensor, not for another alias",
            tensor=alias.name,
            rank=rank,
        )

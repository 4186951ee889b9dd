# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How far a version has come that is still being filled: numbers behind a slot's moments, for readers that begin early.

    line 0        the daemon's: the attempt that the slot is filled by, the one of which all moments of what trainers
                  quantize are there (so that its scales are final), and the one that is sealed
    line 1 + r    trainer rank r's: the attempt that it takes part in, and how many of its boxes have landed

A line is 64 bytes of uint64. Whenever a version is begun that is a new attempt, with a number of its own, from 1 on: a
version that is aborted may be begun again, and what somebody still says of the attempt before must not count. A rank
counts its boxes in the catalog's order (``Catalog.owned_by``): n of them have landed when the first n are in the slot
with their moments, whatever there is of later ones. Flushes and reads go in the order of the slot, so that count is all
there is to say, and nobody sends a message per tensor.

Each number has one writer. It is stored by one aligned instruction after what it tells of, and processors of the x86
family show stores to others in their order; on others readers do not begin early (``supported``).
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from stagingd.boxes import Box, intersect, whole
from stagingd.catalog import PROGRESS_LINE, Catalog

_WORDS: Final = PROGRESS_LINE // 8
_FILLING, _MEASURED, _SEALED = range(3)
_ATTEMPT, _LANDED = range(2)


def supported(machine: str | None = None) -> bool:
    """Whether readers may begin early on a processor of this kind, by default this one."""
    return (platform.machine() if machine is None else machine).lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Needs:
    """What has to have landed: of each trainer rank in turn, so many of its boxes."""

    boxes: tuple[int, ...]

    @classmethod
    def of(cls, catalog: Catalog, tensors: Iterable[str]) -> Needs:
        """All of some tensors, by name or alias. Raises UnknownTensor."""
        return cls.of_boxes(catalog, ((name, whole(catalog.tensor(name).shape)) for name in tensors))

    @classmethod
    def of_boxes(cls, catalog: Catalog, boxes: Iterable[tuple[str, Box]]) -> Needs:
        """Boxes of some tensors, by name or alias. Raises UnknownTensor."""
        needed = [0] * catalog.ranks
        for name, box in boxes:
            for owned, number in zip(catalog.owned_of(name), catalog.numbers_of(name), strict=True):
                if number > needed[owned.rank] and intersect(owned.box, box) is not None:
                    needed[owned.rank] = number
        return cls(tuple(needed))


class Progress:
    """The progress of one slot.

    Args:
        memory: its lines, ``Catalog.progress_bytes`` of them; readers may have it read-only.
        ranks: how many trainer ranks there are.
    """

    def __init__(self, memory: memoryview, ranks: int) -> None:
        self._ranks = ranks
        self._lines = np.frombuffer(memory, np.uint64).reshape(1 + ranks, _WORDS)

    # The daemon's

    def begin(self, attempt: int) -> None:
        """An attempt begins: nothing has landed."""
        self.clear()
        self._lines[0, _FILLING] = attempt

    def measured(self, attempt: int) -> None:
        """The moments of what is quantized are there, of all ranks."""
        self._lines[0, _MEASURED] = attempt

    def sealed(self, attempt: int) -> None:
        """All of it is there, and stays."""
        self._lines[0, _SEALED] = attempt

    def clear(self) -> None:
        """The slot is given up: who reads it early learns so."""
        self._lines[0] = 0

    # A trainer rank's

    def start(self, rank: int, attempt: int) -> None:
        """A rank takes part in an attempt from now on."""
        self._lines[1 + rank, _LANDED] = 0
        self._lines[1 + rank, _ATTEMPT] = attempt

    def land(self, rank: int, boxes: int) -> None:
        """So many of a rank's boxes have landed."""
        self._lines[1 + rank, _LANDED] = boxes

    # Readers'

    def holds(self, attempt: int) -> bool:
        """Whether the slot is filled by an attempt, or was and keeps what it made; False once it is given up."""
        return int(self._lines[0, _FILLING]) == attempt

    def is_sealed(self, attempt: int) -> bool:
        """Whether all of it is there."""
        return int(self._lines[0, _SEALED]) == attempt

    def is_measured(self, attempt: int) -> bool:
        """Whether the moments of what is quantized are there, of all ranks."""
        return self.is_sealed(attempt) or int(self._lines[0, _MEASURED]) == attempt

    def has(self, attempt: int, needs: Needs) -> bool:
        """Whether what is needed has landed."""
        if self.is_sealed(attempt):
            return True
        ranks = self._lines[1:]
        there = bool((ranks[:, _ATTEMPT] == attempt).all())
        return there and bool((ranks[:, _LANDED] >= np.asarray(needs.boxes, np.uint64)).all())

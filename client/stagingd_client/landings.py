# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Which of this rank's boxes have landed in a slot: told in the slot itself, for readers that begin early."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from stagingd.catalog import OwnedBox
from stagingd.segment import Segment

Numbers = npt.NDArray[np.int64]


class Landings:
    """Of one rank, version by version. For the thread that flushes.

    Args:
        segment: the stage's memory.
        rank: the trainer rank.
    """

    def __init__(self, segment: Segment, rank: int) -> None:
        self._rank = rank
        self._progress = [segment.progress(slot) for slot in (0, 1)]
        self._number = {(box.tensor, box.box): number for number, box in enumerate(segment.catalog.owned_by(rank))}
        self._there = np.zeros(len(self._number), np.bool_)
        self._slot = 0
        self._told = 0

    def begin(self, slot: int, attempt: int) -> None:
        """A version is filled from now on, by the attempt of this number."""
        self._slot, self._told = slot, 0
        self._there[:] = False
        self._progress[slot].start(self._rank, attempt)

    def numbers_of(self, boxes: Iterable[OwnedBox]) -> Numbers:
        """How the rank's boxes are counted: worked out once for those that land together."""
        return np.fromiter((self._number[box.tensor, box.box] for box in boxes), np.int64)

    def land(self, numbers: Numbers) -> None:
        """Boxes have landed, with their moments. What is told is how many there are without a gap from the first on."""
        self._there[numbers] = True
        rest = self._there[self._told :]
        gap = int(rest.argmin()) if len(rest) else 0
        landed = self._told + (gap if len(rest) and not rest[gap] else len(rest))
        if landed != self._told:
            self._told = landed
            self._progress[self._slot].land(self._rank, landed)

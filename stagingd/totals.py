# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What has come together since the daemon began: how long things took, and how many bytes they moved. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Durations are counted by the first of these that they do not exceed, in seconds: swaps to whole reads."""

Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True)
class Durations:
    """How long something took, so many times.

    Attributes:
        counts: per bound in seconds, how many took that long at most and longer than the bound before; the last one
            counts those that took longer than any.
        seconds: in all.
        bytes: moved by it, in all.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts)


@dataclass
class _Sum:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0
    bytes: int = 0


class Totals(Generic[Kind]):
    """Durations and bytes by kind; as large as there are kinds."""

    def __init__(self) -> None:
        self._sums: dict[Kind, _Sum] = {}

    def add(self, kind: Kind, seconds: float, size: int | None) -> None:
        """Something took so many seconds, and moved so many bytes."""
        one = self._sums.setdefault(kind, _Sum())
        one.counts[bisect_left(BOUNDS_S, seconds)] += 1
        one.seconds += seconds
        one.bytes += size or 0

    def so_far(self) -> dict[Kind, Durations]:
        """By kind; of a kind that has not been there is nothing."""
        return {kind: Durations(tuple(one.counts), one.seconds, one.bytes) for kind, one in self._sums.items()}

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Seconds as a fixed cost and bytes at a bandwidth: a least-squares line through updates of several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.host_case import BenchmarkFailed


@dataclass(frozen=True)
class Fit:
    """``seconds = fixed_s + bytes / bytes_per_s``.

    ``bytes_per_s`` is infinite where more bytes take no longer.
    """

    fixed_s: float
    bytes_per_s: float

    def seconds(self, size: float) -> float:
        """Of an update of so many bytes."""
        return self.fixed_s + size / self.bytes_per_s


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """The line with the least squared distance from points of bytes and seconds.

    A line that falls is none that a transfer can have: then the mean is all fixed cost. A line that would begin below
    zero goes through the origin: then nothing is.

    Raises:
        BenchmarkFailed: all points are of one size.
    """
    if len({size for size, _ in points}) < 2:
        raise BenchmarkFailed("a line takes updates of two sizes at least", remedy="measure another --model too")
    sizes, seconds = zip(*points, strict=True)
    size, second = math.fsum(sizes) / len(points), math.fsum(seconds) / len(points)
    spread = math.fsum((x - size) ** 2 for x in sizes)
    slope = math.fsum((x - size) * (y - second) for x, y in points) / spread
    if slope <= 0:
        return Fit(second, math.inf)
    if second - slope * size < 0:
        return Fit(0.0, math.fsum(x * x for x in sizes) / math.fsum(x * y for x, y in points))
    return Fit(second - slope * size, 1 / slope)

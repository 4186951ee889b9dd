# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The size that a machine is held against: two versions of a model, and what lies beside them."""

from __future__ import annotations

import math
from typing import Final

from stagingd.memory import gib
from stagingd.record import Record

BESIDE_SHARE: Final = 0.007
"""Moments take 0.3 to 0.7 % of a version; the upper end is reckoned with."""

SMALLEST_BYTES: Final = 2**30
"""One version where no size is given: half a billion parameters in bf16. What has no room for it has room for none."""


class Wanted(Record):
    """How large a stage is to be.

    Attributes:
        version_bytes: one version.
        stage_bytes: both, with their moments.
        given: whether somebody said so.
    """

    version_bytes: int
    stage_bytes: int
    given: bool

    @classmethod
    def of(cls, size_gib: float | None, stage_bytes: int | None) -> Wanted:
        """From one version's size in GiB, or the whole stage's in bytes; from neither, the smallest useful one."""
        if stage_bytes is not None:
            return cls(version_bytes=int(stage_bytes / (2 + 2 * BESIDE_SHARE)), stage_bytes=stage_bytes, given=True)
        version = SMALLEST_BYTES if size_gib is None else math.ceil(size_gib * 2**30)
        whole = math.ceil(version * (2 + 2 * BESIDE_SHARE))
        return cls(version_bytes=version, stage_bytes=whole, given=size_gib is not None)

    def __str__(self) -> str:
        return f"two versions of {size_text(self.version_bytes)} take {size_text(self.stage_bytes)}"


def largest_version(room: int) -> int:
    """Bytes of the largest version of which two fit into so many bytes."""
    return max(0, int(room / (2 + 2 * BESIDE_SHARE)))


def size_text(size: int) -> str:
    """A size in bytes, for people: MiB below one GiB, and KiB below one MiB."""
    if size >= 2**30:
        return gib(size)
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Copies from scratch memory to a slot: joined where they follow each other, split where one call cannot do them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class Copy:
    """``height`` runs of ``width`` bytes. Places and pitches in bytes; a pitch is of no meaning where height is 1.

    Attributes:
        target: where in the slot.
        source: where in the scratch memory.
        width, height: its size.
        target_pitch, source_pitch: from one run to the next.
        padding: so many bytes behind its target belong to nobody, on both sides: it may be made longer by them.
    """

    target: int
    source: int
    width: int
    height: int
    target_pitch: int
    source_pitch: int
    padding: int = 0

    @property
    def bytes(self) -> int:
        """In all."""
        return self.width * self.height


def coalesced(copies: Iterable[Copy]) -> list[Copy]:
    """The same bytes in fewer copies: runs that follow each other are joined, and equal runs at equal distances too."""
    joined: list[Copy] = []
    for copy in copies:
        before = joined[-1] if joined else None
        longer = None if before is None else _longer(before, copy) or _higher(before, copy)
        if longer is None:
            joined.append(copy)
        else:
            joined[-1] = longer
    # Runs at equal distances show only when each is as long as it gets.
    higher: list[Copy] = []
    for copy in joined:
        taller = _higher(higher[-1], copy) if higher else None
        if taller is None:
            higher.append(copy)
        else:
            higher[-1] = taller
    return higher


def _longer(before: Copy, copy: Copy) -> Copy | None:
    """One run for two that follow each other, with what is between them where it is nothing but padding."""
    if before.height > 1 or copy.height > 1:
        return None
    ahead = copy.target - before.target
    if ahead != copy.source - before.source or not before.width <= ahead <= before.width + before.padding:
        return None
    return replace(before, width=ahead + copy.width, padding=copy.padding)


def _higher(before: Copy, copy: Copy) -> Copy | None:
    """More runs of the same width, at the same distance."""
    if before.width != copy.width:
        return None
    target_pitch, source_pitch = copy.target - before.target, copy.source - before.source
    if before.height > 1:
        target_pitch, source_pitch = before.target_pitch, before.source_pitch
        follows = (copy.target, copy.source) == (
            before.target + before.height * target_pitch,
            before.source + before.height * source_pitch,
        )
    else:
        follows = target_pitch >= before.width and source_pitch >= before.width
    same = copy.height == 1 or (copy.target_pitch, copy.source_pitch) == (target_pitch, source_pitch)
    if not (follows and same):
        return None
    return replace(before, height=before.height + copy.height, target_pitch=target_pitch, source_pitch=source_pitch)


MAX_PITCH: Final = 2**31 - 1
"""Bytes: what CUDA's two-dimensional copies take between two runs."""


def split(copy: Copy, slot: int, seams: Sequence[int]) -> Iterator[Copy]:
    """The same bytes in copies of which none crosses a seam, and none has a pitch that is too large.

    Args:
        copy: what to copy.
        slot: the slot's address.
        seams: addresses that no copy's target may cross, rising.
    """
    start = slot + copy.target
    end = start + (copy.height - 1) * copy.target_pitch + copy.width
    after = bisect.bisect_right(seams, start)
    crosses = after < len(seams) and seams[after] < end
    too_wide = copy.height > 1 and max(copy.target_pitch, copy.source_pitch) > MAX_PITCH
    if not crosses and not too_wide:
        yield copy
        return
    if copy.height > 1:
        half = copy.height // 2
        parts = _runs(copy, 0, half), _runs(copy, half, copy.height - half)
    else:
        before = seams[after] - start
        rest = replace(copy, target=copy.target + before, source=copy.source + before, width=copy.width - before)
        parts = replace(copy, width=before), rest
    for part in parts:
        yield from split(part, slot, seams)


def _runs(copy: Copy, first: int, count: int) -> Copy:
    target = copy.target + first * copy.target_pitch
    return replace(copy, target=target, source=copy.source + first * copy.source_pitch, height=count)

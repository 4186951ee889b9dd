# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Who writes what: of the ranks that hold the same box, each gets some of its rows.

So every rank's link to the host carries its part, and every element crosses once. Large boxes are cut into several of
the same rank besides: what has landed is told box by box. All is integer arithmetic on what was declared: whoever
computes it comes to the same owners.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from stagingd.boxes import Box, cells
from stagingd.moments import BLOCK

PIECE_BYTES: Final = 2**20
"""A box is not cut into smaller pieces: a copy of 1 MiB still runs at nine tenths of a link's speed."""


LANDING_BYTES: Final = 2**27
"""A larger box is cut: engines that read as it lands wait for the first part, and not for all of it."""


MOST_PARTS: Final = 2**11
"""So many are made of a stage so, about: whatever sizes somebody declares."""


class HeldBox(NamedTuple):
    """A box of a tensor and all ranks that hold it, in rising order."""

    tensor: str
    box: Box
    ranks: tuple[int, ...]
    item_bytes: int

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.box.volume * self.item_bytes


class Part(NamedTuple):
    """A box that one rank writes."""

    tensor: str
    box: Box
    rank: int


class _Cut(NamedTuple):
    """How a box may be cut: along ``dim``, at global multiples of ``step``, into at most ``parts``."""

    dim: int
    step: int
    parts: int


def choose_owners(held: Iterable[HeldBox]) -> list[Part]:
    """Cut boxes among the ranks that hold them, so that all ranks have about the same bytes to write.

    What only one rank holds is its own. Of the rest the boxes with fewest holders come first, since they leave
    least choice, and among those the largest: the small ones, which stay whole, then level what is left.

    Returns:
        Disjoint boxes that together are those of ``held``.
    """
    load: dict[int, int] = defaultdict(int)
    parts, replicated, item_bytes = [], [], dict[str, int]()
    for entry in held:
        item_bytes[entry.tensor] = entry.item_bytes
        if len(entry.ranks) > 1:
            replicated.append(entry)
            continue
        parts.append(Part(entry.tensor, entry.box, entry.ranks[0]))
        load[entry.ranks[0]] += entry.bytes
    for entry in sorted(replicated, key=lambda entry: (len(entry.ranks), -entry.bytes)):
        for part in _parts(entry, load):
            load[part.rank] += part.box.volume * entry.item_bytes
            parts.append(part)
    sizes = [part.box.volume * item_bytes[part.tensor] for part in parts]
    limit = max(LANDING_BYTES, sum(sizes) // MOST_PARTS)
    return [small for part, size in zip(parts, sizes, strict=True) for small in _small(part, -(-size // limit))]


def _small(part: Part, wanted: int) -> Iterator[Part]:
    """A part, cut into so many, or fewer."""
    cut = _cut_of(part.box, wanted) if wanted > 1 else None
    if cut is None or cut.parts < 2:
        yield part
        return
    start, end = part.box.offsets[cut.dim], part.box.ends[cut.dim]
    length = -(-(end - start) // cut.parts // cut.step) * cut.step
    edges = [start, *range((start + length) // cut.step * cut.step, end, length), end]
    for first, until in itertools.pairwise(edges):
        yield Part(part.tensor, _rows(part.box, cut.dim, first, until), part.rank)


def _parts(entry: HeldBox, load: dict[int, int]) -> list[Part]:
    wanted = min(len(entry.ranks), entry.bytes // PIECE_BYTES)
    cut = _cut_of(entry.box, wanted) if wanted > 1 else None
    if cut is None or cut.parts < 2:
        owner = min(entry.ranks, key=lambda rank: (load[rank], rank))
        return [Part(entry.tensor, entry.box, owner)]
    return list(_cut_rows(entry, cut, load))


@functools.lru_cache(maxsize=1 << 12)  # thousands of experts are cut alike
def _cut_of(box: Box, wanted: int) -> _Cut:
    """Along the first dim that is long enough for so many parts; else the longest, into fewer.

    Cuts fall between blocks of the last two dims, so that a block's statistics, and the kernel that takes them,
    find it whole. Rows that all lie in one block are cut anyhow.
    """
    dims = len(box.lengths)
    found = []
    for dim in range(dims):
        step = BLOCK if dim >= dims - 2 else 1
        units = cells(box, [step] * dims).lengths[dim]
        if dim == dims - 2 and units < 2:
            step, units = 1, box.lengths[dim]
        if units >= wanted:
            return _Cut(dim, step, wanted)
        found.append(_Cut(dim, step, units))
    return max(found, key=lambda cut: cut.parts)


def _cut_rows(entry: HeldBox, cut: _Cut, load: dict[int, int]) -> Iterator[Part]:
    box, dim = entry.box, cut.dim
    start, end = box.offsets[dim], box.ends[dim]
    index_bytes = entry.bytes // box.lengths[dim]
    at, given = start, 0
    shares = sorted(_shares(entry, cut.parts, load))
    for position, (rank, share) in enumerate(shares, 1):
        given += share
        exact = start + given // index_bytes
        until = end if position == len(shares) else min(end, (exact + cut.step // 2) // cut.step * cut.step)
        if until > at:
            yield Part(entry.tensor, _rows(box, dim, at, until), rank)
            at = until


def _shares(entry: HeldBox, parts: int, load: dict[int, int]) -> list[tuple[int, int]]:
    """How many bytes each rank should take, so that those that take some end level; each at least a piece."""
    least = sorted((load[rank], rank) for rank in entry.ranks)[:parts]
    total = entry.bytes + sum(loaded for loaded, _ in least)
    while len(least) > 1 and total // len(least) - least[-1][0] < PIECE_BYTES:
        total -= least.pop()[0]
    level = total // len(least)
    return [(rank, level - loaded) for loaded, rank in least]


def _rows(box: Box, dim: int, start: int, stop: int) -> Box:
    offsets, lengths = list(box.offsets), list(box.lengths)
    offsets[dim], lengths[dim] = start, stop - start
    return Box(tuple(offsets), tuple(lengths))

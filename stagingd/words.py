# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Figures and names as people read them in a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Final

RANGES: Final = 6
"""Ranges of ranks that are listed: the first of many."""

UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def clean(name: str) -> str:
    """A client's text without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def duration(seconds: float) -> str:
    """Seconds with three digits, in the unit that fits: ``4.12 ms``, ``59.9 s``, ``2 min 5 s``, ``3 h 4 min``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 0.001 else f"{max(seconds, 0.0) * 1e3:.2f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ago(seconds: float) -> str:
    """How long something is past."""
    return "now" if seconds < 1 else f"{duration(seconds)} ago"


def amount(size: float) -> str:
    """Bytes with three digits, in the unit that fits."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} {UNITS[-1]}"


def speed(bytes_s: float | None) -> str:
    """Bytes in a second; a dash where it is not known."""
    return "-" if bytes_s is None else f"{amount(bytes_s)}/s"


def ranks_of(ranks: Iterable[int], count: int | None = None) -> str:
    """Ranks as ranges: ``0-3, 7``; of a number of them, ``5 of 64: 0-3, 7``, or ``all 64``."""
    found = sorted(ranks)
    if count is not None and len(found) == count:
        return f"all {count}"
    ranges = list(_ranges(found))
    text = ", ".join(ranges[:RANGES]) + (" and more" if len(ranges) > RANGES else "")
    if count is None:
        return text or "none"
    return f"{len(found)} of {count}: {text}" if found else f"0 of {count}"


def _ranges(ranks: list[int]) -> Iterator[str]:
    for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        yield str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What cannot be done yet, and who it waits for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

NAMED_RANKS = 16
"""Ranks that a message names one by one: whom to look at first."""


@dataclass(frozen=True)
class Waiting:
    """Not yet: what is awaited, and from whom."""

    what: str
    peers: tuple[str, ...] = ()


def named(what: str, ranks: Iterable[int]) -> tuple[str, ...]:
    """The ranks one by one, the first of many: ``trainer rank 3``, …"""
    first = list(itertools.islice(ranks, NAMED_RANKS + 1))
    names = tuple(f"{what} {rank}" for rank in first[:NAMED_RANKS])
    return names if len(first) <= NAMED_RANKS else (*names, "and more")

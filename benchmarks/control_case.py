# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A case of ``benchmarks.control``: how many ranks, what each writes, and what they exchange with the daemon."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

STEP_S: Final = 60.0
"""The longest that anything waits for one exchange or for the start of all processes, in seconds."""
WARM_UP: Final = 10
"""Rounds before the timed ones."""
COLUMNS: Final = 32
"""Elements of a trainer rank's row: the bytes shall not matter."""
ROW_BYTES: Final = 2 * COLUMNS
"""A row's, of bfloat16."""


class Lane(StrEnum):
    """Who answers: the daemon, or a bare ZeroMQ socket that returns the same bytes without reading any."""

    STAGINGD = "stagingd"
    BARE = "ZeroMQ"


class Exchange(StrEnum):
    """A request and its answer. All ranks of a kind, trainers or readers, send it at once."""

    BEGIN = "begin"
    COMMIT = "commit, with readers waiting"
    SEAL = "commit, with nobody waiting"
    WAIT = "lease of a version that is not there yet"
    FLIP = "lease of a sealed version"
    RELEASE = "release"


Spans = dict[Lane, dict[Exchange, list[tuple[int, int]]]]
"""When a rank sent its request and had its answer, in nanoseconds: CLOCK_MONOTONIC, one clock for all processes."""


@dataclass(frozen=True)
class Case:
    """So many trainer ranks, and one engine of so many reader ranks.

    Each round has two versions: the first is awaited by the readers before it is committed, the second is
    sealed before they ask for it. Its requests and answers then take the bare lane, or the other way round.

    Attributes:
        rounds: the timed ones.
        seed: the bytes of a run are no other run's.
    """

    trainers: int
    readers: int
    rounds: int
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    @property
    def all_rounds(self) -> range:
        """The warm-up and the timed ones."""
        return range(WARM_UP + self.rounds)

    def versions(self, number: int) -> tuple[int, int]:
        """The two versions of a round: the one that is awaited, and the one that is flipped."""
        return 2 * number + 1, 2 * number + 2

    def slot(self, version: int) -> int:
        """Where a version lies: the slots take turns."""
        return (version - 1) % 2

    def row(self, version: int, rank: int) -> bytes:
        """What a trainer rank writes."""
        return hashlib.shake_128(self.seed + f"{version} {rank}".encode()).digest(ROW_BYTES)

    def whole(self, version: int) -> bytes:
        """What all trainer ranks write together."""
        return b"".join(self.row(version, rank) for rank in range(self.trainers))

    def gathered(self, exchange: Exchange) -> int:
        """How many requests must have come before any of them is answered."""
        together = {Exchange.SEAL: self.trainers}
        together |= dict.fromkeys((Exchange.COMMIT, Exchange.WAIT), self.trainers + self.readers)
        return together.get(exchange, 1)


def lanes(number: int) -> tuple[Lane, Lane]:
    """Who goes first takes turns. In the first round the daemon does: the bare lane repeats what it has said."""
    return (Lane.STAGINGD, Lane.BARE) if number % 2 == 0 else (Lane.BARE, Lane.STAGINGD)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The two copies, and readers' claims on them. ``stagingd.buffer`` says how they change."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class SlotState(StrEnum):
    """See the picture in ``stagingd.buffer``."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"
    FRONT = "front"
    DRAINING = "draining"


@dataclass
class Slot:
    """One of the two copies. ``version`` is None exactly when the slot is free; it may then still hold one whole.

    ``attempt`` numbers the times that versions were begun: see ``stagingd.progress``.
    """

    index: int
    state: SlotState = SlotState.FREE
    version: int | None = None
    kept: int | None = None
    attempt: int = 0
    begun: set[int] = field(default_factory=set)
    measured: set[int] = field(default_factory=set)
    committed: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Give the slot back: nothing in it is worth anything any more."""
        self.state, self.version, self.kept = SlotState.FREE, None, None
        self.begun, self.measured, self.committed = set(), set(), set()


@dataclass
class Lease:
    """A reader group's claim on a slot: every rank of the engine joins it and releases it once.

    ``holding`` are the ranks that may be reading now, ``done`` those that have released it, ``gone`` those that
    have left the engine: nobody waits for them, and whoever takes such a rank's place may join while it lasts.
    ``until`` is the time at which it is taken away, on the clock of whoever granted it.
    """

    id: int
    engine: str
    ranks: int
    slot: Slot
    version: int
    until: float
    holding: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)

    @property
    def early(self) -> bool:
        """Whether the version is still being filled."""
        return self.slot.state is SlotState.FILLING

    @property
    def complete(self) -> bool:
        """Whether nobody needs it any more: no rank is awaited, or those that held it are gone and none has read it."""
        return not self.missing or not (self.holding or self.done)

    @property
    def missing(self) -> list[int]:
        """The ranks that it is kept for."""
        return [rank for rank in range(self.ranks) if rank not in self.done and rank not in self.gone]

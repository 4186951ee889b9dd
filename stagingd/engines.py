# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How far the engines of a stage have come, and how long each of their ranks stood still: from its history. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from stagingd.history import Span, VersionHistory

LIVE: Final = ("swap", "update")
"""What makes a version live. Readers that are no workers do not tell of it; of them, what they have read counts."""


@dataclass
class EngineState:
    """One engine.

    Attributes:
        read: the newest version that it has read; None where that is not remembered.
        live: the newest version that one of its ranks has made live; None where none has told.
        pauses: per rank, how it made the last version live that it told of.
    """

    read: int | None = None
    live: int | None = None
    pauses: dict[int, Span] = field(default_factory=dict)

    @property
    def version(self) -> int | None:
        """What it computes with, as far as is known."""
        return self.live if self.live is not None else self.read


def engine_states(versions: Sequence[VersionHistory], engines: Iterable[str]) -> dict[str, EngineState]:
    """The state of engines, by name, from a stage's history (oldest first)."""
    states = {name: EngineState() for name in engines}
    for one in versions:
        for span in one.spans:
            state = states.get(span.who)
            if state is None or span.end_s is None or span.what not in ("read", *LIVE):
                continue
            if span.what == "read":
                state.read = one.version if one.sealed_s is not None else state.read
            else:
                state.live = one.version
                before = state.pauses.get(span.rank)
                if before is None or before.end_s is None or before.end_s <= span.end_s:
                    state.pauses[span.rank] = span
    return states

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The crash table: who was killed at which point, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

from crashes.points import ABSENT, POINTS, Point, Role, Step

HEAD: Final = ("killed", "point", "survivors", "within", "front", "version 2", "next version")
NOT_RUN: Final = "not run"


@dataclass(frozen=True)
class Outcome:
    """What came of a death.

    Attributes:
        survivors: what they saw.
        after_ms: how long after the death that was, in milliseconds.
        front: what was read then, byte for byte; None where the stage was given back.
        version_2: what became of it.
        following: the next version that went through.
        following_ms: how long after the death; None where somebody had to come first.
    """

    survivors: str
    after_ms: int
    front: int | None
    version_2: str
    following: int
    following_ms: int | None = None

    def cells(self) -> tuple[str, ...]:
        front = "given back" if self.front is None else f"version {self.front}"
        when = "" if self.following_ms is None else f" after {self.following_ms} ms"
        return self.survivors, f"{self.after_ms} ms", front, self.version_2, f"version {self.following}{when}"


Event = tuple[Point, str]
"""A point, and what comes after the death: nothing, or for the daemon whether it is restarted."""


def lines(outcomes: Mapping[Event, Outcome]) -> Iterator[tuple[str, ...]]:
    """The table's lines: no combination of role and step is left out."""
    for role, step in product(Role, Step):
        if (role, step) in ABSENT:
            yield role, step, f"does not take part: {ABSENT[role, step]}", *[""] * (len(HEAD) - 3)
        for point in (point for point in POINTS if (point.role, point.step) == (role, step)):
            for after in afters(role):
                outcome = outcomes.get((point, after))
                cells = outcome.cells() if outcome is not None else (NOT_RUN, *[""] * (len(HEAD) - 3))
                yield f"{role}{after and ', ' + after}", point.text, *cells


def afters(role: Role) -> tuple[str, ...]:
    """What may come after a death of this role."""
    return ("restarted", "not restarted") if role is Role.DAEMON else ("",)


def markdown(outcomes: Mapping[Event, Outcome]) -> str:
    """The table as Markdown, its columns aligned."""
    rows = [HEAD, *lines(outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]) + "\n"

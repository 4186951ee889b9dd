# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The exactness table: how many bytes and scales were compared with vLLM's own loading, and how many differed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ENGINES = ("TP 1", "TP 2", "TP 4", "EP 2")


@dataclass(frozen=True)
class Row:
    """A model and a mode ("bfloat16" where it is not quantized)."""

    model: str
    mode: str


@dataclass(frozen=True)
class Compared:
    """Over all ranks of an engine."""

    bytes: int
    scales: int
    wrong: int

    def __str__(self) -> str:
        return f"{self.bytes:,} + {self.scales:,}" + (f", {self.wrong} WRONG" if self.wrong else "")


def markdown(found: Mapping[tuple[Row, str], Compared]) -> str:
    """Rows of models and modes, columns of engines: bytes and scales that are equal."""
    lines = [f"| model | mode | {' | '.join(ENGINES)} |", "|---" * (2 + len(ENGINES)) + "|"]
    for row in dict.fromkeys(row for row, _ in found):
        cells = [str(found.get((row, engine), "")) for engine in ENGINES]
        lines.append(f"| {row.model} | {row.mode} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

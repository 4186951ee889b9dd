# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What was measured of one system in one case, as it stands in the report."""

from __future__ import annotations

import dataclasses
import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.case import LAYOUTS, Case
from benchmarks.report import Row

MIB = 2**20


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    """The smallest value that 95 % of all do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


@dataclass(frozen=True)
class Update:
    """Seconds of one update. What concerns the engine is None where there is none.

    Attributes:
        trainer_blocked_s: for which the update held a trainer's host; of several ranks, the longest.
        engine_stopped_s: by which a token of a request in flight was late, at most.
        generation_lost_s: by which all tokens meanwhile were late, taken together: slower steps count, too.
        total_s: from the last weight that changed to the first token of a request that came after the update.
    """

    trainer_blocked_s: float
    engine_stopped_s: float | None = None
    generation_lost_s: float | None = None
    total_s: float | None = None


FIGURES = tuple(field.name for field in dataclasses.fields(Update))


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of plain copies in the same run, of all ranks at once and taken together.

    Attributes:
        from_trainers: out of the trainers' devices, into page-locked memory.
        into_engine: out of page-locked memory, into the engine's devices; None where there is no engine.
    """

    from_trainers: float
    into_engine: float | None = None


@dataclass(frozen=True)
class Wire:
    """The least that an update's bytes take on their way, and how that was found."""

    seconds: float
    how: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that one update moves between devices, reckoned from what the system does and not measured."""

    pcie: int
    nvlink: int


@dataclass(frozen=True)
class Memory:
    """Bytes beyond weights and engine.

    Attributes:
        trainer: of torch's allocator on a trainer's device, at its peak; of several ranks, the largest.
        engine: the same on an engine rank's; None where there is no engine.
        host: page-locked or shared memory of the system, of the whole node.
    """

    trainer: int
    engine: int | None
    host: int


@dataclass(frozen=True)
class Survival:
    """What came of the trainers when a worker of the engine was killed midway.

    ``seconds`` from its death until every trainer rank was done with the update, so that it could begin the next one;
    None where one was not within ``limit_s``.
    """

    seconds: float | None
    limit_s: float


def now() -> str:
    """For ``taken_at``."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Measured:
    """One system in one case.

    Attributes:
        system: its name.
        case: what it was measured with.
        setting: its own, in words.
        lines: of code that a user writes.
        taken_at: when, in UTC.
        not_run: why there is nothing else here; None where there is.
        first: the first update.
        steady: those after it.
        wire, ceilings, traffic, memory, survival: as their types say; None where not measured.
    """

    system: str
    case: Case
    setting: str
    lines: int
    taken_at: str
    not_run: str | None = None
    first: Update | None = None
    steady: tuple[Update, ...] = ()
    wire: Wire | None = None
    ceilings: Ceilings | None = None
    traffic: Traffic | None = None
    memory: Memory | None = None
    survival: Survival | None = None

    def values(self, figure: str) -> list[float]:
        """A figure of ``Update``, of all steady updates that have it."""
        return [value for update in self.steady if (value := getattr(update, figure)) is not None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        case = {"model": self.case.model, "layout": self.case.layout.name, "mode": self.case.mode}
        return {**dataclasses.asdict(self), "case": case, "steady": [dataclasses.asdict(one) for one in self.steady]}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Measured:
        """From JSON."""
        case = found["case"]
        parts: dict[str, Any] = {
            name: None if found[name] is None else kind(**found[name]) for name, kind in PARTS.items()
        }
        return cls(
            system=found["system"],
            case=Case(case["model"], LAYOUTS[case["layout"]], case["mode"]),
            setting=found["setting"],
            lines=found["lines"],
            taken_at=found["taken_at"],
            not_run=found["not_run"],
            steady=tuple(Update(**one) for one in found["steady"]),
            **parts,
        )

    def rows(self) -> list[Row]:
        """The figures, for a report like that of other benchmarks."""
        label = f"{self.case.label}: {self.system}"
        found = []
        for figure in FIGURES:
            values = self.values(figure)
            what = figure.removesuffix("_s").replace("_", " ")
            if values:
                found.append(Row(f"{label}: {what}, p50", median(values) * 1e3, "ms", "lower"))
                found.append(Row(f"{label}: {what}, p95", p95(values) * 1e3, "ms", "lower"))
            first = None if self.first is None else getattr(self.first, figure)
            if first is not None:
                found.append(Row(f"{label}: {what}, first update", first * 1e3, "ms", "lower"))
        if self.wire is not None:
            found.append(Row(f"{label}: wire alone", self.wire.seconds * 1e3, "ms", "lower"))
        return found + self._memory_rows(label)

    def _memory_rows(self, label: str) -> list[Row]:
        if self.memory is None:
            return []
        sizes = dataclasses.asdict(self.memory)
        return [
            Row(f"{label}: {where} memory", size / MIB, "MiB", "lower")
            for where, size in sizes.items()
            if size is not None
        ]


PARTS: Mapping[str, type[Any]] = {
    "first": Update,
    "wire": Wire,
    "ceilings": Ceilings,
    "traffic": Traffic,
    "memory": Memory,
    "survival": Survival,
}

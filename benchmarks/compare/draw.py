# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of what was compared, from reports alone, as SVG. It takes matplotlib, of the extra ``dev``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.compare.case import Case
from benchmarks.compare.measured import Measured, median
from benchmarks.compare.table import measurements
from benchmarks.host_case import BenchmarkFailed

POINTS: Final = {
    "trainer_blocked_s": ("trainer blocked", "o"),
    "engine_stopped_s": ("engine stopped", "s"),
    "total_s": ("last weight to first token", "D"),
}
APART: Final = 0.18
"""Of a row, between its points; the wire stands beside what it is a part of."""


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """One figure for each case of a report.

    Args:
        report: as it stands in its file.
        folder: where they go, as ``compare-MACHINE-CASE.svg``; it is made if need be.

    Raises:
        BenchmarkFailed: there is no matplotlib.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only here
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise BenchmarkFailed("there is no matplotlib", remedy="install stagingd[dev]") from error
    # Else the date and random names would make each drawing of the same figures another file.
    mpl.rcParams["svg.hashsalt"] = "stagingd"
    folder.mkdir(parents=True, exist_ok=True)
    found, paths = measurements(report), []
    for case in dict.fromkeys(one.case for one in found):
        ran = [one for one in found if one.case == case and one.steady]
        if ran:
            figure = Figure(figsize=(9, 1.4 + 0.6 * len(ran)), layout="constrained")
            _points(figure.subplots(), case, ran)
            paths.append(folder / f"compare-{report['machine']}-{_slug(case)}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _points(axes: Any, case: Case, ran: Sequence[Measured]) -> None:
    """A row for each system, the first on top. Points, since the axis is logarithmic and bars would begin nowhere."""
    for number, (figure, (words, marker)) in enumerate(POINTS.items()):
        found = [(place, median(values)) for place, one in enumerate(ran) if (values := one.values(figure))]
        _scatter(axes, found, (number - 1) * APART, marker, words)
    wired = [(place, one.wire.seconds) for place, one in enumerate(ran) if one.wire is not None]
    _scatter(axes, wired, APART, "|", "wire alone")
    axes.set_yticks(range(len(ran)), [one.system for one in ran])
    axes.set_ylim(len(ran) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, median")
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set_title(f"{case.label}, {case.bytes / 1e9:.3g} GB", loc="left", fontsize=10)
    axes.figure.legend(loc="outside lower center", ncols=len(POINTS) + 1, fontsize=8)


def _scatter(axes: Any, found: Sequence[tuple[int, float]], lower: float, marker: str, words: str) -> None:
    if found:
        long, places = [seconds * 1e3 for _, seconds in found], [place + lower for place, _ in found]
        axes.scatter(long, places, marker=marker, s=60, label=words)


def _slug(case: Case) -> str:
    return f"{case.model}-{case.layout.name}-{case.mode}".lower().replace("_", "-")

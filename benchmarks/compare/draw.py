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

BARS: Final = {
    "trainer_blocked_s": "trainer blocked",
    "engine_stopped_s": "engine stopped",
    "total_s": "last weight to first token",
}


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
            figure = Figure(figsize=(9, 1.2 + 0.75 * len(ran)), layout="constrained")
            _bars(figure.subplots(), case, ran)
            paths.append(folder / f"compare-{report['machine']}-{_slug(case)}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _bars(axes: Any, case: Case, ran: Sequence[Measured]) -> None:
    """Groups of horizontal bars, one group for each system, the first on top; wires as marks."""
    height = 0.8 / len(BARS)
    for number, (figure, words) in enumerate(BARS.items()):
        at = [place + (number - 1) * height for place, one in enumerate(ran) if one.values(figure)]
        long = [median(one.values(figure)) * 1e3 for one in ran if one.values(figure)]
        axes.barh(at, long, height=height, label=words)
    wired = [(place, one.wire.seconds * 1e3) for place, one in enumerate(ran) if one.wire is not None]
    if wired:
        axes.scatter(
            [long for _, long in wired],
            [place for place, _ in wired],
            marker="|",
            s=300,
            color="black",
            label="wire alone",
            zorder=3,
        )
    axes.set_yticks(range(len(ran)), [one.system for one in ran])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, median")
    axes.set_title(f"{case.label}, {case.bytes / 1e9:.3g} GB", loc="left", fontsize=10)
    axes.legend(fontsize=8)


def _slug(case: Case) -> str:
    return f"{case.model}-{case.layout.name}-{case.mode}".lower().replace("_", "-")

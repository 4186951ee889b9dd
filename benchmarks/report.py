# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: figures with their aims, and on what machine and with which versions they were taken."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "torchtitan", "vllm", "numpy", "pyzmq", "stagingd")
GIT_S = 10.0
"""The longest that git may take, in seconds."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        figure: what was measured; no two rows of a report have the same.
        value: in ``unit``.
        unit: such as "GB/s" (10**9 bytes a second) or "ms".
        better: which way is better.
        aim: the value to reach, or None where none is set.
    """

    figure: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    aim: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the aim is reached; None where none is set."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.better == "higher" else self.value <= self.aim

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class Report:
    """The outcome of one benchmark on one machine.

    Attributes:
        benchmark: its name, such as "host".
        machine: a short slug.
        surroundings: what else tells one run from another, as ``surroundings`` gives it.
        rows: the figures.
    """

    benchmark: str
    machine: str
    surroundings: Mapping[str, Any]
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        head = {"benchmark": self.benchmark, "machine": self.machine, **self.surroundings}
        return {**head, "rows": [row.as_dict() for row in self.rows]}

    def write(self, folder: Path = RESULTS) -> Path:
        """Write ``BENCHMARK-MACHINE.json`` into a folder, which is made if need be. Returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}-{self.machine}.json"
        path.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")
        return path

    def table(self) -> Table:
        """For the terminal; aims are shown where there are any."""
        found = Table(title=f"{self.benchmark} on {self.machine}", title_justify="left")
        found.add_column("figure", no_wrap=True)
        found.add_column("value", justify="right")
        found.add_column("unit")
        with_aims = any(row.aim is not None for row in self.rows)
        if with_aims:
            found.add_column("aim", justify="right")
            found.add_column("holds")
        for row in self.rows:
            aim = "" if row.aim is None else f"{row.aim:.3g}"
            holds = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[row.holds]
            found.add_row(row.figure, f"{row.value:.4g}", row.unit, *((aim, holds) if with_aims else ()))
        return found


def surroundings(**settings: Any) -> dict[str, Any]:
    """Everything that a figure may depend on. ``settings`` are those of the benchmark.

    The load is that of the minute before: it tells whether the benchmark had the machine for itself.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load_average_1min": os.getloadavg()[0],
        "taken_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": None if changes is None else bool(changes),
        "settings": settings,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # as where the benchmark runs from a source tree


def machine_slug(given: str | None = None) -> str:
    """A short name for this machine that is good in a file's name: the given one, or cores and processor."""
    name = given or f"{psutil.cpu_count()}x {processor()}"
    plain = re.sub(r"\((r|tm|c)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def processor() -> str:
    """The processor's model as Linux names it, or its architecture where Linux does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _git(*arguments: str) -> str | None:
    """What git says of this checkout, or None where there is no git or no checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        found = subprocess.run(
            [git, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=GIT_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip()

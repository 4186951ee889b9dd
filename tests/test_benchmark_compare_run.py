# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.compare`` measures two systems with real engines on a CPU, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_environment import engine_environment

from benchmarks.compare.measured import FIGURES, Measured
from benchmarks.compare.table import BEGIN, END
from stagingd.segment import SHARED_MEMORY

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[1]
OPTIONS = ["--model", "debug", "--mode", "bfloat16", "--system", "stagingd", "--system", "torch-save"]
SMALL = ["--updates", "2", "--batch", "2", "--prefetch-gib", "1", "--kill-s", "10", "--machine", "A Test!"]
NAME = re.compile(r"stagingd-(?:bench|compare)-(\d+)-.*")


def left() -> set[str]:
    """What comparisons have in shared memory whose processes are gone; others may run their own."""
    named = ((path.name, NAME.fullmatch(path.name)) for path in SHARED_MEMORY.iterdir())
    return {name for name, match in named if match and not psutil.pid_exists(int(match[1]))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the report of a small run."""
    folder = tmp_path_factory.mktemp("compare")
    before = left()
    with engine_environment(folder):
        command = [sys.executable, "-m", "benchmarks.compare", "run", *OPTIONS, *SMALL, "--results", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert left() <= before
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "compare-a-test.json").read_text()))


def test_both_systems_are_measured_on_weights_that_were_checked(report: dict[str, Any]) -> None:
    for told, name in zip(report["measurements"], ("stagingd", "torch-save"), strict=True):
        found = Measured.of(told)
        assert found.not_run is None
        assert found.system == name
        assert len(found.steady) == 2
        for figure in FIGURES:
            assert all(value >= 0 for value in found.values(figure))
            assert len(found.values(figure)) == 2
        assert min(found.values("total_s")) > 0
        assert found.first is not None
        assert found.wire is not None
        assert found.memory is not None
        assert found.memory.host >= found.case.bytes


def test_trainers_go_on_though_a_worker_is_killed(report: dict[str, Any]) -> None:
    for told in report["measurements"]:
        survival = Measured.of(told).survival
        assert survival is not None
        assert survival.seconds is not None


def test_stagingd_holds_two_versions_and_a_little_more(report: dict[str, Any]) -> None:
    found = Measured.of(report["measurements"][0])
    assert found.memory is not None
    assert 2 < found.memory.host / found.case.bytes < 3


def test_the_report_says_what_was_measured_and_where(report: dict[str, Any]) -> None:
    assert report["benchmark"] == "compare"
    assert report["settings"] == {"updates": 2, "batch": 2, "prefetch_gib": 1.0, "kill_s": 10.0}
    assert report["versions"]["checkpoint-engine"]
    figures = [row["figure"] for row in report["rows"]]
    assert len(figures) == len(set(figures))


def test_the_readme_gets_its_tables_from_the_report(folder: Path, report: dict[str, Any]) -> None:
    document = folder / "README.md"
    document.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    options = ["--results", str(folder), "--document", str(document)]
    command = [sys.executable, "-m", "benchmarks.compare", "table", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    written = document.read_text()
    assert written.startswith("before\n\n")
    assert written.endswith("\n\nafter\n")
    for told in report["measurements"]:
        assert f"| {told['system']} | " in written

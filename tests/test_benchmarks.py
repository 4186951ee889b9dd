# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, clean up, and report every figure; how great the figures are is no matter here."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import host, host_case, host_ranks
from benchmarks.report import Report, Row, machine_slug
from stagingd.boxes import uncovered
from stagingd.segment import SHARED_MEMORY

ROOT = Path(__file__).parents[1]
OF_A_CASE = {
    "memcpy in",
    "flush, all grids",
    "flush, all grids, of memcpy",
    "flush, tensor grid",
    "flush, tensor grid, of memcpy",
    "moments alone, all grids",
    "first flush, all grids",
    "memcpy out",
    "read",
    "read, of memcpy",
}
OF_A_VERSION = {"begin to sealed, tensor grid, p50", "begin to sealed, all grids, p50", "lease to released, p50"}


def segments() -> set[str]:
    """The shared memory of benchmarks that this process runs; others may run their own."""
    return {path.name for path in SHARED_MEMORY.glob(f"stagingd-bench-{os.getpid()}-*")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a small run of the command, as it stands in its file."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--sizes", "1", "--writers", "1", "--writers", "2", "--repetitions", "1", "--machine", "A Test!"]
    command = [sys.executable, "-m", "benchmarks.host", *options, "--results", str(folder), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "host-a-test.json").read_text())
    assert json.loads(done.stdout) == written
    return dict(written)


def test_host_reports_every_figure_once(found: dict[str, Any]) -> None:
    labels = ("1 MiB, 1 writer", "1 MiB, 2 writers")
    expected = {f"{label}: {figure}" for label in labels for figure in OF_A_CASE}
    expected |= {f"one tiny tensor: {figure}" for figure in OF_A_VERSION}
    figures = [row["figure"] for row in found["rows"]]
    assert set(figures) == expected
    assert len(figures) == len(expected)


def test_host_figures_are_finite_and_positive(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert set(row) == {"figure", "value", "unit", "aim", "better", "holds"}
        assert math.isfinite(row["value"]), row
        assert row["value"] > 0, row
        assert row["aim"] is None
        assert row["holds"] is None
        assert row["better"] == ("lower" if row["unit"] == "ms" else "higher")


def test_host_says_what_was_measured_and_where(found: dict[str, Any]) -> None:
    assert found["benchmark"] == "host"
    assert found["machine"] == "a-test"
    assert set(found["versions"]) == {"python", "torch", "triton", "torchtitan", "vllm", "numpy", "pyzmq", "stagingd"}
    assert found["commit"]
    assert found["settings"] == {"sizes_mib": [1], "writers": [1, 2], "repetitions": 1}


def test_a_refused_declaration_ends_everything(capfd: pytest.CaptureFixture[str]) -> None:
    """A writer dies of it; nobody waits for it, and nothing of the run is left."""
    case = host_case.Case({"full.weight": (4, 4), "empty.weight": (0, 4)}, ranks=1, repetitions=1)
    with pytest.raises(host_case.BenchmarkFailed, match="writer 0 ended with status 1"):
        host.measure(case, lambda _: None)
    assert "'empty.weight'" in capfd.readouterr().err
    assert not multiprocessing.active_children()
    assert not segments()


def test_a_case_without_room_is_refused() -> None:
    case = host_case.Case({"huge.weight": (1 << 30, 1 << 20)}, ranks=1, repetitions=1)
    with pytest.raises(host_case.BenchmarkFailed, match="GiB free in /dev/shm"):
        host.measure(case, lambda _: None)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_boxes_are_the_whole_model(ranks: int) -> None:
    case = host_case.Case(host_case.model_shapes(8 * 2**20), ranks, repetitions=1)
    boxes = [case.boxes(rank) for rank in range(ranks)]
    for name, shape in case.shapes.items():
        assert uncovered(shape, [box[name] for box in boxes]) is None
    assert sum(case.elements(rank) for rank in range(ranks)) * host_case.ITEM_BYTES == case.bytes


@pytest.mark.parametrize("mebibytes", [1, 8, 64, 100, 512, 4096])
def test_a_model_has_about_the_size_that_was_asked_for(mebibytes: int) -> None:
    size = mebibytes * 2**20
    assert host_case.Case(host_case.model_shapes(size), 1, 1).bytes == pytest.approx(size, rel=0.05)


def test_every_round_takes_every_step() -> None:
    for version in (1, 2):
        steps = list(host_ranks.order(version))
        assert sorted(steps) == sorted(host_case.Step)
        assert set(steps[: len(host_case.WRITERS_STEPS)]) == set(host_case.WRITERS_STEPS)


def test_a_step_lasts_from_the_first_begin_to_the_last_end() -> None:
    one: host_case.Spans = {host_case.Step.FLUSH: [(1.0, 2.0), (10.0, 14.0)]}
    other: host_case.Spans = {host_case.Step.FLUSH: [(1.5, 4.0), (9.0, 11.0)]}
    assert host.together([one, other])[host_case.Step.FLUSH] == [3.0, 5.0]


@pytest.mark.parametrize(
    ("value", "better", "aim", "holds"),
    [(2.0, "higher", 1.0, True), (2.0, "higher", 3.0, False), (2.0, "lower", 3.0, True), (2.0, "lower", None, None)],
)
def test_a_row_knows_whether_its_aim_holds(value: float, better: Any, aim: float | None, holds: bool | None) -> None:
    assert Row("figure", value, "ms", better, aim).holds is holds


def test_a_report_is_named_for_benchmark_and_machine(tmp_path: Path) -> None:
    report = Report("host", machine_slug("../Two Cores"), {}, [Row("figure", 1.0, "ms", "lower", 2.0)])
    path = report.write(tmp_path / "new")
    assert path == tmp_path / "new" / "host-two-cores.json"
    assert json.loads(path.read_text())["rows"][0]["holds"] is True
    assert machine_slug().startswith(f"{os.cpu_count()}x-")

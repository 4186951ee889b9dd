# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.control`` runs, checks what it reads, cleans up, and reports every figure, however great."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import control
from benchmarks.control_bare import BareLine, Recorded, relay
from benchmarks.control_case import STEP_S, Case, Exchange, Lane, Spans, lanes
from benchmarks.control_gate import Gate
from benchmarks.control_ranks import Reader, Trainer
from benchmarks.host import end
from benchmarks.host_case import BenchmarkFailed
from stagingd.segment import SHARED_MEMORY

ROOT = Path(__file__).parents[1]
FIGURES = {
    "commit to visible",
    "commit to first visible",
    "commit to last visible",
    "commit to sealed",
    "flip",
    "release",
    "begin",
}
FORK = multiprocessing.get_context("fork")


def left_by(pid: int) -> list[Path]:
    """The shared memory of a benchmark's process."""
    return list(SHARED_MEMORY.glob(f"stagingd-bench-{pid}-*"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a short run of the command, as it stands in its file."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--trainers", "2", "--readers", "3", "--rounds", "4", "--machine", "A Test!", "--results", str(folder)]
    command = [sys.executable, "-m", "benchmarks.control", *options, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert not left_by(process.pid)
    written = json.loads((folder / "control-a-test.json").read_text())
    assert json.loads(output) == written
    return dict(written)


def test_control_reports_every_figure_once(found: dict[str, Any]) -> None:
    kinds = ("", ", ZeroMQ", ", of ZeroMQ")
    expected = [f"{name}, {p}{kind}" for name in FIGURES for p in ("p50", "p99") for kind in kinds]
    assert sorted(row["figure"] for row in found["rows"]) == sorted(expected)


def test_control_figures_are_finite_and_positive(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert math.isfinite(row["value"]), row
        assert row["value"] > 0, row
        assert row["better"] == "lower"
        assert row["unit"] == ("x" if row["figure"].endswith("of ZeroMQ") else "us")


def test_visible_and_flip_may_take_three_times_the_bare_exchange(found: dict[str, Any]) -> None:
    aims = {row["figure"]: row["aim"] for row in found["rows"] if row["aim"] is not None}
    assert aims == {"commit to visible, p50, of ZeroMQ": 3.0, "flip, p50, of ZeroMQ": 3.0}


def test_control_says_what_was_measured(found: dict[str, Any]) -> None:
    assert found["benchmark"] == "control"
    assert found["settings"] == {"trainers": 2, "readers": 3, "rounds": 4, "warm_up_rounds": 10}


class Torn(Case):
    """Nobody agrees with anybody else about what is written."""

    def row(self, version: int, rank: int) -> bytes:
        return os.urandom(len(super().row(version, rank)))


def test_other_bytes_than_the_trainers_wrote_end_everything(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BenchmarkFailed, match=r"reader \d ended before its time"):
        control.run(Torn(trainers=2, readers=2, rounds=1), Console(quiet=True))
    assert re.search(r"^reader \d: bytes: ", capfd.readouterr().err, re.MULTILINE)
    assert not multiprocessing.active_children()
    assert not left_by(os.getpid())


def test_the_rows_of_a_run_are_no_other_runs() -> None:
    case, other = Case(2, 1, 1), Case(2, 1, 1)
    rows = [case.row(1, 0), case.row(1, 1), case.row(2, 0), other.row(1, 0)]
    assert len(set(rows)) == len(rows)
    assert case.whole(1) == case.row(1, 0) + case.row(1, 1)


def test_both_lanes_go_first_in_turn() -> None:
    assert lanes(0) == (Lane.STAGINGD, Lane.BARE)
    assert lanes(1) == (Lane.BARE, Lane.STAGINGD)


# The bare lane


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    """A relay's socket."""
    process = FORK.Process(target=relay, args=(tmp_path / "relay.sock",))
    process.start()
    yield tmp_path / "relay.sock"
    end(process)


def recorded(answer: bytes, gathered: int) -> Recorded:
    return Recorded(Exchange.SEAL, b"request", answer, gathered)


def test_the_relay_returns_what_it_was_told_in_order(bare: Path) -> None:
    with BareLine(bare) as line:
        line.expect([recorded(b"one", 1), recorded(b"", 1)])
        line.expect([recorded(b"three", 1)])
        assert [line.ask(b"request") for _ in range(3)] == [b"one", b"", b"three"]


def test_the_relay_answers_nobody_before_it_has_gathered_all(bare: Path) -> None:
    answers: dict[int, bytes] = {}

    def ask(number: int, line: BareLine) -> None:
        answers[number] = line.ask(b"request")

    with BareLine(bare) as first, BareLine(bare) as second, BareLine(bare) as looking:
        first.expect([recorded(b"first", 2)])
        second.expect([recorded(b"second", 2)])
        asking = threading.Thread(target=ask, args=(1, first))
        asking.start()
        while looking.held() < 1:
            assert asking.is_alive()
        assert not answers
        ask(2, second)
        asking.join(STEP_S)
        assert looking.held() == 0
    assert answers == {1: b"first", 2: b"second"}


# The gate


def test_a_gate_holds_all_until_it_is_opened_and_then_nobody() -> None:
    gate, passed, turns = Gate(3), FORK.Value("i", 0), 20

    def walk() -> None:
        for _ in range(turns):
            gate.wait()
            with passed.get_lock():
                passed.value += 1
        gate.wait()

    processes = [FORK.Process(target=walk) for _ in range(gate.size)]
    for process in processes:
        process.start()
    try:
        for turn in range(turns + 1):
            gate.complete({process.sentinel: "walker" for process in processes})
            assert passed.value == turn * gate.size
            gate.open()
    finally:
        for process in processes:
            process.join(STEP_S)
            end(process)
        gate.close()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_a_gate_does_not_wait_for_who_has_ended() -> None:
    gate = Gate(1)
    process = FORK.Process(target=lambda: None)
    process.start()
    with pytest.raises(BenchmarkFailed, match="trainer 7 ended before its time"):
        gate.complete({process.sentinel: "trainer 7"})
    end(process)
    gate.close()


# Figures


def spans(**exchanges: list[tuple[int, int]]) -> Spans:
    """The same in both lanes; times in microseconds."""
    times = {Exchange[name]: [(1000 * s, 1000 * e) for s, e in pairs] for name, pairs in exchanges.items()}
    return dict.fromkeys(Lane, times)


def test_a_version_is_visible_since_the_last_commit_was_sent() -> None:
    trainers = [
        spans(BEGIN=[(0, 1), (5, 7)], COMMIT=[(10, 90)], SEAL=[(110, 125)]),
        spans(BEGIN=[(0, 3), (5, 9)], COMMIT=[(20, 80)], SEAL=[(100, 130)]),
    ]
    readers = [
        spans(WAIT=[(2, 60)], FLIP=[(140, 150)], RELEASE=[(91, 92), (160, 163)]),
        spans(WAIT=[(4, 50)], FLIP=[(141, 155)], RELEASE=[(91, 93), (160, 164)]),
    ]
    found = control.samples(Lane.STAGINGD, {Trainer: trainers, Reader: readers})
    assert found == {
        "commit to visible": [40.0, 30.0],
        "commit to first visible": [30.0],
        "commit to last visible": [40.0],
        "commit to sealed": [15.0, 20.0],
        "flip": [10.0, 14.0],
        "release": [1.0, 3.0, 2.0, 4.0],
        "begin": [1.0, 2.0, 3.0, 4.0],
    }


def test_a_ratio_is_that_of_the_percentiles() -> None:
    ours, bare = [float(value) for value in range(101)], [float(value) / 4 for value in range(101)]
    values = {r.figure: r.value for r in control.rows({Lane.STAGINGD: {"flip": ours}, Lane.BARE: {"flip": bare}})}
    assert values == {
        "flip, p50": 50.0,
        "flip, p50, ZeroMQ": 12.5,
        "flip, p50, of ZeroMQ": 4.0,
        "flip, p99": 99.0,
        "flip, p99, ZeroMQ": 24.75,
        "flip, p99, of ZeroMQ": 4.0,
    }

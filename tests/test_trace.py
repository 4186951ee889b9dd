# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The trace: its structure, and that what it shows as nested is nested, from a real run and from made histories."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from daemons import RunningDaemon
from test_cli import stagingd
from test_screen import busy

from stagingd import wire
from stagingd.history import History
from stagingd.seen import Seen
from stagingd.trace import chrome_trace

Event = dict[str, Any]

ROUNDING_US = 0.01
"""Differences of doubles of about an hour in microseconds."""


def complete(trace: dict[str, Any]) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def names(trace: dict[str, Any], what: str) -> dict[tuple[int, int], str]:
    found = [event for event in trace["traceEvents"] if event["name"] == what]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in found}


def assert_nested(trace: dict[str, Any]) -> None:
    """On one thread, of two events one is over when the other begins, or lies inside it: else viewers draw nonsense."""
    threads = defaultdict(list)
    for event in complete(trace):
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        ends: list[float] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"] + ROUNDING_US:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1] + ROUNDING_US, events
            ends.append(end)


def assert_whole(trace: dict[str, Any]) -> None:
    """Every event is of a known shape, in a process and on a thread that have a name."""
    processes, threads = names(trace, "process_name"), names(trace, "thread_name")
    assert len(set(processes.values())) == len(processes)
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X", "i")
        assert (event["pid"], 0) in processes
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in threads
            assert event["ts"] >= 0
            assert event["dur"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("g", "p")
    times = [event["ts"] for event in trace["traceEvents"] if event["ph"] != "M"]
    assert times == sorted(times)


def seen(history: History, at_s: float) -> Seen:
    report = wire.StatusReport(pid=1, uptime_s=1.0, connections=0, refused_messages=0, stages=())
    return Seen(report, {"policy": history.versions(256)}, at_s, wall_minus_monotonic_s=1000.0)


def test_the_trace_of_a_real_run_shows_who_was_busy_when(
    daemon: RunningDaemon, stage_name: str, tmp_path: Path
) -> None:
    output = tmp_path / "trace.json"
    arguments = ("trace", "--runtime-dir", str(daemon.folder), "--output", str(output), "--stage", stage_name)
    with busy(daemon, stage_name):
        written = stagingd(*arguments)
        assert written.returncode == 0, written.stderr
        trace = json.loads(output.read_text())
        last = stagingd(*arguments, "--versions", "1")
        assert last.returncode == 0, last.stderr
        only = {event["args"]["version"] for event in complete(json.loads(output.read_text()))}
    assert_whole(trace)
    assert_nested(trace)
    processes = {name: pid for (pid, _), name in names(trace, "process_name").items()}
    assert set(processes) == {f"{stage_name}: {who}" for who in ("trainers", "daemon", "engine engine-a")}
    by_name = {event["name"]: event for event in complete(trace)}
    assert set(by_name) == {f"fill {v}" for v in (1, 2, 3, 4)} | {f"seal {v}" for v in (1, 2, 3)} | {
        "read 3",
        "update 3",
    }
    filled = sorted(event["tid"] for event in complete(trace) if event["name"] == "fill 2")
    assert filled == [0, 1]
    sealed = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i"]
    assert sealed == ["sealed 1", "sealed 2", "sealed 3"]
    # Overlap, which the trace is for: version 4 is filled while version 3 is read.
    filling, reading = by_name["fill 4"], by_name["read 3"]
    assert reading["ts"] < filling["ts"] < reading["ts"] + reading["dur"]
    assert reading["args"]["under_way"]
    assert by_name["update 3"]["dur"] == pytest.approx(2000, abs=1)
    assert only == {4}


def test_what_trainers_measure_lies_in_what_they_fill_and_an_abort_is_marked() -> None:
    history = History(ranks=2)
    for rank in (0, 1):
        history.begun(5, 1, rank, 100.0 + rank)
        history.measuring(5, rank, 102.0 + rank)
    history.measured(5, 103.0)
    history.committed(5, 0, 10, 104.0)
    history.leased(5, "trainer", 0, 104.5)
    history.aborted(5, "rank 1 died", 105.0)
    history.begun(5, 2, 0, 105.0)
    trace = chrome_trace(seen(history, 106.0))
    assert_whole(trace)
    assert_nested(trace)
    (aborted,) = [event for event in trace["traceEvents"] if event["ph"] == "i"]
    assert (aborted["ts"], aborted["args"]["reason"]) == (5e6, "rank 1 died")
    engine = next(pid for (pid, _), name in names(trace, "process_name").items() if name == "policy: engine trainer")
    assert [event["name"] for event in complete(trace) if event["pid"] == engine] == ["read 5"]
    under_way = [event["dur"] for event in complete(trace) if "under_way" in event["args"]]
    assert under_way == [1e6]
    assert trace["otherData"]["start_unix_s"] == 1100.0


def test_an_update_that_outlasts_its_lease_has_a_thread_of_its_own() -> None:
    history = History(ranks=1)
    history.begun(1, 1, 0, 1.0)
    history.leased(1, "e", 1, 2.0)
    history.released("e", 1, 3.0)
    history.reported(1, "update", "e", 1, end_s=3.5, seconds=1.25, size=1)
    trace = chrome_trace(seen(history, 4.0))
    assert_nested(trace)
    of_engine = {name for (pid, _), name in names(trace, "thread_name").items() if pid == 3}
    assert of_engine == {"rank 1", "rank 1 pauses"}


def test_a_daemon_that_has_seen_nothing_gives_a_trace_with_nothing_in_it() -> None:
    assert not complete(chrome_trace(seen(History(ranks=1), 4.0)))


def test_a_file_that_cannot_be_written_is_named(daemon: RunningDaemon, tmp_path: Path) -> None:
    found = stagingd("trace", "--runtime-dir", str(daemon.folder), "--output", str(tmp_path / "no" / "trace.json"))
    assert found.returncode == 2
    assert "cannot be written" in found.stderr

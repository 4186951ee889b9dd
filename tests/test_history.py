# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is remembered of the last versions: by calls, and of real trainers and readers on a real daemon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from daemons import DEADLINE_S, Puppet, RunningDaemon, eventually, serving
from hypothesis import given
from hypothesis import strategies as st
from stagingd_client import Stage
from stagingd_vllm import Reader
from stagingd_vllm.reporter import LONGEST_QUEUE, Reporter
from test_quantized_stage import publish as publish_quantized
from test_quantized_stage import trainers as quantizing
from test_quantized_stage import weights as quantized_weights

from stagingd import history as remembered
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DaemonUnreachable, MessageRefused, OutOfOrder
from stagingd.formats import StageFormat
from stagingd.history import History, Span, VersionHistory
from stagingd.totals import BOUNDS_S

WEIGHTS = {"w": torch.ones(8, 4)}


def spans(version: VersionHistory) -> dict[tuple[str, str, int], Span]:
    return {(span.what, span.who, span.rank): span for span in version.spans}


def test_a_version_is_remembered_from_its_beginning_to_its_swap() -> None:
    history = History(ranks=2)
    history.begun(7, 1, 0, 10.0)
    history.begun(7, 1, 1, 11.0)
    history.measuring(7, 1, 12.0)
    history.measuring(7, 0, 13.0)
    history.measured(7, 13.5)
    history.committed(7, 0, 100, 14.0)
    history.committed(7, 1, 60, 15.0)
    history.sealed(7, 15.5)
    history.leased(7, "e", 0, 16.0)
    history.released("e", 0, 17.0)
    history.reported(7, "swap", "e", 0, end_s=18.0, seconds=0.25, size=80)
    (version,) = history.versions(9)
    assert (version.begun_s, version.sealed_s, version.aborted_s) == (10.0, 15.5, None)
    times = {key: (span.begin_s, span.end_s, span.bytes) for key, span in spans(version).items()}
    assert times == {
        ("fill", "trainer", 0): (10.0, 14.0, 100),
        ("fill", "trainer", 1): (11.0, 15.0, 60),
        ("measure", "trainer", 1): (12.0, 13.5, None),
        ("measure", "trainer", 0): (13.0, 13.5, None),
        ("seal", "daemon", 0): (15.0, 15.5, None),
        ("read", "e", 0): (16.0, 17.0, None),
        ("swap", "e", 0): (17.75, 18.0, 80),
    }


def test_an_abort_ends_what_is_under_way_and_the_next_attempt_stands_by_itself() -> None:
    history = History(ranks=2)
    history.begun(7, 1, 0, 1.0)
    history.leased(7, "early", 0, 2.0)
    history.aborted(7, "x" * 10_000, 3.0)
    history.begun(7, 2, 0, 4.0)
    history.begun(7, 2, 0, 5.0)  # asked again
    first, second = history.versions(2)
    assert {span.end_s for span in first.spans} == {3.0}
    assert (first.aborted_s, first.reason) == (3.0, "x" * remembered.REASON_CHARACTERS)
    assert [(span.begin_s, span.end_s) for span in second.spans] == [(4.0, None)]


def test_a_lease_that_is_lost_ends_the_reads_of_its_engine_alone() -> None:
    history = History(ranks=1)
    history.begun(7, 1, 0, 1.0)
    for engine in ("a", "b"):
        history.leased(7, engine, 0, 2.0)
    history.lease_lost(7, "a", 3.0)
    found = spans(history.versions(1)[0])
    assert (found["read", "a", 0].end_s, found["read", "b", 0].end_s) == (3.0, None)


def test_totals_outlive_the_versions_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "VERSIONS", 1)
    history = History(ranks=1)
    for version in range(3):
        history.begun(version, version, 0, 10.0)
        history.committed(version, 0, 100, 10.3)
        history.sealed(version, 10.3)
        history.leased(version, "e", 0, 11.0)
        history.released("e", 0, 11.004)
        history.reported(version, "swap", "e", 0, end_s=12.0, seconds=0.002, size=7)
    history.begun(9, 9, 0, 20.0)
    history.aborted(9, "why", 21.0)
    totals = history.totals.so_far()
    assert {what: (one.count, one.bytes) for what, one in totals.items()} == {
        "fill": (3, 300),
        "seal": (3, 0),
        "read": (3, 0),
        "swap": (3, 21),
    }
    assert totals["fill"].seconds == pytest.approx(0.9)
    assert totals["fill"].counts[BOUNDS_S.index(0.5)] == 3
    assert totals["swap"].counts[BOUNDS_S.index(0.0025)] == 3


def test_what_is_told_of_a_version_is_made_anew_when_something_happens() -> None:
    history = History(ranks=1)
    history.begun(1, 1, 0, 1.0)
    [before] = history.versions(1)
    assert history.versions(1)[0] is before
    history.committed(1, 0, 5, 2.0)
    history.sealed(1, 2.5)
    history.leased(1, "e", 0, 3.0)
    [leased] = history.versions(1)
    history.lease_lost(1, "e", 4.0)
    assert (leased.sealed_s, spans(leased)["read", "e", 0].end_s) == (2.5, None)
    assert spans(history.versions(1)[0])["read", "e", 0].end_s == 4.0
    assert history.lost_leases == 1


told = st.one_of(
    st.tuples(st.just("begun"), st.integers(0, 9), st.integers(0, 400), st.integers(0, 3)),
    st.tuples(st.just("leased"), st.integers(0, 9), st.text(max_size=2), st.integers(0, 3)),
    st.tuples(st.just("sealed"), st.integers(0, 9)),
    st.tuples(st.just("measuring"), st.integers(0, 9), st.integers(0, 3)),
)


@given(st.lists(told, max_size=60), st.integers(1, 3), st.integers(2, 20))
def test_it_stays_bounded_whatever_it_is_told(calls: list[tuple[object, ...]], versions: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "VERSIONS", versions)
        patch.setattr(remembered, "SPANS", most)
        patch.setattr(remembered, "READER_SPANS", 4)
        history = History(ranks=2)
        for now, (name, *arguments) in enumerate(calls):
            getattr(history, str(name))(*arguments, float(now))
        found = history.versions(1000)
        assert len(found) <= versions
        assert all(len(version.spans) <= 2 * 2 + 1 + 4 for version in found)
        assert len(found) <= 1 or sum(len(version.spans) for version in found) <= most


def test_engines_under_ever_new_names_do_not_fill_the_memory() -> None:
    history = History(ranks=1)
    history.begun(1, 1, 0, 0.0)
    for number in range(remembered.READER_SPANS + 500):
        history.leased(1, f"engine-{number}", 0, 1.0)
    assert len(history.versions(1)[0].spans) == 3 + remembered.READER_SPANS


def history_of(daemon: RunningDaemon, stage: str, last: int = 256) -> tuple[VersionHistory, ...]:
    with Connection(daemon.socket, name="test") as connection:
        report = connection.request(wire.History(stage=stage, last=last), wire.HistoryReport)
    assert abs(time.time() - time.monotonic() - report.wall_minus_monotonic_s) < 60
    return report.versions


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    stage.put("w", WEIGHTS["w"])
    stage.commit().wait()


def test_the_daemon_remembers_what_trainers_and_readers_did(daemon: RunningDaemon, stage_name: str) -> None:
    started = time.monotonic()
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare(WEIGHTS)
        publish(stage, 3)
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease():
                assert spans(history_of(daemon, stage_name)[0])["read", "e", 0].end_s is None
            assert spans(history_of(daemon, stage_name)[0])["read", "e", 0].end_s is not None
            reporter = Reporter(stage_name, "e", 0, daemon.socket)
            reporter.tell("swapped", 3, 64, 0.001)
            reporter.close()
        publish(stage, 4)
        stage.begin(5)
        stage.abort("the test says so")
    third, fourth, fifth = history_of(daemon, stage_name)
    assert [version.version for version in history_of(daemon, stage_name, last=1)] == [5]
    assert set(spans(third)) == {
        ("fill", "trainer", 0),
        ("seal", "daemon", 0),
        ("read", "e", 0),
        ("swap", "e", 0),
    }
    assert spans(third)["fill", "trainer", 0].bytes == 8 * 4 * 2
    swap = spans(third)["swap", "e", 0]
    assert swap.end_s is not None
    assert swap.end_s - swap.begin_s == pytest.approx(0.001)
    marks = [started, third.begun_s, third.sealed_s, swap.begin_s, swap.end_s, fourth.begun_s, fourth.sealed_s]
    assert marks == sorted(marks, key=float)
    assert "the test says so" in fifth.reason
    assert fifth.sealed_s is None


def test_a_restarted_daemon_counts_from_its_own_beginning(own_daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=own_daemon.socket) as stage:
        stage.declare(WEIGHTS)
        publish(stage, 1)
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=own_daemon.socket) as reader:
            with reader.lease():
                stage.begin(2)
                stage.put("w", WEIGHTS["w"])
                filling = lambda: "filling" in [slot.state for slot in own_daemon.stage(stage_name).slots]  # noqa: E731
                eventually(filling, "version 2 to be begun")
                own_daemon.restart()
                restarted = time.monotonic()
                stage.commit().wait()
        first, second = history_of(own_daemon, stage_name)
        assert (first.version, second.version) == (1, 2)
        assert set(spans(first)) == {("read", "e", 0)}
        assert first.begun_s == first.sealed_s == spans(first)["read", "e", 0].begin_s
        assert second.begun_s == first.begun_s < restarted
        assert second.sealed_s is not None
        assert second.sealed_s > restarted
        assert set(spans(second)) == {("fill", "trainer", 0), ("seal", "daemon", 0)}


def test_a_read_ends_where_its_lease_is_lost(tmp_path: Path, stage_name: str) -> None:
    with serving(tmp_path, "--lease-s", "0.05") as daemon:
        with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
            stage.declare(WEIGHTS)
            publish(stage, 1)
            with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
                reader.lease()
                ended = lambda: spans(history_of(daemon, stage_name)[0])["read", "e", 0].end_s  # noqa: E731
                eventually(ended, "the read to end")


def test_what_trainers_that_quantize_measure_is_remembered(daemon: RunningDaemon, stage_name: str) -> None:
    with quantizing(daemon, stage_name, StageFormat.FP8_PER_TENSOR) as stages:
        publish_quantized(stages, 1, quantized_weights(1))
        found = spans(history_of(daemon, stage_name)[0])
    for rank in range(2):
        measure, fill = found["measure", "trainer", rank], found["fill", "trainer", rank]
        assert measure.end_s is not None
        assert fill.end_s is not None
        assert fill.begin_s <= measure.begin_s <= measure.end_s <= fill.end_s
    assert found["measure", "trainer", 0].end_s == found["measure", "trainer", 1].end_s


def test_a_killed_reader_reads_no_more(daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage, Puppet() as reader:
        stage.declare(WEIGHTS)
        publish(stage, 1)
        reader.do(f"connection = Connection({str(daemon.socket)!r}, name='x')")
        attach = f"wire.Attach(stage={stage_name!r}, engine='e', rank=0, ranks=1, timeout_s=9.0)"
        reader.do(f"connection.request({attach}, wire.Attached)")
        lease = f"wire.LeaseVersion(stage={stage_name!r}, engine='e', rank=0, timeout_s=9.0)"
        reader.do(f"connection.request({lease}, wire.Leased)")
        reader.kill()
        eventually(lambda: spans(history_of(daemon, stage_name)[0])["read", "e", 0].end_s, "the read to end")


def test_nobody_reports_for_another_process(daemon: RunningDaemon, stage_name: str) -> None:
    report = wire.Report(
        stage=stage_name, engine="e", rank=0, version=1, what="swapped", seconds=7.0, bytes=1, ago_s=0.0
    )
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare(WEIGHTS)
        publish(stage, 1)
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket), Puppet() as other:
            other.do(f"connection = Connection({str(daemon.socket)!r}, name='x')")
            with pytest.raises(OutOfOrder, match="which another process is"):
                other.do(f"connection.request(wire.{report!r}, wire.Done)")
        with Connection(daemon.socket, name="test") as connection:
            with pytest.raises(OutOfOrder, match="or none"):
                connection.request(report, wire.Done)
    assert all(span.what != "swap" for span in history_of(daemon, stage_name)[0].spans)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e9])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    body = {"kind": "report", "stage": "s", "engine": "e", "rank": 0, "version": 1, "what": "swapped", "bytes": 1}
    with pytest.raises(MessageRefused, match="seconds"):
        wire.decode_request(wire.msgpack.packb({**body, "seconds": seconds}))


class Unreachable:
    """Stands for the making of a connection to a daemon that is gone."""

    def __init__(self) -> None:
        self.tried = 0

    def __call__(self, *_: object, name: str) -> Connection:
        self.tried += 1
        raise DaemonUnreachable(f"{name}: nobody is there", remedy="start it")


def test_a_report_that_cannot_be_sent_is_logged_and_nothing_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    nobody = Unreachable()
    reporter = Reporter("s", "e", 0, connect=nobody)
    reporter.tell("updated", 5, 1, 0.1)
    reporter.close()
    assert nobody.tried == 1
    assert "version 5 is not reported" in caplog.text
    assert reporter._thread is not None
    reporter._thread.join(DEADLINE_S)
    assert not reporter._thread.is_alive()
    reporter.tell("updated", 6, 1, 0.1)
    assert "that version 6 was updated is not reported" in caplog.text
    reporter.close()


def test_a_queue_of_reports_has_an_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter("s", "e", 0, connect=Unreachable())
    monkeypatch.setattr(reporter, "_thread", object())  # one that does not get round to it
    for version in range(LONGEST_QUEUE + 1):
        reporter.tell("updated", version, 1, 0.1)
    assert caplog.text.count("is not reported") == 1
    assert reporter._queue.qsize() == LONGEST_QUEUE

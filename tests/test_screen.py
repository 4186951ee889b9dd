# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What operators see of stages: of constructed reports at two widths, and of a real daemon in a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from daemons import DEADLINE_S, RunningDaemon
from rich.console import Console, RenderableType
from stagingd_client import LocalShard, Stage
from stagingd_vllm import Reader
from stagingd_vllm.reporter import Reporter
from test_cli import stagingd

from stagingd import wire
from stagingd.history import History
from stagingd.rates import Rates, pauses, rates
from stagingd.screen import FittedScreen, screen, waiting_lines
from stagingd.seen import Seen
from stagingd.words import clean, duration, ranks_of

RANKS = 64


def drawn(what: RenderableType, width: int, height: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain(text: str) -> str:
    """Without the breaks that a width makes."""
    return " ".join(text.split())


def crowded(stages: int, engine: str = "engine", letters: int = 20) -> Seen:
    """Many stages of many ranks: one slot is filled by every other rank, and all others wait for rank 63."""
    names = [f"stage-{number}-{'x' * letters}" for number in range(stages)]
    history = History(RANKS)
    for version in range(1, 8):
        for rank in range(RANKS):
            history.begun(version, version, rank, version * 6.0)
            history.committed(version, rank, 2**24, version * 6.0 + 1)
        history.sealed(version, version * 6.0 + 1)
        for rank in range(8):
            end_s = version * 6.0 + 3
            history.reported(version, "swap", engine, rank, end_s=end_s, seconds=0.004 + rank / 1000, size=2**25)
    waiting = tuple(
        wire.WaitingStatus(
            who=f"trainer rank {rank} (pid {4000 + rank})",
            what="version 8 to be committed",
            peers=tuple(f"trainer rank {rank}" for rank in range(48, RANKS)),
            waited_s=3.0 + rank,
        )
        for rank in range(48)
    )
    everybody, odd = tuple(range(RANKS)), tuple(range(1, RANKS, 2))
    slots = (
        wire.SlotStatus(state="front", version=7, begun_ranks=everybody, measured_ranks=(), committed_ranks=everybody),
        wire.SlotStatus(
            state="filling", version=8, begun_ranks=everybody, measured_ranks=everybody[:-1], committed_ranks=odd
        ),
    )
    lease = wire.LeaseStatus(
        lease=9, engine=engine, version=7, awaited_ranks=(4, 5, 6, 7), reading_ranks=(4, 5), age_s=75.0
    )
    statuses = [
        wire.StageStatus(
            stage=name,
            policy="latest",
            trainers=everybody,
            ranks=RANKS,
            engines=(engine,),
            tensors=291,
            segment=f"/stagingd-{name}",
            segment_bytes=33 * 2**30,
            slots=slots,
            leases=(lease,),
            waiting=waiting,
            sealed_versions=7,
            aborted_versions=0,
            begins_kept_waiting=0,
        )
        for name in names
    ]
    report = wire.StatusReport(pid=77, uptime_s=4000.0, connections=72, refused_messages=0, stages=tuple(statuses))
    return Seen(report, {name: history.versions(16) for name in names}, at_s=48.0)


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut_of_twenty_stages_of_sixty_four_ranks(width: int) -> None:
    seen = crowded(20)
    text = drawn(screen(seen), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for stage in seen.report.stages:
        assert text.count(f"{stage.stage}  291 tensors") == 1
    said = plain(text)
    assert said.count("pause: engine 11 ms for the swap to version 7, slowest of 8 ranks, 3.0 s ago") == 20
    assert said.count("rates: 10.0 versions a minute, 171 MiB/s written, 42.7 MiB/s applied; 7 sealed, 0 aborted") == 20
    assert (
        said.count(
            "waits: trainer rank 0 (pid 4000), trainer rank 1 (pid 4001), trainer rank 2 (pid 4002) and 45 more wait "
            "for version 8 to be committed, for 50.0 s; awaited: trainer rank 48, trainer rank 49, trainer rank 50 "
            "and 13 more"
        )
        == 20
    )


def test_a_slot_tells_who_has_begun_measured_and_committed_and_who_reads() -> None:
    said = drawn(screen(crowded(1)), 200)
    assert re.search(r"0 +front +7 +all +engine: ranks 4-5 read, ranks 6-7 are to come, for 75.0 s", said)
    assert re.search(r"1 +filling +8 +begun all 64", said)
    assert "measured 63 of 64: 0-62" in said
    assert "committed 32 of 64: 1, 3, 5, 7, 9, 11 and more" in said


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("height", [24, 60])
def test_the_live_screen_shows_every_stage_and_says_what_it_leaves_out(width: int, height: int) -> None:
    seen = crowded(20, letters=6)
    lines = drawn(FittedScreen(seen), width, height).splitlines()
    assert len(lines) <= height
    assert all(any(line.startswith(stage.stage) for line in lines) for stage in seen.report.stages)
    assert "stages are not shown in full" in lines[-1]


@pytest.mark.parametrize("width", [80, 160])
def test_the_live_screen_shows_all_of_what_there_is_room_for(width: int) -> None:
    assert plain(drawn(FittedScreen(crowded(2)), width, 60)) == plain(drawn(screen(crowded(2)), width))


def test_names_are_not_markup_and_cannot_command_the_terminal() -> None:
    said = drawn(screen(crowded(1, engine="[red]\x1b[2Jevil\r[/red]")), 160)
    assert "\x1b" not in said
    assert "[red]\N{REPLACEMENT CHARACTER}[2Jevil\N{REPLACEMENT CHARACTER}[/red]" in said
    assert clean("层 é-1") == "层 é-1"


def test_who_waits_for_different_things_is_told_apart() -> None:
    def one(who: str, what: str) -> wire.WaitingStatus:
        return wire.WaitingStatus(who=who, what=what, peers=("trainer rank 1",), waited_s=2.0)

    assert waiting_lines([one("a", "x"), one("b", "y"), one("c", "x")]) == [
        "a, c wait for x, for 2.0 s; awaited: trainer rank 1",
        "b waits for y, for 2.0 s; awaited: trainer rank 1",
    ]


def test_figures_are_as_people_read_them() -> None:
    assert [duration(s) for s in (-1.0, 0.00004, 0.0041234, 0.9, 59.94, 125, 3 * 3600 + 250)] == [
        "0.00 ms",
        "0.04 ms",
        "4.12 ms",
        "900 ms",
        "59.9 s",
        "2 min 5 s",
        "3 h 4 min",
    ]
    assert [ranks_of(ranks, 4) for ranks in ((), (0, 1, 3), range(4))] == ["0 of 4", "3 of 4: 0-1, 3", "all 4"]


def sealed(*times: float, taken_over: float | None = None) -> History:
    history = History(1)
    if taken_over is not None:
        history.taken_over(1, 1, sealed=True, now=taken_over)
    for number, at_s in enumerate(times, 2):
        history.begun(number, number, 0, at_s - 0.5)
        history.committed(number, 0, 600, at_s)
        history.sealed(number, at_s)
    return history


def test_a_rate_is_the_average_and_falls_when_the_next_version_is_late() -> None:
    versions = sealed(10, 12, 14).versions(9)
    assert rates(versions, 15.0) == Rates(versions_a_minute=30.0, written_bytes_s=300.0, applied_bytes_s=0.0)
    late = rates(versions, 26.0)
    assert late.versions_a_minute == pytest.approx(2 * 60 / 14)
    assert rates(sealed(10).versions(9), 11.0).versions_a_minute is None
    assert rates(sealed(10, taken_over=9.9).versions(9), 11.0).versions_a_minute is None


def test_a_pause_is_as_long_as_that_of_the_slowest_rank() -> None:
    history = sealed(1.0)
    for rank, seconds in ((0, 0.1), (1, 0.3), (2, 0.2)):
        history.reported(2, "swap", "e", rank, end_s=5.0 + rank, seconds=seconds, size=1)
    (pause,) = pauses(history.versions(1), 5)
    assert (pause.seconds, pause.ended_s, pause.ranks) == (pytest.approx(0.3), 7.0, 3)


# A real daemon


def put(stages: list[Stage], version: int, *, commit: int) -> None:
    """All ranks put their rows of a version, and the first ones commit it."""
    for stage in stages:
        stage.begin(version)
        stage.put("w", torch.ones(4, 8), global_shape=(8, 8), offset=(4 * stage.rank, 0))
    for publication in [stage.commit() for stage in stages[:commit]]:
        if commit == len(stages):
            publication.wait()


@contextmanager
def busy(daemon: RunningDaemon, name: str) -> Iterator[None]:
    """Two trainer ranks and a reader: three versions are sealed, the reader reads the last, one rank fills another."""
    opened = [Stage.open(name, rank=rank, ranks=2, socket=daemon.socket, timeout_s=20.0) for rank in (0, 1)]
    pending = [stage._background.submit(stage.declare, _shard(stage.rank)) for stage in opened]
    for future in pending:
        future.result(DEADLINE_S)
    for version in (1, 2, 3):
        put(opened, version, commit=2)
    reporter = Reporter(name, "engine-a", 0, daemon.socket)
    with Reader.attach(name, engine="engine-a", rank=0, ranks=1, socket=daemon.socket) as reader:
        with reader.lease():
            reporter.tell("updated", 3, 64, 0.002)
            reporter.close()
            put(opened, 4, commit=1)
            yield
            opened[1].commit().wait()
    for stage in opened:
        stage.close()


def _shard(rank: int) -> dict[str, LocalShard]:
    return {"w": LocalShard(torch.ones(4, 8), (8, 8), (4 * rank, 0))}


def test_status_shows_a_real_stage_at_work(daemon: RunningDaemon, stage_name: str) -> None:
    with busy(daemon, stage_name):
        found = stagingd("status", "--stage", stage_name, "--runtime-dir", str(daemon.folder))
        assert found.returncode == 0, found.stderr
        said = plain(found.stdout)
        assert "2 of 2 trainer ranks, engine engine-a" in said
        assert "engine-a: ranks 0 read, for" in said
        assert "versions a minute" in said
        assert "pause: engine-a 2 ms for the update to version 3" in said
        assert "waits: trainer rank 0" in said
        shown = stagingd("status", "--json", "--runtime-dir", str(daemon.folder))
        stage = next(one for one in json.loads(shown.stdout)["stages"] if one["stage"] == stage_name)
        assert stage["rates"]["versions_a_minute"] > 0
        assert stage["pauses"][0]["engine"] == "engine-a"
        assert [slot["version"] for slot in stage["slots"] if slot["state"] == "filling"] == [4]


def test_a_stage_that_is_not_there_is_refused(daemon: RunningDaemon) -> None:
    found = stagingd("status", "--stage", "nowhere", "--runtime-dir", str(daemon.folder))
    assert found.returncode == 1
    assert "there is no stage 'nowhere'" in found.stderr


def test_top_without_a_terminal_is_refused(daemon: RunningDaemon) -> None:
    found = stagingd("top", "--runtime-dir", str(daemon.folder))
    assert found.returncode == 1
    assert "the output is no terminal" in found.stderr


def read_until(terminal: int, what: bytes) -> bytes:
    """What a terminal shows, until it shows this."""
    shown, until = b"", time.monotonic() + DEADLINE_S
    while what not in shown:
        assert select.select([terminal], [], [], until - time.monotonic())[0], shown
        shown += os.read(terminal, 65536)
    return shown


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_top_draws_again_and_ends_with_a_key(daemon: RunningDaemon, stage_name: str, key: bytes) -> None:
    ours, theirs = pty.openpty()
    wrapper = ["setsid", "--ctty"]  # else Ctrl-C in this terminal would not reach it
    command = [
        *wrapper,
        sys.executable,
        "-m",
        "stagingd",
        "top",
        "--interval",
        "0.1",
        "--runtime-dir",
        str(daemon.folder),
    ]
    size = {"COLUMNS": "100", "LINES": "50", "TERM": "xterm-256color"}
    with busy(daemon, stage_name):
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | size,
        )
        os.close(theirs)
        try:
            read_until(ours, stage_name.encode())
            read_until(ours, stage_name.encode())  # drawn anew
            os.write(ours, key)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            os.close(ours)

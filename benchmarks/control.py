# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the control channel takes, beside a bare ZeroMQ exchange of the same bytes.

    python -m benchmarks.control --trainers 8 --readers 8

A daemon and all ranks run as processes of their own, on a stage of a few hundred bytes. What is exchanged is
repeated with a ROUTER that returns the same bodies without reading them: it answers at once, or, where the
daemon waits for other ranks, when it has as many requests. Both lanes take turns within each round, so that
whatever else the machine does meets both.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.command import run_command
from benchmarks.control_bare import BareLine, relay
from benchmarks.control_case import STEP_S, WARM_UP, Case, Exchange, Lane, Spans, lanes
from benchmarks.control_gate import Gate, check_all_live
from benchmarks.control_ranks import Place, Reader, Role, Trainer, work
from benchmarks.host import daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import DeadlineExceeded

AIMS = {"commit to visible": 3.0, "flip": 3.0}
"""How many times the bare exchange's time the daemon may take, at the median."""


class Conductor:
    """Leads all ranks through the rounds."""

    def __init__(
        self,
        gates: Mapping[Role, Gate],
        members: Mapping[Role, Sequence[tuple[BaseProcess, Pipe]]],
        waiting: Mapping[Lane, Callable[[], int]],
    ) -> None:
        self._trainers, self._readers = gates[Trainer], gates[Reader]
        self._members = members
        self._waiting = waiting
        self._sentinels = {p.sentinel: p.name for ranks in members.values() for p, _ in ranks}

    def round(self, number: int) -> None:
        """Both lanes of a round.

        Raises:
            BenchmarkFailed: a rank ended early; its own words are on the terminal.
            DeadlineExceeded: a step took too long.
        """
        for lane in lanes(number):
            self._take(self._trainers)  # begin
            self._all_here()
            self._readers.open()  # they ask for a version that is not there yet
            self._until_readers_wait(lane)
            self._trainers.open()  # and commit it
            self._all_here()
            self._trainers.open()
            self._readers.open()
            self._take(self._readers)  # release
            self._take(self._trainers)  # begin
            self._take(self._trainers)  # commit: nobody waits for it
            self._take(self._readers)  # flip
            self._take(self._readers)  # release

    def _take(self, gate: Gate) -> None:
        """One exchange of all ranks of a kind, while the others rest; then they use the answers."""
        self._all_here()
        gate.open()
        gate.complete(self._sentinels)
        gate.open()

    def _all_here(self) -> None:
        self._trainers.complete(self._sentinels)
        self._readers.complete(self._sentinels)

    def _until_readers_wait(self, lane: Lane) -> None:
        deadline = time.monotonic() + STEP_S
        while self._waiting[lane]() < self._readers.size:
            check_all_live(self._sentinels)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"after {STEP_S} s not all readers wait", remedy="leave the machine more room")

    def spans(self) -> dict[Role, list[Spans]]:
        """What all ranks have measured, when they have taken all rounds. Raises as ``round``."""
        self._all_here()
        self._trainers.open()
        self._readers.open()
        return {role: [self._received(*member) for member in ranks] for role, ranks in self._members.items()}

    def _received(self, process: BaseProcess, spans: Pipe) -> Spans:
        if not spans.poll(STEP_S):
            raise DeadlineExceeded(f"after {STEP_S} s {process.name} has sent nothing", remedy="report this")
        try:
            found: Spans = spans.recv()
        except EOFError as error:
            raise BenchmarkFailed(f"{process.name} ended before its time", remedy="its own words are above") from error
        return found


@contextmanager
def started(case: Case) -> Iterator[Conductor]:
    """A daemon, a relay and all ranks; whatever happens, nothing of them is left. Raises BenchmarkFailed."""
    prefix = f"/stagingd-bench-{os.getpid()}-"
    context = multiprocessing.get_context("fork")  # who imports all of it anew takes seconds for each rank
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        socket, bare = cleanup.enter_context(daemon(folder, prefix)), folder / "relay.sock"

        def start(name: str, target: Callable[..., None], *arguments: object) -> BaseProcess:
            process = context.Process(target=target, args=arguments, name=name)
            process.start()
            cleanup.callback(end, process)
            return process

        start("relay", relay, bare)
        gates: dict[Role, Gate] = {Trainer: Gate(case.trainers), Reader: Gate(case.readers)}
        members: dict[Role, list[tuple[BaseProcess, Pipe]]] = {Trainer: [], Reader: []}
        for role, gate in gates.items():
            cleanup.callback(gate.close)
            for rank in range(gate.size):
                receiving, sending = context.Pipe(duplex=False)
                cleanup.callback(receiving.close)
                place = Place(case, rank, socket, bare, gate, sending)
                members[role].append((start(f"{role.title} {rank}", work, role, place), receiving))
                sending.close()  # so that the process's end is the end of what can be received
        connection = cleanup.enter_context(Connection(socket, name="conductor"))
        line = cleanup.enter_context(BareLine(bare))

        def waiting() -> int:
            stages = connection.request(wire.Status(), wire.StatusReport).stages
            return sum(len(stage.waiting) for stage in stages)

        yield Conductor(gates, members, {Lane.STAGINGD: waiting, Lane.BARE: line.held})


# Figures


def samples(lane: Lane, spans: Mapping[Role, Sequence[Spans]]) -> dict[str, list[float]]:
    """Every figure's samples in one lane: of all ranks and rounds; first and last visible: of all rounds.

    Until a version is visible or sealed is counted from the moment when the last trainer rank sends its commit.
    """

    def of(role: Role, exchange: Exchange) -> npt.NDArray[np.float64]:
        """Shape: ranks, times, (sent, answered); in microseconds."""
        return np.array([one[lane][exchange] for one in spans[role]]) / 1e3

    flips, releases, begins = of(Reader, Exchange.FLIP), of(Reader, Exchange.RELEASE), of(Trainer, Exchange.BEGIN)
    commits, seals = of(Trainer, Exchange.COMMIT), of(Trainer, Exchange.SEAL)
    visible = of(Reader, Exchange.WAIT)[..., 1] - commits[..., 0].max(axis=0)
    found = {
        "commit to visible": visible,
        "commit to first visible": visible.min(axis=0),
        "commit to last visible": visible.max(axis=0),
        "commit to sealed": seals[..., 1] - seals[..., 0].max(axis=0),
        "flip": flips[..., 1] - flips[..., 0],
        "release": releases[..., 1] - releases[..., 0],
        "begin": begins[..., 1] - begins[..., 0],
    }
    return {name: values.ravel().tolist() for name, values in found.items()}


def rows(by_lane: Mapping[Lane, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Every figure in both lanes, and how many times the bare exchange the daemon takes. Samples in microseconds."""
    made = []
    for name, ours in by_lane[Lane.STAGINGD].items():
        for point, percent in (("p50", 50), ("p99", 99)):
            value, bare = (float(np.percentile(of, percent)) for of in (ours, by_lane[Lane.BARE][name]))
            aim = AIMS.get(name) if point == "p50" else None
            made.append(Row(f"{name}, {point}", value, "us", "lower"))
            made.append(Row(f"{name}, {point}, {Lane.BARE}", bare, "us", "lower"))
            made.append(Row(f"{name}, {point}, of {Lane.BARE}", value / bare, "x", "lower", aim))
    return made


def run(case: Case, console: Console) -> list[Row]:
    """Measure everything. Raises BenchmarkFailed, DeadlineExceeded."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # The bar's thread starts when all processes have been forked. Drawing takes a core, so it is seldom done.
    with started(case) as conductor, Progress(*columns, console=console, refresh_per_second=2) as bar:
        label = f"{case.trainers} trainer and {case.readers} reader ranks"
        for number in bar.track(case.all_rounds, description=label):
            conductor.round(number)
        spans = conductor.spans()
    return rows({lane: samples(lane, spans) for lane in Lane})


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def control(
    trainers: Annotated[int, typer.Option(min=1, max=64, help="Trainer ranks.")] = 8,
    readers: Annotated[int, typer.Option(min=1, max=64, help="Reader ranks, of one engine.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, of two versions each.")] = 500,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure what stagingd's control channel takes on this machine, beside a bare ZeroMQ exchange."""
    console = Console(stderr=as_json)
    around = surroundings(trainers=trainers, readers=readers, rounds=rounds, warm_up_rounds=WARM_UP)
    found = run(Case(trainers, readers, rounds), console)
    report = Report("control", machine_slug(machine), around, found)
    path = report.write(results)
    console.print(report.table())
    console.print(f"written to {path}")
    if as_json:
        typer.echo(json.dumps(report.as_dict()))


if __name__ == "__main__":
    run_command(app, "benchmarks.control")

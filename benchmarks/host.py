# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Flush and read through the whole path on one machine without a GPU, beside a plain memcpy of the same bytes.

    python -m benchmarks.host --sizes 64 --sizes 512 --writers 1 --writers 2 --writers 4

A daemon, writers and as many readers run as processes of their own. The ceiling is one memcpy per process,
between the same private memory and its part of another shared mapping. Path and ceiling take turns within
each round, so that whatever else the machine does meets both; all processes take every step together.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Annotated

import posix_ipc
import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.command import run_command
from benchmarks.host_case import DEADLINE_S, WARM_UP, BenchmarkFailed, Case, Seconds, Spans, Step, model_shapes
from benchmarks.host_ranks import ROLES, Place, work
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from stagingd.errors import DeadlineExceeded
from stagingd.segment import SHARED_MEMORY

ENDING_S = 10.0
"""How long a process that is asked to end may take before it is killed, in seconds."""
FIXED_COST_ROUNDS = 200


def measure(case: Case, progress: Callable[[int], None]) -> Seconds:
    """Run a case.

    Args:
        case: what to run.
        progress: called with the number of rounds that have ended.

    Raises:
        BenchmarkFailed: there is no room, a process ended early, or bytes differ.
        DeadlineExceeded: no round ended in time.
    """
    check_room(case)
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        socket = cleanup.enter_context(daemon(folder, prefix))
        shared = posix_ipc.SharedMemory(f"{prefix}memcpy", posix_ipc.O_CREX)
        os.posix_fallocate(shared.fd, 0, case.bytes)
        shared.close_fd()
        context = multiprocessing.get_context("spawn")
        barrier, rounds = context.Barrier(2 * case.ranks), context.Value("i", 0)
        members = []
        for role, rank in itertools.product(ROLES, range(case.ranks)):
            answers, sending = context.Pipe(duplex=False)
            place = Place(case, rank, socket, shared.name, barrier, rounds, sending)
            process = context.Process(target=work, args=(role, place), name=f"{role.title} {rank}")
            process.start()
            cleanup.callback(end, process)
            sending.close()  # so that the process's end is the end of what can be received
            members.append((process, answers))
        return together(collect(members, rounds, progress))


def check_room(case: Case) -> None:
    """Refuse a case that does not fit, before anything is started. Raises BenchmarkFailed."""
    shared = 6 * case.bytes  # two stages of two slots, the ceiling's mapping, and moments
    rooms = {
        "free in /dev/shm": (shared, shutil.disk_usage(SHARED_MEMORY).free),
        "of available memory": (shared + 2 * case.bytes, psutil.virtual_memory().available),
    }
    for what, (need, room) in rooms.items():
        if need > room:
            raise BenchmarkFailed(
                f"the case needs {need / 2**30:.2f} GiB, but {room / 2**30:.2f} GiB {what}",
                remedy="measure smaller --sizes, or enlarge /dev/shm (in a container: --shm-size)",
            )


@contextmanager
def daemon(folder: Path, prefix: str) -> Iterator[Path]:
    """A daemon of its own. Gives its control socket; ends it whatever happens.

    Raises:
        BenchmarkFailed: it did not start; the message holds what it said.
    """
    runtime, log = folder / "run", folder / "daemon.log"
    options = ["--runtime-dir", str(runtime), "--segment-prefix", prefix, "--no-lock-memory", "--log-level", "warning"]
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "stagingd", "serve", *options], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (runtime / "control.sock").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkFailed(f"the daemon did not start:\n{log.read_text()}", remedy="see its words above")
            time.sleep(0.02)
        yield runtime / "control.sock"
    finally:
        process.terminate()
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(ENDING_S)


def end(process: BaseProcess) -> None:
    """End a writer or reader, if it has not ended by itself."""
    process.terminate()
    process.join(ENDING_S)
    if process.is_alive():
        process.kill()
        process.join(ENDING_S)


def remove_segments(prefix: str) -> None:
    """Remove the ceiling's mapping, and what a daemon that had to be killed has left."""
    for path in SHARED_MEMORY.glob(f"{prefix.lstrip('/')}*"):
        path.unlink(missing_ok=True)


def collect(
    members: Sequence[tuple[BaseProcess, Connection]], rounds: Synchronized[int], progress: Callable[[int], None]
) -> list[Spans]:
    """Wait for every process's spans, as long as all of them live and rounds go on ending."""
    found: list[Spans] = []
    waiting = {answers: process for process, answers in members}
    ended, deadline = 0, time.monotonic() + DEADLINE_S
    while waiting:
        ready = connection.wait(list(waiting), timeout=0.5)
        for answers in [answers for answers in waiting if answers in ready]:
            found.append(_received(waiting.pop(answers), answers))
        if rounds.value > ended:
            ended, deadline = rounds.value, time.monotonic() + DEADLINE_S
            progress(ended)
        if time.monotonic() > deadline:
            names = ", ".join(process.name for process in waiting.values())
            raise DeadlineExceeded(
                f"after round {ended} nothing came for {DEADLINE_S} s from {names}", remedy="measure smaller --sizes"
            )
    return found


def _received(process: BaseProcess, answers: Connection) -> Spans:
    try:
        spans: Spans = answers.recv()
    except EOFError as error:
        process.join(ENDING_S)
        raise BenchmarkFailed(
            f"{process.name} ended with status {process.exitcode}", remedy="its own words are above"
        ) from error
    return spans


def together(spans: Sequence[Spans]) -> Seconds:
    """From the first process's begin to the last one's end."""
    seconds: Seconds = {}
    for step in Step:
        rounds = zip(*(one[step] for one in spans if step in one), strict=True)
        seconds[step] = [max(end for _, end in parts) - min(begin for begin, _ in parts) for parts in rounds]
    return seconds


# Figures


def throughput_rows(case: Case, label: str, seconds: Seconds) -> list[Row]:
    """The figures of a case. Each is a median over the timed rounds, and each ratio one of a round's own pair."""
    gigabytes = case.bytes / 1e9
    timed = {step: values[WARM_UP:-1] for step, values in seconds.items()}

    def rate(what: str, step: Step) -> Row:
        return Row(f"{label}: {what}", gigabytes / statistics.median(timed[step]), "GB/s", "higher")

    def of_memcpy(what: str, step: Step, ceiling: Step) -> Row:
        pairs = zip(timed[ceiling], timed[step], strict=True)
        return Row(f"{label}: {what}, of memcpy", statistics.median(c / s for c, s in pairs), "ratio", "higher")

    return [
        rate("memcpy in", Step.MEMCPY_IN),
        rate("flush, all grids", Step.FLUSH),
        of_memcpy("flush, all grids", Step.FLUSH, Step.MEMCPY_IN),
        rate("flush, tensor grid", Step.FLUSH_TENSOR_GRID),
        of_memcpy("flush, tensor grid", Step.FLUSH_TENSOR_GRID, Step.MEMCPY_IN),
        rate("moments alone, all grids", Step.MOMENTS),
        Row(f"{label}: first flush, all grids", gigabytes / seconds[Step.FLUSH][0], "GB/s", "higher"),
        rate("memcpy out", Step.MEMCPY_OUT),
        rate("read", Step.READ),
        of_memcpy("read", Step.READ, Step.MEMCPY_OUT),
    ]


def fixed_cost_rows(seconds: Seconds) -> list[Row]:
    """What a version costs apart from its bytes: medians over the timed rounds, in milliseconds."""
    names = {
        Step.FLUSH_TENSOR_GRID: "one tiny tensor: begin to sealed, tensor grid, p50",
        Step.FLUSH: "one tiny tensor: begin to sealed, all grids, p50",
        Step.READ: "one tiny tensor: lease to released, p50",
    }
    return [
        Row(name, statistics.median(seconds[step][WARM_UP:-1]) * 1e3, "ms", "lower") for step, name in names.items()
    ]


def run(sizes: Sequence[int], writers: Sequence[int], repetitions: int, console: Console) -> list[Row]:
    """Measure everything; sizes in bytes. Raises what ``measure`` does."""
    tiny = Case({"tiny.weight": (16, 16)}, 1, max(repetitions, FIXED_COST_ROUNDS))
    cases = [
        (
            f"{size / 2**20:g} MiB, {count} writer{'s' if count > 1 else ''}",
            Case(model_shapes(size), count, repetitions),
        )
        for size, count in itertools.product(sizes, writers)
    ]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawing takes a core from the processes that are measured, so it is seldom done.
    with Progress(*columns, console=console, refresh_per_second=2) as bar:
        for label, case in cases:
            task = bar.add_task(label, total=len(case.versions))
            seconds = measure(case, lambda ended, task=task: bar.update(task, completed=ended))  # type: ignore[misc]
            rows += throughput_rows(case, label, seconds)
        task = bar.add_task("one tiny tensor", total=len(tiny.versions))
        rows += fixed_cost_rows(measure(tiny, lambda ended: bar.update(task, completed=ended)))
    return rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def host(
    sizes: Annotated[list[int] | None, typer.Option(min=1, help="MiB of tensors in all. [default: 64, 512]")] = None,
    writers: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Writers, and as many readers. [default: 1, 2, 4]")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed rounds of each case.")] = 7,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure flush and read through stagingd on this machine's CPU, beside a plain memcpy."""
    console = Console(stderr=as_json)
    mebibytes, counts = sizes or [64, 512], writers or [1, 2, 4]
    around = surroundings(sizes_mib=mebibytes, writers=counts, repetitions=repetitions)
    rows = run([size * 2**20 for size in mebibytes], counts, repetitions, console)
    report = Report("host", machine_slug(machine), around, rows)
    path = report.write(results)
    console.print(report.table())
    console.print(f"written to {path}")
    if as_json:
        typer.echo(json.dumps(report.as_dict()))


if __name__ == "__main__":
    run_command(app, "benchmarks.host")

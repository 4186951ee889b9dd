# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Flush and read through the whole path on one machine without a GPU, beside a plain memcpy of the same bytes.

    python -m benchmarks.host --sizes 64 --sizes 512 --writers 1 --writers 2 --writers 4

A daemon, writers and as many readers run as processes of their own. The ceiling is one memcpy per process,
between the same private memory and its part of another shared mapping. Path and ceiling take turns within
each round, so that whatever else the machine does meets both; all processes take every step together.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated

import posix_ipc
import psutil
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from stagingd_client import LocalShard, Stage
from stagingd_client.moments import shard_moments
from stagingd_vllm.reader import Reader

from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from stagingd.boxes import Box, Shape
from stagingd.errors import DeadlineExceeded, StagingError
from stagingd.moments import ALL_GRIDS, Grid
from stagingd.segment import SHARED_MEMORY

DEADLINE_S = 300.0
"""The longest that anything waits for one round or for the start of all processes, in seconds."""
ENDING_S = 10.0
"""How long a process that is asked to end may take before it is killed, in seconds."""
ITEM_BYTES = 2
"""Of bfloat16."""
WARM_UP = 2
"""Rounds before the timed ones: the two slots' pages are mapped by the first version that each takes."""
FIXED_COST_ROUNDS = 200


class BenchmarkFailed(StagingError):
    """A part of the benchmark ended before its time, or what was read is not what was put."""

    code = "benchmark_failed"


class Step(StrEnum):
    """What the processes do together, one after the other."""

    MEMCPY_IN = "memcpy in"
    FLUSH = "flush"
    FLUSH_TENSOR_GRID = "flush, tensor grid only"
    MOMENTS = "moments"
    MEMCPY_OUT = "memcpy out"
    READ = "read"
    READ_TENSOR_GRID = "read, tensor grid only"


WRITERS_STEPS = (Step.MEMCPY_IN, Step.FLUSH, Step.FLUSH_TENSOR_GRID, Step.MOMENTS)
READERS_STEPS = (Step.MEMCPY_OUT, Step.READ, Step.READ_TENSOR_GRID)
GRIDS: Mapping[Step, tuple[Grid, ...]] = {Step.FLUSH: ALL_GRIDS, Step.FLUSH_TENSOR_GRID: (Grid.TENSOR,)}
STAGES: Mapping[Step, str] = {
    Step.FLUSH: "all-grids",
    Step.FLUSH_TENSOR_GRID: "tensor-grid",
    Step.READ: "all-grids",
    Step.READ_TENSOR_GRID: "tensor-grid",
}

Spans = dict[Step, list[tuple[float, float]]]
"""Per step and round, when a process began and ended it: CLOCK_MONOTONIC, one clock for all processes."""
Seconds = dict[Step, list[float]]
"""Per step and round, from the first process's begin to the last one's end."""


@dataclass(frozen=True)
class Case:
    """One model, divided among so many writers and readers.

    Attributes:
        shapes: global shapes by tensor name; all bfloat16.
        ranks: how many writers, and how many readers.
        repetitions: timed rounds.
    """

    shapes: Mapping[str, Shape]
    ranks: int
    repetitions: int

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * ITEM_BYTES

    @property
    def versions(self) -> range:
        """One per round: the warm-up, the timed ones, and one more to see that all still holds."""
        return range(1, WARM_UP + self.repetitions + 2)

    def timed(self, version: int) -> bool:
        """Whether the round counts. In those that do not, every byte is checked."""
        return WARM_UP < version <= WARM_UP + self.repetitions

    def boxes(self, rank: int) -> dict[str, Box]:
        """The rows that a rank writes or reads: an even part of every tensor."""
        return {name: _rows(shape, rank, self.ranks) for name, shape in self.shapes.items()}

    def elements(self, rank: int) -> int:
        """How many elements a rank writes or reads."""
        return sum(box.volume for box in self.boxes(rank).values())


def _rows(shape: Shape, rank: int, ranks: int) -> Box:
    first, end = (shape[0] * part // ranks for part in (rank, rank + 1))
    return Box((first, *(0 for _ in shape[1:])), (end - first, *shape[1:]))


def model_shapes(size: int) -> dict[str, Shape]:
    """The tensors of a decoder of about ``size`` bytes: whole layers, and an embedding of what is left over."""
    hidden = 16
    while 13 * (2 * hidden) ** 2 * ITEM_BYTES * 4 <= size:  # a layer has 13 hidden**2 elements; four shall fit
        hidden *= 2
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (hidden * 7 // 2, hidden),
        "mlp.up_proj.weight": (hidden * 7 // 2, hidden),
        "mlp.down_proj.weight": (hidden, hidden * 7 // 2),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer_bytes = sum(math.prod(shape) for shape in layer.values()) * ITEM_BYTES
    layers, rest = divmod(size, layer_bytes)
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (max(hidden, rest // (hidden * ITEM_BYTES)), hidden)}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


# In the writers' and readers' processes


@dataclass(frozen=True)
class Place:
    """A process's part in a case: who it is, and what it shares with the others.

    Attributes:
        socket: the daemon's control socket.
        mapping: POSIX name of the shared memory that the ceiling copies into and out of.
        barrier: all processes wait at it before every step.
        rounds: how many rounds have ended; the first reader counts.
        answers: where the spans go in the end.
    """

    case: Case
    rank: int
    socket: Path
    mapping: str
    barrier: Barrier
    rounds: Synchronized[int]
    answers: Connection


class Memory:
    """A rank's elements in private memory, in one piece, and the rank's part of the shared mapping."""

    def __init__(self, place: Place) -> None:
        case, rank = place.case, place.rank
        count = case.elements(rank)
        self.values = torch.ones(count, dtype=torch.bfloat16)  # written to, so that its pages are there
        self.boxes = case.boxes(rank)
        parts = torch.split(self.values, [box.volume for box in self.boxes.values()])
        self.parts = {n: part.view(b.lengths) for (n, b), part in zip(self.boxes.items(), parts, strict=True)}
        shared = posix_ipc.SharedMemory(place.mapping)
        mapping = mmap.mmap(shared.fd, case.bytes)
        shared.close_fd()
        first = sum(case.elements(before) for before in range(rank))
        self._shared = torch.frombuffer(mapping, dtype=torch.bfloat16)[first : first + count]

    def store(self, _version: int) -> None:
        """One memcpy from private to shared memory. Not torch's copy: libc's is the faster one."""
        ctypes.memmove(self._shared.data_ptr(), self.values.data_ptr(), self.values.nbytes)

    def load(self, _version: int) -> None:
        """One memcpy from shared to private memory."""
        ctypes.memmove(self.values.data_ptr(), self._shared.data_ptr(), self.values.nbytes)

    @property
    def equal(self) -> bool:
        """Whether private and shared bytes are the same."""
        return torch.equal(self.values.view(torch.int16), self._shared.view(torch.int16))


class Writer:
    """A trainer rank, with a stage for each choice of grids."""

    def __init__(self, place: Place, cleanup: ExitStack) -> None:
        self._memory = Memory(place)
        self._random = torch.Generator().manual_seed(place.rank)
        shapes = place.case.shapes
        self._shards = {
            name: LocalShard(part, shapes[name], self._memory.boxes[name].offsets)
            for name, part in self._memory.parts.items()
        }
        self.steps: dict[Step, Callable[[int], None]] = {
            Step.MEMCPY_IN: self._memory.store,
            Step.MOMENTS: self._take_moments,
        }
        for step, grids in GRIDS.items():
            stage = cleanup.enter_context(self._open(place, STAGES[step], grids))
            stage.declare(self._shards)
            self.steps[step] = functools.partial(self._flush, stage)

    @staticmethod
    def _open(place: Place, name: str, grids: tuple[Grid, ...]) -> Stage:
        ranks = place.case.ranks
        return Stage.open(name, rank=place.rank, ranks=ranks, socket=place.socket, grids=grids, timeout_s=DEADLINE_S)

    def prepare(self) -> None:
        """New weights, as after an optimizer step."""
        self._memory.values.normal_(std=0.02, generator=self._random)

    def forget(self) -> None:
        """Writers have nothing to compare."""

    def check(self, step: Step) -> None:
        """Writers have nothing to compare."""

    def _flush(self, stage: Stage, version: int) -> None:
        stage.begin(version)
        for name, shard in self._shards.items():
            stage.put(name, shard)
        stage.commit().wait()

    def _take_moments(self, _version: int) -> None:
        for name, part in self._memory.parts.items():
            if part.numel():
                shard_moments(part, self._memory.boxes[name], ALL_GRIDS)


class Copier:
    """A reader rank: copies its rows of every tensor into private memory."""

    def __init__(self, place: Place, cleanup: ExitStack) -> None:
        self._memory = Memory(place)
        self.steps: dict[Step, Callable[[int], None]] = {Step.MEMCPY_OUT: self._memory.load}
        for step in (Step.READ, Step.READ_TENSOR_GRID):
            reader = cleanup.enter_context(self._attach(place, STAGES[step]))
            self.steps[step] = functools.partial(self._read, reader)

    @staticmethod
    def _attach(place: Place, stage: str) -> Reader:
        ranks = place.case.ranks
        return Reader.attach(
            stage, engine="bench", rank=place.rank, ranks=ranks, socket=place.socket, timeout_s=DEADLINE_S
        )

    def prepare(self) -> None:
        """Readers make nothing."""

    def forget(self) -> None:
        """Wipe what was read before, so that only this step's own bytes can pass the check."""
        self._memory.values.zero_()

    def check(self, step: Step) -> None:
        """Compare with what the writers copied, without stagingd, from the memory that they put."""
        if not self._memory.equal:
            raise BenchmarkFailed(f"{step} gave other bytes than were put", remedy="report this", step=step.value)

    def _read(self, reader: Reader, version: int) -> None:
        with reader.lease(version=version, timeout_s=DEADLINE_S) as lease:
            for name, box in self._memory.boxes.items():
                self._memory.parts[name].copy_(lease.read(name, box))


def order(version: int) -> Iterator[Step]:
    """Writers first, then readers; every other round backwards, so that no step always finds warm caches."""
    way = 1 if version % 2 else -1
    return itertools.chain(WRITERS_STEPS[::way], READERS_STEPS[::way])


def work(role: type[Writer | Copier], place: Place) -> None:
    """A process: all rounds in step with the others."""
    torch.set_num_threads(1)
    spans: Spans = defaultdict(list)
    with ExitStack() as cleanup:
        member = role(place, cleanup)
        for version in place.case.versions:
            member.prepare()
            for step in order(version):
                take(member, step, version, place, spans)
            place.barrier.wait(DEADLINE_S)  # nobody changes anything while others still read or check
            if role is Copier and place.rank == 0:
                place.rounds.value = version
    place.answers.send(dict(spans))


def take(member: Writer | Copier, step: Step, version: int, place: Place, spans: Spans) -> None:
    """One step of one process: only what it does itself is timed."""
    action, check = member.steps.get(step), not place.case.timed(version)
    if action is not None and check:
        member.forget()
    place.barrier.wait(DEADLINE_S)
    if action is None:
        return
    start = time.perf_counter()
    action(version)
    spans[step].append((start, time.perf_counter()))
    if check:
        member.check(step)


# In the process that measures


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
        for role, rank in itertools.product((Writer, Copier), range(case.ranks)):
            answers, sending = context.Pipe(duplex=False)
            place = Place(case, rank, socket, shared.name, barrier, rounds, sending)
            process = context.Process(target=work, args=(role, place), name=f"{role.__name__.lower()} {rank}")
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object instead.")] = False,
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
        typer.echo(path.read_text(), nl=False)


def main() -> None:
    """Entry point: a refusal is one line and exit status 1, not a traceback."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or nothing would be cleaned up
    try:
        app()
    except StagingError as error:
        typer.echo(f"benchmarks.host: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

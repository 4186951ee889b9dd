# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Flush of a sharded model from GPUs to the slot, beside the pinned copy and the blocking alternatives.

    python -m benchmarks.flush --model 8B --model 30B-A3B

One process per GPU; TorchTitan's models, sharded by FSDP2, with fp32 master weights. The ceiling is
measured in the same run: all GPUs copying to pinned memory at once. What was staged is read back and compared
before anything is believed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.command import run_command
from benchmarks.flush_case import Case, Found, rows
from benchmarks.flush_model import SHAPES
from benchmarks.flush_ranks import Place, work
from benchmarks.host import daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.report import RESULTS, Report, machine_slug, surroundings
from stagingd.errors import DeadlineExceeded
from stagingd.formats import StageFormat

CASE_S = 540.0
"""The longest that a case may take, in seconds."""


def measure(case: Case) -> list[Found]:
    """Run a case; gives what each rank found.

    Raises:
        BenchmarkFailed: a rank ended early.
        DeadlineExceeded: it took too long.
    """
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        socket = cleanup.enter_context(daemon(folder, prefix))
        context = multiprocessing.get_context("spawn")
        waiting = {}
        for rank in range(case.ranks):
            answers, sending = context.Pipe(duplex=False)
            place = Place(case, rank, socket, folder / "rendezvous", sending)
            process = context.Process(target=work, args=(place,), name=f"trainer rank {rank}")
            process.start()
            cleanup.callback(end, process)
            sending.close()  # so that the process's end is the end of what can be received
            waiting[answers] = rank, process
        found: dict[int, Found] = {}
        deadline = time.monotonic() + CASE_S
        while waiting:
            for answers in connection.wait(list(waiting), timeout=1.0):
                rank, process = waiting.pop(answers)  # type: ignore[index]
                try:
                    found[rank] = answers.recv()  # type: ignore[union-attr]
                except EOFError as error:
                    raise BenchmarkFailed(
                        f"{process.name} ended early in {case.label}", remedy="its own words are above"
                    ) from error
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{case.label} took more than {CASE_S} s", remedy="measure a smaller model")
    return [found[rank] for rank in range(case.ranks)]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def flush(
    model: Annotated[list[str] | None, typer.Option(help=f"Which: {', '.join(SHAPES)}. [default: 8B]")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Trainer ranks. [default: one per GPU]")] = None,
    versions: Annotated[int, typer.Option(min=1, help="Timed versions.")] = 7,
    steps: Annotated[int, typer.Option(min=0, help="Timed steps of training, where the model trains.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="How often steps without and with publishing take turns.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a microbatch.")] = 4096,
    gather: Annotated[bool, typer.Option(help="Time gathering full tensors too.")] = True,
    stage_format: Annotated[
        StageFormat | None, typer.Option("--format", help="What the trainers make of linear layers. [default: bf16]")
    ] = None,
    checkpoint: Annotated[bool, typer.Option(help="Time torch's checkpoint staging too, where it fits.")] = True,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure the flush of a sharded model on this machine's GPUs; on the CPU where there are none."""
    console = Console(stderr=as_json, width=140)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = ranks or max(1, torch.cuda.device_count())
    models = model or ["8B" if device == "cuda" else "debug"]
    around = surroundings(
        models=models,
        ranks=count,
        device=device,
        versions=versions,
        steps=steps,
        tokens=tokens,
        format=stage_format or "bf16",
    )
    around["devices"] = [torch.cuda.get_device_name(i) for i in range(count)] if device == "cuda" else []
    found = []
    for name in models:
        label = f"{name}, {count} {'GPU' if device == 'cuda' else 'CPU rank'}{'s' if count > 1 else ''}"
        case = Case(
            label if stage_format is None else f"{label}, {stage_format}",
            name,
            count,
            device,
            versions,
            tokens,
            steps,
            rounds,
            checkpoint and SHAPES[name].trains,
            gather,
            stage_format,
        )
        measured = measure(case)
        found += rows(case, measured)
        for note in {note for rank in measured for note in rank.notes}:
            console.print(f"{case.label}: {note}")
        report = Report("flush", machine_slug(machine), around, found)
        path = report.write(results)  # after every case: they take minutes
    console.print(report.table())
    console.print(f"written to {path}")
    if as_json:
        typer.echo(json.dumps(report.as_dict()))


if __name__ == "__main__":
    run_command(app, "benchmarks.flush")

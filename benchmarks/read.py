# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Versions into the live weights of real vLLM engines, beside a pinned copy of the same bytes and vLLM's own reload.

    python -m benchmarks.read --model 8B --tensor-parallel 1 --mode fp8_per_tensor

A version is read from its lease on, by all ranks at once, while nobody generates.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from stagingd_vllm.answers import checked

from benchmarks.command import run_command
from benchmarks.engine import options, refuse_inexact
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from benchmarks.staged import Staged, staged
from stagingd.formats import StageFormat

MIB = 2**20
NOT_RELOADED = {"fp8_per_block": "it recurses without end in per_block_cast_to_fp8"}
"""What vLLM 0.26's own layerwise reload cannot do, and why; the benchmark says so in its place."""
RATIO_AIM = 1.10
MEMORY_AIM = 256.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(model: str, ranks: int, mode: str, stages: Staged, updates: int, reloads: int) -> list[Row]:
    """Start an engine, have it read, and end it."""
    from vllm import LLM  # noqa: PLC0415 - takes seconds

    folder = stages.folder / model
    llm = LLM(**options(folder, mode, ranks, batches=[8], tokens=256, share=0.8))
    label = stages.label(model, mode, ranks)
    try:

        def ask(method: str, **arguments: Any) -> list[dict[str, Any]]:
            return checked(llm.collective_rpc(method, kwargs=arguments))

        before = ask("stagingd_allocated")
        ask("stagingd_attach", stage=model, socket=str(stages.socket), engine=f"{mode}-{ranks}")
        ask("stagingd_update")
        refuse_inexact(label, ask("stagingd_check"))
        read = ask("stagingd_measure", updates=updates)
        by_kernel = ask("stagingd_measure_kernel", updates=updates) if torch.cuda.is_available() else []
        refuse_inexact(label, ask("stagingd_check"))
        reloaded = ask("stagingd_reload", times=reloads) if reloads and mode not in NOT_RELOADED else []
        llm.collective_rpc("stagingd_detach")
    finally:
        llm.llm_engine.engine_core.shutdown()
    for rank, was in zip(read, before, strict=True):
        rank["device_bytes"] -= was["device_bytes"]
    return rows(label, read, by_kernel, reloaded)


def rows(
    label: str, read: list[dict[str, Any]], by_kernel: list[dict[str, Any]], reloaded: list[dict[str, Any]]
) -> list[Row]:
    """The figures of one engine: those of its slowest rank."""
    seconds = _slowest(read)
    pinned = max(rank["bytes"] / rank["pinned"] for rank in read)
    memory = max(rank["device_bytes"] for rank in read) / MIB
    found = [
        Row(f"{label}: pinned copy, all ranks at once", min(rank["pinned"] for rank in read) / 1e9, "GB/s", "higher"),
        Row(f"{label}: lease to live", seconds * 1e3, "ms", "lower"),
        Row(f"{label}: of a pinned copy of the same bytes", seconds / pinned, "ratio", "lower", RATIO_AIM),
        Row(f"{label}: bytes that a rank reads, of the stage", max(r["share"] for r in read), "ratio", "lower"),
        Row(f"{label}: device memory", memory, "MiB", "lower", MEMORY_AIM),
    ]
    if by_kernel:
        ratio = _slowest(by_kernel) / pinned
        found.append(Row(f"{label}: the same by a kernel that reads the slot", ratio, "ratio", "lower"))
    if reloaded:
        times = _slowest(reloaded)
        extra = max(rank["device_bytes"] for rank in reloaded) / MIB
        found.append(Row(f"{label}: vLLM's layerwise reload from pinned tensors", times * 1e3, "ms", "lower"))
        found.append(Row(f"{label}: its device memory", extra, "MiB", "lower"))
    return found


def _slowest(ranks: list[dict[str, Any]]) -> float:
    """Median seconds of the slowest rank each time."""
    return statistics.median(max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True))


@app.command()
def read(
    model: Annotated[list[str] | None, typer.Option(help=f"Which: {', '.join(SIZES)}. [default: 8B]")] = None,
    tensor_parallel: Annotated[list[int] | None, typer.Option(min=1, help="Ranks of an engine. [default: 1]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="vLLM's quantizations, or bfloat16.")] = None,
    stage_format: Annotated[
        StageFormat | None, typer.Option("--format", help="What the trainer makes of linear layers. [default: bf16]")
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Timed updates.")] = 7,
    reloads: Annotated[int, typer.Option(min=0, help="Timed reloads by vLLM itself.")] = 0,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Measure how versions get into the live weights of vLLM engines on this machine."""
    models, modes, sizes = model or ["8B"], mode or ["fp8_per_tensor"], tensor_parallel or [1]
    console = Console(width=140)
    around = surroundings(
        models=models,
        modes=modes,
        tensor_parallel=sizes,
        format=stage_format or "bf16",
        updates=updates,
        reloads=reloads,
    )
    if stage_format is not None and reloads:
        raise BenchmarkFailed("vLLM reloads tensors in bf16 alone", remedy="measure --reloads without --format")
    found: list[Row] = []
    with staged(models, stage_format) as stages:
        for name, ranks, some in itertools.product(models, sizes, modes):
            if reloads and some in NOT_RELOADED:
                console.print(f"{name}, {some}: vLLM's layerwise reload is left out: {NOT_RELOADED[some]}")
            found += measure(name, ranks, some, stages, updates, reloads)
            report = Report("read", machine_slug(machine), around, found)
            path = report.write(results)  # after every engine: they take minutes
    console.print(report.table())
    console.print(f"written to {path}")


if __name__ == "__main__":
    run_command(app, "benchmarks.read")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From a trainer's last put to an engine that computes with the version, read once it is sealed and read as it lands.

    python -m benchmarks.latency --model 8B --trainers 2 --tensor-parallel 2 --format bf16 --format fp8_per_tensor

Trainer ranks hold rows of every tensor, on the last GPUs; the engine is on the first. Beside it stand what the flush
takes alone, with nobody reading; what the read takes alone, of a version that is sealed; and, where trainer and engine
have GPUs of their own, vLLM's packed NCCL transfer, from whole tensors on one GPU, into the same engine.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower

from benchmarks.command import run_command
from benchmarks.engine import options, refuse_inexact
from benchmarks.host_case import BenchmarkFailed
from benchmarks.nccl import BACKEND, has_trainer, nccl_seconds
from benchmarks.pause import PAUSE_AIM, generate
from benchmarks.read_model import SIZES
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from benchmarks.staged import Published, Staged, Trainer, served, staging
from stagingd import wire
from stagingd.connection import Connection
from stagingd.formats import StageFormat

REPEATS = 7
BLOCKED_AIM = 5.0
"""Milliseconds."""
OVERLAP_AIM = 1.25
"""Of the larger of flush and read."""
BF16 = "bf16"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def milliseconds(seconds: Sequence[float]) -> float:
    """The median."""
    return statistics.median(seconds) * 1e3


async def one_version(follower: Follower, trainer: Trainer) -> tuple[Published, float]:
    """Publish a version; gives it, and the seconds from its last put to an engine that computes with it."""

    async def live() -> float:
        await follower.reached(trainer.newest + 1)
        return time.monotonic()

    waiting = asyncio.create_task(live())
    made = await asyncio.to_thread(trainer.publish)
    return made, await waiting - made.put


async def flushes(trainer: Trainer, label: str) -> tuple[float, list[Row]]:
    """With nobody who reads. Gives the milliseconds, too."""
    found = [await asyncio.to_thread(trainer.publish) for _ in range(REPEATS)]
    took = milliseconds([one.sealed - one.put for one in found])
    blocked = milliseconds([one.blocked for one in found])
    return took, [
        Row(f"{label}: flush alone, from the last put to sealed", took, "ms", "lower"),
        Row(f"{label}: a trainer's host is held by publishing", blocked, "ms", "lower", BLOCKED_AIM),
    ]


async def reads(follower: Follower, newest: int, label: str) -> tuple[float, list[Row]]:
    """Of versions that are sealed, in turns, by an engine that generates nothing. Gives the milliseconds, too."""
    took = []
    for version in itertools.islice(itertools.cycle((newest - 1, newest)), REPEATS + 1):
        begin = time.monotonic()
        await follower.hold(version)
        took.append(time.monotonic() - begin)
    follower.follow()
    alone = milliseconds(took[1:])
    return alone, [Row(f"{label}: read and swap alone, of a sealed version", alone, "ms", "lower")]


async def paused(llm: Any, follower: Follower, trainer: Trainer, label: str, batch: int, tokens: int) -> list[Row]:
    """The same while a batch generates, and by how much one of its tokens is late then."""
    await generate(llm, batch, 16)
    took, late = [], []
    for _ in range(REPEATS):
        generating = asyncio.create_task(generate(llm, batch, tokens))
        _, seconds = await one_version(follower, trainer)
        if generating.done():
            raise BenchmarkFailed(f"{label}: the last token came before the version", remedy="raise --tokens")
        gaps = (await generating).gaps
        took.append(seconds)
        late.append(max(gaps) - statistics.median(gaps))
    label = f"{label}, while {batch} requests generate"
    return [
        Row(f"{label}: from the last put to swapped", milliseconds(took), "ms", "lower"),
        Row(f"{label}: longest delay of a token", milliseconds(late), "ms", "lower", PAUSE_AIM),
    ]


def on_the_way(stages: Staged, model: str, made: Sequence[Published], label: str) -> list[Row]:
    """When, since the last put, what it takes was done, by the daemon's clock, which is the trainers'."""
    with Connection(stages.socket, name="benchmarks.latency") as connection:
        report = connection.request(wire.History(stage=model), wire.HistoryReport)
    put = {one.version: one.put for one in made}
    ended: dict[str, list[float]] = {}
    for one in report.versions:
        for what in ("measure", "seal", "read") if one.version in put else ():
            ends = [span.end_s for span in one.spans if span.what == what and span.end_s is not None]
            if ends:
                ended.setdefault(what, []).append(max(ends) - put[one.version])
    names = {"measure": "all moments known", "seal": "sealed", "read": "read by all workers"}
    return [
        Row(f"{label}: from the last put to {names[what]}", milliseconds(s), "ms", "lower") for what, s in ended.items()
    ]


async def overlapped(
    llm: Any,
    stages: Staged,
    model: str,
    follower: Follower,
    trainer: Trainer,
    label: str,
    larger: float,
    aim: float | None,
    batch: int,
    tokens: int,
) -> list[Row]:
    """From the last put to swapped, by an engine that generates nothing, and by one that does."""
    await one_version(follower, trainer)
    made = [await one_version(follower, trainer) for _ in range(REPEATS)]
    took = milliseconds([seconds for _, seconds in made])
    found = [
        *on_the_way(stages, model, [one for one, _ in made], label),
        Row(f"{label}: from the last put to swapped", took, "ms", "lower"),
        Row(f"{label}: of the larger of flush and read", took / larger, "ratio", "lower", aim),
    ]
    return found + await paused(llm, follower, trainer, label, batch, tokens)


def memory(stages: Staged, model: str, label: str) -> Row:
    """What the stage takes of the host's, beside two versions in bf16."""
    with Connection(stages.socket, name="benchmarks.latency") as connection:
        report = connection.request(wire.Status(), wire.StatusReport)
    size = next(stage.segment_bytes for stage in report.stages if stage.stage == model)
    plain = 2 * sum(2 * math.prod(shape) for shape in SIZES[model].shapes().values())
    return Row(f"{label}: host memory, of two versions in bf16", size / plain, "ratio", "lower")


async def measure(
    model: str, ranks: int, mode: str, stages: Staged, trainer: Trainer, batch: int, tokens: int, gib: float
) -> list[Row]:
    """Start an engine, and follow the stage with it, in both ways."""
    from vllm import AsyncEngineArgs  # noqa: PLC0415 - takes seconds
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    shape = options(stages.folder / model, mode, ranks, batches=[batch], tokens=tokens + 64, share=0.6)
    backend = BACKEND if has_trainer(ranks) and stages.stage_format is None else {}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(enable_prefix_caching=False, **shape, **backend))
    label = stages.label(model, mode, ranks)
    found = [memory(stages, model, label)]
    try:
        flush, rows = await flushes(trainer, label)
        found += rows
        larger = flush
        for early in (False, True):
            following = Follower(llm, model, socket=stages.socket, prefetch_gib=gib, cache=Cache.KEEP, early=early)
            async with following as follower:
                if follower.mode != "prefetch":
                    raise BenchmarkFailed(f"{label}: versions are read in place", remedy="raise --prefetch-gib")
                await follower.reached(trainer.newest)
                refuse_inexact(label, checked(await llm.collective_rpc("stagingd_check")))
                if not early:
                    read, rows = await reads(follower, trainer.newest, label)
                    found += rows
                    larger = max(flush, read)
                how = f"{label}, read {'as it lands' if early else 'once sealed'}"
                aim = OVERLAP_AIM if early else None
                found += await overlapped(llm, stages, model, follower, trainer, how, larger, aim, batch, tokens)
                refuse_inexact(label, checked(await llm.collective_rpc("stagingd_check")))
        if backend:
            sent = await nccl_seconds(model, ranks, llm)
            found.append(Row(f"{label}: vLLM's packed NCCL transfer, which stops it", sent * 1e3, "ms", "lower"))
    finally:
        llm.shutdown()
    return found


@app.command()
def latency(
    model: Annotated[str, typer.Option(help=f"Which: {', '.join(SIZES)}.")] = "8B",
    trainers: Annotated[int, typer.Option(min=1, help="Trainer ranks.")] = 2,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks of the engine.")] = 2,
    mode: Annotated[str, typer.Option(help="vLLM's quantization.")] = "fp8_per_tensor",
    stage_format: Annotated[
        list[str] | None, typer.Option("--format", help="What trainers make of linear layers. [default: bf16, mode's]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that each request generates.")] = 512,
    prefetch_gib: Annotated[float, typer.Option(help="Memory for prefetching on each GPU.")] = 20.0,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Measure how long a version takes from trainers to an engine."""
    formats = [None if one == BF16 else StageFormat(one) for one in stage_format or [BF16, mode]]
    console = Console(width=150)
    around = surroundings(
        model=model,
        trainers=trainers,
        tensor_parallel=tensor_parallel,
        mode=mode,
        formats=[one or BF16 for one in formats],
        batch=batch,
        tokens=tokens,
    )
    found: list[Row] = []
    for one in formats:
        with served(one) as stages, staging(model, stages, trainers) as trainer:
            found += asyncio.run(measure(model, tensor_parallel, mode, stages, trainer, batch, tokens, prefetch_gib))
        report = Report("latency", machine_slug(machine), around, found)
        path = report.write(results)  # after every format: they take minutes
    console.print(report.table())
    console.print(f"written to {path}")


if __name__ == "__main__":
    run_command(app, "benchmarks.latency")

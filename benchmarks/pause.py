# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine loses of its generation by an update that is prefetched beside it and swapped in.

    python -m benchmarks.pause --model 8B --tensor-parallel 1 --mode fp8_per_tensor --batch 8 --batch 64 --batch 256

A batch generates so many tokens alone, and again while versions are prefetched and swapped in with nothing between
them. Of each update's time the share that generation took longer is what the update cost. Two versions stand in the
buffer and are taken in turns (``turns.py``), so that no trainer computes on the engine's GPUs meanwhile. Only then does
one publish.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower

from benchmarks.command import run_command
from benchmarks.engine import options, refuse_inexact
from benchmarks.host_case import BenchmarkFailed
from benchmarks.nccl import BACKEND, has_trainer, nccl_seconds
from benchmarks.read import NOT_RELOADED
from benchmarks.read_model import SIZES
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from benchmarks.staged import Staged, Trainer, served, staging
from benchmarks.turns import Turns
from stagingd.connection import Connection
from stagingd.formats import StageFormat

PROMPT = [1, 5, 9, 7]
REPEATS = 3
LEAST_UPDATES = 2
PAUSE_AIM = 15.0
LOST_AIMS = {1: 30.0, 2: 18.0}
"""Milliseconds, by tensor-parallel size."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Generation:
    """Seconds that a batch took, and those between the tokens of one of its requests."""

    seconds: float
    gaps: tuple[float, ...]


async def generate(llm: Any, batch: int, tokens: int) -> Generation:
    """Let a batch of requests generate so many tokens each."""
    from vllm import SamplingParams  # noqa: PLC0415 - takes seconds
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    came: list[float] = []

    async def request(number: int) -> None:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if number else RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": [1 + number % 900, *PROMPT]}
        async for _ in llm.generate(prompt, sampling, f"{time.monotonic_ns()}-{number}"):
            came.append(time.perf_counter()) if not number else None

    begin = time.perf_counter()
    await asyncio.gather(*(request(number) for number in range(batch)))
    return Generation(time.perf_counter() - begin, tuple(b - a for a, b in itertools.pairwise(came)))


async def updates(turns: Turns, generating: asyncio.Task[Generation]) -> list[float]:
    """Take versions in turns until the last token; gives the seconds that each took."""
    took = []
    async with turns:
        while not generating.done():
            begin = time.perf_counter()
            await turns.take()
            took.append(time.perf_counter() - begin)
    return took


@dataclass(frozen=True)
class Beside:
    """A batch alone, and one while versions are taken: ``took`` are the seconds that each of them needed."""

    alone: Generation
    updated: Generation
    took: tuple[float, ...]

    @property
    def lost(self) -> float:
        """Seconds of generation that one update costs."""
        return (1 - self.alone.seconds / self.updated.seconds) * statistics.mean(self.took)

    @property
    def pauses(self) -> list[float]:
        """Seconds that a token came later than usual: the longest of such delays, one for each update."""
        step = statistics.median(self.alone.gaps)
        return [gap - step for gap in sorted(self.updated.gaps)[-len(self.took) :]]


async def compare(llm: Any, turns: Turns, label: str, batch: int, tokens: int) -> Beside:
    """Generate alone, and then while versions are taken."""
    alone = await generate(llm, batch, tokens)
    generating = asyncio.create_task(generate(llm, batch, tokens))
    took = await updates(turns, generating)
    if len(took) < LEAST_UPDATES:
        raise BenchmarkFailed(f"{label}: only {len(took)} updates while it generated", remedy="raise --tokens")
    return Beside(alone, await generating, tuple(took))


async def beside(llm: Any, turns: Turns, label: str, batch: int, tokens: int, aim: float | None) -> list[Row]:
    """The figures of one size of batch."""
    await generate(llm, batch, 16)
    found = [await compare(llm, turns, label, batch, tokens) for _ in range(REPEATS)]
    rate = batch * tokens / statistics.median(one.alone.seconds for one in found)
    pause, took = (
        statistics.median(itertools.chain(*some)) for some in zip(*((o.pauses, o.took) for o in found), strict=True)
    )
    lost = statistics.median(one.lost for one in found)
    return [
        Row(f"{label}: generated alone", rate, "tokens/s", "higher"),
        Row(f"{label}: generation lost per update", lost * 1e3, "ms", "lower", aim),
        Row(f"{label}: longest delay of a token per update", pause * 1e3, "ms", "lower", PAUSE_AIM),
        Row(f"{label}: from one version to computing with the next", took * 1e3, "ms", "lower"),
    ]


async def published(llm: Any, follower: Follower, trainer: Trainer, label: str, batch: int, tokens: int) -> list[Row]:
    """From a trainer's last put to an engine that computes with the version, while it generates."""
    follower.follow()
    flushed, swapped = [], []
    for _ in range(REPEATS):
        generating = asyncio.create_task(generate(llm, batch, tokens))
        version = await asyncio.to_thread(trainer.publish)
        await follower.reached(version.version)
        swapped.append(time.monotonic() - version.put)
        flushed.append(version.sealed - version.put)
        if generating.done():
            raise BenchmarkFailed(f"{label}: the last token came before the version", remedy="raise --tokens")
        await generating
    return [
        Row(f"{label}: from the last put to sealed", statistics.median(flushed) * 1e3, "ms", "lower"),
        Row(f"{label}: from the last put to computing with it", statistics.median(swapped) * 1e3, "ms", "lower"),
    ]


async def measure(
    model: str,
    ranks: int,
    mode: str,
    stages: Staged,
    trainer: Trainer,
    batches: list[int],
    tokens: int,
    gib: float,
) -> list[Row]:
    """Start an engine, follow the stage with it, and end it."""
    from vllm import AsyncEngineArgs  # noqa: PLC0415 - takes seconds
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    shape = options(stages.folder / model, mode, ranks, batches=batches, tokens=tokens + 64, share=0.7)
    backend = BACKEND if has_trainer(ranks) else {}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(enable_prefix_caching=False, **shape, **backend))

    async def ask(method: str, **arguments: Any) -> list[dict[str, Any]]:
        return checked(await llm.collective_rpc(method, kwargs=arguments))

    label = stages.label(model, mode, ranks)
    found: list[Row] = []
    try:
        follower = Follower(llm, model, socket=stages.socket, prefetch_gib=gib, cache=Cache.KEEP)
        async with follower:
            await follower.reached(trainer.newest)
            if follower.mode != "prefetch":
                raise BenchmarkFailed(f"{label}: versions are read in place", remedy="raise --prefetch-gib")
            refuse_inexact(label, await ask("stagingd_check"))
            read = await ask("stagingd_measure", updates=5)
            seconds = max(statistics.median(rank["seconds"]) for rank in read)
            found.append(Row(f"{label}: read in place, by an engine that stands", seconds * 1e3, "ms", "lower"))
            await follower.hold(trainer.newest)
            with Connection(stages.socket, name="benchmarks.pause") as connection:
                turns = Turns(llm, model, trainer.newest, trainer.newest - 1, connection)
            for batch in batches:
                found += await beside(llm, turns, f"{label}, batch {batch}", batch, tokens, LOST_AIMS.get(ranks))
            middle = batches[len(batches) // 2]
            found += await published(llm, follower, trainer, f"{label}, batch {middle}", middle, tokens)
            refuse_inexact(label, await ask("stagingd_check"))
            if torch.cuda.is_available() and mode not in NOT_RELOADED and stages.stage_format is None:
                times = await ask("stagingd_reload", times=3)
                reloaded = max(statistics.median(rank["seconds"]) for rank in times)
                found.append(Row(f"{label}: vLLM's layerwise reload, which stops it", reloaded * 1e3, "ms", "lower"))
                if backend:
                    sent = await nccl_seconds(model, ranks, llm)
                    found.append(
                        Row(f"{label}: vLLM's packed NCCL transfer, which stops it", sent * 1e3, "ms", "lower")
                    )
    finally:
        llm.shutdown()
    return found


@app.command()
def pause(
    model: Annotated[str, typer.Option(help=f"Which: {', '.join(SIZES)}.")] = "8B",
    tensor_parallel: Annotated[list[int] | None, typer.Option(min=1, help="Ranks of an engine. [default: 1]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="vLLM's quantizations. [default: fp8_per_tensor]")] = None,
    stage_format: Annotated[
        StageFormat | None, typer.Option("--format", help="What the trainer makes of linear layers. [default: bf16]")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time. [default: 8, 64, 256]")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that each request generates.")] = 512,
    prefetch_gib: Annotated[float, typer.Option(help="Memory for prefetching on each GPU.")] = 20.0,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Measure what updates cost an engine that generates."""
    sizes, modes, batches = tensor_parallel or [1], mode or ["fp8_per_tensor"], batch or [8, 64, 256]
    console = Console(width=140)
    around = surroundings(
        model=model,
        modes=modes,
        tensor_parallel=sizes,
        format=stage_format or "bf16",
        batches=batches,
        tokens=tokens,
    )
    found: list[Row] = []
    with served(stage_format) as stages, staging(model, stages) as trainer:
        for ranks, some in itertools.product(sizes, modes):
            found += asyncio.run(measure(model, ranks, some, stages, trainer, batches, tokens, prefetch_gib))
            report = Report("pause", machine_slug(machine), around, found)
            path = report.write(results)  # after every engine: they take minutes
    console.print(report.table())
    console.print(f"written to {path}")


if __name__ == "__main__":
    run_command(app, "benchmarks.pause")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine loses of its generation by an update that is prefetched beside it and swapped in.

    python -m benchmarks.pause --model 8B --tensor-parallel 1 --mode fp8_per_tensor --batch 8 --batch 64 --batch 256

A batch generates so many tokens alone, and again while versions are prefetched and swapped in without a pause between
them: what it takes longer, divided by the number of updates, is what one update costs. Two versions stand in the buffer
and are taken in turns, so that no trainer computes on the engine's GPUs meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower

from benchmarks.host import daemon, end, remove_segments
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read import NOT_RELOADED, TRAINER_S, train
from benchmarks.read_model import SIZES
from benchmarks.report import RESULTS, Report, Row, machine_slug, surroundings
from stagingd.errors import StagingError

PROMPT = [1, 5, 9, 7]
REPEATS = 3
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


async def updates(follower: Follower, number: int) -> list[float]:
    """Take two versions in turns; gives the seconds from asking for each to computing with it."""
    took = []
    for _ in range(number):
        begin = time.perf_counter()
        await follower.hold(3 - (follower.version or 2))
        took.append(time.perf_counter() - begin)
    return took


async def beside(
    llm: Any, follower: Follower, label: str, batch: int, tokens: int, number: int, lost_aim: float | None
) -> list[Row]:
    """The figures of one size of batch."""
    await generate(llm, batch, 16)
    alone = [await generate(llm, batch, tokens) for _ in range(REPEATS)]
    with_updates, took = [], list[float]()
    for _ in range(REPEATS):
        generation, seconds = await asyncio.gather(generate(llm, batch, tokens), updates(follower, number))
        if sum(seconds) >= generation.seconds:
            raise BenchmarkFailed(f"{label}: updates went on after the last token", remedy="raise --tokens")
        with_updates.append(generation)
        took += seconds
    usual, longer = (statistics.median(one.seconds for one in some) for some in (alone, with_updates))
    step = statistics.median(gap for one in alone for gap in one.gaps)
    pauses = [gap - step for one in with_updates for gap in sorted(one.gaps)[-number:]]
    rate = batch * tokens / usual
    return [
        Row(f"{label}: generated alone", rate, "tokens/s", "higher"),
        Row(f"{label}: lost per update", (longer - usual) / number * 1e3, "ms", "lower", lost_aim),
        Row(
            f"{label}: longest gap between tokens beyond a step",
            statistics.median(pauses) * 1e3,
            "ms",
            "lower",
            PAUSE_AIM,
        ),
        Row(f"{label}: from asking for a version to computing with it", statistics.median(took) * 1e3, "ms", "lower"),
    ]


async def measure(
    model: str,
    ranks: int,
    mode: str,
    folder: Path,
    socket: Path,
    batches: list[int],
    tokens: int,
    number: int,
    gib: float,
) -> list[Row]:
    """Start an engine, follow the stage with it, and end it."""
    from vllm import AsyncEngineArgs  # noqa: PLC0415 - takes seconds
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted({1, *batches})}
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            quantization=None if mode == "bfloat16" else mode,
            tensor_parallel_size=ranks,
            worker_extension_cls="benchmarks.read_worker.ReadWorkerExtension",
            max_model_len=tokens + 64,
            max_num_seqs=max(batches),
            gpu_memory_utilization=0.7 if torch.cuda.is_available() else 0.2,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **({"compilation_config": graphs} if torch.cuda.is_available() else {"enforce_eager": True}),
        )
    )

    async def ask(method: str, **arguments: Any) -> list[dict[str, Any]]:
        return checked(await llm.collective_rpc(method, kwargs=arguments))

    label = f"{model}, {mode}, TP {ranks}"
    found: list[Row] = []
    try:
        follower = Follower(llm, model, socket=socket, prefetch_gib=gib, cache=Cache.KEEP)
        async with follower:
            await follower.reached(2)
            if follower.mode != "prefetch":
                raise BenchmarkFailed(f"{label}: versions are read in place", remedy="raise --prefetch-gib")
            for told in await ask("stagingd_check"):
                if not told["exact"]:
                    raise BenchmarkFailed(f"{label}: what the weights hold is wrong: {told}", remedy="run the tests")
            read = await ask("stagingd_measure", updates=5)
            seconds = max(statistics.median(rank["seconds"]) for rank in read)
            found.append(Row(f"{label}: read in place, by an engine that stands", seconds * 1e3, "ms", "lower"))
            for batch in batches:
                aim = LOST_AIMS.get(ranks)
                found += await beside(llm, follower, f"{label}, batch {batch}", batch, tokens, number, aim)
            if torch.cuda.is_available() and mode not in NOT_RELOADED:
                times = await ask("stagingd_reload", times=3)
                reloaded = max(statistics.median(rank["seconds"]) for rank in times)
                found.append(Row(f"{label}: vLLM's layerwise reload, which stops it", reloaded * 1e3, "ms", "lower"))
    finally:
        llm.shutdown()
    return found


@app.command()
def pause(
    model: Annotated[str, typer.Option(help=f"Which: {', '.join(SIZES)}.")] = "8B",
    tensor_parallel: Annotated[list[int] | None, typer.Option(min=1, help="Ranks of an engine. [default: 1]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="vLLM's quantizations. [default: fp8_per_tensor]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time. [default: 8, 64, 256]")] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens that each request generates.")] = 512,
    number: Annotated[int, typer.Option("--updates", min=1, help="Updates meanwhile.")] = 2,
    prefetch_gib: Annotated[float, typer.Option(help="Memory for prefetching on each GPU.")] = 20.0,
    machine: Annotated[str | None, typer.Option(help="The machine's name in the report.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Measure what updates cost an engine that generates."""
    sizes, modes, batches = tensor_parallel or [1], mode or ["fp8_per_tensor"], batch or [8, 64, 256]
    console = Console(width=140)
    around = surroundings(
        model=model, modes=modes, tensor_parallel=sizes, batches=batches, tokens=tokens, updates=number
    )
    found: list[Row] = []
    prefix = f"/stagingd-bench-{os.getpid()}-"
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stagingd-bench-")))
        cleanup.callback(remove_segments, prefix)
        socket = cleanup.enter_context(daemon(folder, prefix))
        SIZES[model].save_config(folder / model)
        trainer = multiprocessing.get_context("spawn").Process(target=train, args=(model, socket))
        trainer.start()
        cleanup.callback(end, trainer)
        trainer.join(TRAINER_S)
        if trainer.exitcode != 0:
            raise BenchmarkFailed(f"the trainer of {model} did not stage it", remedy="its own words are above")
        for ranks, some in itertools.product(sizes, modes):
            case = measure(model, ranks, some, folder / model, socket, batches, tokens, number, prefetch_gib)
            found += asyncio.run(case)
            report = Report("pause", machine_slug(machine), around, found)
            path = report.write(results)  # after every engine: they take minutes
    console.print(report.table())
    console.print(f"written to {path}")


def main() -> None:
    """Entry point: a refusal is one line and exit status 1, not a traceback."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or nothing would be cleaned up
    try:
        app()
    except StagingError as error:
        typer.echo(f"benchmarks.pause: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

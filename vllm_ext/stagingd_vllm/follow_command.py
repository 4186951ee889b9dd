# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m stagingd_vllm.follow_command``: keep a vLLM server at the newest version of a stage."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import aiohttp
import typer

from stagingd.errors import StagingError
from stagingd_vllm.follower import CALL_S, Cache, Follower
from stagingd_vllm.server import Server

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def follow(
    url: Annotated[str, typer.Argument(help="The server's address, such as http://127.0.0.1:8000.")],
    stage: Annotated[str, typer.Argument(help="The stage's name.")],
    socket: Annotated[Path | None, typer.Option(help="The daemon's control socket.")] = None,
    engine: Annotated[str, typer.Option(help="What the engine is called.")] = "engine",
    scale_rule: Annotated[str, typer.Option(help="amax, or sigma:k.")] = "amax",
    prefetch_gib: Annotated[float, typer.Option(min=0, help="Memory for prefetching on each worker's device.")] = 0.0,
    cache: Annotated[Cache, typer.Option(help="What becomes of keys and values of the weights before.")] = Cache.RESET,
    most_behind: Annotated[int | None, typer.Option(min=0, help="Stop generation when further behind.")] = None,
    early: Annotated[
        bool | None,
        typer.Option(
            "--early/--once-sealed", help="Prefetch versions while trainers still flush them. [default: early]"
        ),
    ] = None,
) -> None:
    """Keep a vLLM server at the newest version, until SIGINT or SIGTERM; a line tells of every version."""

    async def run() -> None:
        timeout = aiohttp.ClientTimeout(total=CALL_S)
        async with (
            aiohttp.ClientSession(url, timeout=timeout) as session,
            Follower(
                Server(session),
                stage,
                socket=socket,
                engine=engine,
                scale_rule=scale_rule,
                prefetch_gib=prefetch_gib,
                cache=cache,
                most_behind=most_behind,
                early=early,
            ) as follower,
        ):
            typer.echo(f"following {stage}: {follower.mode}")
            async for version in follower.versions():
                typer.echo(f"{stage}: version {version} is live")

    async def until_told() -> None:
        following = asyncio.create_task(run())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, following.cancel)
        await asyncio.wait([following])
        if not following.cancelled():
            following.result()

    asyncio.run(until_told())


def main() -> None:
    """Entry point: a refusal is one line and exit status 1, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (StagingError, aiohttp.ClientError) as error:
        typer.echo(f"follow_command: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of a comparison, requests that it generates without a pause, and what an update does to them."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.compare.case import Case
from benchmarks.compare.system import EXTENSION, System
from benchmarks.engine import options
from benchmarks.host_case import BenchmarkFailed

TOKEN_S = 60.0
"""The longest that one token may take, in seconds; an engine that stands for an update has that long."""
CALL_S = 180.0
"""The longest that the engine may take to be paused, to load, or to go on, in seconds."""
KNOWN_GAPS = 24
"""Gaps between tokens before an update: their median is what is usual."""
LONGEST = 1024
"""Tokens that a request generates before it begins anew."""
SHARES = {False: 0.5, True: 0.3}
"""Of a GPU's memory that the engine may take, alone and beside the trainer; systems take some of the rest."""

_requests = itertools.count()


@asynccontextmanager
async def engine(system: System, case: Case, folder: Path, batch: int) -> AsyncIterator[Any]:
    """An ``AsyncLLM`` of random weights, or None where the system has no engine."""
    if not system.has_engine:
        yield None
        return
    from vllm import AsyncEngineArgs  # noqa: PLC0415 - takes seconds
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    shape = options(
        folder / case.model,
        case.mode,
        case.layout.tensor_parallel,
        batches=[batch, batch + 1],  # with the request that asks for the first token of the new weights
        tokens=LONGEST + 64,
        share=SHARES[case.layout.shared],
    )
    shape |= {"worker_extension_cls": EXTENSION, "enable_prefix_caching": False, **system.engine(case)}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**shape))
    try:
        yield llm
    finally:
        llm.shutdown()


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises BenchmarkFailed: it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise BenchmarkFailed(
            f"{what} took longer than {seconds:g} s", remedy="the words of engine and trainers are above"
        ) from error


@asynccontextmanager
async def standing(llm: Any) -> AsyncIterator[None]:
    """The engine generates nothing meanwhile; its requests are kept, with what they have.

    ``pause_generation`` does the same, and then waits 20 ms more: the alternatives are spared that.
    """
    async with within(CALL_S, "an update of an engine that stands"):
        await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        yield
        await llm.engine_core.resume_scheduler_async()


async def first_token(llm: Any) -> float:
    """When the first token of a request that begins now has come, by ``time.monotonic``."""
    async with within(TOKEN_S, "the first token of the new weights"):
        async for _ in _generate(llm, 0, 1):
            return time.monotonic()
    raise BenchmarkFailed("a request has ended without a token", remedy="the engine's own words are above")


def _generate(llm: Any, number: int, tokens: int, *, all_of_them: bool = True) -> AsyncIterator[Any]:
    from vllm import SamplingParams  # noqa: PLC0415 - takes seconds
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if all_of_them else RequestOutputKind.FINAL_ONLY,
    )
    prompt = {"prompt_token_ids": [1 + number % 900, 1, 5, 9, 7]}
    found: AsyncIterator[Any] = llm.generate(prompt, sampling, f"compare-{next(_requests)}")
    return found


class Load:
    """Keeps a batch of requests in flight, each begun anew when it ends, and notes when tokens of the first come.

    Args:
        llm: the engine.
        batch: requests at a time.
    """

    def __init__(self, llm: Any, batch: int) -> None:
        self._llm = llm
        self._batch = batch
        self._came: list[float] = []
        self._new = asyncio.Condition()

    async def __aenter__(self) -> Load:
        """Wait until it is known how far tokens are apart."""
        self._tasks = [asyncio.create_task(self._request(number)) for number in range(self._batch)]
        await self._until(lambda: len(self._came) > KNOWN_GAPS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=CALL_S)

    async def passed(self, begin: float, end: float) -> tuple[float, float]:
        """By how much one token at most, and all of them together, were later than usual between two instants.

        Waits for the first token after the second one, which may be late, too.
        """
        await self._until(lambda: self._came[-1] > end)
        return delays(self._came, begin, end)

    async def _request(self, number: int) -> None:
        while True:
            async for _ in _generate(self._llm, number, LONGEST, all_of_them=number == 0):
                if number == 0:
                    async with self._new:
                        self._came.append(time.monotonic())
                        self._new.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        waiting = asyncio.create_task(self._wait(condition))
        together = [waiting, *self._tasks]
        done, _ = await asyncio.wait(together, timeout=TOKEN_S + CALL_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        for task in done:
            task.result()  # what ended it
        if waiting not in done:
            raise BenchmarkFailed("the engine generates nothing", remedy="its own words are above")

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with self._new:
            await self._new.wait_for(condition)


def delays(came: Sequence[float], begin: float, end: float) -> tuple[float, float]:
    """By how much tokens were later than usual between two instants: the latest of them, and all together.

    Args:
        came: when each token came.
        begin, end: the instants; what was usual follows from the tokens before.
    """
    usual = statistics.median(b - a for a, b in itertools.pairwise(_until_then(came, begin)))
    late = [b - a - usual for a, b in itertools.pairwise(came) if b > begin and a < end]
    return max(0.0, *late), max(0.0, sum(late))


def _until_then(came: Iterable[float], begin: float) -> list[float]:
    before = [at for at in came if at <= begin]
    if len(before) < 2:
        raise BenchmarkFailed("no two tokens came before the update", remedy="let the engine generate longer before")
    return before

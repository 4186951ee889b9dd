# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One system in one case: started, checked on fresh random weights, timed, and at the end deprived of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from stagingd_vllm.answers import checked

from benchmarks.compare.case import Case
from benchmarks.compare.engines import CALL_S, Load, engine, first_token
from benchmarks.compare.lines import user_lines
from benchmarks.compare.measured import Ceilings, Measured, Memory, Survival, Update, median, now
from benchmarks.compare.system import Running, Stand, System
from benchmarks.engine import refuse_inexact
from benchmarks.read_model import SIZES
from stagingd.segment import SHARED_MEMORY

PREFIX: Final = "stagingd-compare-"
"""Of what a run leaves in shared memory while it runs, before its process's number."""


@dataclass(frozen=True)
class Plan:
    """How a system is measured.

    Attributes:
        updates: timed ones after the first.
        batch: requests in flight.
        prefetch_gib: memory beside the engine's weights that a system may take on each of its devices.
        kill_s: how long trainers may be held after a worker has been killed; 0 to kill none.
    """

    updates: int
    batch: int
    prefetch_gib: float
    kill_s: float


def refused(system: System, case: Case, why: str) -> Measured:
    """What the report says of a system that did not run."""
    return Measured(system.name, case, system.setting, user_lines(system.name), now(), not_run=why)


async def measure(system: System, case: Case, plan: Plan, tell: Callable[[Measured], None]) -> None:
    """Run a system.

    Args:
        system: which.
        case: what with.
        plan: how.
        tell: is told what was found, and once more with what came of a killed worker: then the engine is gone, and
            leaving it in order fails.

    Raises:
        BenchmarkFailed: a part of it ended before its time, or an engine's weights are wrong.
        Exception: what engine or system raise, such as their refusals.
    """
    async with contextlib.AsyncExitStack() as cleanup:
        folders = [
            Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=where)))
            for where in (None, SHARED_MEMORY)
        ]
        SIZES[case.model].save_config(folders[0] / case.model)
        llm = await cleanup.enter_async_context(engine(system, case, folders[0], plan.batch))
        before = 0 if llm is None else await _engine_bytes(llm, "stagingd_allocated")
        stand = Stand(case, folders[0], folders[1], llm, plan.prefetch_gib)
        running = await cleanup.enter_async_context(system.running(stand))
        found = await _timed(system, case, plan, llm, running)
        found = replace(found, memory=await _memory(llm, running, before))
        tell(found)
        if llm is not None and plan.kill_s:
            tell(replace(found, survival=await killed(llm, running, found, plan.kill_s)))


async def _timed(system: System, case: Case, plan: Plan, llm: Any, running: Running) -> Measured:
    first = await update(llm, running, plan.batch)
    await check(llm, case, running)  # before any other update is timed
    ceilings = await _ceilings(llm, running)
    await update(llm, running, plan.batch)  # what has checked took leases, in the engine's name
    steady = [await update(llm, running, plan.batch) for _ in range(plan.updates)]
    await check(llm, case, running)
    return Measured(
        system=system.name,
        case=case,
        setting=system.setting,
        lines=user_lines(system.name),
        taken_at=now(),
        first=first,
        steady=tuple(steady),
        ceilings=ceilings,
        traffic=system.traffic(case),
        wire=await running.wire(ceilings),
    )


async def update(llm: Any, running: Running, batch: int) -> Update:
    """Bring one more version to the engine while it generates, and have a request computed with it."""
    await running.fleet.prepare()
    if llm is None:
        return Update(await running.deliver())
    async with Load(llm, batch) as load:
        begin = time.monotonic()
        blocked = await running.deliver()
        end = await first_token(llm)
        stopped, lost = await load.passed(begin, end)
    return Update(blocked, stopped, lost, end - begin)


async def check(llm: Any, case: Case, running: Running) -> None:
    """Raises BenchmarkFailed: the engine's weights are not those that the trainers have."""
    await running.fleet.settled()
    if llm is not None:
        about = {"model": case.model, "version": running.fleet.newest}
        refuse_inexact(case.label, checked(await llm.collective_rpc("compare_check", kwargs=about)))
    await running.check()


async def _ceilings(llm: Any, running: Running) -> Ceilings:
    out = await running.fleet.ceiling()
    if llm is None:
        return Ceilings(out)
    answers = checked(await llm.collective_rpc("compare_pinned"))
    return Ceilings(out, sum(answer["pinned"] for answer in answers))


async def _memory(llm: Any, running: Running, before: int) -> Memory:
    """Of one more update, which is not timed: to find a peak takes a reset that an update would feel."""
    await running.fleet.prepare()
    if llm is not None:
        await _engine_bytes(llm, "stagingd_allocated")
    await running.deliver()
    settled, host = await running.fleet.settled(), await running.host_bytes()
    if llm is None:
        return Memory(settled.device_bytes, None, host)
    peak = await _engine_bytes(llm, "compare_peak")
    return Memory(settled.device_bytes, max(peak - before, 0) + settled.elsewhere_bytes, host)


async def _engine_bytes(llm: Any, method: str) -> int:
    return max(int(answer["device_bytes"]) for answer in checked(await llm.collective_rpc(method)))


async def killed(llm: Any, running: Running, found: Measured, limit: float) -> Survival:
    """Kill the last worker in the middle of an update, and see how long the trainers are held."""
    worker = (await llm.collective_rpc("compare_process"))[-1]
    await running.fleet.prepare()
    delivering = asyncio.create_task(running.deliver())
    await asyncio.sleep(median(found.values("total_s")) / 2)
    os.kill(worker, signal.SIGKILL)
    died = time.monotonic()
    while running.fleet.done_at is None and time.monotonic() - died < limit:
        await asyncio.sleep(0.001)
    done_at = running.fleet.done_at
    delivering.cancel()
    await asyncio.wait([delivering], timeout=CALL_S)
    return Survival(None if done_at is None else max(done_at - died, 0.0), limit)

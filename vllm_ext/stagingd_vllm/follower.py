# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Keeping vLLM's ``AsyncLLM`` at the newest version of a stage while it generates.

    async with Follower(llm, "policy", prefetch_gib=10) as follower:
        await follower.reached(7)
        async for output in llm.generate(...): ...

Workers read a version beside the engine (``stagingd_prefetch``). The daemon's events say when there is one, and when it
has been read, so that the engine is asked for nothing meanwhile. Then all workers swap it in between two steps, and
wait for the next by themselves: one call to the engine for each version. They begin when trainers begin to flush it,
and read it as it lands, unless ``early`` is False.

Outputs tell in ``weight_versions`` which version made which of their tokens, if vLLM has that (0.32 has, 0.26 has not).
With ``Cache.KEEP`` and asynchronous scheduling, tokens of the step during which it swaps may bear the later version.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio

from stagingd import progress, wire
from stagingd.connection import Connection
from stagingd.errors import DeadlineExceeded, OutOfOrder, StagingError, UnknownStage
from stagingd.slots import SlotState
from stagingd_vllm.answers import Answer, checked
from stagingd_vllm.versions import EngineNotSupported

WAKE_S = 1.0
"""An event may be lost, with a daemon that ends for one: so often is looked without any, in seconds."""
POLL_S = 0.01
"""How often workers are asked once their lease was taken away, until they have noticed it, in seconds."""
POLLS = 20
"""How often in a row, before the next event is waited for."""
NOTICED_S = 1.0
"""How long a worker may take to notice that it has read a version, once the daemon knows, in seconds."""
CALL_S = 300.0
"""The longest that all workers may take to answer, in seconds: attaching derives a plan, and registers memory."""
READ_S = 120.0
"""The longest that reading a version may take beside a generating engine, in seconds."""

logger = logging.getLogger(__name__)


class Cache(StrEnum):
    """What becomes of the keys and values that the weights before made."""

    RESET = "reset"
    """They are dropped: requests in flight are computed again from their prompts and tokens, by the new weights."""
    KEEP = "keep"
    """Requests in flight go on with theirs, and prompts may still find some of them."""


class Follower:
    """Follows a stage with one engine.

    Args:
        llm: vLLM's ``AsyncLLM`` with the worker extension, or a ``Server``.
        stage: the stage's name.
        socket: the daemon's; that of the settings by default.
        engine: what this engine is called.
        scale_rule: how scales follow from moments.
        prefetch_gib: memory that prefetching may take on each worker's device; without it, versions are read in place.
        cache: what becomes of the keys and values that the weights before made.
        most_behind: generation stops while the engine is more versions than this behind the newest; never by default.
        early: versions are prefetched while trainers still flush them; it asks for ``prefetch_gib``. By default where
            that is possible: on x86-64 processors, and with ``prefetch_gib``.

    Raises:
        OutOfOrder: versions are to be read early, and nothing may be prefetched.
    """

    def __init__(
        self,
        llm: Any,
        stage: str,
        *,
        socket: str | os.PathLike[str] | None = None,
        engine: str = "engine",
        scale_rule: str = "amax",
        prefetch_gib: float = 0.0,
        cache: Cache = Cache.RESET,
        most_behind: int | None = None,
        early: bool | None = None,
    ) -> None:
        if early and prefetch_gib <= 0:
            raise OutOfOrder("versions are read early into memory of their own", remedy="give prefetch_gib as well")
        self._llm = llm
        self._early = prefetch_gib > 0 and progress.supported() if early is None else early
        self._stage = stage
        self._socket = socket
        self._attaching = {"stage": stage, "engine": engine, "scale_rule": scale_rule}
        if socket is not None:
            self._attaching["socket"] = str(socket)
        self._prefetch_gib = prefetch_gib
        self._cache = cache
        self._most_behind = most_behind
        self._held_back = False
        self._following = True
        self._armed = False
        """Whether workers have been told to prefetch the next version by themselves."""
        self._taking = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()
        self._released = asyncio.Event()
        self._read: int | None = None
        self.mode = "in_place"
        self.version: int | None = None
        """The version that the engine computes with; None before the first."""

    async def __aenter__(self) -> Follower:
        """Attach all workers. Raises what ``stagingd_attach`` refuses."""
        self._connection = await asyncio.to_thread(Connection, self._socket, name=f"follower of {self._stage}")
        self._events = zmq.asyncio.Context.instance().socket(zmq.SUB)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._close)
            self._events.connect(f"ipc://{self._connection.event_socket}")
            self._events.subscribe(self._stage.encode())
            await self._attach()
            undo.pop_all()
        self._tasks = [asyncio.create_task(what) for what in (self._follow(), self._listen())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        try:
            await self._let_go()
        finally:
            await self._detach()
        for task in self._tasks:
            if kind is None and not task.cancelled():
                task.result()  # what ended it

    async def reached(self, version: int, timeout_s: float = 60.0) -> None:
        """Wait until the engine computes with a version, or with a newer one.

        Raises:
            DeadlineExceeded: it does not within ``timeout_s`` seconds.
            Exception: what ended the following, such as the engine's death.
        """
        waiting = asyncio.create_task(self._wait_until(lambda: self.version is not None and self.version >= version))
        await asyncio.wait([waiting, *self._tasks], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return
        waiting.cancel()
        self._raise_what_ended_it()
        raise DeadlineExceeded(
            f"the engine computes with version {self.version} and not with {version} after {timeout_s:g} s",
            remedy="look at the log of the engine, and at stagingd status",
        )

    async def versions(self) -> AsyncIterator[int]:
        """Each version as it goes live, the newest where several have since the last. Raises as ``reached``."""
        last: int | None = None
        while True:
            waiting = asyncio.create_task(self._wait_until(partial(self._is_other_than, last)))
            await asyncio.wait([waiting, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                self._raise_what_ended_it()
            if self.version is not None:
                last = self.version
                yield last

    async def hold(self, version: int) -> None:
        """Make a version live that is still in the buffer, such as the one before, and stay there until ``follow``.

        Raises:
            StagingError: it cannot be had any more; the engine goes on with the version that it has.
        """
        before, self._following = self._following, False
        async with self._taking:
            try:
                if version != self.version:
                    await self._take(version=version)
            except StagingError:
                self._following = self._following or before  # unless it was told to go on meanwhile
                raise

    def follow(self) -> None:
        """Go on with the newest version after ``hold``."""
        self._following = True

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    def _is_other_than(self, version: int | None) -> bool:
        return self.version != version

    def _raise_what_ended_it(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _attach(self) -> None:
        answers = await self._attach_workers(self._prefetch_gib)
        if len({answer["mode"] for answer in answers}) > 1:  # a shadow is of use on all workers or on none
            await self._call(self._llm.collective_rpc("stagingd_detach"))
            answers = await self._attach_workers(0.0)
        self.mode, self._engine = answers[0]["mode"], answers[0]["engine"]
        replica = re.compile(re.escape(self._attaching["engine"]) + r"-dp\d+")
        replicas = [one for one in (await self._status()).engines if replica.fullmatch(one)]
        if replicas:
            await self._call(self._llm.collective_rpc("stagingd_detach"))
            raise EngineNotSupported(
                f"the engine has data-parallel replicas ({', '.join(replicas)}), and vLLM answers for the first alone",
                remedy="run the replicas as engines of their own, or ask all of them by of_all_replicas",
            )

    async def _attach_workers(self, prefetch_gib: float) -> list[Answer]:
        """All of them or none; what another has attached before stays as it is."""
        arguments = self._attaching | {"prefetch_gib": prefetch_gib}
        answers = await self._call(self._llm.collective_rpc("stagingd_attach", kwargs=arguments))
        try:
            return checked(answers)
        except StagingError:
            if not all("refused" in answer for answer in answers):
                await self._call(self._llm.collective_rpc("stagingd_detach"))
            raise

    async def _follow(self) -> None:
        while True:
            try:
                async with self._taking:
                    due = await self._is_due()
                    if due:
                        await self._take(newer_than=self.version)
            except StagingError as error:
                logger.warning("stage %s: %s", self._stage, error)
                due = False
            if not due:
                await _heard(self._news)

    async def _is_due(self) -> bool:
        """Whether there is a newer version; generation is held back, or let go on, as it is behind."""
        slots = (await self._status()).slots
        newest = _newest(slots, SlotState.SEALED, SlotState.FRONT)
        behind = 0 if newest is None or self.version is None else newest - self.version
        if self._most_behind is not None and behind > self._most_behind and self._following:
            await self._hold_back()
        else:
            await self._let_go()
        if self._early and self.mode == "prefetch":
            newest = _newest(slots, SlotState.SEALED, SlotState.FRONT, SlotState.FILLING)
        return self._following and newest is not None and (self.version is None or newest > self.version)

    async def _status(self) -> wire.StageStatus:
        report = await asyncio.to_thread(self._connection.request, wire.Status(), wire.StatusReport)
        found = next((stage for stage in report.stages if stage.stage == self._stage), None)
        if found is None:
            raise UnknownStage(f"the stage {self._stage!r} is gone", remedy="attach again once it is declared anew")
        return found

    async def _take(self, **which: int | None) -> None:
        if self.mode == "in_place":
            async with self._cache_handled():
                version = (await self._ask("stagingd_update", **which))[0]["version"]
                await self._label(version)
        else:
            version = await self._prefetch(**which)
            async with self._cache_handled():
                await self._swap(version, follow=which.get("version") is None)
        async with self._changed:
            self.version = version
            self._changed.notify_all()

    async def _prefetch(self, **which: int | None) -> int:
        """The version that all workers have read, as they were told or, if need be, are told now."""
        if self._armed and which.get("version") is None:
            try:
                return await self._prefetched()
            except StagingError as error:
                logger.info("stage %s: %s", self._stage, error)  # such as a version that was aborted
        elif self._armed:
            with suppress(StagingError):  # what they read meanwhile is not wanted, whatever becomes of it
                await self._idle()
        self._forget_read()
        await self._ask("stagingd_prefetch", **which, early=self._early and which.get("version") is None)
        return await self._prefetched()

    async def _idle(self) -> None:
        """Wait until no worker reads; those that only wait for a version make way by themselves."""
        if await self._holds_a_lease():
            await self._prefetched()

    async def _holds_a_lease(self) -> bool:
        """Whether a worker reads, or has yet to begin with what another reads, by the daemon's word."""
        return bool(await self._leases())

    async def _reads(self) -> bool:
        """Whether a worker reads. One that has yet to begin with what others have read may have been refused."""
        return any(lease.reading_ranks for lease in await self._leases())

    async def _leases(self) -> list[wire.LeaseStatus]:
        return [lease for lease in (await self._status()).leases if lease.engine == self._engine]

    def _forget_read(self) -> None:
        self._armed, self._read = False, None
        self._released.clear()

    async def _swap(self, version: int, *, follow: bool) -> None:
        self._forget_read()
        early = self._early and follow
        try:
            # Both at once: the engine finds the label before it begins another step.
            swapping = self._ask("stagingd_swap", version=version, timeout_s=NOTICED_S, follow=follow, early=early)
            await asyncio.gather(swapping, self._label(version))
        except StagingError:
            await self._label(self.version)
            raise
        self._armed = follow

    async def _label(self, version: int | None) -> None:
        """Have outputs tell that this version made them, where vLLM can."""
        update = getattr(self._llm, "update_weight_version", None)
        if update is not None and version is not None:
            await self._call(update(str(version)))

    async def _prefetched(self) -> int:
        """The version that all workers have read. Raises StagingError: one could not.

        Once all have given it back, the daemon's word is enough: every question is a pause of some milliseconds.
        """
        until = asyncio.get_running_loop().time() + READ_S
        while asyncio.get_running_loop().time() < until:
            ended = await _heard(self._released)
            if ended and self._read is not None:
                return self._read
            if not ended and await self._reads():
                continue  # a version that is read early may take as long to land as its trainers take to step
            for _ in range(POLLS if ended else 1):
                answers = await self._call(self._llm.collective_rpc("stagingd_prefetched"))
                # While one of them reads, nobody can be asked to prefetch again.
                if not any(answer.get("reading") for answer in answers) and _are_through(answers):
                    return _agreed(checked(answers))
                await asyncio.sleep(POLL_S)
        raise DeadlineExceeded(
            f"a version has not been prefetched by all workers within {READ_S:g} s",
            remedy="look at stagingd status for who holds a lease, and at the log of the engine",
        )

    async def _listen(self) -> None:
        while True:
            event = wire.decode_event((await self._events.recv_multipart())[1])
            if event.stage == self._stage:  # and not one whose name begins like this one's
                self._hear(event)

    def _hear(self, event: wire.Event) -> None:
        if event.event == "sealed" or (self._early and event.event == "begun"):
            self._news.set()
        elif event.event == "lease_lost":
            self._read = None
            self._released.set()
        # The version that is live is looked at, as to examine it, and never prefetched.
        elif event.event == "released" and event.detail == f"engine {self._engine!r}" and event.version != self.version:
            self._read = event.version
            self._released.set()

    @asynccontextmanager
    async def _cache_handled(self) -> AsyncIterator[None]:
        if self._cache is Cache.KEEP:
            yield
            return
        await self._hold_back(clear_cache=True)
        try:
            yield
        finally:
            await self._let_go()

    async def _hold_back(self, *, clear_cache: bool = False) -> None:
        if not self._held_back or clear_cache:
            self._held_back = True  # before: a call that failed may have stopped it
            await self._call(self._llm.pause_generation(mode="keep", clear_cache=clear_cache))

    async def _let_go(self) -> None:
        if self._held_back:
            await self._call(self._llm.resume_generation())
            self._held_back = False

    async def _ask(self, method: str, **arguments: Any) -> list[Answer]:
        return checked(await self._call(self._llm.collective_rpc(method, kwargs=arguments)))

    async def _call(self, what: Coroutine[Any, Any, Any]) -> Any:
        """Ask the engine. Of an engine that dies meanwhile, vLLM's own call would wait for the answer without end."""
        call = asyncio.create_task(what)
        until = asyncio.get_running_loop().time() + CALL_S
        try:
            while not (await asyncio.wait([call], timeout=WAKE_S))[0]:
                if self._llm.errored:
                    raise self._llm.dead_error
                if asyncio.get_running_loop().time() > until:
                    raise DeadlineExceeded(
                        f"the engine has not answered within {CALL_S:g} s",
                        remedy="look at its log for the worker that hangs, and restart it",
                    )
            return call.result()
        finally:
            call.cancel()

    async def _detach(self) -> None:
        try:
            await self._call(self._llm.collective_rpc("stagingd_detach"))
        finally:
            await self._close()

    async def _close(self) -> None:
        self._events.close(linger=0)
        await asyncio.to_thread(self._connection.close)


def _newest(slots: Iterable[wire.SlotStatus], *states: SlotState) -> int | None:
    """The newest version in one of these states."""
    return max((slot.version for slot in slots if slot.state in states and slot.version is not None), default=None)


def _are_through(answers: list[Answer]) -> bool:
    """Whether all workers have a version, or one of them could not have it."""
    refused = any("refused" in answer for answer in answers)
    return refused or all(answer["version"] is not None for answer in answers)


def _agreed(answers: list[Answer]) -> int:
    """The version that all workers have read. Raises OutOfOrder: they have read several."""
    versions = sorted({answer["version"] for answer in answers})
    if len(versions) > 1:
        told = ", ".join(map(str, versions))
        raise OutOfOrder(f"workers have prefetched versions {told}", remedy="they prefetch again")
    return int(versions[0])


async def _heard(event: asyncio.Event) -> bool:
    """Wait until something has happened since the last time. False: it has not, in WAKE_S seconds."""
    try:
        async with asyncio.timeout(WAKE_S):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a follower asks an engine for, where no engine is needed to tell."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stagingd_vllm import follower
from stagingd_vllm.follower import Follower

from stagingd import wire
from stagingd.errors import LeaseLost, OutOfOrder


class Engine:
    """Is not to be asked: each time would be a pause."""

    async def collective_rpc(self, method: str, **_: Any) -> list[dict[str, Any]]:
        raise AssertionError(f"it is asked {method}")


def stage(*engines: str, reading: tuple[int, ...] = (0,)) -> wire.StageStatus:
    """Leased by some engines, of which these ranks read."""
    leases = tuple(
        wire.LeaseStatus.model_construct(lease=number, engine=engine, version=7, reading_ranks=reading)
        for number, engine in enumerate(engines)
    )
    return wire.StageStatus.model_construct(stage="policy", leases=leases, slots=())


def test_an_engine_is_not_asked_while_the_daemon_says_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is read early takes as long as its trainers take to fill it."""
    monkeypatch.setattr(follower, "WAKE_S", 0.001)
    looks = []

    async def run() -> int:
        following = Follower(Engine(), "policy", prefetch_gib=1.0, early=True)
        following._engine = "engine"

        async def status() -> wire.StageStatus:
            looks.append(None)
            if len(looks) == 4:
                following._read = 7
                following._released.set()
            return stage("another", "engine")

        monkeypatch.setattr(following, "_status", status)
        return await following._prefetched()

    assert asyncio.run(run()) == 7
    assert len(looks) == 4


def test_an_engine_is_asked_where_one_worker_was_refused_what_the_others_have_read() -> None:
    """Its lease waits for a worker that will not come: nobody reads."""

    class Refused(Engine):
        async def collective_rpc(self, method: str, **_: Any) -> list[dict[str, Any]]:
            lost = {"refused": "lease_lost", "what": "lost", "remedy": "again", "context": {}}
            return [lost, {"version": 8, "reading": False}]

    async def run() -> int:
        following = Follower(Refused(), "policy", prefetch_gib=1.0, early=True)
        following._engine = "engine"

        async def status() -> wire.StageStatus:
            return stage("engine", reading=())

        following._status = status  # type: ignore[method-assign]
        return await following._prefetched()

    with pytest.raises(LeaseLost, match="lost"):
        asyncio.run(run())


@pytest.mark.parametrize(("version", "engine", "read"), [(7, "engine", None), (8, "engine", 8), (8, "another", None)])
def test_a_version_has_been_prefetched_when_this_engine_gives_back_another_than_the_live_one(
    version: int, engine: str, read: int | None
) -> None:
    following = Follower(Engine(), "policy", prefetch_gib=1.0)
    following._engine, following.version = "engine", 7
    event = wire.Event(event="released", stage="policy", version=version, detail=f"engine {engine!r}")
    following._hear(event)
    assert following._read == read
    assert following._released.is_set() == (read is not None)


def test_reading_early_needs_memory_for_it() -> None:
    with pytest.raises(OutOfOrder, match="Give prefetch_gib as well"):
        Follower(Engine(), "policy", early=True)

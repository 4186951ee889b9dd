# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A refusal of any data-parallel replica is heard. With real replicas: ``test_engines_die_and_join.py``."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from stagingd_vllm.answers import Answer, answering, checked
from stagingd_vllm.replicas import of_all_replicas
from stagingd_vllm.versions import EngineNotSupported

from stagingd.errors import DeadlineExceeded, OutOfOrder


class Client:
    """As far as replicas are asked, vLLM's client of several engines: two workers each."""

    def __init__(self, *replicas: bytes) -> None:
        self.core_engines = list(replicas)

    async def _call_utility_async(
        self, utility: str, method: str, timeout: None, args: tuple[()], kwargs: dict[str, Any], *, engine: bytes
    ) -> list[Answer]:
        assert (utility, method, timeout, args) == ("collective_rpc", "stagingd_update", None, ())
        if engine == b"hangs":
            await asyncio.Event().wait()
        return [update(engine, rank, **kwargs) for rank in (0, 1)]


@answering
def update(replica: bytes, rank: int, *, version: int) -> Answer:
    if replica == b"asleep":
        raise OutOfOrder("the engine sleeps", remedy="wake it up")
    return {"replica": replica, "rank": rank, "version": version}


def asked(*replicas: bytes) -> list[Answer]:
    return asyncio.run(of_all_replicas(SimpleNamespace(engine_core=Client(*replicas)), "stagingd_update", version=3))


def test_every_worker_of_every_replica_is_heard_in_order() -> None:
    answers = checked(asked(b"a", b"b"))
    assert [(answer["replica"], answer["rank"]) for answer in answers] == [
        (replica, rank) for replica in (b"a", b"b") for rank in (0, 1)
    ]
    assert {answer["version"] for answer in answers} == {3}


def test_what_the_second_replica_refuses_is_raised() -> None:
    with pytest.raises(OutOfOrder, match="sleeps"):
        checked(asked(b"a", b"asleep"))


def test_a_replica_that_never_answers_is_waited_for_until_the_deadline() -> None:
    engine = SimpleNamespace(engine_core=Client(b"a", b"hangs"))
    with pytest.raises(DeadlineExceeded, match="one of 2 replicas"):
        asyncio.run(of_all_replicas(engine, "stagingd_update", deadline_s=0.01, version=3))


@pytest.mark.parametrize("llm", [SimpleNamespace(), SimpleNamespace(engine_core=SimpleNamespace(core_engines=[b"a"]))])
def test_an_engine_that_does_not_tell_its_replicas_is_refused(llm: object) -> None:
    with pytest.raises(EngineNotSupported, match="replicas"):
        asyncio.run(of_all_replicas(llm, "stagingd_update"))

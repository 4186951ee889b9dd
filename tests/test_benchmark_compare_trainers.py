# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers of ``benchmarks.compare``: what they gather is the version, and one that ends is told of."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

import pytest
from comparing import die, fail, tell

from benchmarks.compare.case import LAYOUTS, Case
from benchmarks.compare.engines import KNOWN_GAPS, Load, first_token
from benchmarks.compare.fleet import fleet
from benchmarks.compare.systems.stagingd_beside import flush, staged_bytes
from benchmarks.compare.trainer import parts
from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_model import SIZES
from benchmarks.scale_groups import quantization
from benchmarks.staged import served
from stagingd import wire
from stagingd.connection import Connection
from stagingd.formats import StageFormat

CASE = Case("debug", LAYOUTS["four"], "bfloat16")


def test_several_ranks_gather_each_version_and_hand_over_every_tensor_once() -> None:
    asked: list[Any] = []

    async def note(what: Any) -> None:
        asked.append(what)

    async def run() -> None:
        async with fleet(CASE, tell, asked=note) as trainers:
            await trainers.ready()
            for version in (1, 2):
                assert await trainers.prepare() == version
                assert await trainers.send() > 0
                await trainers.settled()
                assert trainers.done_at is not None
            assert await trainers.host_bytes() == 10 + 11
            assert await trainers.ceiling() > 0
            assert await trainers.wire() is None

    asyncio.run(run())
    assert not multiprocessing.active_children()
    assert sorted((version, rank) for version, rank, *_ in asked) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for version, rank, sums, part in asked:
        assert sums == {name: float(tensor.double().sum()) for name, tensor in SIZES["debug"].tensors(version, "cpu")}
        assert set(part) == parts(CASE)[rank]


@pytest.mark.parametrize("stage_format", [None, StageFormat.FP8_PER_TENSOR])
def test_several_ranks_stage_every_version_in_half_of_the_memory_where_they_quantize(
    stage_format: StageFormat | None,
) -> None:
    made = quantization(stage_format, CASE.shapes, "cpu")

    async def run() -> wire.StageStatus:
        with served() as stages:
            async with fleet(CASE, flush, {"socket": stages.socket, "quantization": made}) as trainers:
                await trainers.ready()
                for _ in range(2):
                    await trainers.prepare()
                    await trainers.send()
                    await trainers.settled()
                with Connection(stages.socket, name="tests") as connection:
                    return connection.request(wire.Status(), wire.StatusReport).stages[0]

    found, size = asyncio.run(run()), 2 * sum(staged_bytes(CASE, made).values())
    assert found.sealed_versions == 2
    assert size < found.segment_bytes < size + CASE.bytes


@pytest.mark.parametrize(("make", "words"), [(die, "ended. Its own"), (fail, "ended: RuntimeError: no such device")])
def test_a_trainer_that_ends_is_told_of_and_so_is_why(make: Any, words: str) -> None:
    async def run() -> None:
        async with fleet(Case("debug", LAYOUTS["two"], "bfloat16"), make) as trainers:
            await trainers.ready()
            await trainers.prepare()
            with pytest.raises(BenchmarkFailed, match=words):
                await trainers.send()
            assert trainers.done_at is None

    asyncio.run(run())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("model", ["debug", "30B-A3B"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_all_tensors_once_and_no_layer_but_at_a_cut_is_in_two(model: str, layout: str) -> None:
    case = Case(model, LAYOUTS[layout], "bfloat16")
    found = parts(case)
    assert len(found) == case.layout.trainers
    assert sorted(name for part in found for name in part) == sorted(case.shapes)
    layers = [{name.split(".")[2] for name in part if name.startswith("model.layers.")} for part in found]
    assert sum(len(one) for one in layers) <= SIZES[model].layers + case.layout.trainers - 1


class Engine:
    """Gives a token every so often; ``stands`` while it is locked."""

    def __init__(self, failing: bool = False) -> None:
        self.stands = asyncio.Lock()
        self.running: set[str] = set()
        self._failing = failing

    async def generate(self, _: Any, sampling: Any, request: str) -> AsyncIterator[str]:
        self.running.add(request)
        try:
            for _ in range(sampling.max_tokens):
                if self._failing and len(self.running) > 1:
                    raise RuntimeError("out of memory")
                await asyncio.sleep(0.002)
                async with self.stands:
                    yield "token"
        finally:
            self.running.remove(request)


def test_an_engine_that_stands_is_late_by_that_and_its_requests_end_with_the_load() -> None:
    pytest.importorskip("vllm")

    async def run() -> None:
        engine = Engine()
        async with Load(engine, 2) as load:
            loop = asyncio.get_running_loop()
            begin = loop.time()
            async with engine.stands:
                await asyncio.sleep(0.2)
            end = await first_token(engine)
            stopped, lost = await load.passed(begin, end)
            assert len(engine.running) == 2
        assert not engine.running
        assert 0.15 < stopped < 0.4
        assert lost >= stopped * 0.9

    asyncio.run(run())


def test_an_engine_that_fails_ends_the_load_with_its_own_error() -> None:
    pytest.importorskip("vllm")

    async def run() -> None:
        async with Load(Engine(failing=True), 2):
            pass

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(run())
    assert KNOWN_GAPS > 2

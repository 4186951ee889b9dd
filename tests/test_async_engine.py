# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that generates takes versions: vLLM's AsyncLLM, paused around updates in either way, or followed while a
trainer publishes without a pause."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import RunningDaemon, eventually, serving
from stagingd_client import Stage
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Cache, Follower
from tiny_engines import BACKEND, Driven, Trainer

from stagingd.errors import DeadlineExceeded, VersionNotAvailable
from stagingd.policy import Policy

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.v1.engine.exceptions import EngineDeadError

pytestmark = pytest.mark.vllm
pytest_plugins = ["tiny_engines"]

PROMPT = [1, 5, 9, 7]
TOKENS = 400
VERSIONS = 200
IN_FLIGHT = 6
requests = itertools.count()


class Request:
    """A request in flight: ``tokens`` grows while it is generated."""

    def __init__(self, llm: Any, prompt: list[int], number: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False)
        self.tokens: list[int] = []
        self.grown = asyncio.Event()
        self._outputs = llm.generate({"prompt_token_ids": prompt}, sampling, f"request-{next(requests)}")
        self.done = asyncio.create_task(self._follow())

    async def _follow(self) -> list[int]:
        async for output in self._outputs:
            self.tokens = list(output.outputs[0].token_ids)
            self.grown.set()
        return self.tokens


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Driven]:
    driven = Driven(folder / "version-1", weight_transfer_config=BACKEND)
    yield driven
    driven.close()


async def generate(llm: Any, prompt: list[int], number: int) -> list[int]:
    return await Request(llm, prompt, number).done


async def reloaded(llm: Any, checkpoint: Path, prompt: list[int], number: int) -> list[int]:
    """What vLLM's own loader makes the engine generate."""
    await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint)})
    assert await llm.reset_prefix_cache()
    return await generate(llm, prompt, number)


@asynccontextmanager
async def paused(llm: Any, mode: str) -> AsyncIterator[None]:
    await llm.pause_generation(mode=mode, clear_cache=True)
    yield
    await llm.resume_generation()


def test_a_request_that_is_kept_goes_on_with_the_new_weights(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    """Through vLLM's own API. The tokens before the pause are the old weights', all after it the new ones'."""

    async def run(llm: Any) -> None:
        old = await reloaded(llm, trainer.checkpoints[0], PROMPT, TOKENS)
        info = {"stage": "policy", "socket": str(daemon.socket), "engine": "native"}
        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        trainer.publish(2, 2)
        request = Request(llm, PROMPT, TOKENS)
        await request.grown.wait()
        async with paused(llm, "keep"):
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info={"version": 2}))
            await llm.finish_weight_update()
            before = list(request.tokens)
        tokens = await request.done
        assert 0 < len(before) < TOKENS
        assert before == old[: len(before)]
        fresh = await reloaded(llm, trainer.checkpoints[1], PROMPT + before, TOKENS - len(before))
        assert tokens[len(before) :] == fresh
        assert tokens != old

    engine.do(run(engine.llm))


def test_a_request_that_is_waited_for_ends_with_the_old_weights_and_the_next_begins_with_the_new(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    """Through the worker extension; the second request comes during the pause."""

    async def run(llm: Any) -> None:
        new = await reloaded(llm, trainer.checkpoints[1], PROMPT, 40)
        old = await reloaded(llm, trainer.checkpoints[0], PROMPT, TOKENS)
        info = {"stage": "policy", "socket": str(daemon.socket), "engine": "extension"}
        checked(await llm.collective_rpc("stagingd_attach", kwargs=info))
        trainer.publish(3, 2)
        request = Request(llm, PROMPT, TOKENS)
        await request.grown.wait()
        async with paused(llm, "wait"):
            assert request.done.done() or await request.done
            later = Request(llm, PROMPT, 40)
            (answer,) = checked(await llm.collective_rpc("stagingd_update", kwargs={"newer_than": 2}))
            assert answer["version"] == 3
            assert not later.tokens
        assert request.tokens == old
        assert await later.done == new
        await llm.collective_rpc("stagingd_detach")

    engine.do(run(engine.llm))


def test_a_version_is_prefetched_and_swapped_in_through_vllms_own_calls(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def session(llm: Any, **update_info: Any) -> None:
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        await llm.finish_weight_update()

    async def run(llm: Any) -> None:
        new = await reloaded(llm, trainer.checkpoints[1], PROMPT, 40)
        old = await reloaded(llm, trainer.checkpoints[0], PROMPT, 40)
        info = {"stage": "policy", "socket": str(daemon.socket), "engine": "swapped", "prefetch_gib": 1.0}
        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        trainer.publish(4, 2)
        await session(llm, action="prefetch", newer_than=3)
        assert await llm.reset_prefix_cache()
        assert await generate(llm, PROMPT, 40) == old
        async with paused(llm, "keep"):
            await session(llm, action="swap", version=4)
        assert await generate(llm, PROMPT, 40) == new

    engine.do(run(engine.llm))


@pytest.fixture(scope="module")
def patient_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """Its clients wait long for a successor."""
    with serving(tmp_path_factory.mktemp("daemon"), "--return-s", "30") as running:
        yield running


@pytest.fixture(scope="module")
def paced(patient_daemon: RunningDaemon, folder: Path) -> Iterator[Trainer]:
    """The stage "paced": its trainer waits until each version has been read."""
    with Stage.open("paced", rank=0, ranks=1, socket=patient_daemon.socket, policy=Policy.BLOCK) as stage:
        yield Trainer(stage, sorted(folder.glob("version-*")))


async def completed(llm: Any, prompt: list[int], number: int, begun: asyncio.Event | None = None) -> Any:
    sampling = SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": prompt}, sampling, f"followed-{next(requests)}"):
        last = output.outputs[0]
        if begun is not None:
            begun.set()
    return last


@asynccontextmanager
async def load(llm: Any) -> AsyncIterator[list[list[int]]]:
    """Requests without a pause; what they gave is in the list in the end."""
    ended, done = asyncio.Event(), list[list[int]]()

    async def go_on(number: int) -> None:
        while not ended.is_set():
            done.append(await generate(llm, [number + 1, *PROMPT], 20))

    async with asyncio.TaskGroup() as group:
        for number in range(IN_FLIGHT):
            group.create_task(go_on(number))
        yield done
        ended.set()


def test_hundreds_of_versions_go_live_under_load_and_the_daemon_dies_meanwhile(
    engine: Driven, patient_daemon: RunningDaemon, paced: Trainer
) -> None:
    async def run(llm: Any) -> None:
        follower = Follower(
            llm, "paced", socket=patient_daemon.socket, engine="loaded", prefetch_gib=1, cache=Cache.KEEP, early=True
        )
        async with follower, load(llm) as done:
            assert follower.mode == "prefetch"
            for version in range(2, VERSIONS + 1):
                await asyncio.to_thread(paced.publish, version, 1 + version % 2)
                if version == VERSIONS // 2:
                    await asyncio.to_thread(patient_daemon.kill)
                    await asyncio.to_thread(patient_daemon.restart)
            await follower.reached(VERSIONS)
        assert follower.version == VERSIONS
        assert len(done) >= IN_FLIGHT
        assert {len(tokens) for tokens in done} == {20}
        assert await llm.reset_prefix_cache()
        last = await generate(llm, PROMPT, 40)
        assert last == await reloaded(llm, paced.checkpoints[VERSIONS % 2], PROMPT, 40)

    engine.do(run(engine.llm))


def test_requests_in_flight_go_on_as_if_the_new_weights_had_computed_what_is_cached(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def run(llm: Any) -> None:
        old = await reloaded(llm, trainer.checkpoints[0], PROMPT, TOKENS)
        async with Follower(llm, "policy", socket=daemon.socket, engine="exact", prefetch_gib=1) as follower:
            trainer.publish(5, 1)
            await follower.reached(5)
            begun = asyncio.Event()
            request = asyncio.create_task(completed(llm, PROMPT, TOKENS, begun))
            await begun.wait()
            await asyncio.to_thread(trainer.publish, 6, 2)
            await follower.reached(6)
            said = await request
        spans = [(span.version, span.start, span.end) for span in said.weight_versions]
        (_, _, swapped), _ = spans
        assert spans == [("5", 0, swapped), ("6", swapped, TOKENS)]
        tokens = list(said.token_ids)
        assert tokens[:swapped] == old[:swapped]
        await reloaded(llm, trainer.checkpoints[1], PROMPT, 1)
        assert tokens[swapped:] == await generate(llm, PROMPT + tokens[:swapped], TOKENS - swapped)

    engine.do(run(engine.llm))


def test_an_engine_goes_back_to_the_version_before_and_follows_again(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def run(llm: Any) -> None:
        said = {n: await reloaded(llm, trainer.checkpoints[n - 1], PROMPT, 30) for n in (1, 2, 3)}
        async with Follower(llm, "policy", socket=daemon.socket, engine="back", prefetch_gib=1) as follower:
            trainer.publish(11, 1)
            await follower.reached(11)
            trainer.publish(12, 2)
            await follower.reached(12)
            assert await generate(llm, PROMPT, 30) == said[2]
            trainer.publish(13, 3)
            await follower.reached(13)
            await follower.hold(12)
            assert await generate(llm, PROMPT, 30) == said[2]
            with pytest.raises(VersionNotAvailable, match="version 11 has been replaced"):
                await follower.hold(11)
            assert await generate(llm, PROMPT, 30) == said[2]
            follower.follow()
            await follower.reached(13)
            assert await generate(llm, PROMPT, 30) == said[3]

    engine.do(run(engine.llm))


@pytest.mark.parametrize("early", [False, True])
def test_workers_prefetch_the_next_version_without_being_asked(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    asked = list[str]()

    async def run(llm: Any) -> None:
        call = llm.collective_rpc

        async def noted(method: str, **how: Any) -> Any:
            asked.append(method)
            return await call(method, **how)

        monkeypatch.setattr(llm, "collective_rpc", noted)
        first = trainer.stage.newest_sealed or 0
        follower = Follower(llm, "policy", socket=daemon.socket, engine="armed", prefetch_gib=1, early=early)
        async with follower:
            await follower.reached(first)
            asked.clear()
            for version in range(first + 1, first + 4):
                await asyncio.to_thread(trainer.publish, version, 1)
                await follower.reached(version)
            assert "stagingd_prefetch" not in asked
            assert asked.count("stagingd_swap") == 3
            await follower.hold(first + 2)  # what is waited for makes way
            assert follower.version == first + 2

    engine.do(run(engine.llm))


def test_a_version_that_is_aborted_while_it_is_read_early_never_goes_live(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def run(llm: Any) -> None:
        said = {n: await reloaded(llm, trainer.checkpoints[n - 1], PROMPT, 30) for n in (2, 1)}
        name = "early"
        follower = Follower(llm, "policy", socket=daemon.socket, engine=name, prefetch_gib=1, early=True)

        def leased() -> set[int]:
            return {lease.version for lease in daemon.stage("policy").leases if lease.engine == name}

        async with follower:
            trainer.publish(20, 1)
            await follower.reached(20)
            trainer.begin(21, 2)
            trainer.stage.fence()  # all of it has landed
            await asyncio.to_thread(eventually, lambda: leased() == {21}, "the engine to begin with version 21")
            assert await generate(llm, PROMPT, 30) == said[1]
            trainer.stage.abort()
            await asyncio.to_thread(eventually, lambda: not leased(), "the engine to be told")
            assert await generate(llm, PROMPT, 30) == said[1]
            assert follower.version == 20
            await asyncio.to_thread(trainer.publish, 22, 2)
            await follower.reached(22)
            assert await generate(llm, PROMPT, 30) == said[2]

    engine.do(run(engine.llm))


def test_without_memory_for_a_shadow_versions_are_read_in_place(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def run(llm: Any) -> None:
        new = await reloaded(llm, trainer.checkpoints[2], PROMPT, 30)
        await reloaded(llm, trainer.checkpoints[0], PROMPT, 1)
        async with (
            Follower(llm, "policy", socket=daemon.socket, engine="small", prefetch_gib=0.001) as follower,
            load(llm),
        ):
            assert follower.mode == "in_place"
            trainer.publish(24, 1)
            await follower.reached(24)
            trainer.publish(25, 3)
            await follower.reached(25)
        assert await generate(llm, PROMPT, 30) == new

    engine.do(run(engine.llm))


def test_generation_stops_while_the_engine_is_too_far_behind(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = list[int | None]()

    async def run(llm: Any) -> None:
        pause = llm.pause_generation

        async def noted(**how: Any) -> None:
            paused.append(follower.version)
            await pause(**how)

        monkeypatch.setattr(llm, "pause_generation", noted)
        follower = Follower(
            llm, "policy", socket=daemon.socket, engine="behind", prefetch_gib=1, cache=Cache.KEEP, most_behind=2
        )
        async with follower:
            trainer.publish(30, 1)
            await follower.reached(30)
            paused.clear()
            trainer.publish(32, 1)
            await follower.reached(32)
            assert paused == []
            async with follower._taking:
                trainer.publish(35, 2)
            await follower.reached(35)
            assert paused == [32]
            assert len(await generate(llm, PROMPT, 5)) == 5
            assert not await llm.is_paused()

    engine.do(run(engine.llm))


def test_a_version_that_does_not_come_is_not_waited_for_without_end(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    async def run(llm: Any) -> None:
        async with Follower(llm, "policy", socket=daemon.socket, engine="waits", prefetch_gib=1) as follower:
            with pytest.raises(DeadlineExceeded, match="not with 1000 after"):
                await follower.reached(1000, timeout_s=0.05)

    engine.do(run(engine.llm))


def test_whoever_waits_for_an_engine_learns_of_its_death(
    engine: Driven, daemon: RunningDaemon, trainer: Trainer
) -> None:
    """The module's last test: its engine is gone."""

    async def run(llm: Any) -> None:
        async with Follower(llm, "policy", socket=daemon.socket, engine="mortal", prefetch_gib=1) as follower:
            trainer.publish(40, 1)
            await follower.reached(40)
            (worker,) = await llm.collective_rpc("stagingd_pid")
            os.kill(worker, signal.SIGKILL)
            trainer.publish(41, 2)
            await follower.reached(41)

    with pytest.raises(EngineDeadError):
        engine.do(run(engine.llm))
    eventually(lambda: not daemon.stage("policy").engines, "the dead engine to be forgotten")

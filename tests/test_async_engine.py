# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that generates takes versions: vLLM's AsyncLLM, paused around updates in either way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import RunningDaemon
from stagingd_vllm.answers import checked
from tiny_engines import BACKEND, Driven, Trainer

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)

pytestmark = pytest.mark.vllm
pytest_plugins = ["tiny_engines"]

PROMPT = [1, 5, 9, 7]
TOKENS = 400
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

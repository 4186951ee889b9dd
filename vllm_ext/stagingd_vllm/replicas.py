# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Asking the workers of every data-parallel replica, and hearing all of them.

``AsyncLLM.collective_rpc`` has every replica do what is asked, and gives the first one's answers alone: what another
replica refuses would be lost.
"""

from __future__ import annotations

import asyncio
from typing import Any

from stagingd.errors import DeadlineExceeded
from stagingd_vllm.versions import EngineNotSupported

DEADLINE_S = 600.0
"""The longest that all replicas may take to answer, in seconds."""


async def of_all_replicas(llm: Any, method: str, /, *, deadline_s: float = DEADLINE_S, **kwargs: Any) -> list[Any]:
    """The answers of all workers, replica by replica. Wrap ``checked`` around those of this package's methods.

    Args:
        llm: vLLM's ``AsyncLLM``.
        method: of the worker extension, such as ``stagingd_update``.
        deadline_s: how long to wait for all of them, in seconds.
        kwargs: its arguments.

    Raises:
        DeadlineExceeded: a replica has not answered; what was asked of it may still be carried out.
        EngineNotSupported: this engine's client does not say which replicas it has.
    """
    client = getattr(llm, "engine_core", None)
    replicas = getattr(client, "core_engines", None)
    ask = getattr(client, "_call_utility_async", None)
    if not replicas or ask is None:
        raise EngineNotSupported(
            f"{type(llm).__name__} with client {type(client).__name__} does not tell its replicas",
            remedy="pass an AsyncLLM that this process has started, or ask each replica's server by itself",
        )
    call = "collective_rpc", method, None, (), kwargs
    try:
        async with asyncio.timeout(deadline_s):
            answers = await asyncio.gather(*(ask(*call, engine=replica) for replica in replicas))
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"one of {len(replicas)} replicas has not answered {method} within {deadline_s:g} s",
            remedy="look for the engine process that hangs, and restart it; its replica may be at another version",
        ) from error
    return [answer for of_replica in answers for answer in of_replica]

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's HTTP server, as a ``Follower`` asks it: ``Follower(Server(session), "policy")``.

Its routes for workers and pausing exist only where it was started with ``VLLM_SERVER_DEV_MODE=1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import aiohttp

from stagingd_vllm.versions import EngineNotSupported


class Server:
    """A server.

    Every method raises ``aiohttp.ClientError`` when the server cannot be reached or fails.

    Args:
        session: connections to it; its base URL is the server's, and its timeout how long an answer may take.
    """

    errored = False
    """It is known to be dead when it does not answer, and not before."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    @property
    def dead_error(self) -> Exception:
        """Nothing is known of a death."""
        return ConnectionError("the server is dead")

    async def collective_rpc(self, method: str, *, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The answers of all workers. Raises EngineNotSupported: the server has no such route."""
        answer = await self._post("/collective_rpc", json={"method": method, "kwargs": dict(kwargs or {})})
        results: list[Any] = answer["results"]
        return results

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Stop generating. Raises EngineNotSupported: the server has no such route."""
        await self._post("/pause", params={"mode": mode, "clear_cache": str(clear_cache).lower()})

    async def resume_generation(self) -> None:
        """Go on. Raises EngineNotSupported: the server has no such route."""
        await self._post("/resume")

    async def update_weight_version(self, new_version: str) -> None:
        """Have outputs tell that this version made them; those of a server before 0.32 tell nothing."""
        async with self._session.post("/update_weight_version", json={"new_version": new_version}) as answer:
            if answer.status != HTTPStatus.NOT_FOUND:
                answer.raise_for_status()

    async def _post(self, path: str, **how: Any) -> Any:
        async with self._session.post(path, **how) as answer:
            if answer.status == HTTPStatus.NOT_FOUND:
                raise EngineNotSupported(
                    f"the server at {answer.url.origin()} has no route {path}",
                    remedy="start it with VLLM_SERVER_DEV_MODE=1 in its environment, for trusted clients only",
                )
            answer.raise_for_status()
            return await answer.json()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Engines that start in no time and compute nothing: they take what the real ones take, and refuse the rest.

A snippet that would start a vLLM engine runs with these in its place. So every name, method and argument that it uses
is one of the vLLM that is installed, or of the worker extension. Real engines do the same in tests of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NEWEST = 8
"""The version that workers answer with, where none is asked for: the pages' stage has it."""


def check(real: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments by name. Raises TypeError where the real one would not take them."""
    return inspect.signature(real).bind(*args, **kwargs)


class Workers:
    """One worker of an engine, by what it answers; keeps what it prefetches."""

    def __init__(self) -> None:
        self.prefetching: int | None = None

    def ask(self, method: str, **kwargs: Any) -> dict[str, Any] | int | None:
        from stagingd_vllm.extension import StagingdWorkerExtension  # noqa: PLC0415 - it imports vLLM

        given = check(getattr(StagingdWorkerExtension, method), self, **kwargs).arguments
        version = given.get("version") or NEWEST
        match method:
            case "stagingd_attach":
                mode = "prefetch" if given.get("prefetch_gib") else "in_place"
                return {"rank": 0, "ranks": 1, "engine": given.get("engine", "engine"), "mode": mode}
            case "stagingd_update" | "stagingd_swap":
                self.prefetching = None
                return {"version": version, "milliseconds": 1.0}
            case "stagingd_prefetch":
                self.prefetching = version
                return {}
            case "stagingd_prefetched":
                return {"version": self.prefetching, "reading": False}
            case "stagingd_quantization_error":
                figures = {"relative_rms_error": 0.026, "clipped_share": 0.0}
                return {"version": NEWEST, "rank": 0, "total": {"sigma:6": figures, "amax": figures}, "parameters": {}}
        return None


class Signed:
    """Stands for an instance of a class: has its methods, which check their arguments and do nothing."""

    def __init__(self, real: type) -> None:
        self._real = real
        self._workers = Workers()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)  # AttributeError where the class has no such thing
        if name == "errored":
            return False

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = check(found, self, *args, **kwargs).arguments
            return self._answer(name, arguments)

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        return call_async if inspect.iscoroutinefunction(found) else call

    def _answer(self, name: str, arguments: dict[str, Any]) -> Any:
        from stagingd_vllm.engine import StagingdInitInfo, StagingdUpdateInfo  # noqa: PLC0415 - it imports vLLM

        if name == "collective_rpc":
            return [self._workers.ask(arguments["method"], **(arguments.get("kwargs") or {}))]
        if name == "init_weight_transfer_engine":
            return StagingdInitInfo(**arguments["request"]["init_info"]) and None
        if name == "update_weights":
            return StagingdUpdateInfo(**arguments["request"]["update_info"]) and None
        return None


class Replicas:
    """What ``of_all_replicas`` looks for in an AsyncLLM."""

    core_engines = (b"0", b"1")

    async def _call_utility_async(
        self, call: str, method: str, _: None, __: tuple[()], kwargs: Any, *, engine: bytes
    ) -> Any:
        assert (call, engine in self.core_engines) == ("collective_rpc", True)
        return [Workers().ask(method, **kwargs)]


def _llm(model: str, **options: Any) -> Signed:
    import vllm  # noqa: PLC0415 - seconds

    known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
    assert set(options) <= known, f"vLLM's EngineArgs has no {set(options) - known}"
    return Signed(_REAL["LLM"])


class _AsyncLLM:
    """The class itself, of which a snippet calls ``from_engine_args``."""

    @staticmethod
    def from_engine_args(*args: Any, **kwargs: Any) -> Signed:
        check(_REAL["AsyncLLM"].from_engine_args, *args, **kwargs)
        made = Signed(_REAL["AsyncLLM"])
        made.engine_core = Replicas()  # type: ignore[attr-defined]
        return made


_REAL: dict[str, type] = {}


@contextmanager
def instead_of_vllm() -> Iterator[None]:
    """While this lasts, vLLM's engines are the ones of this module."""
    import vllm  # noqa: PLC0415 - seconds
    from vllm.v1.engine import async_llm  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as patch:
        _REAL.update(LLM=vllm.LLM, AsyncLLM=async_llm.AsyncLLM)
        patch.setattr(vllm, "LLM", _llm)
        patch.setattr(async_llm, "AsyncLLM", _AsyncLLM)
        yield

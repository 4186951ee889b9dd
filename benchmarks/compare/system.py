# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What every compared system fulfils."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.compare.case import Case
from benchmarks.compare.fleet import Fleet
from benchmarks.compare.measured import Ceilings, Traffic, Wire

EXTENSION = "benchmarks.compare.worker.CompareExtension"


@dataclass(frozen=True)
class Stand:
    """What a system finds where it is to run.

    Attributes:
        case: what is compared.
        folder: for small files; it has the model's configuration, in a folder of the model's name.
        shared: a folder in shared memory, for large ones.
        llm: the engine, an ``AsyncLLM``; None for a system that has none.
        prefetch_gib: memory beside the engine's weights that a system may take on each of its devices.
    """

    case: Case
    folder: Path
    shared: Path
    llm: Any
    prefetch_gib: float


class Running(Protocol):
    """A system that stands between its trainers and its engine."""

    fleet: Fleet

    async def deliver(self) -> float:
        """Bring the weights that the trainers have to the engine.

        Returns once a request that comes now is computed with them; without an engine, once they are where they go.
        Gives the seconds for which a trainer's host was held.
        """
        ...

    async def check(self) -> None:
        """What can be checked of this system's weights beyond what is checked of all. Raises BenchmarkFailed."""
        ...

    async def wire(self, ceilings: Ceilings) -> Wire | None:
        """What the bytes take alone: measured where the system's own wire can be, else reckoned from plain copies."""
        ...

    async def host_bytes(self) -> int:
        """Page-locked and shared memory that it takes of the node."""
        ...


class System(Protocol):
    """One way to bring weights from trainers to an engine. Knows nothing before it is asked to run."""

    @property
    def name(self) -> str:
        """In tables, on the command line, and of its snippet."""
        ...

    @property
    def setting(self) -> str:
        """Its own best, in words."""
        ...

    @property
    def has_engine(self) -> bool:
        """Whether it brings weights to an engine at all."""
        ...

    def supports(self, case: Case) -> str | None:
        """Why it cannot run here, or None if it can."""
        ...

    def engine(self, case: Case) -> Mapping[str, Any]:
        """Arguments of the engine beyond those that all have."""
        ...

    def environment(self) -> Mapping[str, str]:
        """Variables that engine and trainers have to find."""
        ...

    def running(self, stand: Stand) -> AbstractAsyncContextManager[Running]:
        """Join trainers and engine; at the end nothing of it is left."""
        ...

    def traffic(self, case: Case) -> Traffic:
        """What one update moves between devices."""
        ...


class Usual:
    """What a system has that runs everywhere, in an engine like any other."""

    def supports(self, case: Case) -> str | None:
        """It can run."""
        return None

    def engine(self, case: Case) -> Mapping[str, Any]:
        """Nothing more."""
        return {}

    def environment(self) -> Mapping[str, str]:
        """Nothing more."""
        return {}


@dataclass
class UsualRunning:
    """What has nothing more to check, and the host's memory in its trainers alone."""

    fleet: Fleet

    async def check(self) -> None:
        """Nothing more."""

    async def host_bytes(self) -> int:
        """Of all trainers."""
        return await self.fleet.host_bytes()

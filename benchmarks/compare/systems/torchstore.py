# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchStore through shared memory. No release that goes with a current torch has it, as its import says."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata

from benchmarks.compare.case import Case
from benchmarks.compare.measured import Traffic
from benchmarks.compare.system import Running, Stand, Usual
from benchmarks.host_case import BenchmarkFailed

TRANSPORT = "torchstore.transport.shared_memory"


@dataclass(frozen=True)
class TorchStore(Usual):
    """Refused by its own error: release 0.1.2 is made for torch 2.9, and has no shared memory."""

    name: str = "torchstore"
    setting: str = "through shared memory"
    has_engine: bool = True

    def supports(self, case: Case) -> str | None:
        """What its import says."""
        try:
            version = metadata.version("torchstore")
            importlib.import_module("torchstore")
            importlib.import_module(TRANSPORT)
        except metadata.PackageNotFoundError as error:
            return f"torchstore is not installed: {error}"
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # what another torch than its own gives
            return f"torchstore {version}: {type(error).__name__}: {error}"
        return (
            f"torchstore {version} has shared memory, which no release had when this was written: it is not driven here"
        )

    def traffic(self, case: Case) -> Traffic:
        """By slices, as its design says."""
        return Traffic(pcie=case.bytes + case.read_bytes, nvlink=0)

    @asynccontextmanager
    async def running(self, stand: Stand) -> AsyncIterator[Running]:
        """Never."""
        raise BenchmarkFailed(self.supports(stand.case) or "it runs", remedy="see systems/torchstore.py")
        yield

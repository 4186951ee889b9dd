# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A CUDA device as ``copy_engine`` uses it: streams as queues, events as marks, and copies that torch has no call for.

``torch.Tensor.copy_`` brings part of a matrix's columns to the device at a tenth of the link's speed;
``cudaMemcpy2DAsync`` does it at the full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from cuda.bindings import runtime

from stagingd.errors import DeviceUnusable
from stagingd_vllm.copy_engine import Mark, Treat
from stagingd_vllm.crossings import Copy
from stagingd_vllm.gpu_moves import PROGRAMS, PROGRAMS_BESIDE, PROGRAMS_LANDED, PROGRAMS_LANDED_BESIDE, MovesOnGpu
from stagingd_vllm.moves import Move, table

_TO_DEVICE: Final = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice


@dataclass(frozen=True)
class CudaMark:
    """An event."""

    event: torch.cuda.Event

    @classmethod
    def on(cls, stream: torch.cuda.Stream) -> CudaMark:
        """Record one. A thread that waits for it sleeps, and leaves the engine's to compute."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return cls(event)

    @property
    def reached(self) -> bool:
        """Whether it has happened. Never waits."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until it has."""
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Between two events that have happened."""
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def mark_current(device: torch.device) -> CudaMark:
    """The point that the calling thread's current stream on a GPU has reached when all that it was given is done."""
    return CudaMark.on(torch.cuda.current_stream(device))


class CudaQueue:
    """A stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def mark(self) -> CudaMark:
        """Record an event."""
        return CudaMark.on(self._stream)

    def after(self, mark: Mark) -> None:
        """Have the stream wait for an event."""
        assert isinstance(mark, CudaMark)
        self._stream.wait_event(mark.event)

    def computing(self) -> AbstractContextManager[object]:
        """Torch's context of the stream."""
        return torch.cuda.stream(self._stream)

    def copy(self, copy: Copy, slot: int, buffer: int) -> None:
        """Start a copy to the device. Raises DeviceUnusable."""
        target, source, handle = buffer + copy.place, slot + copy.source, self._stream.cuda_stream
        if copy.rows == 1:
            (status,) = runtime.cudaMemcpyAsync(target, source, copy.width, _TO_DEVICE, handle)
        else:
            rows = target, copy.width, source, copy.pitch, copy.width, copy.rows
            (status,) = runtime.cudaMemcpy2DAsync(*rows, _TO_DEVICE, handle)
        if status != runtime.cudaError_t.cudaSuccess:
            raise DeviceUnusable(
                f"CUDA refused to copy {copy.bytes} bytes of the slot to the device: {status.name}",
                remedy="look for the first CUDA error of this process: later calls fail because of it",
            )


class CudaCopies:
    """A GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = CudaQueue(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor] = []

    @property
    def copying(self) -> CudaQueue:
        """A stream of its own."""
        return self._copying

    def current(self) -> CudaQueue:
        """The calling thread's current stream on this GPU."""
        return CudaQueue(torch.cuda.current_stream(self._device))

    def buffer(self, size: int) -> int:
        """From torch's allocator, so that it shows in torch's figures."""
        self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        return self._buffers[-1].data_ptr()

    def treating(self, moves: Sequence[Move], *, landed: bool, beside: bool) -> Treat:
        """By the kernel: by many multiprocessors for a moment, or, at the link's speed, by few."""
        if landed:
            programs = PROGRAMS_LANDED_BESIDE if beside else PROGRAMS_LANDED
        else:
            programs = PROGRAMS_BESIDE if beside else PROGRAMS
        return partial(MovesOnGpu(table(moves), self._device).run, programs=programs)

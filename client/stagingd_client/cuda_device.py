# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A CUDA device: streams as queues, events as marks, and copies that torch has no call for.

``torch.Tensor.copy_`` moves part of a matrix's columns to the host at a tenth of the link's speed;
``cudaMemcpy2DAsync`` does it at the full one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from cuda.bindings import runtime

from stagingd import pinning
from stagingd.errors import StagingError
from stagingd.segment import Segment
from stagingd_client import gpu_moments, gpu_quantize
from stagingd_client.copies import Copy, split
from stagingd_client.queues import Mark, SlowerPath
from stagingd_client.strips import QuantizingWork, Work

_TO_HOST: Final = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost


class CudaFailed(StagingError):
    """A call of the CUDA runtime did not succeed."""

    code = "cuda_failed"


@dataclass(frozen=True)
class CudaMark:
    """An event."""

    event: torch.cuda.Event

    @property
    def reached(self) -> bool:
        """Whether it has happened. Never waits."""
        return bool(self.event.query())


class CudaQueue:
    """A stream."""

    def __init__(self, stream: torch.cuda.Stream, seams: Sequence[int] = ()) -> None:
        self._stream = stream
        self.handle: Final = int(stream.cuda_stream)
        self._seams = seams

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaQueue) and other._stream == self._stream

    def __hash__(self) -> int:
        return hash(self.handle)

    def mark(self) -> CudaMark:
        """Record an event."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaMark(event)

    def after(self, mark: Mark) -> None:
        """Have the stream wait for an event."""
        assert isinstance(mark, CudaMark)
        self._stream.wait_event(mark.event)

    def run(self, work: Callable[[], None]) -> None:
        """Call something with this stream as the current one."""
        if torch.cuda.current_stream(self._stream.device) == self._stream:
            return work()
        with torch.cuda.stream(self._stream):
            return work()

    def copy(self, copy: Copy, slot: int, scratch: int) -> None:
        """Start a copy to the host. Raises CudaFailed."""
        for part in split(copy, slot, self._seams):
            target, source = slot + part.target, scratch + part.source
            if part.height == 1:
                _check(runtime.cudaMemcpyAsync(target, source, part.width, _TO_HOST, self.handle), part)
            else:
                where = target, part.target_pitch, source, part.source_pitch
                _check(runtime.cudaMemcpy2DAsync(*where, part.width, part.height, _TO_HOST, self.handle), part)


def _check(answer: tuple[runtime.cudaError_t], copy: Copy) -> None:
    (status,) = answer
    if status != runtime.cudaError_t.cudaSuccess:
        raise CudaFailed(
            f"CUDA refused to copy {copy.bytes} bytes to the slot: {status.name}",
            remedy="look for the first CUDA error of this process: later calls fail because of it",
        )


class CudaDevice:
    """A GPU.

    Args:
        device: which.
        seams: addresses at which one registration of host memory ends and the next begins: no copy may span two.
    """

    def __init__(self, device: torch.device, seams: Sequence[int] = ()) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._casting = CudaQueue(self._stream)
        self._copying = CudaQueue(torch.cuda.Stream(device), seams)
        self._seen = self._casting

    @property
    def casting(self) -> CudaQueue:
        """A stream of its own."""
        return self._casting

    @property
    def copying(self) -> CudaQueue:
        """Another."""
        return self._copying

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """With the casting stream as the current one: changing it for every kernel takes as long as to start one."""
        with torch.cuda.stream(self._stream):
            yield

    def current(self) -> CudaQueue:
        """The calling thread's current stream on this GPU.

        A trainer asks for every shard that it puts, and torch would make an object each time.
        """
        handle, seen = torch._C._cuda_getCurrentRawStream(self._device.index), self._seen
        if handle != seen.handle:
            seen = self._seen = CudaQueue(torch.cuda.current_stream(self._device))
        return seen

    def memory(self, size: int) -> torch.Tensor:
        """From torch's allocator, so that it shows in torch's figures; of the casting stream, which uses it first."""
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Page-locked."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def cast(self, work: Work) -> None:
        """By the Triton kernel."""
        gpu_moments.cast_strips(work)

    def quantize(self, work: QuantizingWork) -> None:
        """By the Triton kernel."""
        gpu_quantize.quantize_strips(work)


def open_device(device: torch.device, segment: Segment) -> tuple[CudaDevice, Callable[[], None]]:
    """Open a GPU and register both slots with it; a warning says so where that is refused, and why.

    Returns:
        The device, and what takes the registration back.
    """
    slots = [torch.frombuffer(segment.slot(slot), dtype=torch.uint8) for slot in (0, 1)]
    with torch.cuda.device(device):
        spans = [span for slot in slots for span in _registered(pinning.Span(slot.data_ptr(), slot.nbytes))]
        opened = CudaDevice(device, sorted(span.address for span in spans))

    def release() -> None:
        with torch.cuda.device(device):
            for span in spans:
                _unregister(span.address)

    return opened, pinning.released_with(opened, slots, release)


def _registered(span: pinning.Span) -> list[pinning.Span]:
    try:
        return pinning.register(span, _register, _unregister)
    except pinning.RegistrationRefused as refused:
        how = "Versions are flushed without it, at a fraction of the link's speed, and fence waits for the copies"
        warnings.warn(SlowerPath(f"{refused} {how}."), stacklevel=2)
        return []


def _register(address: int, size: int) -> str | None:
    (status,) = runtime.cudaHostRegister(address, size, runtime.cudaHostRegisterPortable)
    if status == runtime.cudaError_t.cudaSuccess:
        return None
    runtime.cudaGetLastError()  # forgets it: else torch would take it for the failure of its next kernel
    return str(status.name)


def _unregister(address: int) -> None:
    runtime.cudaHostUnregister(address)

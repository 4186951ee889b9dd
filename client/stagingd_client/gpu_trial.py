# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The trial of one GPU: registration as trainers and as engines do it, and copies between it and registered memory."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Final

import torch
from cuda.bindings import runtime

from stagingd import pinning
from stagingd.doctor.gpu_report import GpuTrial, Registration
from stagingd.doctor.pci import Link, read_link
from stagingd.machine.files import Files
from stagingd_client.trial_memory import LEAST_BYTES, TrialMemory, measure

_WRITTEN: Final = runtime.cudaHostRegisterPortable
_READ: Final = runtime.cudaHostRegisterMapped | runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterReadOnly
"""As engines register the slots, which they map for reading only."""

_BUSY_COPIES: Final = 16
"""Enough to be under way while the state of the link is read."""


def try_gpu(index: int, memory: TrialMemory, copies: int) -> GpuTrial:
    """Try one GPU. What CUDA refuses stands in the result.

    Args:
        index: which.
        memory: what it is to take.
        copies: how many are timed each way.
    """
    with torch.cuda.device(index):
        trial = GpuTrial(index=index, name=torch.cuda.get_device_name(index), address=_address(index))
        try:
            free, _ = torch.cuda.mem_get_info(index)
            runtime.cudaDeviceSynchronize()  # makes the context, with which registering would else be timed
        except RuntimeError as error:  # how torch tells of CUDA's errors
            return _ended(trial, error)
        return _tried(trial, memory, memory.first(min(memory.written.numel(), free // 4)), copies)


def _ended(trial: GpuTrial, error: RuntimeError) -> GpuTrial:
    # Only torch's own allocator has a type for it; a context that finds no room has not.
    short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return trial.model_copy(update={"problem": str(error).splitlines()[0], "short_of_memory": short})


def _address(index: int) -> str:
    status, address = runtime.cudaDeviceGetPCIBusId(len("0000:00:00.0") + 1, index)
    if status != runtime.cudaError_t.cudaSuccess:
        return f"not told ({status.name})"
    return str(address.partition(b"\0")[0].decode()).lower()


def _tried(trial: GpuTrial, memory: TrialMemory, copied: TrialMemory, copies: int) -> GpuTrial:
    """Register all of the memory, and copy as much as the device has room for."""
    with ExitStack() as registered:
        written = _register(memory.written, _WRITTEN, registered)
        read = _register(memory.read, _READ, registered)
        trial = trial.model_copy(update={"written": written, "read": read})
        if written.problem or read.problem:
            return trial  # what is copied without it says nothing of the link
        return _copied(trial, copied, copies)


def _copied(trial: GpuTrial, memory: TrialMemory, copies: int) -> GpuTrial:
    device, size = torch.device("cuda", trial.index), memory.written.numel()
    if size < LEAST_BYTES:
        problem = f"only {4 * size / 2**20:.0f} MiB of its memory are free"
        return trial.model_copy(update={"problem": problem, "short_of_memory": True})
    try:
        found = measure(memory, device, _copy, copies)
        link = _link_at_work(memory, device, trial.address)
    except RuntimeError as error:
        return _ended(trial, error)
    return trial.model_copy(update={"copies": found, "link_at_work": link})


def _register(memory: torch.Tensor, flags: int, registered: ExitStack) -> Registration:
    size, started = memory.numel(), time.perf_counter()
    try:
        spans = pinning.register(
            pinning.Span(memory.data_ptr(), size), partial(_call, flags), runtime.cudaHostUnregister
        )
    except pinning.RegistrationRefused as refused:
        return Registration(bytes=size, problem=refused.what)
    seconds = time.perf_counter() - started
    for span in spans:
        registered.callback(runtime.cudaHostUnregister, span.address)
    return Registration(bytes=size, seconds=seconds)


def _call(flags: int, address: int, size: int) -> str | None:
    (status,) = runtime.cudaHostRegister(address, size, flags)
    if status == runtime.cudaError_t.cudaSuccess:
        return None
    runtime.cudaGetLastError()  # forgets it: else torch would take it for the failure of its next kernel
    return str(status.name)


def _copy(target: torch.Tensor, source: torch.Tensor) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begun.record()
    target.copy_(source, non_blocking=True)
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def _link_at_work(memory: TrialMemory, device: torch.device, address: str) -> Link | None:
    """The link while bytes cross it: an idle GPU lowers its speed."""
    target = torch.empty_like(memory.read, device=device)
    for _ in range(_BUSY_COPIES):
        target.copy_(memory.read, non_blocking=True)
    link = read_link(Files(), address)
    torch.cuda.synchronize(device)
    return link if link.raw_rate is not None else None

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tries every GPU that torch sees: does it take shared memory, copy it unchanged, and how fast?

``stagingd doctor`` runs it in a process of its own. By hand: ``python -m stagingd_client.gpu_check``. It prints one
``GpuReport`` as JSON. Its deadline ends it by SIGALRM, whatever library it hangs in.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
from collections.abc import Sequence

import torch

from stagingd.doctor.gpu_report import GpuReport, GpuTrial
from stagingd_client.trial_memory import shared_memory


def main() -> None:
    """Try all GPUs and print the report."""
    arguments = argparse.ArgumentParser(description="Try every GPU with shared memory; print one JSON object.")
    arguments.add_argument("--deadline-s", type=int, default=180, help="end after so many seconds")
    arguments.add_argument("--copies", type=int, default=5, help="how many copies each way make a median")
    given = arguments.parse_args()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait for the call that hangs
    signal.alarm(given.deadline_s)
    print(check(given.copies).model_dump_json())  # noqa: T201 - its output is its purpose


def check(copies: int) -> GpuReport:
    """Try all GPUs, one after another.

    Args:
        copies: how many are timed each way.
    """
    if not torch.cuda.is_available():
        return _report(problem=_why_none())
    try:
        from stagingd_client.gpu_trial import try_gpu  # noqa: PLC0415 - builds for CPUs have no CUDA bindings
    except ImportError as missing:
        return _report(problem=f"they were not tried: {missing}", remedy="pip install cuda-bindings")
    try:
        memory = shared_memory()
    except OSError as error:
        return _report(problem=f"they were not tried, for want of shared memory: {error}", remedy="df -h /dev/shm")
    return _report([try_gpu(index, memory, copies) for index in range(torch.cuda.device_count())])


def _report(gpus: Sequence[GpuTrial] = (), *, problem: str | None = None, remedy: str | None = None) -> GpuReport:
    return GpuReport(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        driver_cuda=driver_cuda(),
        problem=problem,
        remedy=remedy,
        gpus=tuple(gpus),
    )


def _why_none() -> str:
    """In torch's words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # the first where it is built for CPUs
        return str(error).splitlines()[0]
    return "the driver shows none"


def driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, such as ``13.0``; None without one. Needs no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


if __name__ == "__main__":
    main()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the trial of GPUs, which needs torch, in a process of its own and with a deadline."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from pydantic import ValidationError

from stagingd.doctor.gpu_report import GpuReport
from stagingd.errors import StagingError

MODULE: Final = "stagingd_client.gpu_check"

BY_HAND: Final = f"{sys.executable} -m {MODULE}"
"""The trial by itself."""

DEADLINE_S: Final = 180.0
"""For all GPUs: importing torch from a cold disk, a context and some copies for each."""

GRACE_S: Final = 5.0
"""How long a killed process may take to go: one that the driver holds stays."""


class GpuCheckFailed(StagingError):
    """The process that tries the GPUs did not report."""

    code = "gpu_check_failed"


def torch_is_installed() -> bool:
    """Whether there is anything to start; torch is not imported."""
    return importlib.util.find_spec("torch") is not None


def try_gpus(command: Sequence[str] | None = None, deadline_s: float = DEADLINE_S) -> GpuReport:
    """Run the trial.

    Args:
        command: what is run instead of the trial, by tests.
        deadline_s: when it is killed, in seconds.

    Raises:
        GpuCheckFailed: it did not start, took too long, ended by a signal, or did not report; with its last words.
    """
    run = command or [sys.executable, "-m", MODULE, "--deadline-s", str(int(deadline_s))]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace")
    except OSError as error:
        raise _failed(f"does not start: {error.strerror}", "") from error
    try:
        said, complained = process.communicate(timeout=deadline_s + GRACE_S)
    except subprocess.TimeoutExpired:
        raise _failed(f"did not end within {deadline_s:.0f} s{_killed(process)}", "") from None
    finally:
        process.kill()  # does nothing to one that has ended
    if process.returncode == -signal.SIGALRM:
        raise _failed(f"did not end within {deadline_s:.0f} s", complained)
    if process.returncode:
        raise _failed(_ended(process.returncode), complained)
    try:
        return GpuReport.model_validate_json((said.splitlines() or [""])[-1])
    except ValidationError as error:
        raise _failed(f"printed no report ({error.error_count()} fields are wrong)", complained or said) from error


def _killed(process: subprocess.Popen[str]) -> str:
    process.kill()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return f", and cannot be killed: the driver holds it (pid {process.pid})"
    return ""


def _ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _failed(how: str, complained: str) -> GpuCheckFailed:
    last = next((line.strip() for line in reversed(complained.splitlines()) if line.strip()), "")
    return GpuCheckFailed(
        f"the trial of the GPUs {how}" + (f": {last}" if last else ""),
        remedy=f"run it by itself: {BY_HAND}",
    )

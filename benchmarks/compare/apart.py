# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Each system in a process of its own, on the GPUs of its case alone, with a deadline: one that fails ends no other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.case import Case
from benchmarks.compare.measured import Measured
from benchmarks.compare.run import PREFIX, Plan, refused
from benchmarks.compare.system import System
from benchmarks.host import ENDING_S, remove_segments
from stagingd.segment import SHARED_MEMORY

ROOT = Path(__file__).parents[2]
DEVICES = "CUDA_VISIBLE_DEVICES"
UNPOISONED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Else torch begins to use GPUs when it is asked for their number, and the engine, which vLLM forks, could not."""


def apart(system: System, case: Case, plan: Plan, gpus: int, deadline_s: float) -> Measured:
    """Measure a system, or say why it could not be.

    Args:
        system: which.
        case: what with.
        plan: how.
        gpus: that this host has.
        deadline_s: the longest that it may take with all that it starts, in seconds.
    """
    why = system.supports(case)
    if why is not None:
        return refused(system, case, why)
    with tempfile.TemporaryDirectory(prefix="stagingd-compare-") as folder:
        answer = Path(folder) / "answer.json"
        settings = [
            str(value) for value in (case.model, case.layout.name, case.mode, system.name, *asdict(plan).values())
        ]
        command = [sys.executable, "-m", "benchmarks.compare", "one", *settings, str(answer)]
        surroundings = os.environ | UNPOISONED | system.environment() | visible(case.layout.gpus, gpus, os.environ)
        process = subprocess.Popen(command, env=surroundings, cwd=ROOT, start_new_session=True)
        try:
            status: int | None = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        told: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if "measured" in told and (status == 0 or plan.kill_s):  # it cannot end well after its engine was killed
        return Measured.of(told["measured"])
    if status is None:
        return refused(system, case, f"it was not done within {deadline_s:g} s")
    return refused(system, case, told.get("failed", f"it ended with status {status}"))


def visible(taken: int, gpus: int, surroundings: Mapping[str, str]) -> dict[str, str]:
    """The first GPUs of those that are visible now; on a host without any nothing is said."""
    if not gpus:
        return {}
    now = surroundings.get(DEVICES)
    names = [str(number) for number in range(gpus)] if now is None else now.split(",")
    return {DEVICES: ",".join(names[:taken])}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, all that it has started, and what it has left in shared memory."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * ENDING_S)
    until = time.monotonic() + ENDING_S  # what it has started gives shared memory back
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)  # a worker that hangs outlives whoever started it
    process.wait(ENDING_S)
    remove_segments(f"/stagingd-bench-{process.pid}-")
    for path in SHARED_MEMORY.glob(f"{PREFIX}{process.pid}-*"):
        shutil.rmtree(path, ignore_errors=True)


def tell_why(answer: Path, error: BaseException) -> None:
    """Have an error that ends this process stand where whoever started it looks, beside what was found before."""
    told = json.loads(answer.read_text()) if answer.exists() else {}
    words = " ".join(str(error).split())
    answer.write_text(json.dumps({"failed": f"{type(error).__name__}: {words}", **told}))


def tell_of_the_end(answer: Path) -> None:
    """The same of every error that nobody has expected."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, at: Any) -> None:
        tell_why(answer, error)
        usual(kind, error, at)

    sys.excepthook = hook

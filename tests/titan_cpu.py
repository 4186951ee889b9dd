# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan's trainer on CPU, over gloo: it has no CPU mode of its own.

Run as ``python titan_cpu.py`` it reads runs from its input, one JSON object a line, forks the ranks of each, and
answers with their exit statuses: TorchTitan takes many seconds to import, and so it is imported once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import types
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


class _Cpu(types.ModuleType):
    """What TorchTitan asks of a device's module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _device_module() -> types.ModuleType:
    module = _Cpu("cpu_device")
    module.set_device = module.empty_cache = module.reset_peak_memory_stats = lambda *_: None
    module.current_device = lambda: 0
    module.device_count = lambda: 8
    module.get_device_name = lambda *_: "CPU"
    module.get_device_properties = lambda *_: types.SimpleNamespace(name="CPU", total_memory=1 << 34)
    figures = ("active_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")
    module.memory_stats = lambda *_: dict.fromkeys(figures, 0)
    return module


def shim() -> None:
    """Has to be called before torchtitan is imported."""
    module = _device_module()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: module
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda *_, **__: None  # of a torch newer than some that TorchTitan 0.3 runs with
    histogram = torch.histc
    torch.histc = lambda values, **bins: histogram(values.float(), **bins).to(values.dtype)  # of integers, on CPU
    divide = FSDPModule.set_gradient_divide_factor

    def divide_after_the_sum(self: FSDPModule, factor: float) -> None:
        divide(self, factor)
        self.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces

    FSDPModule.set_gradient_divide_factor = divide_after_the_sum


def train(arguments: list[str]) -> None:
    """One rank of one run."""
    train = importlib.import_module("torchtitan.train")  # only now: the shims are in place
    sys.argv = ["train", *arguments]
    manager = importlib.import_module("torchtitan.config").ConfigManager
    if manager.parse_args.__defaults__ != (None,):
        manager.parse_args.__defaults__ = (arguments,)  # 0.2 takes its own when it is imported
    torch.set_num_threads(1)
    trainer = importlib.import_module(train.Trainer.__module__)
    trainer.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # rank 0 sleeps when all is done
    if train.main.__code__.co_argcount == 0:
        train.main()  # 0.3
    else:
        train.main(train.Trainer)  # 0.2


def fork_rank(rank: int, run: dict[str, Any]) -> int:
    """Start a rank of a run, whose output goes to a file. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(f"{run['log']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["ranks"], "LOCAL_WORLD_SIZE": run["ranks"]}
    os.environ.update({key: str(value) for key, value in {**place, **run["environment"]}.items()})
    importlib.import_module("titan_witness")
    train(run["arguments"])
    sys.exit(0)  # not os._exit: what is registered for the end of a program shall run


def wait(pids: set[int]) -> list[int]:
    """Exit statuses of a run's ranks, in the order of their ends. Where one fails, the others are ended."""
    statuses = []
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        statuses.append(os.waitstatus_to_exitcode(status))
        if statuses[-1] != 0:
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return statuses


def serve() -> None:
    """Carry out the runs that are asked for, one after the other."""
    importlib.import_module("torchtitan.train")
    for line in sys.stdin:
        run = json.loads(line)
        print(json.dumps(wait({fork_rank(rank, run) for rank in range(run["ranks"])})), flush=True)


shim()
if __name__ == "__main__":
    serve()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, on CPU; each reads what it has staged and compares every bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import RunningDaemon

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize(
    ("example", "launcher", "tensors"),
    [("fsdp2", TORCHRUN, 12), ("huggingface", (), 25), ("megatron_shaped", TORCHRUN, 8)],
    ids=["fsdp2", "huggingface", "megatron-shaped"],
)
def test_an_example_stages_what_it_trains(
    daemon: RunningDaemon, example: str, launcher: tuple[str, ...], tensors: int
) -> None:
    """TorchTitan's is run in test_torchtitan.py."""
    path = EXAMPLES / f"{example}.py"
    environment = {
        **os.environ,
        "STAGINGD_RUNTIME_DIR": str(daemon.folder),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *launcher, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"version 3 has arrived: {tensors} tensors, every bit"]
    stage = daemon.stage(f"{example.removesuffix('_shaped')}-example")
    assert (stage.trainers, stage.engines, stage.sealed_versions) == ((), (), 3)

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The environment in which tests start engines. Imports nothing of vLLM: nor may modules that other tests share."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ON_ANY_CPU = {
    # Small functions beside the model are compiled otherwise, in every worker: it takes longer than all the rest.
    "TORCHDYNAMO_DISABLE": "1",
    # On processors with AMX these pack weights in an order of their own, which stagingd refuses.
    "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel,CPUFp8BlockScaledMMKernel,"
    "CPUFp8W8A8ScaledMMLinearKernel,CPUFp8W8A8BlockScaledMMKernel",
}
"""What has engines of tests compute by the same kernels, whatever the processor."""


@contextmanager
def engine_environment(folder: Path) -> Iterator[None]:
    """The environment of an engine on two cores; the project's plugins are found as its metadata says."""
    metadata = folder / "installed" / "stagingd-0.dist-info"
    metadata.mkdir(parents=True)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    points = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for group, e in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(points))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stagingd\nVersion: 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "30")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        for name, value in ON_ANY_CPU.items():
            patch.setenv(name, value)
        patch.syspath_prepend(metadata.parent)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield

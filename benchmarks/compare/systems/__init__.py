# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The systems that are compared, one module each."""

from __future__ import annotations

from typing import Final

from benchmarks.compare.system import System
from benchmarks.compare.systems.checkpoint_engine import CheckpointEngine
from benchmarks.compare.systems.cuda_ipc import CudaIpc
from benchmarks.compare.systems.dcp import Dcp
from benchmarks.compare.systems.nccl import Nccl
from benchmarks.compare.systems.stagingd_beside import StagingdBeside
from benchmarks.compare.systems.torch_save import TorchSave
from benchmarks.compare.systems.torchstore import TorchStore

BESIDE: Final = "prefetched as it lands beside generation, swapped in between two steps"

SYSTEMS: Final[dict[str, System]] = {
    system.name: system
    for system in (
        StagingdBeside("stagingd", f"bf16 stage, {BESIDE}", quantized=False),
        StagingdBeside("stagingd-quantized", f"quantized by the trainers, {BESIDE}", quantized=True),
        Nccl("nccl-packed", "vLLM's own transfer, packed, two packs of 1 GiB", packed=True),
        Nccl("nccl-per-tensor", "vLLM's own transfer, a broadcast for each tensor", packed=False),
        CudaIpc("cuda-ipc", "vLLM's own transfer, handles of all tensors at once", packed=False),
        CudaIpc("cuda-ipc-packed", "vLLM's own transfer, packs of 1 GiB", packed=True),
        CheckpointEngine(),
        TorchStore(),
        Dcp(),
        TorchSave(),
    )
}
"""By name, in the order of the table."""

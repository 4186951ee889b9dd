# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The extension that users name, for engines on GPUs, with what tests want to know; imported in the worker only."""

from __future__ import annotations

import hashlib

import rank_wide_scales
import torch
from stagingd_vllm.extension import StagingdWorkerExtension, Worker
from stagingd_vllm.layouts import homes

rank_wide_scales.install()


class GpuExtension(StagingdWorkerExtension):
    """Also tells what the live weights are."""

    def stagingd_weights(self: Worker) -> dict[str, tuple[str, str]]:
        """Digests of every live weight and of its scales."""
        return {
            name: (_digest(home.weight), "" if home.scale is None else _digest(home.scale))
            for name, home in homes(self.get_model()).items()
        }

    def stagingd_addresses(self: Worker) -> dict[str, tuple[int, int]]:
        """Where every live weight and its scales are."""
        return {
            name: (home.weight.data_ptr(), 0 if home.scale is None else home.scale.data_ptr())
            for name, home in homes(self.get_model()).items()
        }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The vLLM engines of benchmarks: of random weights, with decode graphs on GPUs, and what they are asked to check."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_case import BenchmarkFailed

ON_CPU = {"enforce_eager": True, "gpu_memory_utilization": 0.2}


def options(
    folder: Path, mode: str, ranks: int, *, batches: Iterable[int], tokens: int, share: float
) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` and ``AsyncEngineArgs``.

    Args:
        folder: of the model's configuration.
        mode: a quantization, or "bfloat16".
        ranks: its tensor-parallel size.
        batches: the numbers of requests at a time that graphs are captured for.
        tokens: the longest request.
        share: of a GPU's memory that it may take.
    """
    sizes = sorted({1, *batches})
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    on_gpu = {"compilation_config": graphs, "gpu_memory_utilization": share}
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "quantization": None if mode == "bfloat16" else mode,
        "tensor_parallel_size": ranks,
        "worker_extension_cls": "benchmarks.read_worker.ReadWorkerExtension",
        "max_model_len": tokens,
        "max_num_seqs": sizes[-1],
        "disable_log_stats": True,
    } | (on_gpu if torch.cuda.is_available() else ON_CPU)


def refuse_inexact(label: str, answers: Iterable[dict[str, Any]]) -> None:
    """Raises BenchmarkFailed: a worker's ``stagingd_check`` has found wrong bytes or scales."""
    for found in answers:
        if not found["exact"]:
            raise BenchmarkFailed(f"{label}: what the weights hold is wrong: {found}", remedy="run the tests")

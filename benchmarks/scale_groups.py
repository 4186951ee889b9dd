# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers of benchmarks quantize: the linear layers, and of these what vLLM fuses under one scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from stagingd.formats import EngineDevice, Quantization, StageFormat

FUSED: Final = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


def quantization(stage_format: StageFormat | None, names: Iterable[str], device: EngineDevice) -> Quantization | None:
    """Of a model's tensors, by their Hugging Face names; None where nothing is quantized."""
    if stage_format is None:
        return None
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        block, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer in FUSED:
            groups[f"{block}.{FUSED[layer]}"].append(name)
    return Quantization(format=stage_format, device=device, groups=tuple(map(tuple, groups.values())))

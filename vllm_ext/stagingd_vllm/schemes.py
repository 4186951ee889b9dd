# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The ways in which an engine quantizes weights: what shares a scale, how it is made, how values are rounded.

Arithmetic as in vLLM's online methods (``model_executor/layers/quantization/online``), which a scheme's bytes and
scales have to equal; those of TorchAO as in its kernels in plain torch (``quantization/quant_primitives.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from stagingd_vllm.moves import Treatment
from stagingd_vllm.scales import FP8_MAX, Granularity, scales

INT8_MAX: Final = 127.0
"""vLLM's online INT8 is symmetric: -128 is not used."""


@dataclass(frozen=True)
class Scheme:
    """One way.

    Attributes:
        name: vLLM's name of it.
        granularity: what shares a scale.
        treatment: how a value and its scale become a byte.
        live: dtype of the bytes.
        formula: largest magnitudes to represent, and the engine's device -> scales; float32 of the same shape.
    """

    name: str
    granularity: Granularity
    treatment: Treatment
    live: str
    formula: Callable[[torch.Tensor, torch.device], torch.Tensor]


def _int8_scales(limits: torch.Tensor, _: torch.device) -> torch.Tensor:
    # The engine divides a bf16 tensor by a number: the scale is rounded to bf16, and kept as float32.
    return (limits.bfloat16() / INT8_MAX).float()


def _torchao_scales(limits: torch.Tensor, _: torch.device) -> torch.Tensor:
    # The same there. Of zeros the scale is 0, and of what is next to them too: such a row stands for zeros.
    return (limits.bfloat16() / FP8_MAX).float()


FP8_PER_TENSOR: Final = Scheme(
    "fp8_per_tensor",
    Granularity.TENSOR,
    Treatment.MULTIPLY,
    "float8_e4m3fn",
    lambda limits, engine: scales(limits, Granularity.TENSOR, engine),
)
FP8_PER_CHANNEL: Final = Scheme(
    "fp8_per_channel",
    Granularity.CHANNEL,
    Treatment.DIVIDE,
    "float8_e4m3fn",
    lambda limits, engine: scales(limits, Granularity.CHANNEL, engine),
)
FP8_PER_BLOCK: Final = Scheme(
    "fp8_per_block",
    Granularity.BLOCK,
    Treatment.MULTIPLY,
    "float8_e4m3fn",
    lambda limits, engine: scales(limits, Granularity.BLOCK, engine),
)
INT8_PER_CHANNEL: Final = Scheme(
    "int8_per_channel_weight_only", Granularity.CHANNEL, Treatment.ROUND, "int8", _int8_scales
)
TORCHAO_PER_TENSOR: Final = Scheme(
    "torchao_per_tensor", Granularity.TENSOR, Treatment.DIVIDE, "float8_e4m3fn", _torchao_scales
)
TORCHAO_PER_ROW: Final = Scheme(
    "torchao_per_row", Granularity.CHANNEL, Treatment.DIVIDE, "float8_e4m3fn", _torchao_scales
)

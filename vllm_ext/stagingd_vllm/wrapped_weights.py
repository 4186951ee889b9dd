# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchAO's FP8 weights: parameters with no memory of their own, that wrap a tensor of bytes and one of scales.

Nothing here imports TorchAO: its class is known by its name and attributes, which stand here for 0.18.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stagingd_vllm.schemes import TORCHAO_PER_ROW, TORCHAO_PER_TENSOR, Scheme

WRAPPING = frozenset({"TorchAOLinearMethod"})
"""vLLM's methods that wrap weights after loading, unless TorchAO leaves them be: a size is no multiple of 16."""

BYTES, SCALES = "qdata", "scale"
"""Attributes of a wrapper."""


def is_wrapped(parameter: torch.Tensor) -> bool:
    """Whether a parameter's memory is that of other tensors."""
    return bool(is_traceable_wrapper_subclass(parameter))


def wrapping_fault(parameter: torch.Tensor, method: str) -> str | None:
    """What is not known about a wrapped parameter of a layer with this method; None where it can be written to."""
    if method not in WRAPPING:
        return f"is wrapped as {type(parameter).__name__}, and what {method} makes of that is not known"
    if type(parameter).__name__ != "Float8Tensor":
        return f"is a {type(parameter).__name__}, and where that keeps its memory is not known"
    qdata, scale = parts_of(parameter)
    if parameter.dtype != torch.bfloat16:
        return f"was made of {parameter.dtype}, and its scales are known of bfloat16 alone"
    if qdata.dtype != torch.float8_e4m3fn or qdata.shape != parameter.shape:
        return f"has bytes of {qdata.dtype} {tuple(qdata.shape)}, and not float8_e4m3fn {tuple(parameter.shape)}"
    if scale.dtype != torch.float32 or not scale.is_contiguous() or tuple(scale.shape) not in _schemes(qdata):
        return f"has scales of {scale.dtype} {tuple(scale.shape)}, which are neither one per tensor nor one per row"
    return None


def parts_of(parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes and the scales of a Float8Tensor, as it holds them."""
    return getattr(parameter, BYTES), getattr(parameter, SCALES)


def scheme_of(parameter: torch.Tensor) -> Scheme:
    """How a Float8Tensor of which there is no fault is quantized."""
    qdata, scale = parts_of(parameter)
    return _schemes(qdata)[tuple(scale.shape)]


def _schemes(qdata: torch.Tensor) -> dict[tuple[int, ...], Scheme]:
    return {(qdata.shape[0], 1): TORCHAO_PER_ROW, (1, 1): TORCHAO_PER_TENSOR}

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CUDA kernels do that its CPU build lacks, in torch."""

from __future__ import annotations

from typing import Any

import torch

FP8_MAX = torch.tensor(448.0)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
    **_: Any,
) -> torch.Tensor:
    """The product of FP8 matrices. On processors with AMX torch's own takes hundreds of times as long."""
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)


torch._scaled_mm = scaled_mm


def scaled_fp8_quant(
    values: torch.Tensor, scale: torch.Tensor | None = None, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """To float8_e4m3fn, clamped by fminf and fmaxf, which leave a NaN aside.

    A scale that is given is multiplied by in its reciprocal; one per row, made from the values, is divided by.
    """
    if scale is None and options.get("use_per_token_if_dynamic"):
        scale = (values.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp_min(1.0 / (448.0 * 512.0))
        return _clamped(values.float() / scale), scale
    if scale is None:
        scale = values.abs().amax().float().reshape(1) / FP8_MAX
    return _clamped(values.float() * scale.reciprocal()), scale


def _clamped(scaled: torch.Tensor) -> torch.Tensor:
    return torch.fmax(torch.fmin(scaled, FP8_MAX), -FP8_MAX).to(torch.float8_e4m3fn)

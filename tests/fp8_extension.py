# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension on checkpoints, for an engine that quantizes to FP8 on a CPU; imported in the worker only."""

from __future__ import annotations

import torch
from checkpoint_extension import CheckpointExtension
from stagingd_vllm.extension import Worker
from vllm import _custom_ops


def scaled_fp8_quant(
    values: torch.Tensor, scale: torch.Tensor | None = None, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the CUDA kernel does with one scale; the CPU build has none without AMX.

    Without a scale, as for activations, it is made from the values, per row if asked.
    """
    if scale is None:
        per_token = options.get("use_per_token_if_dynamic")
        amax = values.abs().amax(-1, keepdim=True) if per_token else values.abs().amax().reshape(1)
        scale = amax.float() / torch.tensor(448.0)
    quantized = (values.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantized, scale


_custom_ops.scaled_fp8_quant = scaled_fp8_quant  # before the model is loaded


class Fp8Extension(CheckpointExtension):
    """Also tells what kernels compute."""

    def stagingd_kernels(self: Worker) -> set[str]:
        """The names of the linear layers' methods and kernels."""
        methods = [getattr(layer, "quant_method", None) for layer in self.get_model().modules()]
        kernels = [getattr(method, "fp8_linear", None) for method in methods]
        return {type(found).__name__ for found in (*methods, *kernels) if found is not None}

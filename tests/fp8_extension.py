# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension on checkpoints, for an engine that quantizes to FP8 on a CPU; imported in the worker only."""

from __future__ import annotations

from checkpoint_extension import CheckpointExtension
from fp8_on_cpu import scaled_fp8_quant
from stagingd_vllm.extension import Worker, attachment_of
from vllm import _custom_ops

_custom_ops.scaled_fp8_quant = scaled_fp8_quant  # before the model is loaded


class Fp8Extension(CheckpointExtension):
    """Also tells what kernels compute."""

    def stagingd_kernels(self: Worker) -> set[str]:
        """The names of the linear layers' methods and kernels."""
        methods = [getattr(layer, "quant_method", None) for layer in self.get_model().modules()]
        kernels = [getattr(method, "fp8_linear", None) for method in methods]
        return {type(found).__name__ for found in (*methods, *kernels) if found is not None}

    def stagingd_forget(self: Worker, rank: int) -> None:
        """One worker forgets what it has prefetched."""
        attachment = attachment_of(self)
        if attachment.place.rank == rank:
            attachment._prefetcher.forget()

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tells every vLLM process of the weight-transfer backend "stagingd" (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

import contextlib
from typing import Any

BACKEND = "stagingd"


def register() -> None:
    """Registers the backend by name; its module is imported when an engine asks for it. May be called twice.

    Does nothing with a vLLM that has no such backends: this runs in engines that never heard of a stage, too, and one
    that asks for the backend is then refused by vLLM.
    """
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    with contextlib.suppress(ValueError):  # registered before
        WeightTransferEngineFactory.register_engine(BACKEND, "stagingd_vllm.engine", "StagingdEngine")
    _keep_plain_parameters_for_the_backend()


def _keep_plain_parameters_for_the_backend() -> None:
    """On the CPU, has the engines that use the backend compute from their parameters (``plain_parameters.py``).

    vLLM makes the backend's engine after the model has loaded, when the parameters are packed already.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers import utils

    from stagingd_vllm.plain_parameters import compute_from_parameter

    packed = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, **options: bool) -> None:
        transfer = get_current_vllm_config().weight_transfer_config
        if transfer is not None and transfer.backend == BACKEND:
            compute_from_parameter(layer)
        else:
            packed(layer, **options)

    utils.dispatch_cpu_unquantized_gemm = dispatch

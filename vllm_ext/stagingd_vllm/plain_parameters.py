# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters on vLLM's CPU engine that look as they do on a GPU.

The CPU engine packs every linear weight after loading and leaves an empty parameter behind, or one that is
no longer looked at; a write in place would have no effect. On a GPU the parameter is what the kernel reads.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform


def keep_plain_parameters() -> None:
    """Makes linear layers of models that load from now on in this process compute from their parameters.

    Does nothing on other platforms than the CPU. Slower than the packed kernels.
    """
    # By replacing a function of vLLM, since before 0.33 no hook is called between the import of a worker
    # extension and the loading of the model.
    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = compute_from_parameter


def compute_from_parameter(layer: torch.nn.Module, **_options: bool) -> None:
    """Makes one linear layer of a CPU engine compute from its parameter; stands in for vLLM's packing."""
    # vLLM calls cpu_linear(input, weight, bias) with the live parameter.
    layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Configs of TorchTitan 0.3 for machines without a GPU: the small llama3, with an attention that CPUs have."""

import importlib.util
from pathlib import Path

from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "torchtitan" / "llama3_03.py"


def llama3() -> Trainer.Config:
    """``--module titan_config_03 --config llama3``: nothing is published unless the command line says so."""
    return on_cpu(llama3_debugmodel())


def example() -> Trainer.Config:
    """The example's config, and the witness."""
    spec = importlib.util.spec_from_file_location("llama3_03", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.llama3()
    config.override.imports.append("titan_witness.witnessed")
    return on_cpu(config)


def on_cpu(config: Trainer.Config) -> Trainer.Config:
    config.training.disable_cuda_graphs = True
    config.optimizer.implementation = "for-loop"
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return config

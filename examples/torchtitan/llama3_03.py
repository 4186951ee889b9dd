# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan 0.3.x: the llama3 debug model, with every step published to the stage "policy".

    stagingd serve &
    PYTHONPATH=examples/torchtitan torchrun --nproc_per_node=2 -m torchtitan.train --module llama3_03 --config llama3

Any other config of 0.3 takes the same line on the command line:

    --override.imports 'stagingd_client.torchtitan.override.staged={"stage": "policy"}'
"""

from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer


def llama3() -> Trainer.Config:
    """The debug model's own config, and one line more."""
    config = llama3_debugmodel()
    config.override.imports.append(("stagingd_client.torchtitan.override.staged", {"stage": "policy"}))
    return config

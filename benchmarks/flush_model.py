# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The models of ``benchmarks.flush``: TorchTitan's own, sharded by FSDP2, with fp32 master weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import torch
from stagingd_client.torchtitan_names import TorchTitanNames
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.protocols.train_spec import get_train_spec

SEED: Final = 17


@dataclass(frozen=True)
class Shape:
    """A model, by TorchTitan's name and flavor.

    Attributes:
        family, flavor: of TorchTitan.
        layers: how many of the flavor's layers; None for all.
        trains: whether steps are run with it too, or its parameters only flushed.
    """

    family: str
    flavor: str
    layers: int | None = None
    trains: bool = False


SHAPES: Final = {
    "8B": Shape("llama3", "8B", trains=True),
    "30B-A3B": Shape("qwen3", "30B-A3B"),
    "30B-A3B, half its layers": Shape("qwen3", "30B-A3B", layers=24),
    "debug": Shape("llama3", "debugmodel", trains=True),
    "debug MoE": Shape("qwen3", "debugmodel_moe"),
}


@dataclass(frozen=True)
class Sharded:
    """A model as one rank has it.

    Attributes:
        module: sharded over all ranks.
        names: how its parameters are named in the stage.
        vocabulary: how many tokens it knows.
    """

    module: nn.Module
    names: TorchTitanNames
    vocabulary: int

    @property
    def staged_bytes(self) -> int:
        """Of all ranks' parameters in bf16."""
        return sum(parameter.numel() for parameter in self.module.parameters()) * torch.bfloat16.itemsize


def build(shape: Shape, mesh: DeviceMesh) -> Sharded:
    """Make a model of random weights, each rank its own shards of it."""
    spec = get_train_spec(shape.family)
    args: Any = spec.model_args[shape.flavor]
    if shape.layers is not None:
        args = dataclasses.replace(args, n_layers=shape.layers)
    with torch.device("meta"):
        module: Any = spec.model_cls(args)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in module.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if mesh.device_type == "cpu" and hasattr(part, "set_force_sum_reduction_for_comms"):
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    module.to_empty(device=mesh.device_type)
    torch.manual_seed(SEED + mesh.get_rank())
    with torch.no_grad():
        if shape.trains:
            module.init_weights(buffer_device=torch.device(mesh.device_type))
        for parameter in module.parameters():
            parameter.to_local().normal_(mean=float(parameter.dim() == 1), std=0.02)
    adapter = spec.state_dict_adapter
    if adapter is None:
        raise TypeError(f"TorchTitan has no adapter to Hugging Face names for {shape.family}")
    return Sharded(module, TorchTitanNames.of(adapter(args, None)), args.vocab_size)

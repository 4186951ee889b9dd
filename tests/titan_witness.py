# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A witness of TorchTitan's runs: after every step it saves what an engine should get, by gathering everything.

It is a model converter of TorchTitan 0.2, and a config override of 0.3. ``WITNESS`` is the folder it saves to.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class Witness:
    """Counts steps from ``WITNESS_STEP``, and saves after each what the model's own adapter makes of the whole."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._step = int(os.environ.get("WITNESS_STEP", "0"))

    def save(self, model_parts: list[nn.Module]) -> None:
        """Every rank saves what it can see: all of it, or its stages of a pipeline."""
        self._step += 1
        full = {}
        for part in model_parts:
            buffers = {name.replace("_checkpoint_wrapped_module.", "") for name, _ in part.named_buffers()}
            for name, value in part.state_dict().items():
                whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
                full[name] = whole.clone() if name in buffers else whole.bfloat16()
        path = Path(os.environ["WITNESS"]) / f"{self._step}.{dist.get_rank()}"
        torch.save({name: tensor.contiguous() for name, tensor in self._adapter.to_hf(full).items()}, f"{path}.part")
        Path(f"{path}.part").rename(path)


def register_with_02() -> None:
    """``--model.converters witness``."""
    converters = importlib.import_module("torchtitan.protocols.model_converter")
    specs = importlib.import_module("torchtitan.protocols.train_spec")

    class Converter:
        def __init__(self, job_config: Any, parallel_dims: Any) -> None:
            spec = specs.get_train_spec(job_config.model.name)
            self._witness = Witness(spec.state_dict_adapter(spec.model_args[job_config.model.flavor], None))

        def convert(self, model: nn.Module) -> None:
            pass

        def post_optimizer_hook(self, model: list[nn.Module]) -> None:
            self._witness.save(model)

    converters.register_model_converter(Converter, "witness")


def register_with_03() -> Any:
    """``--override.imports titan_witness.witnessed``."""
    optimizer = importlib.import_module("torchtitan.components.optimizer")
    overrides = importlib.import_module("torchtitan.config.override")
    llama3 = importlib.import_module("torchtitan.models.llama3.state_dict_adapter")

    @dataclass(kw_only=True, slots=True)
    class Config(optimizer.OptimizersContainer.Config):  # type: ignore[misc,name-defined]
        plain: Any

        def build(self, *, model_parts: list[nn.Module]) -> Any:
            optimizers = self.plain.build(model_parts=model_parts)
            witness = Witness(llama3.Llama3StateDictAdapter(model_parts[0].config, None))
            optimizers.register_step_post_hook(lambda *_: witness.save(model_parts))
            return optimizers

    @overrides.override(target=optimizer.OptimizersContainer.Config)
    def witnessed(config: Any) -> Any:
        return overrides.derive(config, Config, plain=config)

    return witnessed


if importlib.util.find_spec("torchtitan.config.override"):
    witnessed = register_with_03()
else:
    register_with_02()

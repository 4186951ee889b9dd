# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for what the override uses of TorchTitan 0.3, and a trainer that goes through a run as that one does.

Run as ``python titan_standin_03.py FOLDER SETTINGS``; after every step it saves its weights in the folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

STEPS = 3
STEP: list[int] = []


class OptimizersContainer(Optimizer):
    """It is an optimizer itself, around others."""

    def __init__(self, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [SGD(part.parameters(), lr=1.0) for part in model_parts]
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class LRSchedulersContainer:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        warmup_steps: int = 7

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> tuple[int, int]:
            return self.warmup_steps, training_steps


class BaseStateDictAdapter:
    def __init__(self, model_config: Any, hf_assets_path: None) -> None:
        self.model_config = model_config
        self.from_hf_map = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}


class Qwen3StateDictAdapter(BaseStateDictAdapter):
    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: state[native] for name, native in self.from_hf_map.items()}


class Model(nn.Module):
    class Config:
        dim = 8
        layers = (types.SimpleNamespace(attention=types.SimpleNamespace(n_heads=2)),)

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.tok_embeddings = nn.Embedding(16, 8)
        self.norm = nn.RMSNorm(8)


def derive(source: Any, target: type, **deltas: Any) -> Any:
    """Copies the fields that both have."""
    return target(**{field.name: getattr(source, field.name) for field in dataclasses.fields(source)}, **deltas)


def put_in_place() -> None:
    """From now on, what is imported from torchtitan is from here."""
    parts = {
        "components.optimizer": {"LRSchedulersContainer": LRSchedulersContainer},
        "config.override": {"override": lambda **_: lambda function: function, "derive": derive},
        "observability.structured_logger": {"get_step": lambda: STEP[-1] if STEP else None},
        "protocols.state_dict_adapter": {"BaseStateDictAdapter": BaseStateDictAdapter},
        "models.tiny.model": {},
        "models.tiny.state_dict_adapter": {"Qwen3StateDictAdapter": Qwen3StateDictAdapter},
    }
    for path, contents in parts.items():
        names = ["torchtitan", *(f"torchtitan.{path[:i]}" for i, c in enumerate(path + ".") if c == ".")]
        for name in names:
            module = sys.modules.setdefault(name, types.ModuleType(name))
            module.__path__ = []
        vars(sys.modules[names[-1]]).update(contents)
    Model.Config.__module__ = "torchtitan.models.tiny.model"
    Qwen3StateDictAdapter.__module__ = "torchtitan.models.tiny.state_dict_adapter"


def main(folder: Path, settings: dict[str, Any]) -> None:
    """A run."""
    put_in_place()
    staged = importlib.import_module("stagingd_client.torchtitan.override").staged
    model = Model()
    config = staged(LRSchedulersContainer.Config(), **settings)
    assert config.warmup_steps == 7
    optimizers = OptimizersContainer([model])
    optimizers.register_step_post_hook(lambda *_: save(model, folder))
    assert config.build(optimizers=optimizers, training_steps=STEPS) == (7, STEPS)
    for step in range(1, STEPS + 1):
        STEP.append(step)
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizers.step()
    print(json.dumps([0]))


def save(model: nn.Module, folder: Path) -> None:
    """Before it is published: as the hooks are registered."""
    whole = {name: value.bfloat16() for name, value in model.state_dict().items()}
    part = folder / "part"
    torch.save(Qwen3StateDictAdapter(None, None).to_hf(whole), part)
    part.rename(folder / f"{STEP[-1]}.0")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan 0.3.x: a config override that leaves everything as it is and publishes after every step.

    --override.imports 'stagingd_client.torchtitan.override.staged={"stage": "policy"}'

What is overridden is the learning rate schedule: it is built when the optimizers are complete, and is told how many
steps there will be. Settings are the override's arguments; what is not given comes from the environment
(``STAGINGD_STAGE``, …).
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stagingd.errors import UnknownModel
from stagingd_client.torchtitan.publishing import Publishing
from stagingd_client.torchtitan.settings import PublishingSettings, unknown_torchtitan
from stagingd_client.torchtitan_names import TorchTitanNames

try:
    from torchtitan.components.optimizer import LRSchedulersContainer
    from torchtitan.config.override import derive, override
    from torchtitan.observability.structured_logger import get_step
    from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
except ImportError as missing:
    raise unknown_torchtitan("config overrides are of TorchTitan 0.3.x", missing) from missing


@dataclass(kw_only=True, slots=True)
class StagedSchedule(LRSchedulersContainer.Config):  # type: ignore[misc] # torchtitan is not typed here
    """The schedule that was there, with publishing beside it."""

    plain: LRSchedulersContainer.Config
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, *, optimizers: Any, training_steps: int, **runtime: Any) -> Any:
        """What the plain schedule builds; from now on every step of the optimizers is published."""
        settings = PublishingSettings(**self.settings)
        names = TorchTitanNames.of(_adapter(settings, optimizers.model_parts[0]))
        publishing = Publishing(settings, names, last_step=training_steps)
        optimizers.register_step_post_hook(lambda *_: publishing.after_step(optimizers.model_parts, get_step()))
        return self.plain.build(optimizers=optimizers, training_steps=training_steps, **runtime)


@override(target=LRSchedulersContainer.Config, description="publish the weights to stagingd after every step")  # type: ignore[untyped-decorator]
def staged(config: Any, **settings: Any) -> Any:
    """The override. Its arguments are those of PublishingSettings, which checks them."""
    return derive(config, StagedSchedule, plain=config, settings=settings)


def _adapter(settings: PublishingSettings, model: nn.Module) -> Any:
    """The model's state dict adapter: the one in the package that the model is from. Raises UnknownModel."""
    config: Any = model.config
    made_by = settings.adapter
    if made_by is None:
        package = type(config).__module__.rpartition(".")[0]
        found = _adapters_of(package)
        if len(found) != 1:
            raise UnknownModel(
                f"the model {type(config).__qualname__} is of the package {package or '(none)'}, whose module "
                f"state_dict_adapter has {len(found)} adapters",
                remedy="set adapter to the one to use: package.module:Class",
            )
        made_by = found[0]
    return made_by(config, None)


def _adapters_of(package: str) -> list[type]:
    name = f"{package}.state_dict_adapter"
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, BaseStateDictAdapter) and kind.__module__ == name]

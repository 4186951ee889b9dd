# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan 0.2.x: a model converter that converts nothing and publishes after every step.

    --model.converters stagingd --experimental.custom_import stagingd_client.torchtitan.converter

Settings come from the environment (``STAGINGD_STAGE``, …), or from a section ``[stagingd]`` of the config, which
``--job.custom_config_module stagingd_client.torchtitan.converter`` makes known to TorchTitan.
"""

import dataclasses
from typing import Any

from torch import nn

from stagingd.errors import UnknownModel
from stagingd_client.torchtitan.publishing import Publishing
from stagingd_client.torchtitan.settings import PublishingSettings, unknown_torchtitan
from stagingd_client.torchtitan_names import TorchTitanNames

try:
    from torchtitan.protocols.model_converter import register_model_converter
    from torchtitan.protocols.train_spec import get_train_spec
except ImportError as missing:
    raise unknown_torchtitan("model converters are of TorchTitan 0.2.x", missing) from missing


# TorchTitan looks at the types of these fields when it runs, so they are no strings here.
@dataclasses.dataclass
class Section:
    """The section ``[stagingd]``: see PublishingSettings. What is not given comes from the environment."""

    stage: str | None = None
    socket: str | None = None
    policy: str | None = None
    on_non_finite: str | None = None
    quantization: str | None = None
    every: int | None = None
    timeout_s: float | None = None
    adapter: str | None = None


@dataclasses.dataclass
class JobConfig:
    """What a custom config module adds to TorchTitan's."""

    stagingd: Section = dataclasses.field(default_factory=Section)


class StagingConverter:
    """TorchTitan makes it once the process group is there, and calls its hook after every step of all optimizers."""

    def __init__(self, job_config: Any, parallel_dims: Any) -> None:  # noqa: ARG002 - of the protocol
        section = dataclasses.asdict(getattr(job_config, "stagingd", Section()))
        settings = PublishingSettings(**{key: value for key, value in section.items() if value is not None})
        names = TorchTitanNames.of(_adapter(settings, job_config.model))
        # It is not told the step's number: the optimizer's own count has it.
        self._publishing = Publishing(settings, names, last_step=job_config.training.steps)

    def convert(self, model: nn.Module) -> None:
        """Nothing."""

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Publish."""
        self._publishing.after_step(model)


def _adapter(settings: PublishingSettings, model: Any) -> Any:
    """The model's state dict adapter. Raises UnknownModel."""
    spec = get_train_spec(model.name)
    made_by = settings.adapter or spec.state_dict_adapter
    if made_by is None:
        raise UnknownModel(
            f"the model {model.name!r} has no state dict adapter", remedy="set adapter to one: package.module:Class"
        )
    return made_by(spec.model_args[model.flavor], None)


register_model_converter(StagingConverter, "stagingd")

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What can be set of publishing: in TorchTitan's own config, else from the environment (``STAGINGD_…``)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field, ImportString
from pydantic_settings import BaseSettings, SettingsConfigDict

from stagingd.errors import UnknownModel
from stagingd.policy import Policy
from stagingd.wire import OnNonFinite


class PublishingSettings(BaseSettings):
    """Which stage to publish to, and when."""

    model_config = SettingsConfigDict(env_prefix="STAGINGD_", frozen=True, extra="forbid")

    stage: str = "policy"
    """Name of the stage."""

    socket: Path | None = None
    """The daemon's control socket; by default the one in ``STAGINGD_RUNTIME_DIR``."""

    policy: Policy = Policy.LATEST
    """What a new version does while the one before has not been read: ``latest`` replaces it, ``block`` waits."""

    on_non_finite: OnNonFinite = OnNonFinite.REJECT
    """``reject`` a version with NaN or infinite values, or ``warn``."""

    quantization: Path | None = None
    """A file that says what the trainer quantizes, and how; nothing by default."""

    every: int = Field(default=1, gt=0)
    """Steps from one version to the next. The last step is published in any case."""

    timeout_s: float = Field(default=60.0, gt=0)
    """The longest that anything waits, in seconds."""

    adapter: ImportString[Any] | None = None
    """The state dict adapter's class, as ``package.module:Class``; by default the model's own."""


def unknown_torchtitan(wanted: str, missing: ImportError) -> UnknownModel:
    """The error for a TorchTitan that lacks what a shim needs.

    Args:
        wanted: the extension point, and the versions that have it.
        missing: what could not be imported.
    """
    try:
        found = f"torchtitan {version('torchtitan')}"
    except PackageNotFoundError:
        found = "no torchtitan"
    return UnknownModel(
        f"{wanted}, but {found} is installed: {missing}",
        remedy="for 0.2.x use the model converter in stagingd_client.torchtitan.converter, for 0.3.x the override "
        "stagingd_client.torchtitan.override.staged; for others call Stage.publish after the optimizer's step",
    )

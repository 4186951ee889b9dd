# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks a stage into a trainer's optimizer steps: the fence before every one, a version after."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from stagingd_client.naming import Names
from stagingd_client.stage import Stage
from stagingd_client.torchtitan.settings import PublishingSettings

log = logging.getLogger(__name__)


class Publishing:
    """One rank's stage, and the trainer's steps.

    A version has the number of its step. Where a trainer went back to an older checkpoint, so that the step is
    not above the newest version of the stage, the version is one more than that, until the steps have caught up:
    what is trained now reaches the engines, and versions rise. All ranks count alike.

    What goes wrong with a version is raised before one of the next steps, or, after the last step, at once.

    Args:
        settings: which stage to publish to, and when.
        names: how the trainer names its tensors.
        last_step: number of the last step: it is waited for, then the stage is left. None: when the process ends.

    Raises:
        DaemonUnreachable, SocketNotTrusted: there is no daemon to talk to.
    """

    def __init__(self, settings: PublishingSettings, names: Names, last_step: int | None = None) -> None:
        self._every = settings.every
        self._last_step = last_step
        self._newest: int | None = None
        self._step: int | None = None
        self._stepping: Optimizer | None = None
        self._stage = Stage.open(
            settings.stage,
            socket=settings.socket,
            policy=settings.policy,
            on_non_finite=settings.on_non_finite,
            quantization=settings.quantization,
            timeout_s=settings.timeout_s,
            names=names,
        )
        # Of all optimizers: such a hook runs before an optimizer's own ones, of which some change what is staged (the
        # routers' biases), and also where parameters are stepped one by one in the backward pass.
        self._fence = register_optimizer_step_pre_hook(self._before_step)
        atexit.register(self.close)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepping = optimizer
        self._stage.fence()

    def after_step(self, model_parts: nn.Module | Iterable[nn.Module], step: int | None = None) -> None:
        """The optimizer has made a step: publish, if it is this one's turn.

        Args:
            model_parts: the model, or what this rank has of it.
            step: its number, counted from 1. By default as many as the optimizer has made by its own count, which
                a checkpoint brings back; where an optimizer does not count, as many as this process has.

        Raises:
            StagingError: what went wrong with this version or with the one before.
        """
        step = self._step = step if step is not None else self._count()
        last = step == self._last_step
        if last or step % self._every == 0:
            self._publish(step, model_parts)
        if last:
            self.close()

    def _count(self) -> int:
        if self._step is not None:
            return self._step + 1
        # The last that began a step: the container around the optimizers began before them.
        return steps_made(self._stepping) if self._stepping is not None else 1

    def _publish(self, step: int, model_parts: nn.Module | Iterable[nn.Module]) -> None:
        parts = [model_parts] if isinstance(model_parts, nn.Module) else list(model_parts)
        if self._newest is None:
            self._stage.declare(parts)
            self._newest = self._stage.newest_sealed or 0
        version = max(step, self._newest + 1)
        if version != step:
            log.warning("step %d is published as version %d: the stage had %d already", step, version, self._newest)
        self._newest = version
        self._stage.publish(version, parts)

    def close(self) -> None:
        """Finish the last version and leave the stage. May be called twice.

        Raises:
            StagingError: what went wrong with it.
        """
        self._fence.remove()
        atexit.unregister(self.close)
        self._stage.close()


def steps_made(optimizer: Optimizer) -> int:
    """How many steps an optimizer has made by its own count; 1 where it does not count."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(max(torch.as_tensor(count).item() for count in counts)) if counts else 1

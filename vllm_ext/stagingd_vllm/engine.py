# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's weight-transfer backend "stagingd": ``LLM(..., weight_transfer_config={"backend": "stagingd"})``.

    llm.init_weight_transfer_engine({"init_info": {"stage": "policy"}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"newer_than": 7}})  # or {"version": 8}, or {} for the newest
    llm.finish_weight_update()
    llm.reset_prefix_cache()

A thin shim over ``attachment.py``; the trainer's half is ``stagingd_client.Stage``, which needs to know of no engine.
Versions are applied in place by ``update_weights``: starting and finishing do nothing but open and close vLLM's
session. An engine that generates is paused around the three calls; cached keys and values of the weights before are
dropped by ``reset_prefix_cache``, or by pausing with ``clear_cache``.

What differs between vLLM 0.26 and 0.32, and is met by this one class:

- In 0.26 the base class has one more abstract method, the static ``trainer_send_weights``.
- Since 0.32 there are ``defers_processing`` and ``drain_pending``, whose defaults are right for it, and
  ``shutdown_weight_transfer_engine``, after which the engine can be initialized again. In 0.26 ``shutdown`` is called
  at the end of the worker only; so that a stage can be changed there, a second initialization replaces the first.
- Since 0.32 an update may be a list with an entry per worker; the worker takes its own before this is called. It also
  makes its configuration the current one around every call; 0.26 does not, and here nothing relies on it.
- ``finish_weight_update(weight_version=...)`` of 0.32 labels the outputs; the label does not reach this class.
- The base class's ``update_weights`` waits for the accelerator, and fails where there is none: so that is done here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config

from stagingd.errors import OutOfOrder
from stagingd_vllm.attachment import Attachment
from stagingd_vllm.outcomes import PEERS_S, RefusedByAll, refuse_once, together
from stagingd_vllm.place import groups_of
from stagingd_vllm.versions import EngineNotSupported, check_base

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
except ImportError as error:
    raise EngineNotSupported(
        f"vLLM {vllm.__version__} has not the weight-transfer API that is known: {error}",
        remedy="use a vLLM from 0.26 to 0.33, or the worker extension instead of the backend",
    ) from error

check_base(WeightTransferEngine, vllm.__version__)


@dataclasses.dataclass
class StagingdInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Which stage to read: the arguments of ``Attachment.to``."""

    stage: str
    socket: str | None = None
    engine: str = "engine"
    scale_rule: str = "amax"
    prefetch_gib: float = 0.0
    timeout_s: float = 60.0


@dataclasses.dataclass
class StagingdUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which version to apply, and how: the arguments of the method of ``Attachment`` that ``action`` names.

    "update" reads it in place. "prefetch" only begins to read it, beside the engine, with ``early`` as it lands, and
    "swap" makes live what was prefetched, in a session of its own; it waits up to ``timeout_s`` seconds for what is
    still being read.
    """

    action: str = "update"
    version: int | None = None
    newer_than: int | None = None
    early: bool = False
    timeout_s: float = 60.0


class StagingdEngine(WeightTransferEngine[StagingdInitInfo, StagingdUpdateInfo]):  # type: ignore[misc]
    """One worker's end of a stage. A call that one worker of the engine refuses, every one of them refuses."""

    init_info_cls = StagingdInitInfo
    update_info_cls = StagingdUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._attachment: Attachment | None = None
        worker_module = sys.modules.get("vllm.v1.worker.gpu_worker")
        if worker_module is not None:
            refuse_once(worker_module.Worker, _is_ours)

    def parse_init_info(self, init_dict: dict[str, Any]) -> StagingdInitInfo:
        """The stage to read. Raises RefusedByAll: each worker is given the same."""
        try:
            return StagingdInitInfo(**init_dict)
        except TypeError as error:
            raise RefusedByAll(f"init_info {init_dict}: {error}", remedy=_fields(StagingdInitInfo)) from error

    def init_transfer_engine(self, init_info: StagingdInitInfo) -> None:
        """Joins a stage; leaves the one joined before.

        Raises:
            RefusedByAll: what ``Attachment.to`` raised on any worker; none of them is attached then.
        """
        self.shutdown()
        try:
            with (
                together(groups_of(self.parallel_config), init_info.timeout_s + PEERS_S),
                set_current_vllm_config(self.vllm_config),
            ):
                self._attachment = Attachment.to(
                    model=self.model, vllm_config=self.vllm_config, **dataclasses.asdict(init_info)
                )
        except RefusedByAll:
            self.shutdown()
            raise

    def start_weight_update(self) -> None:
        """Nothing to prepare: versions are applied in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Applies a version on all workers; returns when all of it is there.

        Raises:
            RefusedByAll: an unknown field, or what ``Attachment.update`` raised on any worker. The weights may be of
                two versions then, until another one is applied.
        """
        timeout_s = update_info.get("timeout_s")
        waits_s = timeout_s if isinstance(timeout_s, int | float) else StagingdUpdateInfo.timeout_s
        with together(groups_of(self.parallel_config), waits_s + PEERS_S):
            self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available() and update_info.get("action") != "prefetch":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StagingdUpdateInfo) -> None:
        """Applies a version on this worker: a lease, and what it holds of the worker's part.

        Raises:
            OutOfOrder: not initialized, or the engine sleeps.
            StagingError: what else ``Attachment.update`` raises.
        """
        if self._attachment is None:
            raise OutOfOrder("this engine is attached to no stage", remedy="call init_weight_transfer_engine first")
        action, early = update_info.action, update_info.early
        which = {"version": update_info.version, "newer_than": update_info.newer_than}
        match action:
            case "update" | "swap" if early:
                raise OutOfOrder(f"{action!r} is not done early", remedy='use early with "prefetch"')
            case "update":
                self._attachment.update(**which, timeout_s=update_info.timeout_s)
            case "prefetch":
                self._attachment.prefetch(**which, early=early, timeout_s=update_info.timeout_s)
            case "swap":
                self._attachment.swap(version=update_info.version, timeout_s=update_info.timeout_s)
            case other:
                raise OutOfOrder(f"{other!r} is no action", remedy='use "update", "prefetch" or "swap"')

    def finish_weight_update(self) -> None:
        """Nothing is left to do: the version is live since ``update_weights``."""

    def shutdown(self) -> None:
        """Leaves the stage; the weights stay as they are. May be called twice."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.detach()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Refused: trainers write to a stage, not to an engine. Abstract in vLLM 0.26."""
        del iterator, trainer_args
        raise OutOfOrder("an engine does not send weights", remedy="publish them with stagingd_client.Stage")


def _is_ours(worker: Any) -> bool:
    return isinstance(worker.weight_transfer_engine, StagingdEngine)


def _fields(info: type) -> str:
    return f"give the fields {', '.join(field.name for field in dataclasses.fields(info))}"

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker extension: ``LLM(..., worker_extension_cls="stagingd_vllm.extension.StagingdWorkerExtension")``.

A thin shim over reader, plan and receiver, called by
``checked(llm.collective_rpc("stagingd_update", kwargs={...}))`` (see ``answers.py`` for ``checked``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Protocol

import torch
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from stagingd.errors import OutOfOrder, StagingError
from stagingd_vllm.answers import Answer, answering
from stagingd_vllm.plain_parameters import keep_plain_parameters
from stagingd_vllm.plan import StagedTensor
from stagingd_vllm.reader import Reader
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.skeleton import derive_plan

keep_plain_parameters()


class EngineNotSupported(StagingError):
    """The engine is spread over its workers in a way that the reader does not know."""

    code = "engine_not_supported"


@dataclasses.dataclass(frozen=True)
class Attachment:
    """What a worker holds while it is attached to a stage."""

    reader: Reader
    receiver: Receiver


class Worker(Protocol):
    """The part of a vLLM worker that the extension uses, with the extension's own state."""

    vllm_config: VllmConfig
    stagingd_attachment: Attachment | None

    def get_model(self) -> torch.nn.Module: ...


class StagingdWorkerExtension:
    """Methods that vLLM adds to its worker class; they return dicts of numbers and strings.

    The errors listed under "Raises" come back as a dict with the key ``refused``, and ``checked`` raises them.
    vLLM never calls an ``__init__`` of this class and refuses any name that the worker has already.
    """

    stagingd_attachment: Attachment | None = None

    @answering
    def stagingd_attach(
        self: Worker, stage: str, socket: str | None = None, engine: str = "engine", timeout_s: float = 60.0
    ) -> Answer:
        """Joins a stage, and derives which part of it this worker reads.

        Args:
            stage: name of the stage.
            socket: the daemon's socket; None for the usual one.
            engine: what this engine is called; its workers change versions together.
            timeout_s: seconds to wait for the stage to be declared.

        Returns:
            rank, ranks, tensors, entries, bytes_per_update, bytes_of_stage and a readable plan.

        Raises:
            OutOfOrder: already attached.
            EngineNotSupported: pipeline or data parallelism.
            PlanRefused: the stage does not fit the model, or the model is of a kind that is not understood.
        """
        if self.stagingd_attachment is not None:
            raise OutOfOrder("this worker is attached to a stage already", remedy="call stagingd_detach first")
        rank, ranks = _place(self.vllm_config.parallel_config)
        with contextlib.ExitStack() as undo:
            reader = Reader.attach(stage, engine=engine, rank=rank, ranks=ranks, socket=socket, timeout_s=timeout_s)
            undo.callback(reader.close)
            model = self.get_model()
            staged = {tensor.name: StagedTensor(tensor.dtype, tensor.shape) for tensor in reader.catalog.tensors}
            aliases = {alias.alias: alias.name for alias in reader.catalog.aliases}
            receiver = Receiver(model, derive_plan(model, self.vllm_config, staged, aliases), reader)
            undo.pop_all()
        self.stagingd_attachment = Attachment(reader, receiver)
        return {"rank": rank, "ranks": ranks, **_summary(receiver)}

    @answering
    def stagingd_update(
        self: Worker, version: int | None = None, newer_than: int | None = None, timeout_s: float = 60.0
    ) -> Answer:
        """Applies a version: the newest, or ``version``, or the first that is newer than ``newer_than``.

        The engine does not generate while it waits for the version.

        Returns:
            version, entries, bytes_read, and milliseconds spent on reading.

        Raises:
            OutOfOrder: not attached.
            DeadlineExceeded: no such version within ``timeout_s`` seconds.
            LayoutChanged: a live parameter is not where it was; nothing was written.
            LeaseLost: the weights may be a mixture of two versions; update again before generating.
        """
        attachment = attachment_of(self)
        lease = attachment.reader.lease(version=version, newer_than=newer_than, timeout_s=timeout_s)
        report = attachment.receiver.apply(lease)
        return {
            "version": report.version,
            "entries": report.entries,
            "bytes_read": report.bytes_read,
            "milliseconds": report.seconds_read * 1e3,
        }

    def stagingd_version(self: Worker) -> int | None:
        """The version that the weights hold, or None when they hold none of the stage's."""
        return self.stagingd_attachment.receiver.version if self.stagingd_attachment else None

    def stagingd_detach(self: Worker) -> None:
        """Leaves the stage; the weights stay as they are. Does nothing when not attached."""
        attachment, self.stagingd_attachment = self.stagingd_attachment, None
        if attachment is not None:
            attachment.receiver.close()
            attachment.reader.close()


def attachment_of(worker: Worker) -> Attachment:
    """What this worker holds.

    Raises:
        OutOfOrder: it is attached to no stage.
    """
    if worker.stagingd_attachment is None:
        raise OutOfOrder("this worker is attached to no stage", remedy="call stagingd_attach first")
    return worker.stagingd_attachment


def _place(parallel: ParallelConfig) -> tuple[int, int]:
    """This worker's rank in its engine, and the number of ranks."""
    for what, size in (("pipeline", parallel.pipeline_parallel_size), ("data", parallel.data_parallel_size)):
        if size > 1:
            raise EngineNotSupported(
                f"the engine has {what}_parallel_size {size}",
                remedy="use tensor parallelism alone, and one engine per data-parallel rank",
            )
    group = get_tp_group()
    return group.rank_in_group, group.world_size


def _summary(receiver: Receiver) -> Answer:
    plan = receiver.plan
    return {
        "tensors": len(plan.tensors),
        "entries": len(plan.entries),
        "bytes_per_update": plan.bytes_per_update,
        "bytes_of_stage": plan.staged_bytes,
        "unread": list(plan.unread),
        "plan": str(plan),
    }

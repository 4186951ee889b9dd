# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker extension: ``LLM(..., worker_extension_cls="stagingd_vllm.extension.StagingdWorkerExtension")``.

A thin shim over ``attachment.py``, called by
``checked(llm.collective_rpc("stagingd_update", kwargs={...}))`` (see ``answers.py`` for ``checked``).
"""

from __future__ import annotations

from typing import Protocol

import torch
from vllm.config import VllmConfig

from stagingd.errors import OutOfOrder
from stagingd_vllm.answers import Answer, answering
from stagingd_vllm.attachment import Attachment
from stagingd_vllm.plain_parameters import keep_plain_parameters
from stagingd_vllm.versions import EngineNotSupported

__all__ = ["EngineNotSupported", "StagingdWorkerExtension", "attachment_of"]

keep_plain_parameters()


class Worker(Protocol):
    """The part of a vLLM worker that the extension uses, with the extension's own state."""

    vllm_config: VllmConfig
    model_runner: object
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
        self: Worker,
        stage: str,
        socket: str | None = None,
        engine: str = "engine",
        scale_rule: str = "amax",
        prefetch_gib: float = 0.0,
        timeout_s: float = 60.0,
    ) -> Answer:
        """Joins a stage, and derives which part of it this worker reads.

        Args:
            stage: name of the stage.
            socket: the daemon's socket; None for the usual one.
            engine: what this engine is called; its workers change versions together.
            scale_rule: how scales follow from moments: "amax" as the engine itself, or "sigma:k" to clip at
                ``|mean|`` + k standard deviations.
            prefetch_gib: memory on the worker's device that prefetching may take, in GiB: as much as the weights do.
            timeout_s: seconds to wait for the stage to be declared.

        Returns:
            rank, ranks, engine, mode ("prefetch", or "in_place" and why), tensors, entries, bytes_per_update,
            bytes_of_stage and a readable plan.

        Raises:
            OutOfOrder: already attached.
            EngineNotSupported: the engine is spread over its workers in a way that is not known.
            PlanRefused: the stage does not fit the model, or the model is of a kind that is not understood.
            LayoutUnknown: the engine keeps a parameter in a way that is not known.
            ScaleRuleRefused: there is no such scale rule.
        """
        if self.stagingd_attachment is not None:
            raise OutOfOrder("this worker is attached to a stage already", remedy="call stagingd_detach first")
        self.stagingd_attachment = Attachment.to(
            stage,
            model=self.get_model(),
            vllm_config=self.vllm_config,
            runner=self.model_runner,
            socket=socket,
            engine=engine,
            scale_rule=scale_rule,
            prefetch_gib=prefetch_gib,
            timeout_s=timeout_s,
        )
        return self.stagingd_attachment.summary()

    @answering
    def stagingd_update(
        self: Worker, version: int | None = None, newer_than: int | None = None, timeout_s: float = 60.0
    ) -> Answer:
        """Applies a version: the newest, or ``version``, or the first that is newer than ``newer_than``.

        The engine does not generate while it waits for the version. It still has the keys and values that the
        weights before made of prompts: call its ``reset_prefix_cache``, or have paused it with ``clear_cache``.

        Returns:
            version, entries, bytes_read, and milliseconds spent on reading.

        Raises:
            OutOfOrder: not attached, the engine sleeps, or a version is being prefetched.
            DeadlineExceeded: no such version within ``timeout_s`` seconds.
            LayoutChanged: a live parameter is not where it was; nothing was written.
            LeaseLost: the weights may be a mixture of two versions; update again before generating.
        """
        report = attachment_of(self).update(version=version, newer_than=newer_than, timeout_s=timeout_s)
        return {
            "version": report.version,
            "entries": report.entries,
            "bytes_read": report.bytes_read,
            "milliseconds": report.seconds_read * 1e3,
        }

    @answering
    def stagingd_prefetch(
        self: Worker,
        version: int | None = None,
        newer_than: int | None = None,
        early: bool = False,
        timeout_s: float = 60.0,
    ) -> Answer:
        """Begins to read a version into memory beside the weights, and returns: the engine goes on generating.

        Which one is chosen as in ``stagingd_update``. With ``early`` one that trainers are still flushing will do,
        where no complete version will: it is read as it lands. To be followed by ``stagingd_prefetched`` and
        ``stagingd_swap``.

        Raises:
            OutOfOrder: not attached, or a version is being prefetched.
            NoRoomForShadow: versions are read in place here; why.
        """
        attachment_of(self).prefetch(version=version, newer_than=newer_than, early=early, timeout_s=timeout_s)
        return {}

    @answering
    def stagingd_prefetched(self: Worker) -> Answer:
        """Whether a version has been prefetched.

        Returns:
            ``version`` is the one that can be swapped in; None while it is waited for or read, and when none was asked
            for. ``reading`` is whether it is being read: only then another cannot be asked for.

        Raises:
            StagingError: what kept it from being read; the live weights are as they were.
        """
        attachment = attachment_of(self)
        return {"version": attachment.prefetched(), "reading": attachment.reading}

    @answering
    def stagingd_swap(
        self: Worker, version: int, timeout_s: float = 0.0, follow: bool = False, early: bool = False
    ) -> Answer:
        """Makes live what was prefetched: by one copy inside the device, on all workers or on none.

        The engine still has the keys and values that the weights before made of prompts, as after ``stagingd_update``.

        Args:
            version: which one has been prefetched.
            timeout_s: seconds to wait for what is still being read; the engine does not generate meanwhile.
            follow: then the worker waits for the next version by itself and prefetches that, with ``early`` while
                trainers still flush it: ``stagingd_prefetch`` need not be called for it.

        Returns:
            version, bytes_copied, and the milliseconds that this worker was busy.

        Raises:
            RefusedByAll: a worker does not have it, its layout changed, or it sleeps; nothing was written on any.
        """
        report = attachment_of(self).swap(version=version, timeout_s=timeout_s, follow=follow, early=early)
        return {"version": report.version, "bytes_copied": report.bytes_copied, "milliseconds": report.seconds * 1e3}

    @answering
    def stagingd_quantization_error(self: Worker, timeout_s: float = 60.0) -> Answer:
        """What quantization costs: how far the version that the weights hold lies from what is staged.

        Told of each quantized parameter (``parameters``) and of all (``total``), for the worker's scale rule and for
        "amax" beside it, which nothing live is written for: ``relative_rms_error`` (the norm of the error in
        proportion to that of the staged values), ``greatest_error``, ``clipped_share`` (beyond what the scale
        represents), ``flushed_share`` (to zero, from what was not), and the sums that these follow from. Each worker
        tells of its own slice: ``QuantizationError.of(figures)`` of several workers add up. What several workers hold
        counts with each of them.

        Takes 48 MiB on the weights' device, and a lease, which has to last as long (``stagingd serve --lease-s``).

        Returns:
            version, rank, scale_rule, total and parameters.

        Raises:
            OutOfOrder: not attached; the weights hold no version; or the stage has replaced it since.
            DeadlineExceeded: no lease within ``timeout_s`` seconds.
            LeaseLost: it took longer than a lease lasts.
        """
        return attachment_of(self).quantization_error(timeout_s)

    def stagingd_version(self: Worker) -> int | None:
        """The version that the weights hold, or None when they hold none of the stage's (``Attachment.version``)."""
        return self.stagingd_attachment.version if self.stagingd_attachment else None

    def stagingd_detach(self: Worker) -> None:
        """Leaves the stage; the weights stay as they are. Does nothing when not attached."""
        attachment, self.stagingd_attachment = self.stagingd_attachment, None
        if attachment is not None:
            attachment.detach()


def attachment_of(worker: Worker) -> Attachment:
    """What this worker holds.

    Raises:
        OutOfOrder: it is attached to no stage.
    """
    if worker.stagingd_attachment is None:
        raise OutOfOrder("this worker is attached to no stage", remedy="call stagingd_attach first")
    return worker.stagingd_attachment

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One worker of ``benchmarks.read``: what it measures, and that what it has read is right."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from stagingd_vllm.answers import Answer, answering
from stagingd_vllm.attachment import Attachment
from stagingd_vllm.exactness import Exactness
from stagingd_vllm.extension import StagingdWorkerExtension, Worker, attachment_of
from stagingd_vllm.layouts import homes
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.writer import Writer
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from benchmarks.read_check import compare
from benchmarks.read_model import SIZES

PINNED_BYTES = 2 * 2**30
CHECKED = 24
"""Parameters that are compared, spread evenly."""


class ReadWorkerExtension(StagingdWorkerExtension):
    """The extension that users name, and what the benchmark asks."""

    @answering
    def stagingd_allocated(self: Worker) -> Answer:
        """Device memory that is taken now."""
        return {"device_bytes": _reset(next(self.get_model().parameters()).device)}

    @answering
    def stagingd_measure(self: Worker, updates: int) -> Answer:
        """Seconds of reading and writing a version from its lease on, all ranks at once, and of a pinned copy."""
        attachment = attachment_of(self)
        device = attachment.receiver.device
        _reset(device)
        seconds = [_timed(device, lambda: _apply(attachment)) for _ in range(updates)]
        peak = _peak(device)
        bytes_read = attachment.receiver.plan.bytes_per_update
        return {
            "seconds": seconds,
            "bytes": bytes_read,
            "share": bytes_read / attachment.receiver.plan.staged_bytes,
            "device_bytes": peak,
            "pinned": pinned_rate(device),
        }

    @answering
    def stagingd_measure_kernel(self: Worker, updates: int) -> Answer:
        """The same seconds where a kernel reads the slot, instead of the copy engine."""
        attachment = attachment_of(self)
        receiver, reader = attachment.receiver, attachment.reader
        device = receiver.device
        writer = Writer(receiver.plan, receiver.homes, reader.catalog, ScaleRule(), device)

        def update() -> None:
            with reader.lease() as lease:
                writer.write(lease)
                _synchronize(device)

        return {"seconds": [_timed(device, update) for _ in range(updates)]}

    @answering
    def stagingd_take(self: Worker, version: int, then: int) -> Answer:
        """Makes live what was prefetched, and has another version prefetched, as ``stagingd_swap`` with ``follow``."""
        attachment = attachment_of(self)
        attachment.swap(version=version, timeout_s=1.0)  # the daemon's word comes a little before the thread's
        attachment.prefetch(version=then)
        return {}

    @answering
    def stagingd_check(self: Worker) -> Answer:
        """Some parameters, of all bytes and scales, against the stage's tensors."""
        attachment = attachment_of(self)
        plan, live = attachment.receiver.plan, homes(self.get_model())
        checked = plan.parameters[:: -(-len(plan.parameters) // CHECKED)]
        found = Exactness()
        with attachment._prefetcher.aside(), attachment.reader.lease() as lease:
            read = lease.read
            if attachment.reader.catalog.format is not None:
                needed = {entry.tensor for entry in plan.entries if entry.region.parameter in checked}
                read = _made_anew(attachment.reader.catalog.stage, lease.version, needed)
            for name in checked:
                entries = [entry for entry in plan.entries if entry.region.parameter == name]
                found += compare(live[name], plan.shapes[name], entries, read)
        return dataclasses.asdict(found) | {"exact": found.exact}

    @answering
    def stagingd_reload(self: Worker, times: int) -> Answer:
        """Seconds of vLLM's own layerwise reload, from whole tensors that are in pinned memory already."""
        attachment, model = attachment_of(self), self.get_model()
        device = next(model.parameters()).device
        with attachment._prefetcher.aside(), attachment.reader.lease() as lease:
            pinned = {
                name: lease.read(name).pin_memory() for name in (t.name for t in attachment.reader.catalog.tensors)
            }

        def reload() -> None:
            with set_current_vllm_config(self.vllm_config), device:
                initialize_layerwise_reload(model)
                model.load_weights((name, tensor.to(device, non_blocking=True)) for name, tensor in pinned.items())
                finalize_layerwise_reload(model, self.vllm_config.model_config)

        before = _reset(device)
        seconds = [_timed(device, reload) for _ in range(times)]
        return {"seconds": seconds, "device_bytes": _peak(device) - before}


def _made_anew(model: str, version: int, needed: Collection[str]) -> Callable[[str], torch.Tensor]:
    """What a trainer has quantized, as it was before: its random numbers are those of any device of the same kind."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {name: tensor for name, tensor in SIZES[model].tensors(version, device) if name in needed}
    return tensors.__getitem__


def _apply(attachment: Attachment) -> None:
    attachment.receiver.apply(attachment.reader.lease())


def _timed(device: torch.device, what: Callable[[], Any]) -> float:
    """All ranks begin together."""
    _synchronize(device)
    torch.distributed.barrier(get_tp_group().cpu_group)
    begin = time.perf_counter()
    what()
    _synchronize(device)
    return time.perf_counter() - begin


def pinned_rate(device: torch.device) -> float:
    """Bytes a second of a copy from pinned memory, all ranks at once."""
    size = PINNED_BYTES if device.type == "cuda" else 2**24
    source = (
        torch.randint(0, 255, (size,), dtype=torch.uint8).pin_memory() if device.type == "cuda" else torch.ones(size)
    )
    target = torch.empty_like(source, device=device)
    seconds = sorted(_timed(device, lambda: target.copy_(source, non_blocking=True)) for _ in range(7))
    return source.nbytes / seconds[3]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a worker of the compared engines is asked, whatever system brings it weights."""

from __future__ import annotations

import dataclasses
import importlib
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from stagingd_vllm.answers import Answer, answering
from stagingd_vllm.extension import Worker, attachment_of
from stagingd_vllm.layouts import homes
from stagingd_vllm.plan import StagedTensor
from stagingd_vllm.skeleton import derive_plan
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from benchmarks.compare.broadcast import broadcasts
from benchmarks.compare.check import Nearness, nearness
from benchmarks.read_model import SIZES
from benchmarks.read_worker import CHECKED, ReadWorkerExtension, pinned_rate

Weights = Iterable[tuple[str, torch.Tensor]]


class CompareExtension(ReadWorkerExtension):
    """vLLM adds these to its worker class; all begin with ``compare_``."""

    def compare_process(self: Worker) -> int:
        """The worker's process."""
        return os.getpid()

    @answering
    def compare_check(self: Worker, model: str, version: int) -> Answer:
        """Some parameters, of all their values, against the tensors of a version, made anew."""
        live, staged = (
            homes(self.get_model()),
            {n: StagedTensor("bfloat16", s) for n, s in SIZES[model].shapes().items()},
        )
        plan = derive_plan(self.get_model(), self.vllm_config, staged, {})
        checked = plan.parameters[:: -(-len(plan.parameters) // CHECKED)]
        entries = {name: [entry for entry in plan.entries if entry.region.parameter == name] for name in checked}
        needed = {entry.tensor for some in entries.values() for entry in some}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensors = {name: tensor for name, tensor in SIZES[model].tensors(version, device) if name in needed}
        found = sum(
            (nearness(live[name], plan.shapes[name], entries[name], tensors.__getitem__) for name in checked),
            Nearness(),
        )
        return dataclasses.asdict(found) | {"exact": found.near}

    @answering
    def compare_pinned(self: Worker) -> Answer:
        """Bytes a second of a copy from page-locked memory, all ranks at once."""
        return {"pinned": pinned_rate(_device(self))}

    @answering
    def compare_peak(self: Worker) -> Answer:
        """The most device memory since ``stagingd_allocated`` was asked."""
        device = _device(self)
        return {"device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}

    @answering
    def compare_read_bytes(self: Worker) -> Answer:
        """What stagingd's plan reads for one update."""
        return {"bytes": attachment_of(self).receiver.plan.bytes_per_update}

    @answering
    def compare_load(self: Worker, paths: Sequence[str]) -> Answer:
        """Loads what ``torch.save`` has written, by vLLM's layerwise reload."""
        device = _device(self)
        with _reloading(self):
            for path in paths:
                # Mapped, so that nothing is copied before it goes to the device; no code is run that the file names.
                saved = torch.load(Path(path), map_location="cpu", mmap=True, weights_only=True)
                self.get_model().load_weights((name, tensor.to(device)) for name, tensor in saved.items())
        return {}

    @answering
    def compare_import_buckets(self: Any) -> Answer:
        """Imports what ``compare_take_buckets`` does, before anything is timed."""
        importlib.import_module("checkpoint_engine.worker")
        return {}

    @answering
    def compare_take_buckets(self: Any, handles: dict[str, str]) -> Answer:
        """Loads what checkpoint-engine's server on this worker's device sends, by vLLM's layerwise reload."""
        import zmq  # noqa: PLC0415 - vLLM's own, and checkpoint-engine's
        from checkpoint_engine.worker import update_weights_from_ipc  # noqa: PLC0415 - only where it is installed
        from vllm.platforms import current_platform  # noqa: PLC0415

        model, device = self.get_model(), _device(self)
        with _reloading(self), zmq.Context() as context:
            update_weights_from_ipc(
                context,
                handles[current_platform.get_device_uuid(device.index)],
                device_id=device.index,
                # Copied: the reload keeps tensors until it has a whole layer, and buckets are written over.
                run=lambda weights: model.load_weights((name, tensor.clone()) for name, tensor in weights),
            )
        return {}

    @answering
    def compare_broadcast(self: Any, sizes: Sequence[int], times: int) -> Answer:
        """Seconds in which broadcasts of these sizes arrive by vLLM's NCCL group, and go nowhere."""
        group, device = self.weight_transfer_engine.model_update_group, _device(self)
        buffer = torch.empty(max(sizes), dtype=torch.uint8, device=device)
        return {"seconds": statistics.median(broadcasts(group, buffer, sizes, times))}


@contextmanager
def _reloading(worker: Any) -> Iterator[None]:
    """What is loaded meanwhile goes, layer by layer, where the live weights are."""
    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config), _device(worker):
        initialize_layerwise_reload(model)
        yield
        finalize_layerwise_reload(model, worker.vllm_config.model_config)


def _device(worker: Any) -> torch.device:
    found = worker.device
    return found if isinstance(found, torch.device) else torch.device(found)

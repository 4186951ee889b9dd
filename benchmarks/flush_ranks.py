# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""One trainer rank of ``benchmarks.flush``: what it measures, and that what it staged is right."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from stagingd_client import Publication, Stage
from stagingd_client.placement import held
from stagingd_client.quantize import quantized
from stagingd_vllm import Lease, Reader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.flush_case import FLUSHES_PER_STEP, Case, Found
from benchmarks.flush_model import SHAPES, Sharded, build
from benchmarks.scale_groups import quantization
from stagingd.boxes import Box
from stagingd.catalog import Catalog
from stagingd.format_scales import scales
from stagingd.formats import Quantization
from stagingd.moments import FIELD_BYTES, FIELDS, Grid, cells_of
from stagingd.segment import SHARED_MEMORY

WARM_UP = 2
"""Versions before the timed ones: the two slots' first."""
PINNED_BYTES = 2 * 2**30
PINNED_REPETITIONS = 7
REPETITIONS = 3
"""Of the blocking alternatives."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    case: Case
    rank: int
    socket: Path
    rendezvous: Path
    results: Connection


def work(place: Place) -> None:
    """One rank, from start to end; sends what it found."""
    case = place.case
    cuda = case.device == "cuda"
    if cuda:
        torch.cuda.set_device(place.rank)
    else:
        torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{place.rendezvous}",
        rank=place.rank,
        world_size=case.ranks,
        device_id=torch.device("cuda", place.rank) if cuda else None,
    )
    try:
        place.results.send(Rank(place).measure())
    finally:
        dist.destroy_process_group()


class Rank:
    """One rank's measurements."""

    def __init__(self, place: Place) -> None:
        self._begun = time.perf_counter()
        self._case = place.case
        self._rank = place.rank
        self._socket = place.socket
        self._cuda = place.case.device == "cuda"
        mesh = init_device_mesh(place.case.device, (place.case.ranks,))
        self._model: Sharded = build(SHAPES[place.case.model], mesh)
        self._found = Found(self._model.staged_bytes)
        self._version = 0

    def measure(self) -> Found:
        """Everything that the case asks for."""
        self._say("the model stands")
        self._measure_pinned()
        before = self._device_bytes()
        options = {"quantization": self._quantization(), "timeout_s": 300.0}
        with Stage.open("policy", socket=self._socket, names=self._model.names, **options) as stage:
            stage.declare(self._model.module)
            self._say("declared")
            self._found.held_bytes = stage.catalog.tensor_bytes
            self._found.segment_bytes = stage._segment.size if self._rank == 0 and stage._segment else 0
            self._found.moments_bytes = _moments_bytes(stage)
            self._measure_versions(stage)
            self._found.device_bytes = self._device_peak() - before
            self._say(f"versions are measured: {self._found.flush_of_step * 1e3:.1f} ms from publish to sealed")
            self._check(stage)
            self._say("what was staged is right")
            if self._case.steps and SHAPES[self._case.model].trains:
                self._measure_steps(stage)
        self._say("steps are measured")
        if self._case.gather:
            self._measure_gather()
        if self._case.checkpoint:
            self._measure_checkpoint()
        self._say("done")
        return self._found

    def _say(self, what: str) -> None:
        """Tell how far it is: a case takes minutes."""
        if self._rank == 0:
            print(
                f"{time.perf_counter() - self._begun:7.1f} s  {self._case.label}: {what}", file=sys.stderr, flush=True
            )

    def _quantization(self) -> Quantization | None:
        if self._case.stage_format is None:
            return None
        names = {
            named.name
            for name, parameter in self._model.module.named_parameters()
            if (part := held(name, parameter)) is not None
            for named in self._model.names.shards(name, part)
        }
        everybodys: list[set[str]] = [set() for _ in range(self._case.ranks)]
        dist.all_gather_object(everybodys, names)
        return quantization(self._case.stage_format, set().union(*everybodys), "cuda" if self._cuda else "cpu")

    # Ceilings

    def _measure_pinned(self) -> None:
        source = torch.randint(0, 255, (PINNED_BYTES if self._cuda else 2**24,), dtype=torch.uint8, device=self._device)
        target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=self._cuda)

        def copy() -> None:
            target.copy_(source, non_blocking=True)
            self._synchronize()

        alone = [self._timed(copy) for _ in range(PINNED_REPETITIONS)] if self._rank == 0 else []
        dist.barrier()
        self._found.pinned_alone = source.nbytes / _median(alone) if alone else 0.0
        together = []
        for _ in range(PINNED_REPETITIONS):
            dist.barrier()
            together.append(self._timed(copy))
        self._found.pinned_together = source.nbytes / _median(together)

    # Versions

    def _measure_versions(self, stage: Stage) -> None:
        for number in range(WARM_UP + self._case.versions):
            self._change()
            self._synchronize()
            dist.barrier()
            begin = time.perf_counter()
            publication = self._publish(stage)
            published = time.perf_counter()
            publication.wait()
            end = time.perf_counter()
            if number >= WARM_UP:
                self._found.flush.append((begin, end))
                self._found.published.append(published - begin)
        self._found.flush_of_step = _median([end - begin for begin, end in self._found.flush])

    def _publish(self, stage: Stage) -> Publication:
        self._version += 1
        return stage.publish(self._version, self._model.module)

    def _change(self) -> None:
        """Every version has values of its own."""
        with torch.no_grad():
            for parameter in self._model.module.parameters():
                assert isinstance(parameter, DTensor)
                parameter.to_local().mul_(1.01)

    def _check(self, stage: Stage) -> None:
        """Read this rank's own boxes of the newest version back, and compare them bit for bit."""
        engine = f"check-{self._rank}"
        with (
            Reader.attach(stage.name, engine=engine, rank=0, ranks=1, socket=self._socket) as reader,
            reader.lease() as lease,
        ):
            for name, parameter in self._model.module.named_parameters():
                part = held(name, parameter)
                for named in self._model.names.shards(name, part) if part is not None else ():
                    wanted = named.part.values.bfloat16().reshape(named.part.box.lengths)
                    if stage.catalog.tensor(named.name).quantized_from is not None:
                        wanted = _as_quantized(stage.catalog, lease, named.name, named.part.box, wanted)
                    staged = lease.read(named.name, named.part.box).to(wanted.device)
                    if not torch.equal(staged.view(torch.uint8), wanted.view(torch.uint8)):
                        raise RuntimeError(f"tensor {named.name} is not staged as it was put")
            amax = max(
                float(lease.moments(tensor.name, Grid.TENSOR).amax.max()) for tensor in stage.catalog.tensors[:3]
            )
            if not amax > 0:
                raise RuntimeError("there are no moments")

    # Steps

    def _measure_steps(self, stage: Stage) -> None:
        module = self._model.module
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
        fences: list[float] = []

        def fence(*_: object) -> None:
            begin = time.perf_counter()
            stage.fence()
            fences.append(time.perf_counter() - begin)

        optimizer.register_step_pre_hook(fence)
        microbatches = self._microbatches(optimizer)
        self._steps(optimizer, microbatches, 2, stage)
        self._found.published.clear()
        for _ in range(self._case.rounds):
            self._found.plain_steps += self._steps(optimizer, microbatches, self._case.steps, None)
            fences.clear()
            self._found.staged_steps += self._steps(optimizer, microbatches, self._case.steps, stage)
            self._found.fenced += fences
        optimizer.zero_grad()

    def _microbatches(self, optimizer: torch.optim.Optimizer) -> int:
        """So many that a step takes four flushes, the same on all ranks."""
        self._steps(optimizer, 1, 2, None)
        one = _median(self._steps(optimizer, 1, 3, None))
        need = torch.tensor([FLUSHES_PER_STEP * self._found.flush_of_step / one], device=self._device)
        dist.all_reduce(need, dist.ReduceOp.MAX)
        return max(1, min(64, int(need.item()) + 1))

    def _steps(
        self, optimizer: torch.optim.Optimizer, microbatches: int, count: int, stage: Stage | None
    ) -> list[float]:
        """Seconds of one step: the mean of several that follow each other, since they overlap."""
        self._synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            for _ in range(microbatches):
                tokens = torch.randint(0, self._model.vocabulary, (1, self._case.step_tokens), device=self._device)
                logits = self._model.module(tokens)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if stage is not None:
                start = time.perf_counter()
                self._publish(stage)
                self._found.published.append(time.perf_counter() - start)
        self._synchronize()
        return [(time.perf_counter() - begin) / count]

    # What people do without stagingd

    def _measure_gather(self) -> None:
        """Gather every tensor on all ranks; one rank copies it to pinned host memory, in bf16."""
        largest = max(parameter.numel() for parameter in self._model.module.parameters())
        target = torch.empty(largest, dtype=torch.bfloat16, pin_memory=self._cuda)

        def gather() -> None:
            for parameter in self._model.module.parameters():
                assert isinstance(parameter, DTensor)
                full = parameter.detach().full_tensor()
                if self._rank == 0:
                    target[: full.numel()].copy_(full.bfloat16().flatten(), non_blocking=True)
            self._synchronize()

        for number in range(REPETITIONS + 1):
            dist.barrier()
            seconds = self._timed(gather)
            if number:
                self._found.gathered.append(seconds)

    def _measure_checkpoint(self) -> None:
        """torch's own asynchronous staging into pinned memory: in the parameters' dtype, without statistics.

        Once, since torch 2.11's stager cannot stage a second time: the memory is pinned anew for every checkpoint.
        """
        if not self._cuda:
            self._found.notes.append("torch's pinned checkpoint staging needs a GPU")
            return
        need = sum(parameter.numel() * parameter.element_size() for parameter in self._model.module.parameters())
        room = min(psutil.virtual_memory().available, shutil.disk_usage(SHARED_MEMORY).free)
        if need * 1.1 > room:
            self._found.notes.append(
                f"torch's checkpoint staging needs {need / 2**30:.0f} GiB more of pinned shared memory, of which "
                "there is less: not measured"
            )
            return
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # noqa: PLC0415

        stager = DefaultStager(StagingOptions(True, True, True, True))
        dist.barrier()
        begin = time.perf_counter()
        staging = stager.stage(dict(self._model.module.named_parameters()))
        blocked = time.perf_counter() - begin
        staging.result()  # type: ignore[union-attr]
        self._found.checkpointed.append((blocked, time.perf_counter() - begin))
        stager.close()

    # The device

    @property
    def _device(self) -> torch.device:
        return torch.device(self._case.device, self._rank if self._cuda else None)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _timed(self, what: Callable[[], None]) -> float:
        self._synchronize()
        begin = time.perf_counter()
        what()
        return time.perf_counter() - begin

    def _device_bytes(self) -> int:
        if not self._cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    def _device_peak(self) -> int:
        return torch.cuda.max_memory_reserved() if self._cuda else 0


def _as_quantized(catalog: Catalog, lease: Lease, name: str, box: Box, values: torch.Tensor) -> torch.Tensor:
    """What a box's values are in the stage's format, by the moments of whole cells that a reader finds."""
    assert catalog.format is not None  # else nothing is quantized
    grid = catalog.format.grid
    if grid is Grid.TENSOR:
        group = [lease.moments(one.name, grid).amax.max() for one in catalog.group_of(catalog.tensor(name))]
        limits = np.full((1,) * values.dim(), max(group), np.float32)
    else:
        limits = lease.moments(name, grid, box).amax
    made = torch.from_numpy(scales(catalog.format, catalog.device, limits)).to(values.device)
    return quantized(values, made, catalog.format, box, catalog.tensor(name).shape)


def _moments_bytes(stage: Stage) -> int:
    """What moments of tensors and rows alone take in a slot."""
    tensors, catalog = stage.catalog.tensors, stage.catalog
    cells = sum(
        cells_of(grid, tensors[owned.tensor].shape, Box(*owned.box)).volume
        for owned in catalog.owned
        for grid in (Grid.TENSOR, Grid.ROW)
        if tensors[owned.tensor].has_moments
    )
    return cells * FIELD_BYTES * len(FIELDS)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

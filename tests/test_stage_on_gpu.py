# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers whose shards are on a GPU, on a real daemon. ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from daemons import RunningDaemon
from stagingd_client import LocalShard, Stage
from stagingd_client.moments import shard_moments
from stagingd_client.queues import SlowerPath
from stagingd_vllm import Reader

from stagingd.boxes import Box, whole
from stagingd.moments import ALL_GRIDS

pytestmark = pytest.mark.gpu

LONG_CYCLES = 4_000_000_000
"""Of torch.cuda._sleep: seconds, so that whatever waits for the GPU shows."""


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    return {
        "embed": noise(5001, 1024),
        "norm": noise(1024) + 1,
        "odd": noise(333, 77).half(),
        "experts": noise(6, 200, 320).bfloat16(),
        "scalar": noise(),
        "counts": torch.arange(9, device="cuda"),
        **{f"expert.{i}": noise(768, 256) for i in range(40)},
    }


@pytest.fixture
def stage(own_daemon: RunningDaemon, stage_name: str) -> Iterator[Stage]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPath)
        with Stage.open(stage_name, rank=0, ranks=1, socket=own_daemon.socket) as opened:
            yield opened


def put_all(stage: Stage, version: int, tensors: dict[str, torch.Tensor]) -> None:
    stage.begin(version)
    for name, tensor in tensors.items():
        stage.put(name, tensor)


def check(daemon: RunningDaemon, stage: Stage, wanted: dict[str, torch.Tensor]) -> None:
    with Reader.attach(stage.name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
        with reader.lease() as lease:
            for name, tensor in wanted.items():
                staged = tensor.bfloat16() if tensor.is_floating_point() else tensor
                assert torch.equal(lease.read(name), staged.cpu()), name
                if not tensor.is_floating_point():
                    continue
                box: Box = whole(tuple(tensor.shape))
                for grid, cells in shard_moments(staged.cpu(), box, ALL_GRIDS).items():
                    found = lease.moments(name, grid)
                    assert torch.equal(torch.from_numpy(np.atleast_1d(found.amax).copy()).flatten(), cells.amax), (
                        name,
                        grid,
                    )
                    variance = torch.from_numpy(np.atleast_1d(found.variance)).flatten()
                    torch.testing.assert_close(variance, cells.m2 / cells.count.clamp_min(1), rtol=1e-4, atol=1e-6)


def test_versions_from_a_gpu_are_what_was_put(own_daemon: RunningDaemon, stage: Stage) -> None:
    stage.declare(weights(0))
    for version in (1, 2, 3):
        put_all(stage, version, weights(version))
        stage.commit().wait()
        check(own_daemon, stage, weights(version))


def test_neither_put_nor_commit_nor_fence_waits_for_the_gpu(own_daemon: RunningDaemon, stage: Stage) -> None:
    tensors = weights(0)
    stage.declare(tensors)
    put_all(stage, 1, tensors)
    stage.commit().wait()  # scratch memory and kernels are there now
    old = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in weights(1).values():
        tensor.zero_()  # CUDA loads a kernel when it is first called, and that waits for the GPU
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    put_all(stage, 2, tensors)
    publication = stage.commit()
    stage.fence()
    for tensor in tensors.values():
        tensor.zero_()  # queued behind the fence
    assert not asleep.query()  # all of that came back while the GPU had not even begun
    publication.wait()
    check(own_daemon, stage, old)
    assert all(not tensor.any() for tensor in tensors.values())


def test_what_several_streams_compute_is_waited_for_on_each_of_them(own_daemon: RunningDaemon, stage: Stage) -> None:
    tensors, new = weights(0), weights(1)
    stage.declare(tensors)
    put_all(stage, 1, tensors)
    stage.commit().wait()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    stage.begin(2)
    for number, (name, tensor) in enumerate(tensors.items()):
        with torch.cuda.stream(streams[number % len(streams)]):
            if number < len(streams):
                torch.cuda._sleep(LONG_CYCLES)
            tensor.copy_(new[name])
            stage.put(name, tensor)
    stage.commit().wait()
    check(own_daemon, stage, new)


def test_without_the_fence_the_same_check_finds_new_values(own_daemon: RunningDaemon, stage: Stage) -> None:
    tensors = weights(0)
    stage.declare(tensors)
    put_all(stage, 1, tensors)
    stage.commit().wait()
    old = {name: tensor.clone() for name, tensor in tensors.items()}
    from stagingd_client import flushers  # noqa: PLC0415

    read = flushers.Flushers.flush
    late = torch.cuda.Stream()

    def after_the_change(self: flushers.Flushers, *given: object) -> list[flushers.Read]:
        late.synchronize()  # the GPU has changed the tensors by now, as without a fence it may
        return read(self, *given)  # type: ignore[arg-type]

    flushers.Flushers.flush = after_the_change  # type: ignore[method-assign, assignment]
    try:
        put_all(stage, 2, tensors)
        with torch.cuda.stream(late):
            for tensor in tensors.values():
                tensor.zero_()
        stage.commit().wait()
    finally:
        flushers.Flushers.flush = read  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        check(own_daemon, stage, old)


def test_columns_and_rows_of_two_ranks_on_one_gpu_become_one_tensor(own_daemon: RunningDaemon, stage_name: str) -> None:
    full = torch.randn(640, 1000, device="cuda")
    ranks = [Stage.open(stage_name, rank=rank, ranks=2, socket=own_daemon.socket) for rank in (0, 1)]
    parts = [
        LocalShard(full[:, :410], (640, 1000), (0, 0)),
        LocalShard(full[:, 410:], (640, 1000), (0, 410)),
    ]
    declared = [stage._background.submit(stage.declare, {"w": part}) for stage, part in zip(ranks, parts, strict=True)]
    for one in declared:
        one.result(30)
    for stage, part in zip(ranks, parts, strict=True):
        stage.begin(1)
        stage.put("w", part)
    for publication in [stage.commit() for stage in ranks]:
        publication.wait()
    check(own_daemon, ranks[0], {"w": full})
    for stage in ranks:
        stage.close()


def test_memory_of_the_device_is_bounded(own_daemon: RunningDaemon, stage: Stage) -> None:
    tensors = {f"w{i}": torch.randn(4096, 8192, device="cuda") for i in range(20)}  # 2.7 GB
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stage.declare(tensors)
    put_all(stage, 1, tensors)
    stage.commit().wait()
    assert torch.cuda.max_memory_allocated() - before <= 256 * 2**20
    check(own_daemon, stage, {"w3": tensors["w3"]})

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Versions through a shadow: the live weights do not change until it is copied, and are then those of an update in
place, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from live_model import SCHEMES, Parallel, tensors
from private_stage import PrivateStage, by_rows, private_stage
from queued_device import QueuedDevice
from stagingd_vllm.copy_engine import CopyEngine, Paced
from stagingd_vllm.layouts import homes
from stagingd_vllm.pace import Pace, Steps
from stagingd_vllm.plan import Computed, PlanEntry, ReadPlan, Region
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.shadow import GIB, NoRoomForShadow, Shadow
from stagingd_vllm.writer import Writer

from stagingd.boxes import whole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage() -> Iterator[PrivateStage]:
    full = tensors(1)
    with private_stage(full, {name: by_rows(tensor.shape, 3) for name, tensor in full.items()}) as made:
        made.write(1, full)
        made.write(2, tensors(2))
        yield made


def shadow_of(
    worker: Parallel,
    stage: PrivateStage,
    budget: float = GIB,
    device: torch.device = CPU,
    through: Paced | None = None,
) -> Shadow:
    return Shadow(worker.plan, homes(worker.model), stage.catalog, ScaleRule(), device, budget, through)


def paced(device: Any, mark: Callable[[], Any]) -> Paced:
    return Paced(CopyEngine(device, 16 * 1024), Pace(Steps(mark)))


def memory(worker: Parallel) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        for name, tensor in worker.model.state_dict().items()
    }


def write(shadow: Shadow, stage: PrivateStage, version: int) -> None:
    lease = stage.lease(version)
    shadow.write(lease)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_swap_gives_what_an_update_in_place_gives(stage: PrivateStage, scheme: str, ranks: int) -> None:
    updated, swapped = Parallel(scheme, ranks - 1, ranks), Parallel(scheme, ranks - 1, ranks)
    receiver = Receiver(updated.model, updated.plan, stage)
    taking, shadow = Receiver(swapped.model, swapped.plan, stage), shadow_of(swapped, stage)
    for version in (1, 2):
        before = memory(swapped)
        write(shadow, stage, version)
        assert memory(swapped) == before
        taking.take(shadow, version)
        receiver.apply(stage.lease(version))
        assert memory(swapped) == memory(updated) != before
        assert taking.version == version


def test_the_version_before_can_be_swapped_in_again(stage: PrivateStage) -> None:
    worker = Parallel("fp8_per_block", 0, 1)
    receiver, shadow = Receiver(worker.model, worker.plan, stage), shadow_of(worker, stage)
    seen = []
    for version in (1, 2, 1):
        write(shadow, stage, version)
        receiver.take(shadow, version)
        seen.append(memory(worker))
    assert seen[0] == seen[2] != seen[1]


def test_a_shadow_that_is_written_twice_holds_the_second_version_whole(stage: PrivateStage) -> None:
    worker, other = Parallel("fp8_per_channel", 0, 1), Parallel("fp8_per_channel", 0, 1)
    shadow = shadow_of(worker, stage)
    write(shadow, stage, 1)
    write(shadow, stage, 2)
    Receiver(worker.model, worker.plan, stage).take(shadow, 2)
    Receiver(other.model, other.plan, stage).apply(stage.lease(2))
    assert memory(worker) == memory(other)


@contextmanager
def one_parameter(live: torch.Tensor) -> Iterator[tuple[torch.nn.Module, ReadPlan, PrivateStage]]:
    """A stage of one tensor that fills the first two rows of a live parameter."""
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(live, requires_grad=False))
    region = Region("w", 0, (2, live.shape[1]), (live.shape[1], 1))
    plan = ReadPlan((PlanEntry("w", "bfloat16", whole(region.shape), region),), 0)
    staged = {"w": torch.ones(region.shape, dtype=torch.bfloat16)}
    with private_stage(staged) as stage:
        stage.write(1, staged)
        yield model, plan, stage


@pytest.mark.parametrize("columns", [slice(0, 5), slice(None), slice(0, 7, 2)])
def test_what_no_read_fills_stays_as_it_is_whatever_the_strides(columns: slice) -> None:
    around = torch.full((3, 7), 7, dtype=torch.bfloat16)
    with one_parameter(around[:, columns]) as (model, plan, stage):
        shadow = Shadow(plan, homes(model), stage.catalog, ScaleRule(), CPU, GIB)
        write(shadow, stage, 1)
        shadow.copy_to_live()
    expected = torch.full((3, 7), 7, dtype=torch.bfloat16)
    expected[:2, columns] = 1
    assert around.equal(expected)


def test_a_shadow_takes_as_much_as_the_weights_and_not_a_byte_more_than_allowed(stage: PrivateStage) -> None:
    worker = Parallel("fp8_per_tensor", 0, 1)
    live = [
        tensor for home in homes(worker.model).values() for tensor in (home.weight, home.scale) if tensor is not None
    ]
    size = sum(tensor.nbytes for tensor in live)
    assert shadow_of(worker, stage, size).bytes == size
    with pytest.raises(NoRoomForShadow, match=r"0\.00 GiB are allowed.*in place, where generation stops"):
        shadow_of(worker, stage, size - 1)


def test_tensors_that_only_the_models_own_loader_can_take_are_read_in_place(stage: PrivateStage) -> None:
    worker = Parallel("plain", 0, 1)
    computed = Computed("a_log", 8, ("a",), "the loader computes")
    with pytest.raises(NoRoomForShadow, match="a_log goes through the model's own loader"):
        Shadow(replace(worker.plan, computed=(computed,)), homes(worker.model), stage.catalog, ScaleRule(), CPU, GIB)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_by_way_of_a_copy_engine_the_same_is_written(stage: PrivateStage, scheme: str, rank: int, beside: bool) -> None:
    updated, brought = Parallel(scheme, rank, 2), Parallel(scheme, rank, 2)
    device = QueuedDevice(rank)
    through = paced(device, device.computing.mark)
    live = homes(brought.model)
    writer = Writer(brought.plan, live, stage.catalog, ScaleRule(), CPU, beside=beside, through=through.copies)
    receiver = Receiver(updated.model, updated.plan, stage)
    for version in (1, 2):
        lease = stage.lease(version)
        with through.at_work():
            writer.write(lease)
        device.synchronize()
        receiver.apply(stage.lease(version))
        assert memory(brought) == memory(updated)


@pytest.mark.gpu
@pytest.mark.parametrize("by_copy_engine", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_swap_on_a_gpu_gives_what_an_update_in_place_gives(
    stage: PrivateStage, scheme: str, by_copy_engine: bool
) -> None:
    """The engine's stream computes with the live weights until the copy, and the next version waits for that."""
    worker, device = Parallel(scheme, 1, 2, "cuda"), torch.device("cuda", 0)
    receiver = Receiver(worker.model, worker.plan, stage)
    try:
        updated = []
        for version in (1, 2):
            receiver.apply(stage.lease(version))
            updated.append(memory(worker))
        shadow = shadow_of(worker, stage, device=device, through=on_gpu(device) if by_copy_engine else None)
        swapped = []
        for version in (1, 2, 1):
            write(shadow, stage, version)
            receiver.take(shadow, version)
            write(shadow, stage, 3 - version)  # at once: the copy may still be under way
            swapped.append(memory(worker))
    finally:
        receiver.close()
    assert swapped == [*updated, updated[0]]
    assert updated[0] != updated[1]


def on_gpu(device: torch.device) -> Paced:
    from stagingd_vllm.cuda_copies import CudaCopies, mark_current  # noqa: PLC0415 - there is none without CUDA

    return paced(CudaCopies(device), partial(mark_current, device))


@pytest.mark.gpu
def test_a_gpu_that_has_too_little_memory_left_is_told_of(stage: PrivateStage) -> None:
    worker = Parallel("plain", 0, 1, "cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(NoRoomForShadow, match="cuda:0 has less left"):
            shadow_of(worker, stage, device=torch.device("cuda", 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

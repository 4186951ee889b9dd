# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""By way of a copy engine and its buffers, live memory becomes what the reference makes it, in whatever order the
device does what it was given; and how much it is given at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from move_sets import MoveSet, aligned, move_sets
from queued_device import RATE, CopyRefused, QueuedDevice
from stagingd_vllm.carriers import copy_engine
from stagingd_vllm.copy_engine import BUFFERS, FIRST_RATE, CopyEngine
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import Move, MoveRefused, Treatment
from stagingd_vllm.pace import Pace, Steps

BUFFER = 4096
MIB = 2**20


class Admitting:
    """Admits everything at once; ``asked`` are the seconds that it was asked for."""

    def __init__(self, *, idle: bool) -> None:
        self.idle = idle
        self.asked: list[float] = []

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def admit(self, seconds: float) -> None:
        self.asked.append(seconds)


PACES = st.sampled_from((None, Admitting(idle=False), Admitting(idle=True)))


def carry(engine: CopyEngine, moves: list[Move], slot: torch.Tensor, pace: Any = None) -> None:
    """At a pace, or, without one, all at once."""
    with nullcontext() if pace is None else engine.paced(pace):
        engine.carrier(moves, beside=pace is not None).carry(slot)


def expected(made: MoveSet, slot: torch.Tensor) -> torch.Tensor:
    live = aligned(made.live.numel())
    live.copy_(made.live)
    run_moves(made.at(live.data_ptr()), slot)
    return live


@settings(deadline=None, max_examples=100)
@given(move_sets(), PACES, st.integers(0, 2**32))
def test_one_version_after_another_is_carried_whole(made: MoveSet, pace: Admitting | None, seed: int) -> None:
    made = MoveSet([move for move in made.moves if move.treatment is not Treatment.PEAK], made.slot, made.live)
    live = aligned(made.live.numel())
    live.copy_(made.live)
    device = QueuedDevice(seed)
    engine = CopyEngine(device, BUFFER)
    for slot in (made.slot, made.slot.clone().zero_(), made.slot):
        placed = aligned(slot.numel())
        placed.copy_(slot)
        carry(engine, made.at(live.data_ptr()), placed, pace)
        device.synchronize()
        placed.fill_(0x77)  # the slot has been given back
        assert torch.equal(live, expected(made, slot))


def rows(number: int, columns: int = 512) -> tuple[list[Move], torch.Tensor, torch.Tensor]:
    """Matrices that fill a small buffer each, their slot, and where they go."""
    slot, live = aligned(number * 2 * columns), aligned(number * 2 * columns)
    slot.copy_(torch.arange(slot.numel()) % 251)
    one = Move(0, columns, 1, 1, columns, 0, columns, 1, "bfloat16", "bfloat16", Treatment.COPY)
    moves = [replace(one, source=2 * columns * n, target=live.data_ptr() + 2 * columns * n) for n in range(number)]
    return moves, slot, live


def test_while_nobody_generates_two_buffers_are_on_their_way_and_no_more() -> None:
    moves, slot, live = rows(40)
    device = QueuedDevice()
    on_their_way = []

    class Looking(Admitting):
        def admit(self, seconds: float) -> None:
            super().admit(seconds)
            begun = len(self.asked) - 1
            on_their_way.append(begun - device.computing.done // 2)  # a wait and the moves, for each

    carry(CopyEngine(device, BUFFER), moves, slot, Looking(idle=True))
    assert max(on_their_way) <= BUFFERS
    device.synchronize()
    assert torch.equal(live, slot)


@pytest.mark.parametrize("pace", [None, Admitting(idle=False)])
def test_while_it_generates_or_stands_for_it_the_host_waits_for_no_copy(pace: Admitting | None) -> None:
    moves, slot, live = rows(40)
    device = QueuedDevice()
    carry(CopyEngine(device, BUFFER), moves, slot, pace)
    assert device.computing.done == device.copying.done == 0
    device.synchronize()
    assert torch.equal(live, slot)


@pytest.mark.parametrize("seed", range(5))
def test_copies_wait_for_the_inputs_of_their_step(seed: int) -> None:
    moves, slot, live = rows(4)
    device = QueuedDevice(seed)
    steps = Steps(device.computing.mark)
    engine = CopyEngine(device, BUFFER)
    crossed_before = list[float]()
    with engine.paced(Pace(steps)):
        device.computing.work(lambda: crossed_before.append(device.now))
        steps.began()
        steps.began()
        engine.carrier(moves).carry(slot)
    device.synchronize()
    assert crossed_before == [0.0]
    assert torch.equal(live, slot)


@pytest.mark.parametrize("seed", range(5))
def test_copies_wait_for_what_the_device_was_given_before_a_version(seed: int) -> None:
    moves, slot, live = rows(4)
    device = QueuedDevice(seed)
    engine = CopyEngine(device, BUFFER)
    crossed_before = list[float]()
    device.compute(lambda: crossed_before.append(device.now))
    engine.begin()
    carry(engine, moves, slot)
    device.synchronize()
    assert crossed_before == [0.0]
    assert torch.equal(live, slot)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_computed_ahead_comes_before_what_follows_and_waits_for_no_treatment(seed: int) -> None:
    device = QueuedDevice(seed)
    engine = CopyEngine(device, BUFFER)
    done = list[str]()
    device.computing.when(lambda: "ahead" in done)  # a treatment that lasts so long
    with engine.ahead():
        device.compute(lambda: done.append("ahead"))
    device.compute(lambda: done.append("after"))
    device.synchronize()
    assert done == ["ahead", "after"]


def test_the_pace_is_asked_for_what_the_last_copies_took() -> None:
    moves, slot, _ = rows(8, columns=MIB // 2)
    device = QueuedDevice()
    pace = Admitting(idle=True)
    carry(CopyEngine(device, MIB + 4096), moves, slot, pace)
    device.synchronize()
    assert pace.asked[:BUFFERS] == [MIB / FIRST_RATE] * BUFFERS, "nothing has crossed yet"
    assert pace.asked[-1] == pytest.approx(MIB / RATE)


def test_what_was_handed_over_before_a_copy_failed_is_waited_for() -> None:
    moves, _, _ = rows(3)
    apart = [replace(move, source=move.source // 1024 * 512 * 1024) for move in moves]
    device = QueuedDevice()
    device.refused = 128
    with pytest.raises(CopyRefused):
        carry(CopyEngine(device, MIB), [*apart[:2], replace(apart[2], columns=64)], aligned(2 * MIB))
    device.synchronize()
    assert not device.copying.waiting


def test_a_slot_that_is_too_small_is_refused() -> None:
    moves, slot, _ = rows(2)
    with pytest.raises(MoveRefused, match="reach to byte 2048 of a slot of 2047"):
        carry(CopyEngine(QueuedDevice(), BUFFER), moves, slot[:-1])


@pytest.mark.gpu
@settings(deadline=None, max_examples=20)
@given(move_sets(), PACES)
def test_on_a_gpu_one_version_after_another_is_carried_whole(made: MoveSet, pace: Admitting | None) -> None:
    from stagingd_vllm.cuda_copies import CudaCopies  # noqa: PLC0415 - there is no such module without CUDA

    made = MoveSet([move for move in made.moves if move.treatment is not Treatment.PEAK], made.slot, made.live)
    live = aligned(made.live.numel(), "cuda")
    engine = CopyEngine(CudaCopies(torch.device("cuda", 0)), BUFFER)
    for slot in (made.slot, made.slot.clone().zero_(), made.slot):
        live.copy_(made.live)
        placed = aligned(slot.numel(), pinned=True)
        placed.copy_(slot)
        carry(engine, made.at(live.data_ptr()), placed, pace)
        torch.cuda.current_stream().synchronize()
        placed.fill_(0x77)
        assert torch.equal(live.cpu(), expected(made, slot))


@pytest.mark.gpu
def test_a_gpu_without_room_for_buffers_has_its_slots_read_by_kernels_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        assert copy_engine(torch.device("cuda", 0)) is None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "cuda:0 has no memory left for the 64 MiB of its copy engine's buffers" in caplog.text

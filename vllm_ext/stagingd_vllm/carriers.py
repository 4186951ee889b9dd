# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Who carries moves out: the host, where the live weights are in its memory, or the GPU that they are on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from stagingd import pinning
from stagingd.errors import DeviceUnusable
from stagingd_vllm.copy_engine import BUFFER_BYTES, BUFFERS, CopyEngine
from stagingd_vllm.move_reference import run_moves
from stagingd_vllm.moves import Move, refuse_short, table

logger = logging.getLogger(__name__)


class Carrier(Protocol):
    """One set of moves, from either slot."""

    def carry(self, slot: torch.Tensor) -> None:
        """Start carrying all moves out; on a GPU this is work of the current stream.

        Args:
            slot: the slot's bytes: uint8, in this process's memory.
        """


class HostCarrier:
    """Moves within host memory; they are done when ``carry`` returns."""

    def __init__(self, moves: Sequence[Move]) -> None:
        self._moves = moves
        table(moves)  # refuses what contradicts itself

    def carry(self, slot: torch.Tensor) -> None:
        """Carry all moves out."""
        run_moves(self._moves, slot)


class DeviceCarrier:
    """Moves by a kernel that reads the slot where it lies: its memory has to be registered (``registered``)."""

    def __init__(self, moves: Sequence[Move], device: torch.device, *, beside: bool = False) -> None:
        from stagingd_vllm.gpu_moves import PROGRAMS, PROGRAMS_BESIDE, MovesOnGpu

        self._programs = PROGRAMS_BESIDE if beside else PROGRAMS
        self._moves = MovesOnGpu(table(moves), device)
        self._end = max((move.source_end for move in moves), default=0)

    def carry(self, slot: torch.Tensor) -> None:
        """Start the kernels on the current stream. Raises MoveRefused: the slot is too small for the moves."""
        refuse_short(slot.numel(), self._end)
        self._moves.run(slot.data_ptr(), self._programs)


def carrier(moves: Sequence[Move], device: torch.device, *, beside: bool = False) -> Carrier:
    """Who carries moves to a device.

    Args:
        moves: what is carried.
        device: where to.
        beside: whether the device computes meanwhile, and is to be disturbed least.

    Raises:
        DeviceUnusable: live weights on such a device cannot be written.
        MoveRefused: a move contradicts itself.
    """
    if device.type == "cpu":
        return HostCarrier(moves)
    _check_cuda(device)
    return DeviceCarrier(moves, device, beside=beside)


def copy_engine(device: torch.device) -> CopyEngine | None:
    """A device's copy engine, with buffers for what it brings.

    Returns:
        None on a CPU; and, with a line in the log, where the device has no memory left for the buffers: kernels read
        the slot there.
    """
    if device.type == "cpu":
        return None
    _check_cuda(device)
    from stagingd_vllm.cuda_copies import CudaCopies

    try:
        return CopyEngine(CudaCopies(device))
    except torch.OutOfMemoryError:
        logger.warning(
            "%s has no memory left for the %d MiB of its copy engine's buffers: a kernel reads versions instead, which "
            "takes longer, and takes multiprocessors from an engine that generates meanwhile; give the engine less of "
            "its memory (gpu_memory_utilization)",
            device,
            BUFFER_BYTES * BUFFERS // 2**20,
        )
        return None


def registered(slots: Sequence[torch.Tensor], device: torch.device, owner: object) -> Callable[[], None]:
    """Register both slots with a GPU, so that its kernels read them; does nothing on a CPU.

    The registration ends with its owner at the latest, and keeps the slots mapped until then.

    Returns:
        What takes the registration back.

    Raises:
        DeviceUnusable, RegistrationRefused: it cannot be done, and why.
    """
    if device.type == "cpu":
        return lambda: None
    _check_cuda(device)
    from stagingd_vllm.cuda_memory import register, unregister

    spans: list[pinning.Span] = []

    def release() -> None:
        with torch.cuda.device(device):
            while spans:
                unregister(spans.pop().address)

    with torch.cuda.device(device):
        try:
            for slot in slots:
                spans += pinning.register(pinning.Span(slot.data_ptr(), slot.nbytes), register, unregister)
        except pinning.RegistrationRefused:
            release()
            raise
    return pinning.released_with(owner, list(slots), release)


def _check_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise DeviceUnusable(
            f"live weights on {device} cannot be written in place",
            remedy="run the engine on CUDA devices or on the CPU",
        )

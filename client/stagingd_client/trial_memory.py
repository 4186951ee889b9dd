# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Memory to try GPUs with, and whether copies to it and from it arrive, and how fast."""

from __future__ import annotations

import errno
import mmap
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import posix_ipc
import torch

from stagingd.doctor.gpu_report import Copies
from stagingd.segment import SHARED_MEMORY

TRIAL_BYTES: Final = 256 * 2**20
"""What is registered and copied, where there is room for it."""

LEAST_BYTES: Final = 16 * 2**20
"""Smaller copies do not have a link's full speed."""

Copy = Callable[[torch.Tensor, torch.Tensor], float]
"""Copies (to, from): two uint8 tensors of one size. Returns the seconds that it took, once all has arrived."""


@dataclass(frozen=True)
class TrialMemory:
    """One piece of shared memory, mapped twice as a stage is: by trainers for writing, by engines for reading only.

    Attributes:
        written, read: its bytes, uint8, by either mapping.
    """

    written: torch.Tensor
    read: torch.Tensor

    def first(self, size: int) -> TrialMemory:
        """The first so many bytes."""
        return TrialMemory(self.written[:size], self.read[:size])


def shared_memory(most: int = TRIAL_BYTES) -> TrialMemory:
    """POSIX shared memory that has no name any more, so that nothing is left of it, however this process ends.

    Args:
        most: how many bytes; fewer where these would be more than a quarter of what is free in /dev/shm.

    Raises:
        OSError: there is not even room for the least that tells anything.
    """
    shm = os.statvfs(SHARED_MEMORY)
    size = min(most, shm.f_bavail * shm.f_frsize // 4) // mmap.PAGESIZE * mmap.PAGESIZE
    if size < min(most, LEAST_BYTES):
        raise OSError(errno.ENOSPC, f"less than {4 * LEAST_BYTES // 2**20} MiB are free in {SHARED_MEMORY}")
    shared = posix_ipc.SharedMemory(f"/stagingd-trial-{uuid.uuid4().hex}", posix_ipc.O_CREX, mode=0o600)
    try:
        shared.unlink()
        os.posix_fallocate(shared.fd, 0, size)
        return TrialMemory(
            _tensor(mmap.mmap(shared.fd, size)), _tensor(mmap.mmap(shared.fd, size, access=mmap.ACCESS_READ))
        )
    finally:
        os.close(shared.fd)


def _tensor(mapping: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and nobody writes to it
        return torch.frombuffer(mapping, dtype=torch.uint8)


def measure(memory: TrialMemory, device: torch.device, copy: Copy, copies: int) -> Copies:
    """Copy random bytes from a device to the memory and back, and compare them each time.

    No byte is where it shall arrive before it is sent: every copy has bytes of its own, and what they are copied over
    is made of other random bytes, or of their complement.

    Args:
        memory: to which, as trainers write it, and from which, as engines read it.
        device: the GPU.
        copy: one copy.
        copies: how many are told of; one more comes before them, which wakes the link up and is compared too.
    """
    size, to_host, from_host, wrong = memory.written.numel(), [], [], [0, 0]
    for _ in range(copies + 1):
        sent = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        to_host.append(size / copy(memory.written, sent))
        wrong[0] += _different(memory.written, sent.cpu())
        back = ~sent
        from_host.append(size / copy(back, memory.read))
        wrong[1] += _different(back.cpu(), memory.read)
    return Copies(
        bytes=size,
        to_host=tuple(to_host[1:]),
        from_host=tuple(from_host[1:]),
        wrong_to_host=wrong[0],
        wrong_from_host=wrong[1],
    )


def _different(one: torch.Tensor, other: torch.Tensor) -> int:
    return 0 if torch.equal(one, other) else int((one != other).count_nonzero())

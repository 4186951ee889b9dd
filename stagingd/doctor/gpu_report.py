# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the trial of GPUs reports: it runs in a process of its own, with torch, and prints one of these as JSON."""

from __future__ import annotations

from stagingd.doctor.pci import Link
from stagingd.record import Record


class Registration(Record):
    """One registration of shared memory with a GPU.

    Attributes:
        bytes: how much.
        seconds: how long it took; None where it was refused.
        problem: the refusal.
    """

    bytes: int
    seconds: float | None = None
    problem: str | None = None


class Copies(Record):
    """Copies of random bytes from a GPU to registered shared memory, and back.

    Attributes:
        bytes: of one copy.
        to_host, from_host: bytes per second of each copy, without the first.
        wrong_to_host, wrong_from_host: how many bytes did not arrive as they were sent, of all copies together.
    """

    bytes: int
    to_host: tuple[float, ...]
    from_host: tuple[float, ...]
    wrong_to_host: int
    wrong_from_host: int


class GpuTrial(Record):
    """One GPU.

    Attributes:
        index: its number in CUDA.
        name: its model.
        address: on the PCI bus, such as ``0000:17:00.0``.
        written: registration of memory that is mapped for writing, as trainers do.
        read: registration of memory that is mapped for reading, as engines do.
        copies: None where no memory could be registered.
        link_at_work: the link while copies ran; None where the machine does not show the device.
        problem: what ended the trial of this GPU before its time.
        short_of_memory: whether that was because others have its memory.
    """

    index: int
    name: str
    address: str
    written: Registration | None = None
    read: Registration | None = None
    copies: Copies | None = None
    link_at_work: Link | None = None
    problem: str | None = None
    short_of_memory: bool = False


class GpuReport(Record):
    """All GPUs that torch sees.

    Attributes:
        torch: its version.
        torch_cuda: the version of CUDA that torch was built for; None of a build for CPUs.
        driver_cuda: the newest version of CUDA that the driver supports; None where there is no driver.
        problem: why none was tried.
        remedy: what to do about that, where it is known.
        gpus: each of them.
    """

    torch: str
    torch_cuda: str | None
    driver_cuda: str | None
    problem: str | None
    remedy: str | None
    gpus: tuple[GpuTrial, ...]

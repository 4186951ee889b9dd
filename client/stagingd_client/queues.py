# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a flush asks of a device: queues of work that run beside each other, and marks that order them.

On a GPU queues are streams and marks events. Tests have a device of their own, which runs what is queued as late
and in as odd an order as the marks allow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from stagingd_client.copies import Copy
from stagingd_client.strips import QuantizingWork, Work


class SlowerPath(UserWarning):
    """Something still works, at a lower speed; the message says why, and what to do."""


class Mark(Protocol):
    """A point in a queue."""

    @property
    def reached(self) -> bool:
        """Whether everything queued before it is done."""


class Queue(Protocol):
    """Work that a device does in order, while the host goes on."""

    def mark(self) -> Mark:
        """The point after everything queued so far."""

    def after(self, mark: Mark) -> None:
        """What is queued from now on waits for a mark; the host does not."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue work; it is called at once, and what it queues on the device's current queue goes into this one."""

    def copy(self, copy: Copy, slot: int, scratch: int) -> None:
        """Copy from device to host.

        Args:
            copy: which bytes.
            slot, scratch: addresses that the copy's places are counted from.
        """


class Device(Protocol):
    """One accelerator, as a rank uses it."""

    @property
    def casting(self) -> Queue:
        """The queue of kernels."""

    @property
    def copying(self) -> Queue:
        """The queue of copies."""

    def at_work(self) -> AbstractContextManager[None]:
        """While it is open, queueing what the casting queue does costs least."""

    def current(self) -> Queue:
        """The queue that the calling thread's computations go to."""

    def memory(self, size: int) -> torch.Tensor:
        """So many bytes of the device's memory, uint8."""

    def host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory that copies to and from the device do not wait for, of a tensor's shape and dtype."""

    def cast(self, work: Work) -> None:
        """Cast, pack and take moments, on the current queue."""

    def quantize(self, work: QuantizingWork) -> None:
        """Cast, quantize and pack, on the current queue."""

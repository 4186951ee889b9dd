# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The ways into the slots: one for shards in host memory, one for each device that shards are on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from stagingd.catalog import OwnedBox
from stagingd.errors import DeviceUnusable
from stagingd.segment import Segment
from stagingd_client.flush import Flusher
from stagingd_client.gpu_flush import DeviceFlusher
from stagingd_client.holdings import Put
from stagingd_client.landings import Landings
from stagingd_client.queues import Device, Mark, Queue

Opened = tuple[Device, Callable[[], None]]
"""A device, and what to call when it is no longer needed."""


@dataclass(frozen=True)
class Read:
    """When a device has read shards: from then on they may be changed."""

    device: Device
    mark: Mark


class Flushers:
    """All of one rank.

    Args:
        segment: the stage's memory.
        owned: by tensor, the boxes that this rank owns.
        rank: its number.
        open_device: opens a device, and prepares the stage's memory for it.
    """

    def __init__(
        self,
        segment: Segment,
        owned: Mapping[str, Sequence[OwnedBox]],
        rank: int,
        open_device: Callable[[torch.device, Segment], Opened],
    ) -> None:
        self._segment = segment
        self._owned = owned
        self._open_device = open_device
        self._landings = Landings(segment, rank)
        self._host = Flusher(segment, owned, self._landings)
        self._devices: dict[torch.device, tuple[Device, DeviceFlusher, Callable[[], None]]] = {}

    def prepare(self, puts: Sequence[Put]) -> None:
        """Do beforehand what the first version of these shards would else wait for.

        Registering the stage's memory takes a second per 30 GiB, compiling kernels seconds.
        """
        for where, some in _by_device(puts).items():
            if where.type != "cpu":
                device, flusher, _ = self._device(where)
                with device.at_work():
                    flusher.prepare(some)

    def _device(self, where: torch.device) -> tuple[Device, DeviceFlusher, Callable[[], None]]:
        if where not in self._devices:
            opened, release = self._open_device(where, self._segment)
            flusher = DeviceFlusher(self._segment, self._owned, opened, self._landings)
            self._devices[where] = opened, flusher, release
        return self._devices[where]

    def current(self, devices: Iterable[torch.device]) -> Iterator[Queue]:
        """Where the caller's computations on these devices go; the host computes at once."""
        for where in devices:
            if where.type != "cpu":
                yield self._device(where)[0].current()

    def begin(self, slot: int, attempt: int) -> None:
        """A version is flushed from now on, by the attempt of this number."""
        self._landings.begin(slot, attempt)

    def flush(self, slot: int, puts: Sequence[Put], ready: Sequence[Mark]) -> list[Read]:
        """Stage all owned boxes of shards.

        Returns:
            For each device when it will have read them. Those in host memory have been read by then.
        """
        by_device = _by_device(puts)
        self._host.flush(slot, by_device.pop(torch.device("cpu"), ()))
        read = []
        for where, some in by_device.items():
            device, flusher, _ = self._device(where)
            with device.at_work():
                read.append(Read(device, flusher.flush(slot, some, ready)))
        return read

    def quantize(self, slot: int, puts: Sequence[Put]) -> list[Read]:
        """Stage what is quantized of shards, once the moments of all ranks are in the slot; returns as ``flush``."""
        by_device = _by_device(puts)
        self._host.quantize(slot, by_device.pop(torch.device("cpu"), ()))
        read = []
        for where, some in by_device.items():
            device, flusher, _ = self._device(where)
            with device.at_work():
                read.append(Read(device, flusher.quantize(slot, some)))
        return read

    def finish_measuring(self, timeout_s: float) -> None:
        """Wait until the moments of what will be quantized are in the slot. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        for _, flusher, _ in self._devices.values():
            flusher.finish_measuring(deadline)

    def finish(self, timeout_s: float) -> None:
        """Wait until everything is in the slot, moments included. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        for _, flusher, _ in self._devices.values():
            flusher.finish(deadline)

    def abandon(self, timeout_s: float) -> None:
        """Wait until nothing is on its way to the slot any more, whatever it was. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        for _, flusher, _ in self._devices.values():
            flusher.abandon(deadline)

    def close(self) -> None:
        """Let the devices go."""
        for _, _, release in self._devices.values():
            release()
        self._devices.clear()


def _by_device(puts: Iterable[Put]) -> dict[torch.device, list[Put]]:
    found: dict[torch.device, list[Put]] = defaultdict(list)
    for put in puts:
        found[put.shard.device].append(put)
    return found


def open_device(device: torch.device, segment: Segment) -> Opened:
    """Open a CUDA device, and register the stage's memory with it.

    Raises:
        DeviceUnusable: shards cannot be flushed from it, or what that takes is not installed.
    """
    if device.type != "cuda":
        raise DeviceUnusable(
            f"shards on {device} cannot be staged",
            remedy="put tensors in host memory or on a CUDA device",
        )
    try:
        from stagingd_client import cuda_device  # noqa: PLC0415 - CPU trainers have no CUDA bindings
    except ImportError as missing:
        raise DeviceUnusable(
            f"shards on {device} cannot be staged: {missing}",
            remedy="install triton and cuda-bindings, which torch's CUDA builds bring along",
        ) from missing
    return cuda_device.open_device(device, segment)

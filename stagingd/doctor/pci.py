# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""GPUs on the PCI bus, from sysfs: their NUMA nodes, and the links that they are behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from stagingd.machine.files import Files
from stagingd.record import Record

DEVICES: Final = "sys/bus/pci/devices"

USABLE_SHARE: Final = 0.87
"""Of what the encoding leaves, what is left for data beside the packets' headers: 55 of 63 GB/s, as measured."""

_NVIDIA: Final = "0x10de"
_DISPLAY: Final = "0x03"
"""The class of VGA and of 3D controllers."""

_ADDRESS: Final = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.\d")


class Link(Record):
    """A PCIe link.

    Attributes:
        speed: GT/s of one lane; None where the machine does not tell.
        width: its lanes; None likewise.
    """

    speed: float | None
    width: int | None

    @property
    def raw_rate(self) -> float | None:
        """Bytes per second behind the encoding; None where speed or width is not told.

        Transfers per second times lanes are bits. Of them 8b/10b leaves 8 in 10 up to 5 GT/s, 128b/130b 128 in 130 up
        to 32 GT/s, and beyond that flits of 256 bytes carry 242 (PCI Express Base Specification 6.0).
        """
        if self.speed is None or self.width is None:
            return None
        share = 8 / 10 if self.speed <= 5 else 128 / 130 if self.speed <= 32 else 242 / 256
        return self.speed * 1e9 * self.width / 8 * share

    def __str__(self) -> str:
        return f"{self.speed or '?'} GT/s x{self.width or '?'}"


class PciGpu(Record):
    """A GPU.

    Attributes:
        address: such as ``0000:17:00.0``.
        node: the NUMA node that it is at; None where the firmware does not say.
        link: its link as it runs now. An idle GPU lowers the speed.
        device_best: what the GPU can do.
        best: what its link can do: the lesser of both ends.
        usable: bytes per second of data that the links between it and the host carry at their best; None where that is
            not told.
    """

    address: str
    node: int | None
    link: Link
    device_best: Link
    best: Link
    usable: float | None


def read_gpus(files: Files) -> list[PciGpu]:
    """All NVIDIA GPUs that this machine shows, in the order of their addresses."""
    return [_read_gpu(files, name) for name in files.names(DEVICES) if _is_gpu(files, f"{DEVICES}/{name}")]


def _is_gpu(files: Files, folder: str) -> bool:
    return files.text(f"{folder}/vendor") == _NVIDIA and (files.text(f"{folder}/class") or "").startswith(_DISPLAY)


def _read_gpu(files: Files, address: str) -> PciGpu:
    node = files.number(f"{DEVICES}/{address}/numa_node")
    device, *above = _devices(files, address)
    best = [_link(files, path, "max") for path in (device, *above)]
    both_ends = _lesser(best[0], best[1]) if above else best[0]
    rates = [rate for link in (both_ends, *best[1:]) if (rate := link.raw_rate) is not None]
    return PciGpu(
        address=address,
        node=node if node is not None and node >= 0 else None,
        link=_link(files, device, "current"),
        device_best=best[0],
        best=both_ends,
        usable=min(rates) * USABLE_SHARE if rates and both_ends.raw_rate else None,
    )


def read_link(files: Files, address: str) -> Link:
    """A device's link, as it runs now."""
    return _link(files, _devices(files, address)[0], "current")


def _devices(files: Files, address: str) -> list[Path]:
    """The folders of a device, and of the ports between it and the host: they lie in each other."""
    root = files.root.resolve()
    folder = (root / DEVICES / address).resolve().relative_to(root)
    return [folder, *(path for path in folder.parents if _ADDRESS.fullmatch(path.name))]


def _link(files: Files, folder: Path, when: str) -> Link:
    # ``32.0 GT/s PCIe``; older kernels say ``8 GT/s``, and virtual machines ``Unknown``.
    speed = re.match(r"([\d.]+) GT/s", files.text(f"{folder}/{when}_link_speed") or "")
    lanes = files.number(f"{folder}/{when}_link_width")
    # 0 and 255 lanes mean that there is no link to tell of.
    return Link(speed=float(speed[1]) if speed else None, width=lanes if lanes and lanes <= 32 else None)


def _lesser(device: Link, port: Link) -> Link:
    speeds = [link.speed for link in (device, port) if link.speed is not None]
    widths = [link.width for link in (device, port) if link.width is not None]
    return Link(speed=min(speeds, default=None), width=min(widths, default=None))

# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Writing a version into live weights, in place, quantized as the engine would have done it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

import torch

from stagingd.catalog import Catalog
from stagingd.errors import StagingError
from stagingd_vllm.carriers import copy_engine, registered
from stagingd_vllm.computed import Loading, OwnLoader
from stagingd_vllm.layouts import Home, LayoutUnknown, homes
from stagingd_vllm.leased import LeasedVersion
from stagingd_vllm.plan import ReadPlan, Region
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.shadow import Shadow
from stagingd_vllm.writer import Writer


class LayoutChanged(StagingError):
    """A live parameter is no longer where, or what, it was when the plan was made."""

    code = "layout_changed"


class Source(Protocol):
    """What is known of a stage before any version is leased: its catalog, and the bytes of both slots (uint8)."""

    @property
    def catalog(self) -> Catalog: ...

    @property
    def slots(self) -> Sequence[torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must not change about a live tensor: shape and stride in elements, dtype, address in bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Fingerprint:
        """The fingerprint of a tensor as it is now."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.data_ptr())

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is this tensor's."""
        return (
            tensor.data_ptr() == self.address
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.dtype is self.dtype
        )

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} with strides {self.stride} at {self.address:#x}"


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One version applied: bytes read of the stage in so many entries, and the seconds that it took."""

    version: int
    entries: int
    bytes_read: int
    seconds_read: float


class Receiver:
    """Keeps the live weights of one worker up to date with a stage.

    Args:
        model: the live model.
        plan: which box goes where, as the model's loader sees it.
        source: the stage.
        rule: how scales follow from moments.
        refresh: makes anew what the model derives from its weights, after they have been written.
        loading: how the engine loads, for tensors that only the model's own loader can take.

    Raises:
        LayoutUnknown: the model keeps a parameter in a way that is not known.
        LayoutChanged: the model lacks a parameter of the plan.
        PlanRefused, OutOfOrder: the plan asks for what cannot be done with it, or for moments that are not kept.
        DeviceUnusable, RegistrationRefused: the device cannot read the stage's memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: ReadPlan,
        source: Source,
        rule: ScaleRule | None = None,
        refresh: Callable[[], None] = lambda: None,
        loading: Loading | None = None,
    ) -> None:
        self.plan = plan
        self._refresh = refresh
        self._version: int | None = None
        found = homes(model)
        written = (*plan.parameters, *plan.computed_parameters)
        missing = next((name for name in written if name not in found), None)
        if missing is not None:
            raise _changed(missing, "is not in the live model")
        live = {name: found[name] for name in written}
        for entry in plan.entries:
            _check_room(entry.region, live[entry.region.parameter])
        self._live = live
        self._places = [
            (f"{name}'s scale" if number else name, module, attribute, Fingerprint.of(attrgetter(attribute)(module)))
            for name, home in live.items()
            for number, (module, attribute) in enumerate(home.places)
        ]
        self.device = _device_of(live)
        self._own_loader = OwnLoader(plan, found, loading, source.catalog)
        self.copies = copy_engine(self.device)
        self._writer = Writer(plan, live, source.catalog, rule or ScaleRule(), self.device, through=self.copies)
        self._bytes = plan.bytes_per_update
        self._unregister: Callable[[], None] = registered(source.slots, self.device, self)

    @property
    def version(self) -> int | None:
        """The version that the live weights hold; None before the first, and after one that failed half-way."""
        return self._version

    def apply(self, lease: LeasedVersion) -> UpdateReport:
        """Writes a version into the live weights and releases the lease; returns when all of it is there.

        Nobody may compute with the weights meanwhile.

        Raises:
            LayoutChanged: a live parameter changed; found before anything is written.
            LoaderFailed: the model's own loader did not take what only it can take.
            StagingError: what the lease raises, when it was lost. The weights may then be a mixture of two versions
                until another one is applied, and ``version`` is None.
        """
        started = time.perf_counter()
        with lease:
            self.check()
            self._version = None
            try:
                self._writer.write(lease)
                self._own_loader.load(lease.slot)
                self._refresh()
            finally:
                # Whatever failed: a slot is not given back while the device still reads it.
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
        # Only now: a lease that was lost says so when it is released.
        self._version = lease.version
        seconds = time.perf_counter() - started
        return UpdateReport(lease.version, len(self.plan.entries), self._bytes, seconds)

    def take(self, shadow: Shadow, version: int) -> None:
        """Copies a version over the live weights; on a GPU this is work of the current stream when it returns.

        ``check`` has to have passed on all workers of the engine.

        Args:
            shadow: it holds the version, whole.
            version: which one.
        """
        self._version = None
        shadow.copy_to_live()
        self._refresh()
        self._version = version

    def close(self) -> None:
        """Let the stage's memory go. May be called twice."""
        self._own_loader.close()
        release, self._unregister = self._unregister, lambda: None
        release()

    @property
    def homes(self) -> Mapping[str, Home]:
        """Where every parameter that is written lives, by its name."""
        return self._live

    def check(self) -> None:
        """Raises LayoutChanged: a live parameter, or its scale, is not where it was, or not what it was."""
        for name, module, attribute, expected in self._places:
            live = _attribute(module, attribute)
            if not isinstance(live, torch.Tensor) or not expected.is_of(live):
                found = Fingerprint.of(live) if isinstance(live, torch.Tensor) else "gone"
                raise _changed(name, f"was {expected} and is {found}")


def _attribute(owner: object, path: str) -> object:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _device_of(live: Mapping[str, Home]) -> torch.device:
    devices = {home.weight.device: name for name, home in live.items()}
    if len(devices) > 1:
        (one, first), (other, second), *_ = devices.items()
        raise LayoutUnknown(
            f"live parameter {first} is on {one}, and {second} on {other}",
            remedy="start the engine without offloading: all weights have to be on one device",
            parameter=second,
        )
    return next(iter(devices), torch.device("cpu"))


def _check_room(region: Region, home: Home) -> None:
    last = region.offset + sum((n - 1) * s for n, s in zip(region.shape, region.stride, strict=True))
    if not 0 <= last < home.weight.numel():
        raise _changed(region.parameter, f"is {Fingerprint.of(home.weight)} and has no {region}")


def _changed(name: str, how: str) -> LayoutChanged:
    return LayoutChanged(
        f"live parameter {name} {how}",
        remedy="something replaced the engine's weights; detach from the stage and attach again",
        parameter=name,
    )

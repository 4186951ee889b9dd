# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Writing a version into live weights, in place, by a read plan."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch

from stagingd.boxes import Box
from stagingd.errors import StagingError, WrongShape
from stagingd_vllm.plan import PlanEntry, ReadPlan, Region


class LayoutChanged(StagingError):
    """A live parameter is no longer where, or what, it was when the plan was made."""

    code = "layout_changed"


class LeasedVersion(Protocol):
    """A version that cannot change while it is read. Leaving its context releases it, and fails when it was lost."""

    version: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
    ) -> None: ...

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The elements of a box of a tensor, as a strided CPU view of shape ``box.lengths``."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must not change about a live parameter: shape and stride in elements, dtype, address in bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Fingerprint:
        """The fingerprint of a tensor as it is now."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.data_ptr())

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
        model: the live model, in the layout that the plan was made for.
        plan: which box goes where.

    Raises:
        LayoutChanged: the model lacks a parameter of the plan, or it is too small for its regions.
    """

    def __init__(self, model: torch.nn.Module, plan: ReadPlan) -> None:
        self.plan = plan
        self._model = model
        self._version: int | None = None
        self._fingerprints = {name: Fingerprint.of(parameter) for name, parameter in _parameters(model).items()}
        for entry in plan.entries:
            self._check_region(entry.region)

    @property
    def version(self) -> int | None:
        """The version that the live weights hold; None before the first, and after one that failed half-way."""
        return self._version

    def apply(self, lease: LeasedVersion) -> UpdateReport:
        """Copies a version into the live weights and releases the lease; returns when all of it is there.

        Nobody may compute with the weights meanwhile.

        Raises:
            LayoutChanged: a live parameter changed; found before anything is written.
            WrongShape: the lease gave something else than the box that was asked for.
            StagingError: what the lease raises, when it was lost. After this and WrongShape the weights may be a
                mixture of two versions until another one is applied, and ``version`` is None.
        """
        started = time.perf_counter()
        with lease:
            live = self._checked_parameters()
            self._version = None
            bytes_read = sum(
                _copy(lease.read(entry.tensor, entry.source), live[entry.region.parameter], entry)
                for entry in self.plan.entries
            )
        # Only now: a lease that was lost says so when it is released.
        self._version = lease.version
        seconds = time.perf_counter() - started
        return UpdateReport(lease.version, len(self.plan.entries), bytes_read, seconds)

    def _checked_parameters(self) -> dict[str, torch.Tensor]:
        live = _parameters(self._model)
        for name, expected in self._fingerprints.items():
            found = Fingerprint.of(live[name]) if name in live else None
            if found != expected:
                raise _changed(name, f"was {expected} and is {found or 'gone'}")
        return live

    def _check_region(self, region: Region) -> None:
        fingerprint = self._fingerprints.get(region.parameter)
        if fingerprint is None:
            raise _changed(region.parameter, "is not in the live model")
        last = region.offset + sum((n - 1) * s for n, s in zip(region.shape, region.stride, strict=True))
        end = sum((n - 1) * s for n, s in zip(fingerprint.shape, fingerprint.stride, strict=True))
        if not 0 <= last <= end:
            raise _changed(region.parameter, f"is {fingerprint} and has no {region}")


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _copy(source: torch.Tensor, parameter: torch.Tensor, entry: PlanEntry) -> int:
    """Copies one read into place. Returns the bytes that were read."""
    region = entry.region
    # copy_ would repeat a smaller source, and would convert any dtype: both are checked.
    if source.shape != region.shape or source.dtype != getattr(torch, entry.dtype):
        raise WrongShape(
            f"asked for {entry.source} of {entry.tensor} ({entry.dtype}) and got {source.dtype} {tuple(source.shape)}",
            remedy="detach from the stage and attach again",
            tensor=entry.tensor,
            box=entry.source,
        )
    live = torch.as_strided(parameter, region.shape, region.stride, parameter.storage_offset() + region.offset)
    live.copy_(source)
    return source.nbytes


def _changed(name: str, how: str) -> LayoutChanged:
    return LayoutChanged(
        f"live parameter {name} {how}",
        remedy="something replaced the engine's weights; detach from the stage and attach again",
        parameter=name,
    )

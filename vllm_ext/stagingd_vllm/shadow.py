# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Memory beside the live weights for one more version: it is written while the engine computes, then copied over.

What costs the engine time is the copy alone, inside the device. It runs on the engine's own stream, between two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from stagingd.catalog import Catalog
from stagingd.errors import StagingError
from stagingd_vllm.copy_engine import Paced
from stagingd_vllm.layouts import Home
from stagingd_vllm.leased import LeasedVersion
from stagingd_vllm.plan import ReadPlan
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.writer import Writer

GIB = 2**30
LINK = 50e9
"""Bytes per second that a GPU reads of host memory, about: to tell how long an update in place takes."""


class NoRoomForShadow(StagingError):
    """There is no shadow for these weights; updates are in place."""

    code = "no_room_for_shadow"


class Shadow:
    """A shadow of a worker's live weights and scales.

    It begins as a copy of them, so that what no read fills, such as padding, stays what it is.

    Args:
        plan: what is read, and to which region of which parameter, as the loader sees it.
        homes: where the parameters live.
        catalog: the stage's.
        rule: how scales follow from moments.
        device: where they live.
        budget: bytes that it may take on the device.
        through: what brings the bytes to the device; a kernel reads them from the slot without it.

    Raises:
        NoRoomForShadow: it would take more, or the device has not so much left; or the model's own loader has to fill
            some parameters, which it can do in place only. Says what updates in place cost.
        PlanRefused, OutOfOrder: as ``make_recipe`` says.
    """

    def __init__(
        self,
        plan: ReadPlan,
        homes: Mapping[str, Home],
        catalog: Catalog,
        rule: ScaleRule,
        device: torch.device,
        budget: float,
        through: Paced | None = None,
    ) -> None:
        homes = {name: homes[name] for name in plan.parameters}
        self.bytes = sum(tensor.nbytes for home in homes.values() for tensor in _tensors(home))
        in_place = f"in place, where generation stops for {plan.bytes_per_update / LINK * 1e3:.0f} ms or more each time"
        if plan.computed:
            raise _no_room(f"tensor {plan.computed[0].tensor} goes through the model's own loader", in_place)
        if self.bytes > budget:
            raise _no_room(f"it takes {self.bytes / GIB:.2f} GiB, and {budget / GIB:.2f} GiB are allowed", in_place)
        try:
            shadows = {name: _shadow_of(home) for name, home in homes.items()}
        except torch.OutOfMemoryError as error:
            raise _no_room(f"it takes {self.bytes / GIB:.2f} GiB, and {device} has less left", in_place) from error
        self._device = device
        self._copies = _copies(
            (live, shadow)
            for name, home in homes.items()
            for live, shadow in zip(_tensors(home), _tensors(shadows[name]), strict=True)
        )
        self._writer = Writer(
            plan, shadows, catalog, rule, device, beside=True, through=None if through is None else through.copies
        )
        self._through = through
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None

    def write(self, lease: LeasedVersion) -> None:
        """Write a version into the shadow, on a stream of its own; returns when all of it is there.

        For a thread beside the one that computes. While it runs, ``copy_to_live`` must not be called.

        Raises:
            LeaseLost: it was leased early, and aborted. What is in the shadow is of no version then.
        """
        if self._stream is None:
            return self._writer.write(lease)
        with ExitStack() as context:
            context.enter_context(torch.cuda.device(self._device))
            context.enter_context(torch.cuda.stream(self._stream))
            # Whatever failed: a slot is not given back while the device still reads it.
            context.callback(self._stream.synchronize)
            if self._copied is not None:
                self._stream.wait_event(self._copied)
            if self._through is not None:
                context.enter_context(self._through.at_work())
            return self._writer.write(lease)

    def close(self) -> None:
        """No more versions are written into it. May be called twice."""
        if self._through is not None:
            self._through.close()

    def copy_to_live(self) -> None:
        """Copy the shadow over the live weights; on a GPU this is work of the current stream, in few launches."""
        for live, shadow in self._copies:
            torch._foreach_copy_(live, shadow)
        if self._stream is not None:
            self._copied = torch.cuda.current_stream(self._device).record_event()


def _no_room(why: str, in_place: str) -> NoRoomForShadow:
    return NoRoomForShadow(f"no shadow: {why}. Versions are read {in_place}", remedy="allow more for prefetching")


def _tensors(home: Home) -> Sequence[torch.Tensor]:
    return (home.weight,) if home.scale is None else (home.weight, home.scale)


def _shadow_of(home: Home) -> Home:
    scale = None if home.scale is None else _copy_of(home.scale)
    return replace(home, weight=_copy_of(home.weight), scale=scale)


def _copy_of(live: torch.Tensor) -> torch.Tensor:
    strides = live.stride() if _is_dense(live) else torch.empty(live.shape, device="meta").stride()
    return torch.empty_strided(live.shape, strides, dtype=live.dtype, device=live.device).copy_(live)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements are all of its memory, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _copies(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Pairs of live and shadow tensors, gathered so that each lot is copied by one call."""
    lots: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for live, shadow in pairs:
        to, of = (_as_words(live), _as_words(shadow)) if _is_dense(live) else (live, shadow)
        targets, sources = lots.setdefault(to.dtype, ([], []))
        targets.append(to)
        sources.append(of)
    return list(lots.values())


def _as_words(dense: torch.Tensor) -> torch.Tensor:
    """Its memory in order, 8 bytes at a time if possible: of one dtype, tensors are copied together."""
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    whole = flat.numel() % 8 == 0 and flat.data_ptr() % 8 == 0
    return flat.view(torch.int64) if whole else flat
